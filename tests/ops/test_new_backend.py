# SPDX-License-Identifier: Apache-2.0
"""A fourth backend, by the recipe in docs/dev/architecture.md."""

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels import checks, reference
from stoptome_kernels._backends import BACKENDS
from stoptome_kernels._backends.contract import Backend
from stoptome_kernels._backends.reference import Reference
from torch import Tensor


class Dense(Reference):
    """Merging as products with matrices, in float64; the rest is the reference's."""

    name = "dense"

    def __init__(self):
        self.called: list[str] = []

    def unavailable_reason(self, device, dtype, explicit):
        return None if device == "cpu" else f"dense matrices are CPU tensors, not on {device}"

    def unsupported_attention(self, inputs):
        keys = reference.prefix_length(inputs) + inputs.k.shape[2]
        return f"dense attention is to at most 12 keys, not to {keys}" if keys > 12 else None

    def attention(self, inputs):
        self.called.append("attention")
        return reference.attention(inputs)

    def reduce(self, x, groups, mode, out=None):
        self.called.append(f"reduce {mode}")
        belongs, weights = matrices(groups, mode)
        if mode == "max":
            y = x.double()[:, None].masked_fill(belongs[..., None] == 0, -torch.inf).amax(2)
        else:
            y = (weights / weights.sum(-1, keepdim=True) if mode == "mean" else belongs) @ x.double()
        results = (y.to(x.dtype), weights.sum(-1).float())
        return results if out is None else tuple(to.copy_(value) for to, value in zip(out, results, strict=True))

    def spread(self, grad, groups, mode, x=None, y=None):
        self.called.append(f"spread {mode}")
        belongs, weights = matrices(groups, mode)
        if mode == "max":
            hit = (x[:, None] == y[:, :, None]) & (belongs[..., None] > 0)
            return ((hit & (hit.cumsum(2) == 1)) * grad[:, :, None]).sum(1)
        share = weights / weights.sum(-1, keepdim=True) if mode == "mean" else belongs
        return (share.mT @ grad.double()).to(grad.dtype)


def matrices(groups, mode: str) -> tuple[Tensor, Tensor]:
    """Return ``(N, T_out, T)`` float64: 1 where a token is a member of a group, and its size there."""
    index, valid, offsets, _ = reference.merging.read(groups)
    counts = (valid | (mode == "all")).double()
    group = reference.merging.group_of(offsets, index.shape[1])
    belongs = torch.zeros(index.shape[0], offsets.shape[1] - 1, index.shape[1], dtype=torch.float64)
    for item in range(len(index)):
        belongs[item, group[item], index[item]] = counts[item]
    return belongs, belongs if groups.size is None else belongs * groups.size[:, None].double()


@pytest.fixture
def dense(monkeypatch):
    """Register the backend, best of all."""
    run = Dense()
    monkeypatch.setattr("stoptome_kernels._backends.BACKENDS", {run.name: run, **BACKENDS})
    monkeypatch.setattr(checks, "BACKENDS", (*checks.BACKENDS, run.name))
    return run


def results(backend: str) -> list[Tensor]:
    """Return outputs and gradients of merging."""
    torch.manual_seed(0)
    x, size, grad = torch.randn(2, 11, 6), torch.rand(2, 11) + 1, torch.randn(2, 7, 6)
    x[1, [4, 6]] = torch.inf  # merged with weight 0
    plan = stk.match(x, 4, backend=backend)
    assert (plan.members < 0).any()
    x[1, [4, 6]] = 7.0
    x = x.round()  # ties of max
    found = [plan.dest, plan.members]
    for mode in ("mean", "sum", "max"):
        leaf = x.clone().requires_grad_()
        y, size_out = stk.merge(leaf, plan, size, mode, backend)
        found += [y, size_out, *torch.autograd.grad(y, leaf, grad)]
    leaf = grad.clone().requires_grad_()
    unmerged = stk.unmerge(leaf, plan, backend)
    found += [unmerged, *torch.autograd.grad(unmerged, leaf, x)]
    out = (torch.empty(2, 7, 6), torch.empty(2, 7))
    return [*found, *stk.merge(x, plan, size, backend=backend, out=out)]


def test_its_operations_are_what_runs(dense):
    for got, want in zip(results("dense"), results("reference"), strict=True):
        torch.testing.assert_close(got, want)
    assert {call.split()[0] for call in dense.called} == {"reduce", "spread"}
    assert {call.split()[1] for call in dense.called} == {"mean", "sum", "max", "all"}


def test_auto_takes_the_first_that_can_run(dense, monkeypatch):
    x = torch.randn(2, 9, 4)
    stk.merge(x, stk.match(x, 2))
    assert dense.called == ["reduce mean"]
    assert stk.backends()["dense"] is None
    monkeypatch.setenv("STOPTOME_BACKEND", "reference")
    stk.merge(x, stk.match(x, 2))
    monkeypatch.setenv("STOPTOME_BACKEND", "dense")
    stk.merge(x, stk.match(x, 2))
    assert dense.called == ["reduce mean"] * 2
    monkeypatch.setattr(Dense, "unavailable_reason", lambda self, device, dtype, explicit: "there is no matrix here")
    assert stk.backends()["dense"] == "there is no matrix here"
    with pytest.raises(RuntimeError, match="STOPTOME_BACKEND=dense can't run this: there is no matrix here"):
        stk.match(x, 2)
    monkeypatch.delenv("STOPTOME_BACKEND")
    assert stk.match(x, 2).r == 2


def test_an_explicit_one_never_falls_back(dense):
    q = torch.randn(1, 1, 13, 8)
    with pytest.raises(RuntimeError, match=r"backend='dense' can't run this: dense attention is to at most 12 keys"):
        stk.attention(q, q, q, torch.ones(1, 13), backend="dense")
    torch.testing.assert_close(stk.attention(q, q, q), stk.attention(q, q, q, torch.ones(1, 13), backend="reference"))
    few = q[:, :, :12]
    stk.attention(few, few, few, backend="dense")
    assert dense.called == ["attention"]
    with pytest.raises(ValueError, match=r"backend must be one of .*'dense', got 'sparse'"):
        stk.match(q[0], 2, backend="sparse")


def test_every_operation_is_asked_for():
    """A backend that lacks one can't be made, rather than fail at the first call."""
    lacking = type("Lacking", (Backend,), {"name": "lacking", "match": staticmethod(reference.match)})
    with pytest.raises(TypeError, match=r"abstract method.*attention_backward.*reduce"):
        lacking()
    public = {name for name in vars(Backend) if not name.startswith("_")}
    optional = {"unsupported_attention", "merge_norm_inference", "attention_inference"}
    assert public - {"name", "devices"} - optional == Backend.__abstractmethods__


def test_names_are_those_of_the_checks():
    assert ("auto", *BACKENDS) == checks.BACKENDS
    assert all(run.name == name for name, run in BACKENDS.items())
