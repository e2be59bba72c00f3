# SPDX-License-Identifier: Apache-2.0
"""The operations as torch.onnx.export sees them: the same plans, values and errors as the reference's."""

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels import onnx


@pytest.fixture
def both(monkeypatch):
    """Call a function by the reference, then as while exporting."""

    def call(function):
        want = function()
        with monkeypatch.context() as patch:
            patch.setattr(onnx, "is_onnx_exporting", lambda: True)
            return want, function()

    return call


def same_plan(want: stk.MergePlan, got: stk.MergePlan) -> None:
    for name in ("dest", "members", "offsets"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == torch.int32
    assert got.protected == want.protected


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("heads", [None, 3])
def test_plans(both, protected, heads):
    metric = torch.randn(2, 20, 8) if heads is None else torch.randn(2, heads, 20, 8)
    for r in (1, 4, 100):
        same_plan(*both(lambda r=r: stk.match(metric, r, protected, "reference")))
    metric *= 1e30
    same_plan(*both(lambda: stk.match(metric, 4, protected, "reference")))


def test_tokens_that_hold_nan(both):
    metric = torch.randn(2, 12, 4)
    metric[0, 2:9, 1] = torch.nan
    metric[1, :, 0] = torch.inf
    metric[1, 3] = 0
    want, got = both(lambda: stk.match(metric, 5, 1, "reference"))
    same_plan(want, got)
    assert (want.members < 0).any()
    x = torch.randn(2, 12, 6)
    for mode in ("mean", "sum", "max"):
        for ours, theirs in zip(*both(lambda mode=mode: stk.merge(x, want, None, mode)), strict=True):
            torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values(both, dtype):
    plan = stk.match(torch.randn(3, 15, 4), 6, 2)
    x, residual = torch.randn(2, 3, 15, 8).to(dtype)
    size, weight, bias = torch.rand(3, 15) + 0.5, torch.randn(8), torch.randn(8)
    for function in (
        lambda: stk.merge(x, plan, size),
        lambda: stk.merge(x, plan, size, "sum"),
        lambda: stk.merge(x, plan, size, "max"),
        lambda: (stk.unmerge(x[:, :9], plan),),
        lambda: stk.merge_norm(x, residual, plan, size, weight, bias),
        lambda: stk.merge_norm(x, residual, plan),
        lambda: (stk.attention(*[t.unflatten(2, (2, 4)).transpose(1, 2) for t in (x, residual, x)], size),),
    ):
        for want, got in zip(*both(function), strict=True):
            assert got.dtype == want.dtype
            tolerance = {"rtol": 0.02, "atol": 0.03} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(got, want, **tolerance)


def test_composed(both):
    first = stk.match(torch.randn(2, 16, 4), 4, 1)
    second = stk.match(torch.randn(2, 12, 4), 3, 1)
    same_plan(*both(lambda: first.then(second)))


def test_errors(both, monkeypatch):
    monkeypatch.setattr(onnx, "is_onnx_exporting", lambda: True)
    x = torch.randn(2, 10, 4)
    with pytest.raises(TypeError, match="metric"):
        stk.match(x.long(), 2)
    plan = stk.match(x, 2)
    with pytest.raises(ValueError, match="size"):
        stk.merge(x, plan, torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="ONNX"):
        stk.match(x, 2, sets=([0, 2], [1, 3]))
