# SPDX-License-Identifier: Apache-2.0
"""Matching over given sets of sources and destinations, on every backend."""

import hypothesis.strategies as st
import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels._backends import BACKENDS
from stoptome_kernels.reference import arrange

from support.helpers import ROUNDOFF, assert_valid, dtypes_of, examples, groups

cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 3),
        "heads": st.integers(0, 2),
        "tokens": st.integers(1, 40),
        "channels": st.sampled_from([3, 16, 33]),  # with one, all cosines are ties, or near ones
        "sources": st.integers(0, 30),
        "destinations": st.integers(0, 30),
        "r": st.integers(0, 30),
        "seed": st.integers(0, 2**20),
    }
)


def unpack(case, device, dtype=torch.float32):
    """Metric with copies and bad tokens, r, and disjoint sets in random order."""
    rng = torch.Generator().manual_seed(case["seed"])
    tokens, heads = case["tokens"], case["heads"]
    metric = torch.randn((case["n"], max(heads, 1), tokens, case["channels"]), generator=rng)
    if heads == 0:
        metric = metric[:, 0]
    shuffled = torch.randperm(tokens, generator=rng)
    metric[0].index_copy_(-2, shuffled[::3], metric[0].index_select(-2, shuffled[:1].expand(len(shuffled[::3]))))
    metric[-1, ..., shuffled[tokens // 2], 0] = torch.nan
    sources = min(case["sources"], tokens)
    sets = shuffled[:sources], shuffled[sources : sources + case["destinations"]]
    return metric.to(device, dtype), case["r"], tuple(index.to(device) for index in sets)


def by_hand(metric, r, src, dst):
    """The contract, one item and one token after the other: dest and the groups of every item; and how near to a tie
    the nearest decision was that no tie decided."""
    metric = (metric.double().mean(1) if metric.dim() == 4 else metric.double()).cpu()
    src, dst = sorted(src.tolist()), sorted(dst.tolist())
    tokens = metric.shape[1]
    r = min(r, len(src)) if dst else 0
    if r == 0:
        return [(list(range(tokens)), [[t] for t in range(tokens)])] * len(metric), torch.inf
    kept = [t for t in range(tokens) if t not in src and t not in dst]
    found, nearest = [], torch.inf
    for m in metric:
        bad = ~m.isfinite().all(-1)
        unit = torch.nn.functional.normalize(m.masked_fill(bad[:, None], 0), dim=-1, eps=1e-300)
        score = (unit[src] @ unit[dst].T).float().double()  # copies tie
        score[bad[src]] = -torch.inf
        score[:, bad[dst]] = -torch.inf
        best, partner = score.max(1)
        ranking = sorted(range(len(src)), key=lambda a: (-best[a].item(), a))
        merged = set(ranking[:r])
        order = [*kept, *(t for a, t in enumerate(src) if a not in merged), *dst]
        dest = {t: order.index(t) for t in order}
        members = [[t] for t in order]
        for a in merged:
            dest[src[a]] = order.index(dst[partner[a]])
            members[dest[src[a]]].append(src[a] if best[a] > -torch.inf else ~src[a])
        found.append(
            ([dest[t] for t in range(tokens)], [sorted(g, key=lambda i: i if i >= 0 else ~i) for g in members])
        )
        values = torch.cat([score.flatten(), best]).unique()
        nearest = min([nearest, *values[values > -torch.inf].diff().tolist()])
    return found, nearest


def test_follows_the_contract(backend, device):
    compared = 0

    @examples(backend, case=cases, dtype=st.sampled_from(dtypes_of(backend)))
    def check(case, dtype):
        nonlocal compared
        metric, r, sets = unpack(case, device, dtype)
        plan = stk.match(metric, r, backend=backend, sets=sets)
        assert_valid(plan)
        assert plan.protected == 0
        want, gap = by_hand(metric, r, *sets)
        assert plan.r == case["tokens"] - len(want[0][1])
        if gap <= 8 * (case["channels"] + 4) * ROUNDOFF[torch.float32]:  # a decision that rounding may turn
            return
        compared += 1
        for item, (dest, members) in enumerate(want):
            assert plan.dest[item].tolist() == dest
            assert groups(plan, item) == members

    check()
    assert compared >= (3 if backend == "triton" else 20)


@pytest.mark.parametrize("protected", [0, 1, 4, 7])
def test_even_and_odd_tokens_as_sets(backend, device, protected):
    """What the usual matching does, bit for bit, with the metric of a block's keys and of more than one tile."""
    for tokens, heads in ((9, 3), (33, 1), *(() if backend == "triton" else ((301, 2),))):
        metric = torch.randn(2, heads, tokens, 8, device=device)
        metric[1, :, tokens // 3 :: 3] = metric[1, :, :1].clone()
        first = protected + protected % 2
        sets = torch.arange(first, tokens, 2), torch.arange(protected + 1 - protected % 2, tokens, 2)
        want = stk.match(metric, tokens // 4, protected, backend)
        plan = stk.match(metric, want.r, backend=backend, sets=[index.to(device) for index in sets])
        for name in ("dest", "members", "offsets"):
            assert torch.equal(getattr(plan, name), getattr(want, name)), name


@pytest.mark.parametrize(("sources", "destinations"), [(140, 50), (50, 140)])
def test_sets_of_more_than_one_tile(backend, device, sources, destinations):
    metric, shuffled = torch.randn(2, 200, 6, device=device), torch.randperm(200, device=device)
    metric[1, 100:] = metric[1, 10].clone()  # a hundred exact ties across tiles
    sets = shuffled[:sources], shuffled[sources : sources + destinations].int()
    plan, reference = (stk.match(metric, 45, backend=b, sets=sets) for b in (backend, "reference"))
    assert_valid(plan)
    assert torch.equal(plan.members, reference.members)
    assert torch.equal(plan.offsets, reference.offsets)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_images(tokens):
    """A quarter of an image's tokens as destinations: native and reference agree but for near ties."""
    side = int(tokens**0.5)
    metric = torch.randn(1, tokens, 16)
    grid = torch.arange(tokens).view(side, side)
    dst = grid[::2, ::2].flatten()
    src = torch.cat([grid[::2, 1::2].flatten(), grid[1::2].flatten()])
    plans = [stk.match(metric, tokens // 2, backend=b, sets=(src, dst)) for b in ("native", "reference")]
    for plan in plans:
        assert plan.r == tokens // 2
        assert torch.equal(plan.dest[0, dst.sort().values], torch.arange(tokens // 4, tokens // 2, dtype=torch.int32))
    assert (plans[0].dest != plans[1].dest).sum().item() <= tokens // 1000


def test_the_reference_holds_a_part_of_the_similarities_at_a_time(monkeypatch):
    metric, sets = torch.randn(3, 2, 41, 8), (range(5, 30), range(30, 41))
    for dtype in (torch.float32, torch.float64):
        want = stk.match(metric.to(dtype), 9, backend="reference", sets=sets)
        with monkeypatch.context() as patch:
            patch.setattr(stk.reference.matching, "_CHUNK", 3 * 11 * 4)
            plan = stk.match(metric.to(dtype), 9, backend="reference", sets=sets)
            full = stk.reference.similarity(metric.to(dtype), 1)
        assert torch.equal(plan.members, want.members)
        assert torch.equal(full.argmax(-1), stk.reference.similarity(metric.to(dtype), 1).argmax(-1))


def test_kinds_of_sets_are_the_same(backend, device):
    metric = torch.randn(2, 12, 5, device=device)
    src, dst = [9, 2, 4, 11], [3, 10, 0]
    want = stk.match(metric, 3, backend=backend, sets=(src, dst))
    tensors = [torch.tensor(index, device=device) for index in (src, dst)]
    for sets in (
        (sorted(src), sorted(dst)),
        tensors,
        tuple(index.int() for index in tensors),
        (tensors[0], dst),
        (torch.tensor(src, device=device).repeat_interleave(2)[::2], tuple(dst)),
    ):
        plan = stk.match(metric, 3, backend=backend, sets=sets)
        assert torch.equal(plan.members, want.members)
        assert torch.equal(plan.dest, want.dest)


def test_many_sources_into_one_destination(backend, device):
    """r is capped at the sources, not at half of the tokens; the mean is that of all."""
    metric, x = torch.randn(2, 9, 4, device=device), torch.randn(2, 9, 6, device=device, requires_grad=True)
    plan = stk.match(metric, 99, backend=backend, sets=([0, 1, 2, 3, 5, 6, 7], [8]))
    assert (plan.r, plan.tokens_out) == (7, 2)
    y, size = stk.merge(x, plan, backend=backend)
    assert size.tolist() == [[1, 8]] * 2
    torch.testing.assert_close(y[:, 0], x[:, 4], rtol=0, atol=0)
    torch.testing.assert_close(y[:, 1], x[:, [0, 1, 2, 3, 5, 6, 7, 8]].mean(1))
    x_hat = stk.unmerge(y, plan, backend)
    assert torch.equal(x_hat[:, 3], y[:, 1])
    x_hat.square().sum().backward()
    assert (x.grad != 0).all()


def test_plans_compose(backend, device):
    metric, x = torch.randn(2, 20, 4, device=device), torch.randn(2, 20, 6, device=device)
    first = stk.match(metric, 5, backend=backend, sets=(range(3, 12), range(12, 20)))
    y, size = stk.merge(x, first, backend=backend)
    second = stk.match(y, 4, 2, backend)
    z, size = stk.merge(y, second, size, backend=backend)
    both = first.then(second)
    assert_valid(both)
    torch.testing.assert_close(stk.merge(x, both, backend=backend)[0], z)
    assert torch.equal(stk.merge(x, both, backend=backend)[1], size)
    rows = stk.merge_norm(x, x, first, backend=backend)
    torch.testing.assert_close(rows[0], 2 * y)


@pytest.mark.parametrize("sets", [([], []), ([], [1, 2]), ([1, 2], []), (range(9), [])])
def test_nothing_to_merge(backend, device, sets):
    metric, x = torch.randn(2, 9, 4, device=device), torch.randn(2, 9, 3, device=device)
    plan = stk.match(metric, 4, backend=backend, sets=sets)
    assert_valid(plan)
    assert plan.r == 0
    assert stk.merge(x, plan, backend=backend)[0] is x


def test_no_items(backend, device):
    plan = stk.match(torch.randn(0, 9, 4, device=device), 4, backend=backend, sets=([1, 3], [2]))
    assert plan.dest.shape == (0, 9)
    assert plan.r == 2


@pytest.mark.interpreted
def test_bad_tokens_are_removed_with_weight_0(backend, device):
    metric = torch.randn(1, 8, 4, device=device)
    metric[0, [1, 5]] = torch.inf
    plan = stk.match(metric, 3, backend=backend, sets=([5, 1, 3, 4], [2, 7]))
    # 3 and 4 are merged first, then the lowest bad source, into the lowest destination
    assert groups(plan, 0)[:3] == [[0], [6], [5]]
    assert sorted(i for group in groups(plan, 0)[3:] for i in group) == [~1, 2, 3, 4, 7]
    assert ~1 in groups(plan, 0)[3]


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_sets_that_are_none_leave_no_range(name, request):
    """On a GPU nobody reads the indices before the kernels do: whatever they hold, a plan comes out."""
    if name == "triton" and stk.backends()[name] is not None:
        pytest.skip(stk.backends()[name])
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    run = BACKENDS[name]
    for src, dst in (
        ([3, 3, 3, 3], [5, 6]),
        ([1, 2, 3, 4], [4, 3, 2]),
        ([-7, 2**31 - 1, 2**40, -(2**63)], [0, 0, 19]),
        ([9, 8, 7, 7], [7, 7, 7, 7, 7, 7]),
    ):
        order = arrange(torch.tensor(src, device=device), torch.tensor(dst, device=device), 20)
        assert order.sort().values.tolist() == list(range(20))
        metric = torch.randn(2, 1, 20, 4, device=device)
        parts = run.match(metric, 3, 20 - len(src) - len(dst), order, len(src))
        plan = stk.MergePlan(*parts, 0)
        assert plan.tokens_out == 17
        tokens = torch.where(plan.members < 0, ~plan.members, plan.members)
        assert torch.equal(tokens.sort(1).values, torch.arange(20, device=device).expand(2, -1).int())
        assert (plan.offsets.diff(dim=1) >= 1).all()
        assert (plan.offsets[:, 0] == 0).all()
        assert (plan.offsets[:, -1] == 20).all()
        for item in range(2):
            for output, group in enumerate(groups(plan, item)):
                assert all(plan.dest[item, i if i >= 0 else ~i] == output for i in group)


METRIC = torch.randn(2, 9, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"protected": 1}, ValueError, ["protected can't be given together with sets", "1"]),
        ({"protected": 0}, ValueError, ["protected can't be given together with sets", "0"]),
        ({"sets": [1, 2, 3]}, TypeError, ["sets", "pair (sources, destinations)", "list"]),
        ({"sets": torch.ones(2, 3)}, TypeError, ["sets", "pair", "Tensor"]),
        ({"sets": ([1], None)}, TypeError, ["sets[1]", "1-D tensor or a list of ints", "NoneType"]),
        ({"sets": ([1.0], [2])}, TypeError, ["sets[0]", "ints"]),
        ({"sets": ([True], [2])}, TypeError, ["sets[0]", "ints"]),
        ({"sets": ("12", [2])}, TypeError, ["sets[0]", "str"]),
        ({"sets": ([1], torch.tensor([2.0]))}, TypeError, ["sets[1]", "int32 or int64", "float32"]),
        ({"sets": (torch.tensor([[1]]), [2])}, ValueError, ["sets[0]", "1-D", "(1, 1)"]),
        ({"sets": ([9], [2])}, ValueError, ["sets[0]", "0 to T - 1 = 8", "9"]),
        ({"sets": ([1], [-1])}, ValueError, ["sets[1]", "0 to T - 1 = 8", "-1"]),
        ({"sets": (range(5), range(4, 9))}, ValueError, ["sets", "disjoint", "5 sources", "5 destinations", "T = 9"]),
        ({"metric": METRIC[0]}, ValueError, ["metric", "(9, 4)"]),
        ({"metric": METRIC.long()}, TypeError, ["metric", "int64"]),
        ({"metric": "m"}, TypeError, ["metric", "torch.Tensor"]),
        ({"r": -1}, ValueError, ["r", "-1"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'"]),
    ],
)
def test_errors(backend, device, change, error, words):
    arguments = {"metric": METRIC, "r": 2, "backend": backend, "sets": ([1], [2])} | change
    if isinstance(arguments["metric"], torch.Tensor):
        arguments["metric"] = arguments["metric"].to(device)
    if "sets" in change:
        arguments["sets"] = type(change["sets"])(
            index.to(device) if isinstance(index, torch.Tensor) else index for index in change["sets"]
        ) if isinstance(change["sets"], (tuple, list)) else change["sets"]  # fmt: skip
    with pytest.raises(error) as caught:
        stk.match(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("src", "dst", "says"),
    [
        ([1, 9], [2], r"sets\[0\] must hold token indices from 0 to T - 1 = 8, got 9"),
        ([1, 3], [-4], r"sets\[1\] must hold token indices from 0 to T - 1 = 8, got -4"),
        ([1, 3, 1], [2], r"sets\[0\] must hold a token at most once, but has 1 twice"),
        ([1], [4, 0, 4], r"sets\[1\] must hold a token at most once, but has 4 twice"),
        ([1, 3], [2, 3], "disjoint, but token 3 is a source and a destination"),
    ],
)
@pytest.mark.parametrize("r", [2, 0])
def test_indices_of_cpu_tensors_are_checked(backend, src, dst, says, r):
    with pytest.raises(ValueError, match=says):
        stk.match(METRIC, r, backend=backend, sets=(torch.tensor(src), torch.tensor(dst, dtype=torch.int32)))


def test_device_mix():
    with pytest.raises(ValueError, match=r"sets\[1\] is on meta, but metric is on cpu"):
        stk.match(METRIC, 2, sets=([1], torch.tensor([2], device="meta")))


def test_opcheck(backend, device):
    metric, src, dst = torch.randn(3, 2, 20, 6, device=device), *torch.randperm(20, device=device).split([9, 11])
    torch.library.opcheck(torch.ops.stoptome.match_sets.default, (metric, 4, src, dst[:7].int(), backend))
    torch.library.opcheck(torch.ops.stoptome.match_sets.default, (metric[:, 0], 4, src, dst[:0], backend))


def test_meta_tensors():
    src, dst = torch.arange(9, device="meta"), torch.arange(9, 20, device="meta")
    dest, members, offsets = torch.ops.stoptome.match_sets(torch.randn(3, 20, 8, device="meta"), 4, src, dst)
    assert dest.shape == members.shape == (3, 20)
    assert offsets.shape == (3, 17)


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, src, dst):
        plan = stk.match(x, 4, backend=self.backend, sets=(src, dst))
        y, size = stk.merge(x, plan, backend=self.backend)
        return stk.unmerge(y.sin(), plan, self.backend), size, plan


@pytest.mark.compiled
def test_compile_and_export(backend, device):
    torch._dynamo.reset()
    layer = Layer(backend)
    x, src, dst = torch.randn(3, 20, 8, device=device), *torch.randperm(20, device=device)[:15].split([9, 6])
    want = layer(x, src, dst)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, src, dst)
    n = torch.export.Dim("n", min=2, max=100)
    program = torch.export.export(layer, (x, src, dst), dynamic_shapes=({0: n}, None, None))
    assert "stoptome.match_sets.default" in {str(node.target) for node in program.graph.nodes}
    for got in (compiled, program.module()(x, src, dst)):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[2].members, want[2].members)
    assert program.module()(x[:2], src, dst)[1].shape == (2, 16)


@pytest.mark.compiled
def test_compile_with_lists(backend, device):
    torch._dynamo.reset()
    x = torch.randn(3, 20, 8, device=device)
    layer = Layer(backend)
    compiled = torch.compile(lambda x: layer(x, [3, 9, 1], range(12, 15))[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x, [1, 3, 9], [12, 13, 14])[0])


def test_no_gradient_for_the_metric(backend, device):
    metric = torch.randn(2, 9, 4, device=device, requires_grad=True)
    plan = stk.match(metric, 2, backend=backend, sets=([1, 2, 3], [5, 7]))
    assert not plan.dest.requires_grad
    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.vmap(lambda m: stk.match(m, 1, backend=backend, sets=([1], [2])).dest)(metric[None])


def test_the_same_input_gives_the_same_plan(backend, device):
    metric, (src, dst) = torch.randn(2, 60, 8, device=device), torch.randperm(60, device=device).split([40, 20])
    first = stk.match(metric, 20, backend=backend, sets=(src, dst))
    for _ in range(3):
        again = stk.match(metric, 20, backend=backend, sets=(src.flip(0), dst))
        assert torch.equal(again.members, first.members)
        assert torch.equal(again.dest, first.dest)
