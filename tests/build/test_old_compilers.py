# SPDX-License-Identifier: Apache-2.0
"""Patched models compiled and exported by whatever torch is there; needs no other library of models."""

import pytest
import stoptome_kernels as stk
import torch
import torch._dynamo.testing

from support.vit import build
from support.vit.torch_encoder import CASES

RATES = (4, 9, 3, 5)  # in each layer: of torch's own fast path torch 2.11 makes no graph


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_graph(case):
    """For all batches: the first size is compiled as it is, the second for any."""
    torch._dynamo.reset()
    model, batches = build(case), [case.inputs(batch) for batch in (2, 3, 4, 6)]
    with torch.no_grad():
        wanted = [case.slow(model, inputs, RATES) for inputs in batches]
        stk.apply_tome_patch(model, list(RATES))
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for inputs, want in zip(batches, wanted, strict=True):
            torch.testing.assert_close(compiled(*inputs), want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.compiled
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_export_leaves_the_trace_alone(strict):
    """The trace of the last forward; also while a graph for any batch is made."""
    case = CASES[0]
    model, inputs = stk.apply_tome_patch(build(case), list(RATES), trace_source=True), case.inputs(3)
    model(*inputs)
    kept = stk.tome_trace(model).dest
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},), strict=strict)
    assert torch.equal(stk.tome_trace(model).dest, kept)
    inputs = case.inputs(5)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.compiled
@pytest.mark.slow
def test_a_compiled_model_keeps_its_trace():
    torch._dynamo.reset()
    case = CASES[0]
    model, inputs = stk.apply_tome_patch(build(case), list(RATES), trace_source=True), case.inputs(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(*inputs)
    want = stk.tome_trace(model).dest
    model(*case.inputs(2))
    compiled(*inputs)
    assert torch.equal(stk.tome_trace(model).dest, want)
