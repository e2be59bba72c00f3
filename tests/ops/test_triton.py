# SPDX-License-Identifier: Apache-2.0
"""Paths of the Triton kernels that small shapes under the interpreter do not take by themselves."""

import itertools

import pytest
import stoptome_kernels as stk
import torch

from support import GPU
from support.helpers import ROUNDOFF, assert_valid, similarity_gap

config = pytest.importorskip(
    "stoptome_kernels._backends.triton.config", reason="Triton has no packages for this system"
)

pytestmark = pytest.mark.skipif(GPU, reason="on a GPU the kernels choose these paths by shape: see test_gpu.py")


@pytest.fixture
def configure(monkeypatch):
    """Changes the table of configurations for one test."""

    def use(
        one_launch: int = config.ONE_LAUNCH, dots: bool = False, span: int | None = None, bits: int | None = None
    ) -> None:
        table = config.match.__wrapped__

        def match(heads, channels, larger, dtype, compiled=False):
            found = table(heads, channels, larger, dtype, False)
            for kernel in ("item", "score"):
                if dots and found[kernel]:
                    # The interpreter multiplies by BLAS instead, to make exact ties. Here: what a GPU multiplies.
                    found[kernel] |= {"PRODUCT": table(heads, channels, larger, dtype, True)[kernel]["PRODUCT"]}
            if span and found["plan"]:
                found["plan"] |= {"SPAN": span, "ONE": larger <= span}
            if bits and found["plan"]:
                found["plan"] |= {"BITS": bits}
            return found

        monkeypatch.setattr(config, "ONE_LAUNCH", one_launch)
        monkeypatch.setattr(config, "match", match)

    return use


def compare(metric, r, protected):
    plan, reference = (stk.match(metric, r, protected, b) for b in ("triton", "reference"))
    assert_valid(plan)
    band = 4 * (metric.shape[-1] + 4) * ROUNDOFF[torch.float32]
    differ = (plan.dest != reference.dest).any(1).nonzero().flatten().tolist()
    assert len(differ) <= len(metric) // 4
    for item in differ:
        assert similarity_gap(metric[item], protected, plan.dest[item], reference.dest[item], plan.r) <= band


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "tokens", "channels", "product"),
    [(4, 40, 64, "float32"), (1, 40, 64, None), (4, 90, 64, "thirds"), (3, 90, 40, "thirds"), (1, 90, 100, None)],
)
def test_products_of_a_gpu(configure, dtype, heads, tokens, channels, product):
    """float32 in FMAs, float32 as three bfloat16 on tensor cores, 16-bit rows as they are."""
    expected = product or ("narrow" if dtype != torch.float32 else "float32" if tokens == 40 else "thirds")
    found = config.match(heads, channels, (tokens + 1) // 2, dtype, True)["item"]["PRODUCT"]
    assert found == expected
    configure(dots=True)
    metric = torch.randn(4, heads, tokens, channels).to(dtype)
    metric[:, :, 5] *= 1e-4  # far from 1 within what float16 holds
    compare(metric, tokens // 4, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "channels"), [(4, 16), (1, 100)])
@pytest.mark.parametrize(("tokens", "protected"), [(9, 1), (40, 0), (83, 5), (150, 2)])
def test_two_launches(configure, heads, channels, tokens, protected):
    configure(one_launch=0)
    metric = torch.randn(4, heads, tokens, channels)
    for r in (1, tokens // 5, tokens):
        compare(metric, r, protected)


@pytest.mark.slow
@pytest.mark.parametrize("span", [16, 64])
def test_more_sources_than_a_span(configure, span):
    """The r-th best of all is searched over several spans; ties across them go to the lowest source."""
    configure(one_launch=0, span=span)
    metric = torch.randn(3, 1, 201, 8)
    metric[1, :, ::3] = metric[1, :, :1]
    metric[2] = metric[2, :, :1]
    metric[0, :, 31] = torch.nan
    plan, reference = (stk.match(metric, 70, 1, b) for b in ("triton", "reference"))
    assert torch.equal(plan.members, reference.members)
    assert torch.equal(plan.offsets, reference.offsets)


def test_merges_as_long_numbers(configure):
    """Beyond 32767 tokens of a set a merge takes 64 bits."""
    for larger, wide in ((32767, False), (32768, True)):
        assert (config.match(1, 8, larger, torch.float32)["plan"]["BITS"] >= 16) == wide
    configure(one_launch=0, bits=17)
    metric = torch.randn(2, 1, 75, 8)
    metric[1, :, ::3] = metric[1, :, :1]
    plan, reference = (stk.match(metric, 30, 2, b) for b in ("triton", "reference"))
    assert torch.equal(plan.members, reference.members)
    assert torch.equal(plan.offsets, reference.offsets)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [40, 100])
def test_float32_attention_of_a_gpu(monkeypatch, tokens):
    """On a GPU float32 rows are multiplied as three bfloat16 on tensor cores: as exact as in one piece."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 2, tokens, 40))
    with torch.no_grad():
        k[:, :, 5] *= 1e-4
    size, leaves = torch.rand(2, tokens) + 0.1, (q, k, v)

    def results(rows, backend):
        out = stk.attention(*rows, size, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), rows)]

    exact = results([x.detach().double().requires_grad_() for x in leaves], "reference")
    plain = results(leaves, "triton")
    table = config.attention.__wrapped__
    parts = ("attend", "queries", "keys")
    assert all(table(tokens, tokens, 40, torch.float32, 90)[part]["THIRDS"] for part in parts)

    def thirds(*arguments):
        found = table(*arguments)
        return {**found, **{part: {**found[part], "THIRDS": True} for part in parts}}

    monkeypatch.setattr(config, "attention", thirds)
    for got, whole, right in zip(results(leaves, "triton"), plain, exact, strict=True):
        assert not torch.equal(got, whole)
        errors = [(x - right).abs().max().item() for x in (got, whole)]
        assert errors[0] <= 2 * errors[1] + ROUNDOFF[torch.float32] * right.abs().max().item()


@pytest.mark.parametrize("tokens", [40, 64, 100])
@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (64, 32), (128, 128)])
def test_attention_in_other_blocks(monkeypatch, tokens, ahead, blocks):
    """Tiles of other sizes, whole blocks of keys and what is left of them, with the prefix or not, give the same, and
    the same gradients, in one kernel or two."""
    queries = tokens - 7
    leaves = [torch.randn(2, 2, n, 8, requires_grad=True) for n in (queries, tokens, tokens)]
    if ahead:
        leaves += [torch.randn(1, 2, ahead, 8, requires_grad=True) for _ in range(2)]
    size = torch.rand(2, tokens) + 0.1
    size[:, -9:] = 0  # a padded plan's
    grad, table = torch.randn(2, 2, queries, 8), config.attention.__wrapped__

    def results(backend):
        out = stk.attention(*leaves[:3], size, *leaves[3:], backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    changes = dict(zip(("BLOCK_Q", "BLOCK_K"), blocks, strict=True))

    def chosen(*arguments):
        return {name: part and {**part, **changes} for name, part in table(*arguments).items()}

    def in_one(*arguments):
        item = {name: value for name, value in table(*arguments)["queries"].items() if name != "STAGES"}
        return {**chosen(*arguments), "item": {**item, "BLOCK_Q": 128, "BLOCK_K": 128}}

    want = results("reference")
    for use in (chosen, in_one):
        monkeypatch.setattr(config, "attention", use)
        for ours, right in zip(results("triton"), want, strict=True):
            torch.testing.assert_close(ours, right)


def test_keys_that_weigh_nothing_come_first():
    """A whole block of them: no NaN, with sizes of 0 or scores of -inf."""
    q = torch.randn(1, 1, 64, 8)  # a whole block: what is added to one is 0, and numpy warns of 0 · inf
    k, v = torch.randn(2, 1, 1, 300, 8)
    size = torch.ones(1, 300)
    size[:, :200] = 0
    low = k.clone()
    low[:, :, :200] = -torch.inf
    for keys, sizes in ((k, size), (low, None), (low, torch.ones(1, 300))):
        got = stk.attention(q.abs(), keys, v, sizes, backend="triton")
        torch.testing.assert_close(got, stk.attention(q.abs(), keys, v, sizes, backend="reference"))


@pytest.mark.parametrize("far", ["k", "q"])
def test_rows_that_are_far_apart(tmp_path, far):
    """A block of rows spans more than 2^31 elements, as in a large batch of which the tokens come first."""
    stride, tokens = 2**25, 150
    with open(tmp_path / "rows", "wb") as file:  # a file of holes, which takes no space
        file.truncate(2 * stride * tokens)
    memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=stride * tokens, dtype=torch.bfloat16)
    rows = memory.as_strided((1, 1, tokens, 16), (16, 16, stride, 1)).copy_(torch.randn(1, 1, tokens, 16))
    other = torch.randn(1, 1, tokens, 16).bfloat16()
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in ((rows, other) if far == "q" else (other, rows))]
        out = stk.attention(*leaves, leaves[1], torch.ones(1, tokens), backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, other)])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dim", [24, 32])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("affine", ["trained", "fixed", "none"])
@pytest.mark.parametrize("outputs", ["both", "normed"])
def test_early_loads_change_no_bit_of_merge_norm(monkeypatch, dim, sized, affine, outputs):
    x, residual = torch.randn(2, 2, 14, dim, requires_grad=True).unbind()
    weight, bias = torch.randn(2, dim, requires_grad=affine == "trained").unbind()
    size = torch.rand(2, 14) + 0.1 if sized else None
    plan = stk.match(x.detach(), r=5)
    table, used, found = config.norm.__wrapped__, [], []
    for early in (False, True):

        def chosen(*arguments, early=early):
            used.append(early)
            return {**table(*arguments), "EARLY": early}

        monkeypatch.setattr(config, "norm", chosen)
        parameters = [None, None] if affine == "none" else [weight, bias]
        y, normed, _ = stk.merge_norm(x, residual, plan, size, *parameters, backend="triton")
        loss = normed.exp().sum() if outputs == "normed" else (y.square() + normed.exp()).sum()
        wanted = [x, residual, weight, bias] if affine == "trained" else [x, residual]
        found.append([y, normed, *torch.autograd.grad(loss, wanted)])
    # forward, backward, and where both gradients are summed the memory for their parts
    each = 3 if affine == "trained" else 2
    assert used == [False] * each + [True] * each
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_cover_what_they_must(dtype):
    """A gradient in one launch sees all queries and keys of a head; the pieces of a row make up the row."""
    for architecture, queries, keys in itertools.product(
        (80, 90, 100, 120), (1, 54, 64, 65), (1, 16, 17, 58, 64, 65, 577)
    ):
        for channels in (16, 40, 64, 65, 128):
            found = config.attention(queries, keys, channels, dtype, architecture)
            if found["item"]:
                assert found["item"]["BLOCK_Q"] >= queries
                assert found["item"]["BLOCK_K"] >= keys
            for one in filter(None, found.values()):
                assert one["BLOCK_D"] >= channels
                assert all(one[side] >= 16 and one[side] & (one[side] - 1) == 0 for side in ("BLOCK_Q", "BLOCK_K"))
    for dim in (1, 8, 64, 320, 384, 768, 1000, 1024, 1152, 1280, 4096):
        found = config.merge(dim, 52, dtype, "mean")
        assert dim <= found["CHUNKS"] * found["BLOCK_D"] < dim + found["BLOCK_D"]
        assert config.norm(dim, 52, dtype)["BLOCK_D"] >= dim


def test_launches_of_attention():
    """One launch forward; backward one while a block holds all queries and keys, else two, however many they are."""
    from stoptome_kernels._backends.triton import attention_grad

    half, full = torch.bfloat16, torch.float32
    for dtype, tokens, backward in ((half, 54, 1), (half, 64, 1), (half, 197, 2), (half, 4096, 2), (full, 54, 2)):
        q = torch.empty(2, 12, tokens, 64, dtype=dtype, device="meta")
        lse = torch.empty(2, 12, tokens, device="meta")
        inputs = stk.reference.AttentionInputs(q, q, q)
        launches = attention_grad.grad_launches(q, inputs, q, lse, (q, q, q, None, None))
        assert len(launches) == backward


def test_launches():
    """One launch to match while the sources fit a tile, two beyond; merging takes one more."""
    from stoptome_kernels._backends.triton import match

    for tokens, most in ((54, 1), (197, 1), (257, 1), (577, 2), (4097, 2)):
        for heads, channels in ((12, 64), (12, 80), (1, 768)):
            metric = torch.empty(2, heads, tokens, channels, device="meta")
            index = [torch.empty(2, n, dtype=torch.int32, device="meta") for n in (tokens, tokens, tokens - 7)]
            assert len(match.launches(metric, 8, 1, index)) == most
