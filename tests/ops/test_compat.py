# SPDX-License-Identifier: Apache-2.0
"""The drop-in functions: against vectors of the public ones, and against plain PyTorch in our own words."""

import copy
import io
import pickle

import numpy as np
import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels import compat
from stoptome_kernels.compat import (
    bipartite_soft_matching,
    bipartite_soft_matching_random2d,
    bipartite_soft_matching_tempme,
    do_nothing,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    parse_r,
    random_bipartite_soft_matching,
)

from support.helpers import ROUNDOFF, assert_valid

UNMERGE_OFF_UPSTREAM = 7  # see test_golden.py


def plain_dest(metric, r, kept, src, dst):
    """``(N, T)``: where every token goes, for data without ties; the most similar pairs by topk in float64."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    best, partner = (unit[:, src] @ unit[:, dst].transpose(1, 2)).max(-1)
    merged = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(r, dim=1).indices, True)
    dest = torch.zeros(metric.shape[:2], dtype=torch.int64)
    first = len(kept) + len(src) - r
    dest[:, kept] = torch.arange(len(kept))
    dest[:, src] = torch.where(merged, first + partner, len(kept) - 1 + (~merged).cumsum(1))
    dest[:, dst] = torch.arange(first, first + len(dst))
    return dest


def plain_merge(x, dest, mode):
    """Scatter with weight 1."""
    shape = (x.shape[0], int(dest.max()) + 1, x.shape[2])
    index = dest[..., None].expand_as(x)
    start = -torch.inf if mode == "amax" else 0.0
    return x.new_full(shape, start).scatter_reduce(1, index, x, mode, include_self=mode == "amax")


# -- ToMe's and TempMe's forms ----------------------------------------------------------------------------------------


def golden_call(c, backend, device, dtype=torch.float32):
    """The case's matching as its library calls it: with bools for ToMe, positionally with ints for TempMe."""
    metric = c["metric"].to(device, dtype)
    if c["name"].startswith("tempme"):
        return bipartite_soft_matching(metric, c["r"], c["protected"], 0, backend=backend)
    return bipartite_soft_matching(metric, c["r"], c["protected"] >= 1, c["protected"] == 2, backend=backend)


@pytest.mark.parametrize("case", range(8))
def test_golden(golden, case, backend, device):
    c = golden[case]
    merge, unmerge = golden_call(c, backend, device)
    assert torch.equal(merge.plan.dest.cpu(), c["dest"])
    x, size = c["x"].float().to(device), c["size"].to(device)
    y, size_out = merge_wavg(merge, x, size)
    scale = c["y"].abs().max().item()
    assert (y.double().cpu() - c["y"]).abs().max().item() <= 4 * ROUNDOFF[torch.float32] * scale
    assert size_out.dtype == torch.float32
    assert torch.equal(size_out.cpu(), c["size_out"].float())
    if "unmerged" in c and case != UNMERGE_OFF_UPSTREAM:
        assert torch.equal(unmerge(c["y"].float().to(device)).cpu(), c["unmerged"].float())


@pytest.mark.parametrize(
    ("class_token", "distill_token", "tokens"), [(False, False, 12), (True, False, 13), (True, True, 14)]
)
@pytest.mark.parametrize("r", [1, 4, 100])
def test_tome_form(backend, device, class_token, distill_token, tokens, r):
    protected = class_token + distill_token
    metric, x = torch.randn(2, tokens, 6), torch.randn(2, tokens, 5)
    numbers = range(protected, tokens)
    src, dst = [t for t in numbers if t % 2 == 0], [t for t in numbers if t % 2]
    dest = plain_dest(metric, min(r, (tokens - protected) // 2), list(range(protected)), src, dst)
    merge, unmerge = bipartite_soft_matching(metric.to(device), r, class_token, distill_token, backend=backend)
    assert_valid(merge.plan)
    assert unmerge.plan is merge.plan
    assert torch.equal(merge.plan.dest.cpu().long(), dest)
    for mode, plain in (("mean", "mean"), ("sum", "sum"), ("max", "amax"), ("amax", "amax")):
        torch.testing.assert_close(merge(x.to(device), mode=mode).cpu(), plain_merge(x, dest, plain))
    torch.testing.assert_close(merge(x.to(device)).cpu(), plain_merge(x, dest, "mean"))
    y = merge(x.to(device), "sum")
    assert torch.equal(unmerge(y).cpu(), y.cpu().gather(1, dest[..., None].expand_as(x)))


@pytest.mark.interpreted
def test_both_forms_are_told_apart(backend, device):
    metric = torch.randn(2, 15, 6, device=device)

    def dest(*args):
        return bipartite_soft_matching(metric, *args, backend=backend)[0].plan.dest

    tempme = bipartite_soft_matching_tempme(metric, 4, cls_num=5, backend=backend)[0]
    assert tempme.plan.protected == 5
    assert torch.equal(dest(4, 5, 0), tempme.plan.dest)
    assert torch.equal(dest(4, 5), tempme.plan.dest)
    for same in ((True,), (True, False), (1,), (1, 0)):
        assert torch.equal(dest(4, *same), stk.match(metric, 4, 1, backend).dest)
    for same in ((), (False,), (False, False), (0, 0)):
        assert torch.equal(dest(4, *same), stk.match(metric, 4, 0, backend).dest)


@pytest.mark.parametrize("r_f", [0, 1, 12, -3, np.int64(8)])
def test_tempme_form_by_name(r_f):
    """As TempMe's own code calls it; r_f has no effect."""
    metric = torch.randn(2, 15, 6)
    want = stk.match(metric, 4, 5).dest
    for matching in (bipartite_soft_matching, bipartite_soft_matching_tempme):
        for given in (
            matching(metric, 4, cls_num=5, r_f=r_f),
            matching(metric, 4, 5, r_f=r_f),
            matching(metric, 4, 5, r_f),
        ):
            assert torch.equal(given[0].plan.dest, want)
        assert torch.equal(matching(metric, np.int64(4), cls_num=np.uint8(5))[0].plan.dest, want)


@pytest.mark.parametrize(("tokens", "k"), [(12, 2), (12, 3), (13, 4), (11, 4), (9, 9), (14, 9)])
def test_kth(backend, device, tokens, k):
    metric, x = torch.randn(2, tokens, 6), torch.randn(2, tokens, 5)
    dst = list(range(k - 1, tokens, k))
    src = [t for t in range(tokens) if t not in dst]  # those that fill no group too
    assert len(dst) == tokens // k
    dest = plain_dest(metric, len(src), [], src, dst)
    merge, unmerge = kth_bipartite_soft_matching(metric.to(device), np.int64(k), backend=backend)
    assert_valid(merge.plan)
    assert unmerge.plan is merge.plan
    assert torch.equal(merge.plan.dest.cpu().long(), dest)
    y = merge(x.to(device))
    assert y.shape == (2, tokens // k, 5)
    torch.testing.assert_close(y.cpu(), plain_merge(x, dest, "mean"))
    total, size = merge_wavg(merge, x.to(device))
    torch.testing.assert_close((total * size).sum(1).cpu(), x.sum(1))  # nothing is lost
    assert torch.equal(unmerge(y).cpu(), y.cpu().gather(1, dest[..., None].expand_as(x)))


@pytest.mark.parametrize(("tokens", "r"), [(12, 1), (12, 7), (13, 12), (13, 999), (2, np.int64(1))])
def test_random(backend, device, tokens, r):
    metric, x = torch.randn(3, tokens, 6), torch.randn(3, tokens, 5)
    removed = min(int(r), tokens - 1)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(5))
    src, dst = order[:removed].sort().values.tolist(), order[removed:].sort().values.tolist()
    dest = plain_dest(metric, removed, [], src, dst)
    merge, unmerge = random_bipartite_soft_matching(
        metric.to(device), r, generator=torch.Generator().manual_seed(5), backend=backend
    )
    assert_valid(merge.plan)
    assert unmerge.plan is merge.plan
    assert torch.equal(merge.plan.dest.cpu().long(), dest)
    y = merge(x.to(device))
    assert y.shape == (3, tokens - removed, 5)
    torch.testing.assert_close(y.cpu(), plain_merge(x, dest, "mean"))
    assert torch.equal(unmerge(y).cpu(), y.cpu().gather(1, dest[..., None].expand_as(x)))


def test_random_is_random():
    metric = torch.randn(1, 36, 4)

    def dest():
        return random_bipartite_soft_matching(metric, 18)[0].plan.dest

    dests = [dest() for _ in range(3)]
    assert not all(torch.equal(dests[0], other) for other in dests)
    torch.manual_seed(3)
    first = dest()
    torch.manual_seed(3)
    assert torch.equal(first, dest())


def test_do_nothing():
    x = torch.randn(2, 3)
    assert do_nothing(x) is do_nothing(x, mode="prune") is x


@pytest.mark.parametrize("k", [1, 0, -2, 13, 10**30])
def test_kth_without_groups_or_destinations(k):
    x = torch.randn(2, 12, 5)
    merge, unmerge = kth_bipartite_soft_matching(x, k)
    assert merge(x) is unmerge(x) is x


@pytest.mark.parametrize("r", [0, -3, np.int64(-3)])
@pytest.mark.parametrize("what", ["tome", "tempme", "random2d", "random", "too few"])
def test_nothing_to_merge_gives_back_the_argument(backend, device, r, what):
    metric, x = torch.randn(2, 12, 6, device=device), torch.randn(2, 12, 5, device=device)
    if what == "random2d":
        merge, unmerge = bipartite_soft_matching_random2d(metric, 4, 3, 2, 2, r, backend=backend)
    elif what == "random":
        merge, unmerge = random_bipartite_soft_matching(metric, r, backend=backend)
    elif what == "too few":
        merge, unmerge = bipartite_soft_matching(metric[:, :1], 3 - r, True, True, backend=backend)
    else:
        merge, unmerge = bipartite_soft_matching(metric, r, True if what == "tome" else 3, backend=backend)
    assert merge(x) is x
    assert merge(x, mode="sum") is x
    assert unmerge(x) is x
    if what != "too few":
        y, size = merge_wavg(merge, x)
        assert y is x
        assert torch.equal(size, torch.ones(2, 12, 1, device=device))
        assert torch.equal(merge_source(merge, x), torch.eye(12, device=device).expand(2, -1, -1))


# -- sizes and sources ------------------------------------------------------------------------------------------------


class Foreign:
    """A merge that is not ours."""

    def __init__(self, dest):
        self.dest = dest

    def __call__(self, x, mode="mean"):
        return plain_merge(x, self.dest, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sized", [None, torch.float32, torch.bfloat16])
def test_merge_wavg(backend, device, dtype, sized):
    metric, x = torch.randn(2, 13, 6), torch.randn(2, 13, 5).to(dtype)
    size = None if sized is None else torch.randint(1, 5, (2, 13, 1)).to(sized)
    merge, _ = bipartite_soft_matching(metric.to(device), 4, True, backend=backend)
    y, size_out = merge_wavg(merge, x.to(device), None if size is None else size.to(device))
    theirs, their_size = merge_wavg(Foreign(merge.plan.dest.cpu().long()), x, size)
    assert y.dtype == theirs.dtype == dtype
    assert size_out.dtype == their_size.dtype == torch.float32
    assert size_out.shape == (2, 9, 1)
    assert torch.equal(size_out.cpu(), their_size)
    torch.testing.assert_close(y.cpu(), theirs)


def test_merge_wavg_is_one_merge(monkeypatch):
    """Not two, as a merge of rows and one of sizes would be; and bit for bit what stk.merge gives."""
    calls = []
    original = compat.api.merge
    monkeypatch.setattr(compat.api, "merge", lambda *args, **kw: calls.append(kw) or original(*args, **kw))
    x, size = torch.randn(2, 13, 5), torch.rand(2, 13, 1) + 1
    merge, _ = bipartite_soft_matching(torch.randn(2, 13, 6), 4, True)
    y, size_out = merge_wavg(merge, x, size)
    assert len(calls) == 1
    want, want_size = original(x, merge.plan, size[..., 0])
    assert torch.equal(y, want)
    assert torch.equal(size_out[..., 0], want_size)


def test_sizes_count_exactly_in_bfloat16():
    merge, _ = bipartite_soft_matching(torch.ones(1, 2, 4), 1)
    _, size = merge_wavg(merge, torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.tensor([256.0, 1.0]).view(1, 2, 1))
    assert size.item() == 257


def test_merge_source(backend, device):
    metric, x = torch.randn(2, 13, 6, device=device), torch.randn(2, 13, 5, device=device)
    metric[0, [2, 4, 6, 8, 10]] = torch.nan  # sources that can only be removed with weight 0
    merge, _ = bipartite_soft_matching(metric, 4, True, backend=backend)
    assert (merge.plan.members < 0).any()
    first = merge_source(merge, x)
    one_hot = torch.nn.functional.one_hot(merge.plan.dest.long(), 9).transpose(1, 2).to(x)
    assert torch.equal(first, one_hot)
    y = merge(x)
    bad = y.clone()
    bad[1, [2, 4, 6]] = torch.inf
    second, _ = bipartite_soft_matching(bad, 3, True, backend=backend)
    assert (second.plan.members < 0).any()
    both = merge_source(second, y, first)
    trace = merge.plan.then(second.plan).dest.long()
    assert torch.equal(both, torch.nn.functional.one_hot(trace, 6).transpose(1, 2).to(x))
    assert torch.equal(merge_source(merge, x.bfloat16()), one_hot.bfloat16())
    foreign = Foreign(merge.plan.dest.cpu().long())
    assert torch.equal(merge_source(foreign, x.cpu()), one_hot.cpu())
    assert torch.equal(merge_source(Foreign(second.plan.dest.cpu().long()), y.cpu(), first.cpu()), both.cpu())


@pytest.mark.parametrize(
    ("r", "want"),
    [
        (3, [3] * 4),
        ([5, 2], [5, 2, 0, 0]),
        ((8, -1.0), [16, 10, 5, 0]),
        ((8, 1.0), [0, 5, 10, 16]),
        ((8, 0.0), [8] * 4),
        (np.int64(3), [3] * 4),
        (np.array([5, 2]), [5, 2, 0, 0]),
        ((np.int64(8), np.float32(-1)), [16, 10, 5, 0]),
    ],
)
def test_parse_r(r, want):
    found = parse_r(np.int64(4), r)
    assert found == want
    assert all(type(number) is int for number in found)


def test_parse_r_mirrors_the_first_layer():
    """The first is truncated before it is mirrored: 6 to 20, where 6.5 to 19.5 would sum to 150."""
    assert parse_r(12, (13, 0.5)) == [6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 20]
    assert parse_r(12, (13, 0.5)) == list(stk.tome.parse_r((13, 0.5), 12))


# -- images -----------------------------------------------------------------------------------------------------------


def plain_cells(w, h, sx, sy, places):
    """Destinations, cell after cell, and all other tokens, by walking over the image."""
    dst = []
    for cell, place in enumerate(places):
        top, left = cell // (w // sx) * sy, cell % (w // sx) * sx
        dst.append((top + place // sx) * w + left + place % sx)
    dst.sort()
    taken = set(dst)
    return [t for t in range(w * h) if t not in taken], dst


@pytest.mark.parametrize(
    ("w", "h", "sx", "sy"), [(8, 6, 2, 2), (7, 5, 2, 2), (5, 9, 3, 2), (4, 4, 1, 3), (5, 3, 4, 3), (6, 2, 6, 1)]
)
@pytest.mark.parametrize("no_rand", [True, False])
def test_random2d(backend, device, w, h, sx, sy, no_rand):
    metric, x = torch.randn(2, w * h, 6), torch.randn(2, w * h, 5)
    rng = torch.Generator(device).manual_seed(5)
    cells = (w // sx) * (h // sy)
    if no_rand:
        places = [0] * cells
    else:
        places = torch.randint(sx * sy, (cells, 1), generator=rng, device=device).flatten().tolist()
    rng = torch.Generator(device).manual_seed(5)
    src, dst = plain_cells(w, h, sx, sy, places)
    r = len(src) // 2
    merge, unmerge = bipartite_soft_matching_random2d(
        metric.to(device), w, h, sx, sy, r, no_rand, rng, backend=backend
    )  # fmt: skip
    dest = plain_dest(metric, r, [], src, dst)
    assert_valid(merge.plan)
    assert torch.equal(merge.plan.dest.cpu().long(), dest)
    y = merge(x.to(device))
    assert y.shape == (2, w * h - r, 5)
    torch.testing.assert_close(y.cpu(), plain_merge(x, dest, "mean"))
    torch.testing.assert_close(merge(x.to(device), mode="sum").cpu(), plain_merge(x, dest, "sum"))
    assert torch.equal(unmerge(y).cpu(), y.cpu().gather(1, dest[..., None].expand_as(x)))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("side", "channels"), [(64, 16), (128, 8)])
def test_random2d_of_a_large_image(backend, side, channels):
    tokens = side * side
    metric, x = torch.randn(1, tokens, channels), torch.randn(1, tokens, 3)
    rng = torch.Generator().manual_seed(1)
    merge, unmerge = bipartite_soft_matching_random2d(
        metric, side, side, 2, 2, tokens // 2, generator=rng, backend=backend
    )
    places = torch.randint(4, (tokens // 4, 1), generator=torch.Generator().manual_seed(1)).flatten().tolist()
    src, dst = plain_cells(side, side, 2, 2, places)
    dest = plain_dest(metric, tokens // 2, [], src, dst)
    assert (merge.plan.dest.long() != dest).sum().item() <= (0 if backend == "reference" else tokens // 1000)
    torch.testing.assert_close(merge(x), plain_merge(x, merge.plan.dest.long(), "mean"))
    assert unmerge(merge(x)).shape == x.shape


def test_random2d_is_random(backend, device):
    metric = torch.randn(1, 36, 4, device=device)

    def last(**kw):  # every cell has one destination, and these come last
        plan = bipartite_soft_matching_random2d(metric, 6, 6, 3, 3, 20, backend=backend, **kw)[0].plan
        found = [{t for t in range(36) if plan.dest[0, t] >= 12}]
        return found, plan.dest

    dests = [last()[1] for _ in range(3)]
    assert not all(torch.equal(dests[0], other) for other in dests)
    torch.manual_seed(3)
    first = last()[1]
    torch.manual_seed(3)
    assert torch.equal(first, last()[1])
    assert torch.equal(last(no_rand=True)[1], last(no_rand=True)[1])
    # a CPU's generator serves any device
    again = [last(generator=torch.Generator().manual_seed(1))[1] for _ in range(2)]
    assert torch.equal(*again)


def test_every_place_of_a_cell_is_chosen():
    src, dst = compat._cells(12, 12, 2, 3, False, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert sorted([*src.tolist(), *dst.tolist()]) == list(range(144))
    assert len({(t // 12 % 3, t % 2) for t in dst.tolist()}) == 6
    assert {(t // 36, t % 12 // 2) for t in dst.tolist()} == {(i, j) for i in range(4) for j in range(6)}


def test_r_is_capped_at_the_sources(backend, device):
    metric = torch.randn(2, 20, 4, device=device)
    assert bipartite_soft_matching_random2d(metric, 5, 4, 2, 2, 999, backend=backend)[0].plan.r == 16
    for sx, sy in ((1, 1), (6, 2)):  # no sources; no cell that fits, so no destinations
        assert bipartite_soft_matching_random2d(metric, 5, 4, sx, sy, 999, backend=backend)[0].plan.r == 0


# -- inside PyTorch ---------------------------------------------------------------------------------------------------


def matchings(metric, backend):
    yield bipartite_soft_matching(metric, 4, True, backend=backend)
    yield bipartite_soft_matching_random2d(metric, 6, 4, 2, 2, 9, True, backend=backend)


def test_gradients_are_those_of_the_package(backend, device):
    metric = torch.randn(2, 24, 6, device=device, requires_grad=True)
    for merge, unmerge in matchings(metric, backend):
        x, size = torch.randn(2, 24, 5, device=device, requires_grad=True), torch.rand(2, 24, 1, device=device) + 1
        y, _ = merge_wavg(merge, x, size.requires_grad_())
        loss = (unmerge(y) * merge(x, "max").mean() + merge(x).sum()).square().sum()
        (grad,) = torch.autograd.grad(loss, x)
        leaf = x.detach().requires_grad_()
        y = stk.merge(leaf, merge.plan, size[..., 0], backend=backend)[0]
        wide = stk.unmerge(y, merge.plan, backend)
        wide = wide * stk.merge(leaf, merge.plan, mode="max", backend=backend)[0].mean()
        (want,) = torch.autograd.grad(
            (wide + stk.merge(leaf, merge.plan, backend=backend)[0].sum()).square().sum(), leaf
        )
        assert torch.equal(grad, want)
        assert (grad != 0).all()
    assert metric.grad is None
    assert not merge.plan.dest.requires_grad


def test_callables_are_values():
    merge, unmerge = bipartite_soft_matching(torch.randn(2, 13, 6), 4, True, backend="reference")
    x = torch.randn(2, 13, 5)
    file = io.BytesIO()
    torch.save((merge, unmerge), file)
    file.seek(0)
    leaves, spec = torch.utils._pytree.tree_flatten((merge, unmerge))
    assert len(leaves) == 6
    for twins in (
        copy.deepcopy((merge, unmerge)),
        pickle.loads(pickle.dumps((merge, unmerge))),
        torch.load(file),
        torch.utils._pytree.tree_unflatten(leaves, spec),
    ):
        assert [type(twin) for twin in twins] == [compat.Merge, compat.Unmerge]
        assert twins[0].backend == twins[1].backend == "reference"
        assert torch.equal(twins[0](x), merge(x))
        assert torch.equal(twins[1](merge(x)), unmerge(merge(x)))
    with pytest.raises(AttributeError):
        merge.plan = None


def layer(metric, x, backend):
    merge, unmerge = bipartite_soft_matching(metric, 4, True, backend=backend)
    y, size = merge_wavg(merge, x)
    image, back = bipartite_soft_matching_random2d(metric, 6, 4, 2, 2, 9, True, backend=backend)
    third = kth_bipartite_soft_matching(metric, 3, backend=backend)[0]
    return unmerge(y.sin()), size, merge_source(merge, x), back(image(x, mode="max")), third(x), merge


@pytest.mark.compiled
def test_compile_fullgraph(backend, device):
    torch._dynamo.reset()
    metric, x = torch.randn(2, 24, 6, device=device), torch.randn(2, 24, 5, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, want = compiled(metric, x, backend), layer(metric, x, backend)
    for ours, theirs in zip(got[:-1], want[:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(got[-1](x), want[-1](x))  # a callable out of a graph, and into one
    again = torch.compile(lambda merge, x: merge_wavg(merge, x), fullgraph=True, backend="aot_eager")
    assert torch.equal(again(got[-1], x)[0], merge_wavg(want[-1], x)[0])


@pytest.mark.compiled
def test_compile_with_a_random_choice():
    torch._dynamo.reset()
    metric = torch.randn(2, 24, 6)

    def run(metric):
        plans = []
        for merge, unmerge in (
            bipartite_soft_matching_random2d(metric, 6, 4, 2, 2, 9),
            random_bipartite_soft_matching(metric, 9),
        ):
            plans.append((unmerge(merge(metric)), merge.plan))
        return plans

    for y, plan in torch.compile(run, fullgraph=True, backend="aot_eager")(metric):
        assert_valid(plan)
        assert plan.r == 9
        assert torch.equal(y, stk.unmerge(stk.merge(metric, plan)[0], plan))


# -- errors -----------------------------------------------------------------------------------------------------------

M = torch.randn(2, 12, 4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: bipartite_soft_matching(M, 2, True, 0), TypeError, "distill_token must be a bool after a bool class"),
        (lambda: bipartite_soft_matching(M, 2, 1, True), TypeError, "r_f must be an int .* got bool"),
        (lambda: bipartite_soft_matching(M, 2, False, True), ValueError, "needs class_token=True"),
        (lambda: bipartite_soft_matching(M, 2, 3, 1.0), TypeError, "r_f must be an int .* got float"),
        (lambda: bipartite_soft_matching(M, 2, True, cls_num=3), ValueError, "class_token=True can't be .* cls_num=3"),
        (lambda: bipartite_soft_matching(M, 2, 3, cls_num=3), ValueError, "class_token=3 can't be given .* cls_num=3"),
        (
            lambda: bipartite_soft_matching(M, 2, distill_token=True, cls_num=3),
            ValueError, "distill_token=True can't be given together with cls_num=3",
        ),
        (lambda: bipartite_soft_matching(M, 2, cls_num=True), TypeError, "cls_num must be an int .* got bool"),
        (lambda: bipartite_soft_matching(M, 2, 3, 1, r_f=1), ValueError, "r_f=1 can't be given .* distill_token=1"),
        (lambda: bipartite_soft_matching(M, 2, True, r_f=1), ValueError, "r_f belongs to TempMe's form"),
        (lambda: kth_bipartite_soft_matching(M, 2.0), TypeError, "k must be an int"),
        (lambda: kth_bipartite_soft_matching(M, True), TypeError, "k must be an int"),
        (lambda: kth_bipartite_soft_matching(M[0], 2), ValueError, "metric must have shape"),
        (lambda: random_bipartite_soft_matching(M, 2.0), TypeError, "r must be an int"),
        (lambda: random_bipartite_soft_matching(M, 2, generator=7), TypeError, "generator must be a torch"),
        (lambda: random_bipartite_soft_matching([1], 2), TypeError, "metric must be a torch.Tensor"),
        (lambda: bipartite_soft_matching(M, 2, -1), ValueError, "cls_num must be 0 or more"),
        (lambda: bipartite_soft_matching(M, 2, None), TypeError, "cls_num must be an int .* got NoneType"),
        (lambda: bipartite_soft_matching_tempme(M, 2, True), TypeError, "cls_num must be an int .* got bool"),
        (lambda: bipartite_soft_matching(M, 2.0), TypeError, "r must be an int"),
        (lambda: bipartite_soft_matching(M, True), TypeError, "r must be an int"),
        (lambda: bipartite_soft_matching(M, np.True_), TypeError, "r must be an int"),
        (lambda: bipartite_soft_matching(M, torch.tensor(2)), TypeError, "r must be an int .* got a tensor"),
        (lambda: bipartite_soft_matching(M[0], 2), ValueError, "metric must have shape"),
        (lambda: bipartite_soft_matching([1], 2), TypeError, "metric must be a torch.Tensor"),
        (lambda: bipartite_soft_matching(M, 2, backend="x"), ValueError, "backend must be one of"),
        (lambda: bipartite_soft_matching(M, 2)[0](M, mode="prod"), ValueError, "mode must be one of 'mean', 'sum'"),
        (lambda: bipartite_soft_matching(M, 2)[0](M[:, 1:]), ValueError, "x has shape"),
        (lambda: bipartite_soft_matching(M, 2)[1](M), ValueError, "y has shape"),
        (lambda: bipartite_soft_matching_random2d(M, 5, 2, 2, 2, 3), ValueError, r"w·h = 5·2 = 10 tokens, got T = 12"),
        (lambda: bipartite_soft_matching_random2d(M, 4, 3, 0, 2, 3), ValueError, "sx must be 1 or more"),
        (lambda: bipartite_soft_matching_random2d(M, 4.0, 3, 2, 2, 3), TypeError, "w must be an int"),
        (lambda: bipartite_soft_matching_random2d(M, 4, 3, 2, 2, 3.0), TypeError, "r must be an int"),
        (lambda: bipartite_soft_matching_random2d(M, 4, 3, 2, 2, 3, False, 7), TypeError, "generator must be a torch"),
        (lambda: bipartite_soft_matching_random2d(M, 4, 3, 2, 2, 3, True, 7), TypeError, "generator must be a torch"),
        (lambda: bipartite_soft_matching_random2d(None, 4, 3, 2, 2, 3), TypeError, "metric must be a torch.Tensor"),
        (lambda: merge_wavg(bipartite_soft_matching(M, 2)[0], M, torch.ones(2, 12)), ValueError, r"size .*\(N, T, 1\)"),
        (lambda: merge_wavg(bipartite_soft_matching(M, 2)[0], M, torch.ones(2, 12, 1).long()), ValueError, "int64"),
        (lambda: merge_wavg(bipartite_soft_matching(M, 2)[0], M, torch.ones(2, 11, 1)), ValueError, "size must have"),
        (lambda: merge_source(bipartite_soft_matching(M, 2)[0], M[:, 1:]), ValueError, "x has shape"),
        (lambda: merge_source(bipartite_soft_matching(M, 2)[0], M, M[:, 1:]), ValueError, "grad has shape"),
        (lambda: parse_r(2, [1, 2, 3]), ValueError, "has 3 numbers, but there are 2 layers"),
        (lambda: parse_r(2.0, 1), TypeError, "num_layers must be an int"),
    ],
)  # fmt: skip
def test_errors(call, error, says):
    with pytest.raises(error, match=says):
        call()
