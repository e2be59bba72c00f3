# SPDX-License-Identifier: Apache-2.0
"""Token merging in the vision transformers of every library: what holds for all of them."""

import pytest
import torch
from vit_cases import Case, build, cases

import stoptome_kernels as stk

CASES = list(cases())


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def run(case: Case, model, inputs):
    return case.answer(model(*inputs))


def schedules(case: Case, model) -> list:
    layers = len(case.blocks(model))
    return [4, [0, 7], (6, -1.0), [3] * (layers - 1), 10_000]


def rates(case: Case, model, tome_r) -> tuple[int, ...]:
    return stk.tome.parse_r(tome_r, len(case.blocks(model)))


def test_r_0_changes_no_bit(case):
    model, inputs = build(case), case.inputs(2)
    before = run(case, model, inputs)
    assert torch.equal(run(case, stk.apply_tome_patch(model, 0), inputs), before)


def test_like_the_slow_way(case):
    model, inputs = build(case), case.inputs(2)
    plain = run(case, model, inputs)
    for tome_r in schedules(case, model):
        want = case.slow(model, inputs, rates(case, model, tome_r))
        got = run(case, stk.apply_tome_patch(model, tome_r), inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, plain, rtol=1e-3, atol=1e-3), "nothing was merged"
        stk.remove_tome_patch(model)


def test_gradients_like_the_slow_way(case):
    model, inputs = build(case).double(), tuple(x.double() for x in case.inputs(2))
    for tome_r in (5, [0, 9, 3]):
        want = case.slow(model, inputs, rates(case, model, tome_r))
        parameters = [p for p in model.parameters() if p.requires_grad]
        slow = torch.autograd.grad(want.sin().sum(), parameters, allow_unused=True)
        stk.apply_tome_patch(model, tome_r)
        fast = torch.autograd.grad(run(case, model, inputs).sin().sum(), parameters, allow_unused=True)
        stk.remove_tome_patch(model)
        for got, wanted in zip(fast, slow, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
