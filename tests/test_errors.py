# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error that names the argument, its value and what is allowed, the same on every backend."""

import pytest
import torch

import stoptome_kernels as stk

METRIC = torch.randn(2, 9, 4)
X = torch.randn(2, 9, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"metric": [1, 2]}, TypeError, ["metric", "torch.Tensor", "list"]),
        ({"metric": METRIC[0]}, ValueError, ["metric", "(9, 4)", "(N, T, C) or (N, H, T, C)"]),
        ({"metric": METRIC.long()}, TypeError, ["metric", "int64", "float32, float64, bfloat16 or float16"]),
        ({"metric": METRIC.to_sparse()}, TypeError, ["metric", "sparse", "to_dense"]),
        ({"metric": METRIC[..., :0]}, ValueError, ["metric", "channel", "(2, 9, 0)"]),
        ({"metric": METRIC[:, None][:, :0]}, ValueError, ["metric", "head"]),
        ({"r": -1}, ValueError, ["r", "-1", "0 or more"]),
        ({"r": 2.0}, TypeError, ["r", "int", "float"]),
        ({"r": True}, TypeError, ["r", "int", "bool"]),
        ({"r": torch.tensor(2)}, TypeError, ["r", "int", "tensor"]),
        ({"protected": -3}, ValueError, ["protected", "-3", "0 or more"]),
        ({"protected": "1"}, TypeError, ["protected", "int", "str"]),
        ({"protected": 10}, ValueError, ["protected", "10", "T = 9"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'reference'"]),
    ],
)
def test_match(backend, device, change, error, words):
    arguments = {"metric": METRIC, "r": 2, "protected": 1, "backend": backend} | change
    if isinstance(arguments["metric"], torch.Tensor):
        arguments["metric"] = arguments["metric"].to(device)
    with pytest.raises(error) as caught:
        stk.match(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": None}, TypeError, ["x", "torch.Tensor", "NoneType"]),
        ({"x": X[0]}, ValueError, ["x", "(9, 3)", "(N, T, D)"]),
        ({"x": X.int()}, TypeError, ["x", "int32", "float32"]),
        ({"x": X[:, :8]}, ValueError, ["x", "(2, 8, 3)", "9"]),
        ({"x": X[:1]}, ValueError, ["x", "(1, 9, 3)", "N = 2"]),
        ({"plan": "plan"}, TypeError, ["plan", "MergePlan", "str"]),
        ({"size": torch.ones(2, 9, 1)}, ValueError, ["size", "(2, 9)", "(2, 9, 1)"]),
        ({"size": torch.ones(2, 9).double()}, TypeError, ["size", "float32", "float64"]),
        ({"size": torch.ones(2, 9).bfloat16()}, TypeError, ["size", "float32", "256"]),
        ({"size": 1.0}, TypeError, ["size", "torch.Tensor", "float"]),
        ({"mode": "amax"}, ValueError, ["mode", "'amax'", "'mean', 'sum', 'max'"]),
        ({"mode": "all"}, ValueError, ["mode", "'all'"]),
        ({"backend": ""}, ValueError, ["backend", "''", "'native'"]),
    ],
)
@pytest.mark.parametrize("r", [2, 0])
def test_merge(backend, device, change, error, words, r):
    plan = stk.match(METRIC.to(device), r, 1, backend)
    arguments = {"x": X, "plan": plan, "size": None, "mode": "mean", "backend": backend} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error) as caught:
        stk.merge(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("r", [2, 0])
def test_unmerge(backend, device, r):
    plan = stk.match(METRIC.to(device), r, 1, backend)
    good = torch.randn(2, 9 - r, 3, device=device)
    for change, error, word in (
        ({"y": good[:, 1:]}, ValueError, "y has shape"),
        ({"y": good.long()}, TypeError, "y must be float32"),
        ({"y": 3}, TypeError, "y must be a torch.Tensor"),
        ({"plan": None}, TypeError, "plan must be a MergePlan"),
        ({"backend": "x"}, ValueError, "backend must be one of"),
    ):
        with pytest.raises(error, match=word):
            stk.unmerge(**({"y": good, "plan": plan, "backend": backend} | change))


def test_device_mix():
    plan = stk.match(METRIC, 2)
    with pytest.raises(ValueError, match=r"x is on meta, but the plan is on cpu; use plan\.to\(x\.device\)"):
        stk.merge(X.to("meta"), plan)
    with pytest.raises(ValueError, match="size is on meta"):
        stk.merge(X, plan, torch.ones(2, 9, device="meta"))


def test_then():
    plan = stk.match(METRIC, 2)
    with pytest.raises(TypeError, match="following must be a MergePlan, got list"):
        plan.then([])
    with pytest.raises(ValueError, match=r"following starts from .* \(2, 9\), but this plan leads to \(2, 7\)"):
        plan.then(plan)


def test_errors_while_tracing():
    """The fake kernels check the same arguments as the real ones."""
    torch._dynamo.reset()
    plan = stk.match(METRIC, 2)
    compiled = torch.compile(lambda x: stk.merge(x, plan)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="plan wants N = 2 items of 9 tokens"):
        compiled(X[:, :8])
    torch._dynamo.reset()


def test_operators_check_too(backend, device):
    """torch.ops.stoptome can be called without the public functions around it."""
    plan = stk.match(METRIC.to(device), 2, 1, backend)
    x = X.to(device)
    with pytest.raises(ValueError, match="protected must be at most"):
        torch.ops.stoptome.match(METRIC.to(device), 2, 99, backend)
    with pytest.raises(ValueError, match="do not belong together"):
        torch.ops.stoptome.merge(x, plan.members, plan.offsets[:1], None, "mean", backend)
    with pytest.raises(ValueError, match="must be 2-D int32"):
        torch.ops.stoptome.merge(x, plan.members.long(), plan.offsets, None, "mean", backend)
    with pytest.raises(ValueError, match="mode 'max' needs x"):
        torch.ops.stoptome.merge_backward(x[:, :7], plan.members, plan.offsets, None, None, None, "max", backend)


def test_a_corrupt_plan_is_never_followed_out_of_range():
    """What a plan points at is checked where it is used: on the CPU an error, whatever the index."""
    plan = stk.match(METRIC, 2)
    for wrong in (9, 10**6, 2**31 - 1, ~9, -(2**31)):
        members = plan.members.clone()
        members[1, 4] = wrong
        for run in (
            lambda m: torch.ops.stoptome.merge(X, m, plan.offsets, None, "mean", "native"),
            lambda m: torch.ops.stoptome.unmerge(X[:, :7], m, plan.offsets, "native"),
        ):
            with pytest.raises(IndexError, match="plan points outside of its items"):
                run(members)
    for wrong in (-5, 10, 2**31 - 1):
        offsets = plan.offsets.clone()
        offsets[0, 3] = wrong
        with pytest.raises(IndexError, match="plan points outside of its items"):
            torch.ops.stoptome.merge(X, plan.members, offsets, None, "mean", "native")


def test_out(backend, device):
    x = X.to(device)
    plan = stk.match(METRIC.to(device), 2, 1, backend)
    y, size = torch.empty(2, 7, 3, device=device), torch.empty(2, 7, device=device)
    for out, error, words in (
        (y, TypeError, r"out must be a pair \(y, size\)"),
        ((y, None), TypeError, r"out\[1\] must be a torch.Tensor"),
        ((y.double(), size), TypeError, r"out\[0\] must be torch.float32, got torch.float64"),
        ((y, size.long()), TypeError, r"out\[1\] must be torch.float32, got torch.int64"),
        ((y[:, 1:], size), ValueError, r"out\[0\] must be contiguous of shape \(2, 7, 3\)"),
        ((y, size.T.contiguous().T), ValueError, r"out\[1\] must be contiguous .* got strided"),
        ((x.flatten()[:42].view(2, 7, 3), size), ValueError, r"out\[0\] shares memory with x"),
    ):
        with pytest.raises(error, match=words):
            stk.merge(x, plan, backend=backend, out=out)
    with pytest.raises(RuntimeError, match=r"out=... can't be differentiated"):
        stk.merge(x.clone().requires_grad_(), plan, backend=backend, out=(y, size))
