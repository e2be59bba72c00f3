# SPDX-License-Identifier: Apache-2.0
"""Plans and merges small enough to be worked out with pencil and paper."""

import pytest
import stoptome_kernels as stk
import torch

from support.helpers import assert_valid, groups

NAN = float("nan")


def plan_of(metric, r, protected, backend, device):
    plan = stk.match(torch.tensor([metric], dtype=torch.float32, device=device), r, protected, backend)
    assert_valid(plan)
    return plan


def test_one_merge(backend, device):
    # A = {2, 4}, B = {1, 3}; token 2 is nearly token 1 (0.995), token 4 is nearest to token 3 (0.8)
    metric = [[9, 9], [1, 0], [1, 0.1], [0, 1], [0.6, 0.8]]
    plan = plan_of(metric, 1, 1, backend, device)
    assert plan.dest.tolist() == [[0, 2, 2, 3, 1]]
    assert groups(plan, 0) == [[0], [4], [1, 2], [3]]
    assert (plan.tokens_in, plan.tokens_out, plan.r, plan.protected) == (5, 4, 1, 1)

    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0]]], device=device)
    size = torch.tensor([[1.0, 1.0, 3.0, 2.0, 5.0]], device=device)
    y, size_out = stk.merge(x, plan, size, backend=backend)
    assert y.flatten().tolist() == [1.0, 16.0, 3.5, 8.0]  # (1·2 + 3·4) / 4
    assert size_out.tolist() == [[1.0, 5.0, 4.0, 2.0]]
    assert stk.merge(x, plan, backend=backend)[0].flatten().tolist() == [1.0, 16.0, 3.0, 8.0]
    assert stk.merge(x, plan, mode="sum", backend=backend)[0].flatten().tolist() == [1.0, 16.0, 6.0, 8.0]
    assert stk.merge(x, plan, mode="max", backend=backend)[0].flatten().tolist() == [1.0, 16.0, 4.0, 8.0]
    assert stk.unmerge(y, plan, backend).flatten().tolist() == [1.0, 3.5, 3.5, 8.0, 16.0]


def test_protected_count_decides_the_sets(backend, device):
    # with 4 protected A = {4, 6}, B = {5, 7}; with 5 protected A = {6}, B = {5, 7}
    metric = [[1, 0]] * 4 + [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert plan_of(metric, 2, 4, backend, device).dest.tolist() == [[0, 1, 2, 3, 4, 4, 5, 5]]
    assert plan_of(metric, 2, 5, backend, device).dest.tolist() == [[0, 1, 2, 3, 4, 5, 6, 6]]


def test_ties_go_to_the_lowest(backend, device):
    # all tokens alike: every a proposes the first b, and the first a's are merged
    plan = plan_of([[0.3, -0.7, 0.2]] * 9, 2, 1, backend, device)
    assert groups(plan, 0) == [[0], [6], [8], [1, 2, 4], [3], [5], [7]]


@pytest.mark.parametrize("channels", [1, 3, 17, 64, 100])
def test_copies_tie_exactly_wherever_they_stand(backend, device, channels):
    # one direction for all tokens, in one item after another: any rounding that depended on the place would show
    metric = torch.randn(4, 1, channels, device=device).expand(4, 61, channels)
    plan = stk.match(metric, 7, 1, backend)
    sources = [2, 4, 6, 8, 10, 12, 14]
    for item in range(4):
        assert groups(plan, item)[1 + 30 - 7] == sorted([1, *sources])


def test_zero_vectors_are_similar_to_nothing(backend, device):
    # token 2 is zero (0 to all), token 4 points away from both (−0.6, −0.8), token 6 is nearest to 5
    metric = [[1, 1], [1, 0], [0, 0], [0, 1], [-0.6, -0.8], [0.8, 0.6], [0.9, 0.5]]
    assert groups(plan_of(metric, 1, 1, backend, device), 0)[-1] == [5, 6]
    # next is the zero token: similarity 0 to all, so it goes to the lowest b
    assert groups(plan_of(metric, 2, 1, backend, device), 0)[2:] == [[1, 2], [3], [5, 6]]


def test_zero_destination_ties_with_a_right_angle(backend, device):
    # token 1 is zero, token 3 at a right angle to token 2: both similarities are 0, the lowest b wins
    assert groups(plan_of([[0, 0], [0, 0], [1, 0], [0, 1]], 1, 1, backend, device), 0) == [[0], [1, 2], [3]]


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_a_bad_source_is_removed_with_weight_0(backend, device, bad):
    metric = [[1, 1], [1, 0], [bad, 1], [0, 1], [0.6, 0.8]]
    plan = plan_of(metric, 1, 1, backend, device)
    assert groups(plan, 0) == [[0], [2], [1], [3, 4]]  # with another proposal left, the bad token stays
    plan = plan_of(metric, 2, 1, backend, device)
    assert groups(plan, 0) == [[0], [1, ~2], [3, 4]]
    assert plan.dest.tolist() == [[0, 1, 1, 2, 2]]
    x = torch.tensor([[[1.0], [2.0], [NAN], [8.0], [16.0]]], device=device)
    y, size = stk.merge(x, plan, backend=backend)
    assert y.flatten().tolist() == [1.0, 2.0, 12.0]
    assert size.tolist() == [[1.0, 1.0, 2.0]]
    assert stk.unmerge(y, plan, backend).flatten().tolist() == [1.0, 2.0, 2.0, 12.0, 12.0]


def test_a_bad_destination_receives_nothing(backend, device):
    metric = [[1, 1], [NAN, 0], [1, 0], [-1, 0]]
    assert groups(plan_of(metric, 1, 1, backend, device), 0) == [[0], [1], [2, 3]]


def test_all_bad(backend, device):
    plan = plan_of([[NAN, 0]] * 7, 2, 1, backend, device)
    assert groups(plan, 0) == [[0], [6], [1, ~2, ~4], [3], [5]]


def test_gradients(backend, device):
    metric = [[9, 9], [1, 0], [1, 0.1], [0, 1], [0.6, 0.8]]
    plan = plan_of(metric, 1, 1, backend, device)
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0]]], device=device, requires_grad=True)
    size = torch.tensor([[1.0, 1.0, 3.0, 2.0, 5.0]], device=device)
    upstream = torch.tensor([[[1.0], [10.0], [100.0], [1000.0]]], device=device)
    for mode, want in (
        ("mean", [1.0, 25.0, 75.0, 1000.0, 10.0]),
        ("sum", [1.0, 100.0, 100.0, 1000.0, 10.0]),
        ("max", [1.0, 0.0, 100.0, 1000.0, 10.0]),
    ):
        (grad,) = torch.autograd.grad(stk.merge(x, plan, size, mode, backend)[0], x, upstream)
        assert grad.flatten().tolist() == want, mode
    y = torch.zeros(1, 4, 1, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(stk.unmerge(y, plan, backend), y, x.detach())
    assert grad.flatten().tolist() == [1.0, 16.0, 6.0, 8.0]


def test_gradient_of_a_weight_0_token(backend, device):
    plan = plan_of([[1, 1], [1, 0], [NAN, 1], [0, 1], [0.6, 0.8]], 2, 1, backend, device)
    x = torch.ones(1, 5, 1, device=device, requires_grad=True)
    for mode in ("mean", "sum", "max"):
        (grad,) = torch.autograd.grad(stk.merge(x, plan, None, mode, backend)[0].sum(), x)
        assert grad[0, 2].item() == 0.0, mode
    # but unmerging reads its destination for it, so its gradient counts there
    y = torch.zeros(1, 3, 1, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(stk.unmerge(y, plan, backend).sum(), y)
    assert grad.flatten().tolist() == [1.0, 2.0, 2.0]


def test_max_gradient_goes_to_the_first_of_equals(backend, device):
    plan = plan_of([[1, 0]] * 5, 2, 1, backend, device)
    x = torch.ones(1, 5, 1, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(stk.merge(x, plan, None, "max", backend)[0].sum(), x)
    assert grad.flatten().tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_composition(backend, device):
    first = plan_of([[9, 9], [1, 0], [1, 0.1], [0, 1], [0.6, 0.8]], 1, 1, backend, device)  # [0] [4] [1 2] [3]
    second = plan_of([[9, 9], [1, 0], [1, 0.1], [0, 1]], 1, 1, backend, device)  # [0] [1 2] [3]
    both = first.then(second)
    assert_valid(both)
    assert both.dest.tolist() == [[0, 1, 1, 2, 1]]
    assert groups(both, 0) == [[0], [1, 2, 4], [3]]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_what_two_plans_protect_is_protected_by_both(backend, device, before, after):
    """A token that the second protects may be one that the first merged others into."""
    first = plan_of([[9, 9], [1, 0], [1, 0.1], [0, 1], [0.6, 0.8]], 1, before, backend, device)
    second = plan_of([[9, 9], [1, 0], [1, 0.1], [0, 1]], 1, after, backend, device)
    both = first.then(second)
    assert both.protected == min(before, after)
    assert_valid(both)
