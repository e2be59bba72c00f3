# SPDX-License-Identifier: Apache-2.0
"""Properties of the matching on every backend."""

import hypothesis.strategies as st
import pytest
import stoptome_kernels as stk
import torch

from support.helpers import DTYPES, ROUNDOFF, assert_valid, dtypes_of, examples, groups, similarity_gap


def metric_of(n, heads, tokens, channels, dtype, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, tokens, channels) if heads == 0 else (n, heads, tokens, channels)
    return torch.randn(shape, generator=generator).to(device, dtype)


shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 4),
        "heads": st.integers(0, 3),
        "tokens": st.integers(1, 40),
        "channels": st.sampled_from([1, 2, 5, 16, 33, 64]),
        "protected": st.integers(0, 7),
        "r": st.integers(0, 30),
        "seed": st.integers(0, 2**20),
    }
)


def unpack(shape, dtype, device):
    metric = metric_of(shape["n"], shape["heads"], shape["tokens"], shape["channels"], dtype, shape["seed"], device)
    return metric, shape["r"], min(shape["protected"], shape["tokens"])


def test_agrees_with_the_reference(backend, device):
    @examples(backend, shape=shapes, dtype=st.sampled_from(DTYPES))
    def check(shape, dtype):
        if dtype not in dtypes_of(backend):
            dtype = torch.float32
        metric, r, protected = unpack(shape, dtype, device)
        plan, reference = stk.match(metric, r, protected, backend), stk.match(metric, r, protected, "reference")
        assert_valid(plan)
        assert plan.r == min(r, (shape["tokens"] - protected) // 2)
        # a dot product of C rounded products, of vectors that were rounded twice
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        band = 4 * (shape["channels"] + 4) * ROUNDOFF[accumulated]
        for item in range(shape["n"]):
            if not torch.equal(plan.dest[item], reference.dest[item]):
                gap = similarity_gap(
                    metric[item].cpu(), protected, plan.dest[item].cpu(), reference.dest[item].cpu(), plan.r
                )
                assert gap <= band

    check()


@pytest.mark.parametrize("tokens", [54, 197])
def test_flips_near_a_tie_are_rare(backend, device, tokens):
    """Disagreements are allowed within rounding; there must be next to none of them on random data."""
    n = 4 if backend == "triton" else 64
    metric = metric_of(n, 4, tokens, 64, torch.float32, 1, device)
    plan, reference = (stk.match(metric, 8, 1, b) for b in (backend, "reference"))
    assert (plan.dest != reference.dest).any(1).sum().item() <= n // 32


def test_scale_of_a_token_does_not_matter(backend, device):
    @examples(backend, shape=shapes, exponent=st.integers(-100, 100))
    def check(shape, exponent):
        metric, r, protected = unpack(shape | {"heads": 0}, torch.float32, device)
        scale = torch.full((shape["tokens"], 1), 2.0**exponent, device=device)
        scale[::3] = 1.0
        plan, scaled = stk.match(metric, r, protected, backend), stk.match(metric * scale, r, protected, backend)
        assert torch.equal(plan.dest, scaled.dest)  # a power of two rounds nothing: bit for bit
        assert torch.equal(plan.members, scaled.members)

    check()


def test_items_are_independent(backend, device):
    @examples(backend, shape=shapes)
    def check(shape):
        metric, r, protected = unpack(shape, torch.float32, device)
        order = torch.randperm(shape["n"])
        plan = stk.match(metric, r, protected, backend)
        permuted = stk.match(metric[order.to(device)], r, protected, backend)
        assert torch.equal(plan.dest[order], permuted.dest)
        alone = stk.match(metric[:1], r, protected, backend)
        assert torch.equal(alone.dest, plan.dest[:1])

    check()


@pytest.mark.interpreted
def test_protected_tokens_are_not_looked_at(backend, device):
    @examples(backend, shape=shapes)
    def check(shape):
        metric, r, protected = unpack(shape, torch.float32, device)
        changed = metric.clone()
        changed[..., :protected, :] = torch.nan
        assert torch.equal(
            stk.match(metric, r, protected, backend).members, stk.match(changed, r, protected, backend).members
        )

    check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("heads", [0, 3])
def test_a_bad_token_touches_no_other_item(backend, device, bad, heads):
    metric = metric_of(5, heads, 30, 20, torch.float32, 3, device)
    plan = stk.match(metric, 9, 1, backend)
    for token in (7, 8):
        broken = metric.clone()
        broken[2, ..., token, 11] = bad
        other = stk.match(broken, 9, 1, backend)
        assert_valid(other)
        for item in (0, 1, 3, 4):
            assert torch.equal(plan.members[item], other.members[item])
            assert torch.equal(plan.offsets[item], other.offsets[item])
        alone = [m for m in other.members[2].tolist() if m in (token, ~token)]
        assert len(alone) == 1
        # nothing was merged with it: as a source it stayed, as a destination it kept to itself
        members = [g for g in groups(other, 2) if token in g or ~token in g]
        assert members == [[token]]


@pytest.mark.parametrize("exponent", [100, 124, -110, -149])
def test_huge_and_tiny_tokens(backend, device, exponent):
    """Their squares overflow or vanish in float32 (and 2^-149 is its smallest number), the tokens themselves do not."""
    metric = torch.randint(-8, 9, (3, 21, 8), device=device).float()
    plan, scaled = (stk.match(m, 6, 1, backend) for m in (metric, torch.ldexp(metric, torch.tensor(exponent))))
    assert torch.equal(plan.members, scaled.members)
    assert torch.equal(plan.offsets, scaled.offsets)


@pytest.mark.parametrize("heads", [2, 3, 12])
def test_a_head_mean_of_finite_heads_is_finite(backend, device, heads):
    """Their sum is not, in float32."""
    metric = torch.randint(-8, 9, (3, heads, 21, 8), device=device).float()
    metric[:, :, 5] = 8.0
    large = metric * 2.0**124
    plan, scaled = (stk.match(m, 6, 1, backend) for m in (metric, large))
    assert large.sum(1).isinf().any()
    assert torch.equal(plan.members, scaled.members)


def strided_views(dtype, device):
    """The same values behind different strides: contiguous, a key of a packed QKV, slices, an inner stride."""
    qkv = metric_of(1, 0, 4 * 23 * 3 * 2 * 16, 1, dtype, 7, device).view(4, 23, 3, 2, 16)
    keys = qkv[:, :, 1].transpose(1, 2)  # (N, H, T, C), strided as a ViT has it
    yield keys.contiguous(), keys
    yield keys[:, :, 3:].contiguous(), keys[:, :, 3:]
    yield keys[..., 2:13].contiguous(), keys[..., 2:13]
    yield keys[1:3, :1].contiguous(), keys[1:3, :1]
    yield keys[..., ::3].contiguous(), keys[..., ::3]
    yield keys.transpose(2, 3)[..., :16, :11].contiguous(), keys.transpose(2, 3)[..., :16, :11]
    yield keys[:1].expand(4, -1, -1, -1).contiguous(), keys[:1].expand(4, -1, -1, -1)


@pytest.mark.interpreted
def test_strides(backend, device):
    for dtype in dtypes_of(backend):
        for contiguous, view in strided_views(dtype, device):
            assert torch.equal(stk.match(contiguous, 5, 1, backend).members, stk.match(view, 5, 1, backend).members)


@pytest.mark.parametrize("heads", [1, 2, 12])
def test_head_mean(backend, device, heads):
    metric = metric_of(3, heads, 40, 16, torch.float64 if backend != "triton" else torch.float32, 11, device)
    assert torch.equal(stk.match(metric, 7, 1, backend).dest, stk.match(metric.mean(1), 7, 1, backend).dest)


@pytest.mark.parametrize(
    ("n", "tokens", "protected", "r"),
    [
        (0, 9, 1, 2),
        (2, 0, 0, 3),
        (2, 5, 5, 3),
        (2, 9, 1, 0),
        (2, 9, 1, 100),
        (3, 6, 5, 1),
        (3, 1, 0, 1),
        (1, 2, 0, 1),
        (2, 3, 1, 4),
    ],
)
def test_edges(backend, device, n, tokens, protected, r):
    metric = metric_of(n, 0, tokens, 4, torch.float32, 0, device)
    plan = stk.match(metric, r, protected, backend)
    assert_valid(plan)
    assert plan.r == min(r, (tokens - protected) // 2)
    assert plan.dest.shape == (n, tokens)
    x = torch.randn(n, tokens, 3, device=device)
    for mode in ("mean", "sum", "max"):
        y, size = stk.merge(x, plan, mode=mode, backend=backend)
        assert y.shape == (n, plan.tokens_out, 3)
        assert size.sum().item() == n * tokens
    assert stk.unmerge(y, plan, backend).shape == x.shape


def test_r_0_is_the_identity(backend, device):
    plan = stk.match(metric_of(2, 0, 9, 4, torch.float32, 0, device), 0, 1, backend)
    assert plan.dest.tolist() == [list(range(9))] * 2
    x = torch.randn(2, 9, 3, device=device)
    size = torch.rand(2, 9, device=device)
    y, size_out = stk.merge(x, plan, size, backend=backend)
    assert y is x
    assert size_out is size
    assert stk.unmerge(x, plan, backend) is x
    assert torch.equal(stk.merge(x, plan, backend=backend)[1], torch.ones(2, 9, device=device))


def test_r_is_an_upper_bound(backend, device):
    metric = metric_of(2, 0, 20, 4, torch.float32, 0, device)
    assert torch.equal(stk.match(metric, 9, 1, backend).members, stk.match(metric, 10**9, 1, backend).members)


@pytest.mark.interpreted
@pytest.mark.parametrize("tokens", [515, 700])
def test_many_tokens(backend, device, tokens):
    """More than one tile of sources on every backend."""
    metric = metric_of(2, 0, tokens, 8, torch.float32, 13, device)
    metric[1, 300:] = metric[1, 10]  # hundreds of exact ties across tiles
    plan, reference = (stk.match(metric, 120, 3, b) for b in (backend, "reference"))
    assert_valid(plan)
    assert torch.equal(plan.members, reference.members)
    assert torch.equal(plan.offsets, reference.offsets)


def test_plan_memory():
    plan = stk.match(torch.randn(3, 54, 8), 2)
    assert sum(t.numel() * t.element_size() for t in (plan.dest, plan.members, plan.offsets)) <= 16 * 3 * 54
