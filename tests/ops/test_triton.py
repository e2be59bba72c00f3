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

    def use(one_launch: int = config.ONE_LAUNCH, dots: bool = False, span: int | None = None) -> None:
        table = config.match.__wrapped__

        def match(heads, channels, larger, dtype, compiled=False):
            found = table(heads, channels, larger, dtype, False)
            for kernel in ("item", "score"):
                if dots and found[kernel]:
                    # The interpreter multiplies by BLAS instead, to make exact ties. Here: what a GPU multiplies.
                    found[kernel] |= {"PRODUCT": table(heads, channels, larger, dtype, True)[kernel]["PRODUCT"]}
            if span and found["plan"]:
                found["plan"] |= {"SPAN": span, "ONE": larger <= span}
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


@pytest.mark.parametrize("changes", [{"BLOCK_K": 16}, {"BLOCK_Q": 32, "BLOCK_K": 32}, {"BLOCK_K": 128}])
@pytest.mark.parametrize(("tokens", "ahead"), [(40, 0), (64, 3), (100, 4), (96, 0)])
def test_attention_in_other_blocks(monkeypatch, changes, tokens, ahead):
    """Tiles of other sizes, whole blocks and what is left of them, alone or with the prefix, give the same."""
    q, k, v = torch.randn(3, 2, 2, tokens, 8)
    prefix = torch.randn(2, 1, 2, ahead, 8) if ahead else (None, None)
    size = torch.rand(2, tokens) + 0.1
    size[:, -7:] = 0  # a padded plan's
    want = stk.attention(q, k, v, size, *prefix, backend="reference")
    table = config.attention.__wrapped__

    def chosen(*arguments):
        return {**table(*arguments), "attend": {**table(*arguments)["attend"], **changes}}

    monkeypatch.setattr(config, "attention", chosen)
    torch.testing.assert_close(stk.attention(q, k, v, size, *prefix, backend="triton"), want)


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
    for capability, queries, keys in itertools.product((80, 90, 100), (1, 54, 64, 65), (1, 16, 17, 58, 64, 65, 577)):
        for channels in (16, 40, 64, 65, 128):
            found = config.attention(queries, keys, channels, dtype, capability)
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
