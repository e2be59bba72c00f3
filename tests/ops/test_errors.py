# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error that names the argument, its value and what is allowed, the same on every backend."""

import numpy as np
import pytest
import stoptome_kernels as stk
import torch

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
        ({"r": np.True_}, TypeError, ["r", "int", "bool"]),
        ({"r": np.array([2])}, TypeError, ["r", "int", "ndarray"]),
        ({"r": torch.tensor(2)}, TypeError, ["r", "int", "tensor"]),
        ({"r": torch.tensor(True)}, TypeError, ["r", "int", "tensor"]),
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


def test_numbers_of_numpy():
    want = stk.match(METRIC, 2, 1)
    assert torch.equal(stk.match(METRIC, np.int64(2), np.uint8(1)).dest, want.dest)
    sets = np.arange(1, 9, 2), [np.int64(token) for token in range(2, 9, 2)]
    plan = stk.match(METRIC, np.int64(2), sets=sets)
    assert torch.equal(plan.dest, stk.match(METRIC, 2, sets=(range(1, 9, 2), range(2, 9, 2))).dest)
    for wrong in ([np.True_], np.array([[1]]), np.array([True]), [1.0], [torch.tensor(1)]):
        with pytest.raises(TypeError, match=r"each of sets\[0\] must be an int"):
            stk.match(METRIC, 2, sets=(wrong, [3]))


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


@pytest.mark.compiled
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


@pytest.mark.parametrize("r", [2, 0])
def test_what_torch_library_can_not_transform_is_refused(backend, device, r):
    """Without a refusal forward mode gives a gradient of zero, and vmap a plan of the wrong sizes."""
    x, metric = X.to(device), METRIC.to(device)
    plan = stk.match(metric, r, 1, backend)
    for run, rows in (
        (lambda t: stk.merge(t, plan, backend=backend)[0], x),
        (lambda t: stk.unmerge(t, plan, backend), x[:, : 9 - r]),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            torch.func.jvp(run, (rows,), (rows,))
        with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
            torch.vmap(run)(rows[None])
    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.vmap(lambda m: stk.match(m, r, 1, backend).dest)(metric[None])


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_plan_of_r_0_still_asks_for_the_backend(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = "cpu" if name == "triton" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        device, name = "cpu", "triton"
    plan = stk.match(METRIC.to(device), 0, backend="reference")
    with pytest.raises(RuntimeError, match=f"backend='{name}' can't run this"):
        stk.merge(X.to(device), plan, backend=name)
    with pytest.raises(RuntimeError, match=f"backend='{name}' can't run this"):
        stk.unmerge(X.to(device), plan, backend=name)


def test_numbers_beyond_64_bits(backend, device):
    metric = METRIC.to(device)
    assert stk.match(metric, 2**70, 1, backend).r == 4
    with pytest.raises(ValueError, match="protected must be at most the number of tokens T = 9"):
        stk.match(metric, 2, 2**70, backend)


def test_out(backend, device):
    x = X.to(device)
    plan = stk.match(METRIC.to(device), 2, 1, backend)
    y, size, sizes = (torch.ones(*shape, device=device) for shape in ((2, 7, 3), (2, 7), (2, 9)))
    for out, error, words in (
        (y, TypeError, r"out must be a pair \(y, size\)"),
        ((y, None), TypeError, r"out\[1\] must be a torch.Tensor"),
        ((y.double(), size), TypeError, r"out\[0\] must be torch.float32, got torch.float64"),
        ((y, size.long()), TypeError, r"out\[1\] must be torch.float32, got torch.int64"),
        ((y[:, 1:], size), ValueError, r"out\[0\] must be contiguous of shape \(2, 7, 3\)"),
        ((y, size.T.contiguous().T), ValueError, r"out\[1\] must be contiguous .* got strided"),
        ((x.flatten()[:42].view(2, 7, 3), size), ValueError, r"out\[0\] shares memory with x"),
        ((y, x.flatten()[:14].view(2, 7)), ValueError, r"out\[1\] shares memory with x"),
        ((y, sizes.flatten()[:14].view(2, 7)), ValueError, r"out\[1\] shares memory with size"),
        ((y, y.flatten()[:14].view(2, 7)), ValueError, r"out\[1\] shares memory with out\[0\]"),
    ):
        with pytest.raises(error, match=words):
            stk.merge(x, plan, sizes, backend=backend, out=out)
    with pytest.raises(RuntimeError, match=r"out=... can't be differentiated"):
        stk.merge(x.clone().requires_grad_(), plan, backend=backend, out=(y, size))
