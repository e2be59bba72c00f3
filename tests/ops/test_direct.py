# SPDX-License-Identifier: Apache-2.0
"""Calls past the dispatcher: eager calls take them, with the results of the operators; whatever could see an operator
sees it."""

import os
import subprocess
import sys

import pytest
import stoptome_kernels as stk
import torch
import torch.utils.checkpoint
from stoptome_kernels.ops import direct
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from support import ROOT
from support.helpers import dtypes_of

NAMES = ("match", "merge", "unmerge", "merge_norm", "attention")


def calls(backend, device, dtype=torch.float32, grad=False) -> dict:
    """Every op as a function without arguments, and the tensors that it may differentiate."""

    def made(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=dtype, device=device).requires_grad_(grad)

    keys = torch.randn(2, 2, 14, 8, dtype=dtype, device=device)
    keys[1, :, 2] = torch.nan  # merged with weight 0
    size = torch.rand(2, 14, device=device) + 1
    plan = stk.match(keys, 6, 1, backend)
    x, residual, merged = made(2, 14, 12), made(2, 14, 12), made(2, 8, 12)
    weight, bias = made(12, dtype=torch.float32), made(12, dtype=torch.float32)
    q, k, v = (made(2, 2, 14, 8) for _ in range(3))
    ahead_k, ahead_v = (made(1, 2, 3, 8) for _ in range(2))
    return {
        "match": (lambda: stk.match(keys, 6, 1, backend), []),
        "merge": (lambda: stk.merge(x, plan, size, backend=backend)[0], [x]),
        "merge, sum": (lambda: stk.merge(x, plan, None, "sum", backend)[0], [x]),
        "merge, max": (lambda: stk.merge(x, plan, size, "max", backend)[0], [x]),
        "unmerge": (lambda: stk.unmerge(merged, plan, backend), [merged]),
        "merge_norm": (
            lambda: stk.merge_norm(x, residual, plan, size, weight, bias, backend=backend)[:2],
            [x, residual, weight, bias],
        ),
        "merge_norm, plain": (
            lambda: stk.merge_norm(x, residual, plan, backend=backend)[:2], [x, residual],
        ),
        "attention": (
            lambda: stk.attention(q, k, v, size, ahead_k, ahead_v, backend=backend), [q, k, v, ahead_k, ahead_v],
        ),
    }  # fmt: skip


def outputs(found) -> tuple:
    if isinstance(found, stk.MergePlan):
        return found.dest, found.members, found.offsets
    return found if isinstance(found, tuple) else (found,)


def with_gradients(call, leaves) -> list:
    out = outputs(call())
    return [*out, *torch.autograd.grad(out, leaves, [torch.ones_like(y) for y in out])] if leaves else list(out)


class Operators(TorchDispatchMode):
    """Names of this package's operators, as they come."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stoptome":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_operators(monkeypatch):
    """Operators that can't be called."""

    def refuse(*_):
        raise AssertionError("an operator was called")

    for name in (*NAMES, "merge_backward", "unmerge_backward", "merge_norm_backward", "attention_backward"):
        monkeypatch.setattr(torch.ops.stoptome, name, refuse)


@pytest.mark.parametrize("grad", [False, True])
def test_eager_calls_are_direct(backend, device, no_operators, grad):
    for call, leaves in calls(backend, device, grad=grad).values():
        with_gradients(call, leaves if grad else [])
        with torch.no_grad():
            call()
        with torch.inference_mode():
            call()


@pytest.mark.parametrize("grad", [False, True])
def test_results_are_those_of_the_operators(backend, device, monkeypatch, grad):
    """Bit for bit, gradients too."""
    for dtype in dtypes_of(backend):
        found = calls(backend, device, dtype, grad)
        ours = {name: with_gradients(call, leaves if grad else []) for name, (call, leaves) in found.items()}
        with monkeypatch.context() as patched:
            patched.setattr(direct, "is_unseen", lambda: False)
            for name, (call, leaves) in found.items():
                theirs = with_gradients(call, leaves if grad else [])
                results = len(outputs(call()))
                for index, (got, want) in enumerate(zip(ours[name], theirs, strict=True)):
                    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=f"{name}, {dtype}")
                    assert index >= results or got.stride() == want.stride(), name  # gradients may have any
                    assert got.requires_grad == want.requires_grad, name


def test_second_derivatives_are_those_of_the_operators(backend, device, monkeypatch):
    def twice(call, leaf):
        (once,) = torch.autograd.grad(call().square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(once.square().sum(), leaf)

    for name, (call, leaves) in calls(backend, device, grad=True).items():
        if name.startswith(("merge,", "unmerge")) or name == "merge":
            (ours,) = twice(call, leaves[0])
            with monkeypatch.context() as patched:
                patched.setattr(direct, "is_unseen", lambda: False)
                (theirs,) = twice(call, leaves[0])
            assert torch.equal(ours, theirs), name
    for name in ("merge_norm", "attention"):
        call, leaves = calls(backend, device, grad=True)[name]
        out = outputs(call())[-1]
        if name == "attention" and backend != "triton":
            continue  # torch's own function or the reference
        (once,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{name} has no second derivative"):
            torch.autograd.grad(once.sum(), leaves[0])


@pytest.mark.parametrize("grad", [False, True])
def test_a_dispatch_mode_sees_every_operator(backend, device, grad):
    for name, (call, leaves) in calls(backend, device, grad=grad).items():
        op = name.split(",")[0]
        with Operators() as mode:
            with_gradients(call, leaves if grad else [])
        if op == "attention" and backend != "triton":
            continue  # may be torch's own function
        assert mode.seen == ([op, f"{op}_backward"] if grad and leaves else [op])


def test_a_function_mode_sees_every_operator(backend, device):
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    for name, (call, _) in calls(backend, device).items():
        seen: list[str] = []
        with Functions():
            call()
        if not name.startswith("attention"):
            assert any(name.split(",")[0] == one.split(".")[0] for one in seen), name


def test_a_profiler_sees_every_operator(backend, device):
    found = calls(backend, device, grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        for call, leaves in found.values():
            with_gradients(call, leaves)
    names = {event.name for event in profiled.events()}
    for name in ("match", "merge", "merge_backward", "unmerge", "unmerge_backward", "merge_norm",
                 "merge_norm_backward"):  # fmt: skip
        assert f"stoptome::{name}" in names


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is:DeprecationWarning")
def test_traces_hold_the_operators(backend, device):
    x = torch.randn(2, 14, 12, device=device)
    plan = stk.match(x, 4, 1, backend)

    def merged(x):
        return stk.merge(x, plan, backend=backend)[0]

    assert "stoptome.merge" in make_fx(merged)(x).code
    assert "stoptome::merge" in str(torch.jit.trace(merged, x, check_trace=False).graph)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(merged, backend=keep, fullgraph=True)(x)
    assert "stoptome.merge" in graphs[0].code


class Marked(torch.Tensor):
    """A subclass that gives its own kind."""


@pytest.mark.parametrize("name", ["merge", "unmerge"])
def test_subclasses_stay_what_they_are(backend, device, name):
    x = torch.randn(2, 14, 12, device=device)
    plan = stk.match(x, 4, 1, backend)
    given = x if name == "merge" else x[:, :10]

    def run(value):
        out = stk.merge(value, plan, backend=backend)[0] if name == "merge" else stk.unmerge(value, plan, backend)
        return out

    assert type(run(given.as_subclass(Marked))) is Marked
    assert type(run(torch.nn.Parameter(given, requires_grad=False))) is torch.Tensor
    assert torch.equal(run(given.as_subclass(Marked)).as_subclass(torch.Tensor), run(given))


def test_views_with_the_negative_bit(backend, device):
    """Their memory holds the numbers of the other sign, which no kernel knows; indices and sizes may be such views."""

    def negated(t):
        return torch._neg_view(-t)

    x = torch.randn(2, 14, 12, device=device)
    keys, size = torch.randn(2, 2, 14, 8, device=device), torch.rand(2, 14, device=device) + 1
    plan = stk.match(keys, 4, 1, backend)
    assert torch.equal(stk.match(negated(keys), 4, 1, backend).members, plan.members)
    want = stk.merge(x, plan, size, backend=backend)
    other = stk.MergePlan(negated(plan.dest), negated(plan.members), negated(plan.offsets), 1)
    for changed in ((negated(x), plan, size), (x, other, size), (x, plan, negated(size))):
        for got, right in zip(stk.merge(*changed, backend=backend), want, strict=True):
            assert torch.equal(got, right)
    weight, bias = torch.randn(2, 12, device=device)
    want = stk.merge_norm(x, x, plan, size, weight, bias, backend=backend)
    for given in ((negated(x), weight, bias), (x, negated(weight), bias), (x, weight, negated(bias))):
        got = stk.merge_norm(x, given[0], plan, size, *given[1:], backend=backend)
        assert all(map(torch.equal, got, want))
    q, k, v = torch.randn(3, 2, 2, 14, 8, device=device)
    ahead = torch.randn(2, 2, 2, 3, 8, device=device)
    want = stk.attention(q, k, v, size, *ahead, backend=backend)
    given = [q, k, v, size, *ahead]
    for index, value in enumerate(given):
        arguments = [*given[:index], negated(value), *given[index + 1 :]]
        torch.testing.assert_close(stk.attention(*arguments, backend=backend), want)
    leaf = x.clone().requires_grad_()
    y = stk.merge(leaf, plan, size, backend=backend)[0]
    grad = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, leaf, grad, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, leaf, negated(grad))[0], want)


def test_a_tensor_of_zeros_without_memory(backend, device):
    """Autograd has such tensors, whose address is 0."""
    if device != "cpu":
        pytest.skip("torch makes them on a CPU")
    x = torch.randn(2, 14, 12)
    plan = stk.match(x, 4, 1, backend)
    none = torch._efficientzerotensor(x.shape)
    assert torch.equal(stk.merge(none, plan, backend=backend)[0], torch.zeros(2, 10, 12))


def test_nothing_is_noted_below_autograd(backend, device):
    """Inside of somebody's operator the dispatcher has left autograd behind, though the tensors want gradients."""
    leaf = torch.randn(2, 14, 12, device=device, requires_grad=True)
    plan = stk.match(leaf, 4, 1, backend)
    with torch._C._AutoDispatchBelowAutograd():
        for out in (
            stk.merge(leaf, plan, backend=backend)[0],
            stk.unmerge(leaf[:, :10], plan, backend),
            *stk.merge_norm(leaf, leaf, plan, backend=backend),
        ):
            assert not out.requires_grad
    assert stk.merge(leaf, plan, backend=backend)[0].requires_grad


def test_saved_tensors_are_guarded(backend, device):
    """A tensor that the gradient needs may not be changed before it; hooks on saved tensors run."""
    x = torch.randn(2, 14, 12, device=device, requires_grad=True)
    plan = stk.match(x, 4, 1, backend)
    y = stk.merge(x, plan, None, "max", backend)[0]
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    _, normed, _ = stk.merge_norm(x, x, plan, backend=backend)
    plan.members.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        stk.merge(x, plan, backend=backend)[0].sum().backward()
    assert any(t.dtype == torch.int32 for t in packed)


def wrong_from_hooks(t):
    """A saved tensor in another dtype, as hooks that save memory may give it back."""
    return t.bfloat16() if t.dtype == torch.float32 else t.short() if t.dtype == torch.int32 else t


@pytest.mark.parametrize("name", ["merge", "merge, max", "unmerge", "merge_norm", "attention"])
@pytest.mark.parametrize("changes", [lambda t: t, wrong_from_hooks], ids=["none", "dtypes"])
def test_saved_tensors_that_come_back_otherwise(backend, device, name, changes):
    """Kernels get addresses: what does not fit is told by the operator, and nothing is read as what it is not."""
    if name == "attention" and backend == "reference":
        pytest.skip("attention's reference is differentiated operation by operation")
    call, leaves = calls(backend, device, grad=True)[name]
    want = with_gradients(call, leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, changes):
        out = outputs(call())
    grads = [torch.ones_like(y) for y in out]
    if changes is wrong_from_hooks:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            torch.autograd.grad(out, leaves, grads)
    else:
        assert all(map(torch.equal, torch.autograd.grad(out, leaves, grads), want[len(out) :]))


def test_new_data_behind_a_saved_tensor(backend, device):
    """``.data =`` is not seen by autograd."""
    x = torch.randn(2, 14, 12, device=device, requires_grad=True)
    weight = torch.rand(12, device=device, requires_grad=True)
    plan, other = stk.match(x, 4, 1, backend), stk.match(torch.randn(5, 30, 4, device=device), 4, 1, backend)
    size = torch.rand(2, 14, device=device) + 1
    (want,) = torch.autograd.grad(stk.merge(x, plan, size, backend=backend)[0].sum(), x)
    y, _ = stk.merge(x, plan, size, backend=backend)
    size.data = torch.ones(1, 1, device=device)  # the call's own alias is as it was
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
    _, normed, _ = stk.merge_norm(x, x, plan, None, weight, backend=backend)
    weight.data = torch.empty(0, device=device)
    with pytest.raises((ValueError, RuntimeError)):
        torch.autograd.grad(normed.sum(), x)
    ys = stk.merge(x, plan, backend=backend)[0], stk.unmerge(x[:, :10], plan, backend)
    plan.members.data, plan.offsets.data = other.members, other.offsets
    for y in ys:
        with pytest.raises((ValueError, RuntimeError)):
            torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("prefixed", [False, True])
def test_attention_may_be_changed_in_place(backend, device, prefixed):
    """As torch's own can."""
    q, k, v = torch.randn(3, 2, 2, 9, 8, device=device, requires_grad=True).unbind()
    ahead = torch.randn(2, 2, 2, 3, 8, device=device) if prefixed else (None, None)
    out = stk.attention(q, k, v, torch.rand(2, 9, device=device) + 1, *ahead, backend=backend)
    out.mul_(2).transpose(1, 2).flatten(2).add_(1)


def test_a_checkpoint_may_be_recomputed_outside_of_a_mode(backend, device):
    q = torch.randn(2, 2, 9, 8, device=device, requires_grad=True)
    size = torch.rand(2, 9, device=device) + 1

    def block(q):
        return stk.attention(q, q, q, size, backend=backend) * 1

    with Operators():
        out = torch.utils.checkpoint.checkpoint(block, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(block(q).sum(), q)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_is_recomputed_bit_for_bit(backend, device, reentrant):
    """A reentrant checkpoint's first pass is without gradients, where a CPU has a faster kernel than with them."""
    q = torch.randn(2, 2, 40, 24, device=device, requires_grad=True)
    size = torch.rand(2, 40, device=device) + 1

    def block(q):
        return stk.attention(q, q, q, size, backend=backend) * 1

    out = torch.utils.checkpoint.checkpoint(block, q, use_reentrant=reentrant)
    want = block(q)
    assert torch.equal(out, want)
    out.square().sum().backward()
    assert torch.equal(q.grad, torch.autograd.grad(want.square().sum(), q)[0])
    with torch.no_grad():
        torch.testing.assert_close(block(q), want)


def test_a_profiler_compiles_nothing_anew(backend, device):
    x = torch.randn(2, 14, 12, device=device)
    plan, graphs = stk.match(x, 4, 1, backend), []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: stk.merge(x, plan, backend=backend)[0], backend=keep)
    compiled(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        compiled(x)
    assert len(graphs) == 1


def test_outputs_of_inference_mode_are_its_own(backend, device):
    x = torch.randn(2, 14, 12, device=device)
    with torch.inference_mode():
        plan = stk.match(x, 4, 1, backend)
        y, size = stk.merge(x, plan, backend=backend)
        assert all(t.is_inference() for t in (plan.dest, plan.members, y, size))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        stk.merge(x.requires_grad_(), plan, backend=backend)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is:DeprecationWarning")
def test_what_is_plain(device):
    """Of this version of torch: were these keys others, every call would be slow and none wrong."""
    assert direct.is_unseen()
    assert direct.device_of(torch.ones(2, device=device)) == device
    assert direct.device_of(torch.nn.Parameter(torch.ones(2, device=device))) == device
    with torch.inference_mode():
        assert direct.is_unseen()
        assert direct.device_of(torch.ones(2, device=device)) == device
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        assert direct.is_unseen()
    for other in (
        torch.ones(2, device="meta"),
        torch._neg_view(torch.ones(2, device=device)),
        torch.ones(2, device=device).to_sparse(),
        torch.ones(2, device=device).as_subclass(Marked),
        torch._to_functional_tensor(torch.ones(2, device=device)),
        [1.0],
        None,
    ):
        assert direct.device_of(other) is None
    with torch.autograd.forward_ad.dual_level():
        assert not direct.is_unseen()
    with torch.profiler.profile():
        assert not direct.is_unseen()
    with torch.device(device):
        assert not direct.is_unseen()
    with Operators():
        assert not direct.is_unseen()

    def inside(x):
        seen.append(direct.is_unseen())
        return x

    seen: list[bool] = []
    torch.vmap(inside)(torch.ones(2, device=device))
    torch.func.grad(inside)(torch.ones((), device=device))
    torch.func.functionalize(inside)(torch.ones(2, device=device))
    torch.jit.trace(inside, torch.ones(2, device=device), check_trace=False)
    assert not any(seen)
    assert len(seen) >= 4


@pytest.mark.slow  # a process that imports torch
@pytest.mark.parametrize("lacks", ["_C._dispatch_keys", "autograd.profiler._is_profiler_enabled", None])
def test_a_torch_that_is_not_known_takes_the_operators(lacks):
    """The direct way asks torch for things that are not public; and a user may turn it off."""
    code = f"""if True:
        import torch
        {f"del torch.{lacks}" if lacks else ""}
        import stoptome_kernels as stk
        from stoptome_kernels.ops import direct
        assert not direct.is_unseen()
        x = torch.randn(2, 9, 4)
        plan = stk.match(x, 2)
        assert stk.merge(x, plan)[0].shape == (2, 7, 4)
        q = torch.randn(2, 2, 9, 4)
        assert stk.attention(q, q, q, torch.ones(2, 9)).shape == q.shape
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if lacks else {"STOPTOME_DIRECT": "0"})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
