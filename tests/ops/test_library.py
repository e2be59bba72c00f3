# SPDX-License-Identifier: Apache-2.0
"""The operators inside PyTorch: opcheck, gradcheck, compile, export, autocast, copies of a plan."""

import copy
import io
import pickle

import pytest
import stoptome_kernels as stk
import stoptome_kernels.compat
import torch
import torch._dynamo.testing
from stoptome_kernels.vit.state import _follow_positions
from torch.utils._python_dispatch import TorchDispatchMode

from support.helpers import assert_valid

OPS = torch.ops.stoptome


def inputs(backend, device, n=4, dtype=torch.float32):
    keys = torch.randn(n, 2, 20, 16, device=device)
    x = torch.randn(n, 20, 24, device=device, dtype=dtype)
    return x, keys, torch.rand(n, 20, device=device) + 1


def two_layers(x, keys, size, backend):
    """Two merges, a composed trace and a dense map: everything a patched model does."""
    first = stk.match(keys, 4, 1, backend)
    y, size = stk.merge(x, first, size, backend=backend)
    second = stk.match(y * 2, 3, 1, backend)
    z, size = stk.merge(y.sin(), second, size, backend=backend)
    trace = first.then(second)
    return z, size, trace, stk.unmerge(z, trace, backend)


# a sum has the schema, the fake kernels and the saved tensors of a mean
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mean", "max", pytest.param("sum", marks=pytest.mark.full)])
@pytest.mark.parametrize("sized", [False, True])
def test_opcheck(backend, device, mode, sized):
    x, keys, size = inputs(backend, device)
    size = size if sized else None
    plan = stk.match(keys, 4, 1, backend)
    index = (plan.members, plan.offsets)
    y, _ = stk.merge(x, plan, size, mode, backend)
    leaf = x.clone().requires_grad_()
    extremes = (x, y) if mode == "max" else (None, None)
    for op, args in (
        (OPS.match.default, (keys, 4, 1, backend)),
        (OPS.merge.default, (leaf, *index, size, mode, backend)),
        (OPS.merge_backward.default, (y.clone().requires_grad_(), *index, size, *extremes, mode, backend)),
        (OPS.unmerge.default, (y.clone().requires_grad_(), *index, backend)),
        (OPS.unmerge_backward.default, (leaf, *index, backend)),
    ):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])  # Triton has no float64: see test_merge, bit for bit
def test_gradcheck(backend, mode, sized):
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    # sizes that float32 adds exactly: what is checked is the gradient, not the rounding of size_out
    size = torch.randint(1, 9, (2, 12)).float() if sized else None
    metric = torch.randn(2, 12, 4)
    metric[1, 2] = torch.nan
    plan = stk.match(metric, 5, 1, backend)
    assert (plan.members < 0).any()

    def merged(x):
        return stk.merge(x, plan, size, mode, backend)[0]

    def unmerged(y):
        return stk.unmerge(y, plan, backend)

    assert torch.autograd.gradcheck(merged, x)
    assert torch.autograd.gradgradcheck(merged, x)
    y = merged(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(unmerged, y)
    assert torch.autograd.gradgradcheck(unmerged, y)


def test_no_gradient_for_metric_and_size(backend, device):
    x, keys, size = inputs(backend, device)
    plan = stk.match(keys.requires_grad_(), 4, 1, backend)
    y, size_out = stk.merge(x.requires_grad_(), plan, size.requires_grad_(), backend=backend)
    assert y.requires_grad
    assert not size_out.requires_grad
    y.sum().backward()
    assert keys.grad is None
    assert size.grad is None


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, device, compiler):
    torch._dynamo.reset()
    x, keys, size = inputs(backend, device)
    x.requires_grad_()
    compiled = torch.compile(two_layers, fullgraph=True, backend=compiler)
    eager, ours = (f(x, keys, size, backend) for f in (two_layers, compiled))
    assert isinstance(ours[2], stk.MergePlan)
    assert_valid(ours[2])
    assert torch.equal(eager[2].members, ours[2].members)
    grads = [torch.autograd.grad(out[3].square().sum(), x)[0] for out in (eager, ours)]
    if compiler == "aot_eager":  # inductor has its own sine
        assert torch.equal(eager[3], ours[3])
    torch.testing.assert_close(ours[3], eager[3])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.interpreted
@pytest.mark.compiled
def test_compile_with_dynamic_batch_compiles_once(backend, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True, backend=counter)
    for n in (4, 7, 2, 9 if backend == "triton" else 31):
        arguments = inputs(backend, device, n)
        assert torch.equal(compiled(*arguments, backend)[0], two_layers(*arguments, backend)[0])
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, keys, size):
        return two_layers(x, keys, size, self.backend)


@pytest.mark.interpreted
@pytest.mark.compiled
def test_export_with_dynamic_batch(backend, device):
    n = torch.export.Dim("n", min=2, max=100)
    layer, arguments = Layer(backend), inputs(backend, device)
    program = torch.export.export(layer, arguments, dynamic_shapes=[{0: n}] * 3)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"stoptome.match.default", "stoptome.merge.default", "stoptome.unmerge.default"} <= targets
    for count in (2, 9):
        arguments = inputs(backend, device, count)
        got, want = program.module()(*arguments), layer(*arguments)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[2].dest, want[2].dest)


@pytest.mark.slow
@pytest.mark.compiled
def test_tokens_may_be_dynamic_too(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (20, 33, 50):
        keys = torch.randn(2, 2, tokens, 16, device=device)
        x, size = torch.randn(2, tokens, 24, device=device), torch.ones(2, tokens, device=device)
        assert torch.equal(compiled(x, keys, size, backend)[0], two_layers(x, keys, size, backend)[0])


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_keeps_dtypes(backend, device, autocast, dtype):
    x, keys, size = inputs(backend, device, dtype=dtype)
    want_plan = stk.match(keys, 4, 1, backend)
    want = stk.merge(x, want_plan, size, backend=backend)
    x.requires_grad_()
    with torch.autocast(device, dtype=autocast):
        plan = stk.match(keys, 4, 1, backend)
        y, size_out = stk.merge(x, plan, size, backend=backend)
        x_hat = stk.unmerge(y, plan, backend)
    assert torch.equal(plan.members, want_plan.members)
    assert y.dtype == x_hat.dtype == dtype
    assert size_out.dtype == torch.float32
    assert torch.equal(y, want[0])
    x_hat.float().sum().backward()
    assert x.grad.dtype == dtype


def test_ops_work_on_fake_and_meta_tensors(backend, device):
    keys = torch.randn(3, 20, 8, device="meta")
    dest, members, offsets = OPS.match(keys, 4, 1, "auto")
    y, size = OPS.merge(torch.randn(3, 20, 5, device="meta"), members, offsets)
    assert dest.shape == (3, 20)
    assert y.shape == (3, 16, 5)
    assert size.dtype == torch.float32


def test_defaults_of_the_schema(device):
    x, keys, _ = inputs("auto", device)
    dest, members, offsets = OPS.match(keys, 4)
    assert torch.equal(dest, stk.match(keys, 4).dest)
    assert torch.equal(OPS.merge(x, members, offsets)[0], stk.merge(x, stk.match(keys, 4))[0])


def test_functional_transforms_see_a_plan_as_its_tensors():
    plan = stk.match(torch.randn(2, 9, 4), 2)
    leaves, spec = torch.utils._pytree.tree_flatten(plan)
    assert len(leaves) == 3
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.protected == plan.protected
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), plan.to("cpu")):
        assert torch.equal(twin.members, plan.members)
        assert twin.protected == 1


def test_a_plan_can_not_be_changed():
    plan = stk.match(torch.randn(2, 9, 4), 2)
    with pytest.raises(AttributeError):
        plan.protected = 2
    file = io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    assert torch.equal(torch.load(file).members, plan.members)
    assert "2 items, 9 -> 7 tokens, r=2, protected=1" in repr(plan)


@pytest.mark.interpreted
def test_checkpointing_and_two_forwards_before_backward(backend, device):
    x, keys, size = inputs(backend, device)
    x.requires_grad_()

    def layer(x):
        return stk.merge(x, stk.match(keys, 4, 1, backend), size, backend=backend)[0].square()

    (want,) = torch.autograd.grad(layer(x).sum(), x)
    for reentrant in (False, True):
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, want)
        x.grad = None
    one, two = layer(x), layer(2 * x)
    two.sum().backward()
    one.sum().backward()
    torch.testing.assert_close(x.grad, 5 * want)


class Operations(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_scatters():
    """On a GPU in deterministic mode a scatter copies from the host: it waits, and no CUDA graph can hold it."""
    x, keys, size = inputs("reference", "cpu")
    plan, following = stk.match(keys, 4, 1), stk.match(x[:, :16], 3, 1)
    sets = stk.reference.arrange(torch.arange(0, 20, 2), torch.arange(1, 20, 2), 20)
    with Operations() as seen:
        plan.then(following)
        for order in (None, sets):
            groups = stk.reference.Groups(*stk.reference.match(keys, 4, 0, order, 10)[1:], size)
        for mode in ("mean", "sum", "max"):
            y, _ = stk.reference.reduce(x, groups, mode)
            stk.reference.spread(y, groups, mode, x, y)
        stk.compat.merge_source(stk.compat.bipartite_soft_matching(keys.mean(1), 4)[0], x)
        _follow_positions(None, plan)
    assert {"sort", "gather"} <= seen.names
    assert not {name for name in seen.names if "scatter" in name or name == "put_"}, seen.names
