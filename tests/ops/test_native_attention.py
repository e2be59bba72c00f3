# SPDX-License-Identifier: Apache-2.0
"""The native kernel of attention, called by addresses as the backend will: values against the definition in float64,
instruction sets, strides, what is not finite, threads."""

import random

import pytest
import torch
from stoptome_kernels import _native
from stoptome_kernels import reference as definition
from stoptome_kernels.reference import AttentionInputs

from support.helpers import DTYPES, ROUNDOFF

INF, NAN = torch.inf, torch.nan
# queries, keys of the item, keys of the prefix, channels: around the borders of tiles and of vectors
SHAPES = [
    (1, 1, 0, 1), (3, 0, 3, 3), (2, 15, 1, 16), (6, 16, 0, 40), (7, 17, 5, 64), (13, 33, 0, 80), (12, 60, 4, 128),
    (54, 54, 0, 64), (11, 197, 4, 80), (5, 300, 0, 16), (1, 127, 1, 33),
]  # fmt: skip
MARGIN = 64  # numbers around the outputs, which must stay as they are


def at(x):
    """Address and strides of items, heads and tokens."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])


def with_margin(shape, dtype):
    flat = torch.full((torch.Size(shape).numel() + 2 * MARGIN,), 7.0, dtype=dtype)
    inside = flat[MARGIN:-MARGIN]
    inside.fill_(NAN)
    return flat, inside.view(shape)


def attention(q, k, v, size=None, prefix_k=None, prefix_v=None, scale=None, threads=1, lse=True):
    n, heads, queries, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = [with_margin((n, queries, heads, dim), q.dtype), with_margin((n, heads, queries), wide)]
    (_, out), (_, sums) = outputs
    prefixes = (0, 0) if prefix_k is None else (prefix_k.shape[0], prefix_k.shape[2])
    _native.attention(
        at(q), at(k), at(v), at(prefix_k), at(prefix_v), (n, heads, queries, k.shape[2], dim, *prefixes),
        DTYPES.index(q.dtype), (0, 0, 0) if size is None else (size.data_ptr(), *size.stride()),
        dim**-0.5 if scale is None else scale, out.data_ptr(), sums.data_ptr() if lse else 0, threads,
    )  # fmt: skip
    for flat, _ in outputs:
        assert (flat[:MARGIN] == 7).all()
        assert (flat[-MARGIN:] == 7).all()
    return out.transpose(1, 2), sums


def make(queries, tokens, ahead, dim, dtype=torch.float32, n=4, m=2, heads=3):
    """q, k and v as a linear layer leaves them, sizes of which some are 0, and a prefix that items share."""
    packed = torch.randn(n, max(queries, tokens), 3, heads, dim).to(dtype)
    q, k, v = (packed[:, :, part].transpose(1, 2) for part in range(3))
    size = torch.randint(1, 30, (n, tokens)).float()
    size[:, 1:][torch.rand(n, max(0, tokens - 1)) < 0.2] = 0
    prefix = torch.randn(2, m, heads, ahead, dim).to(dtype) if ahead else (None, None)
    return q[:, :, :queries], k[:, :, :tokens], v[:, :, :tokens], size, *prefix


def exact(arguments, scale=None):
    return definition.attention(AttentionInputs(*(x if x is None else x.double() for x in arguments), scale=scale))


def assert_right(arguments, scale=None, **more):
    """A probability is as wrong as the score it comes from, which is a sum of products rounded one by one."""
    out, lse = attention(*arguments, scale=scale, **more)
    want, want_lse = exact(arguments, scale)
    q, k, v, _, prefix_k, prefix_v = arguments
    wide = ROUNDOFF[lse.dtype]

    def longest(*rows):
        return max(x.double().norm(dim=-1).max() for x in rows if x is not None and x.numel())

    score = longest(q) * longest(k, prefix_k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    noise = 4 * wide * (4 + score)
    assert out.dtype == q.dtype
    assert ((lse - want_lse).abs() <= noise + wide * want_lse.abs()).all()
    bound = ROUNDOFF[q.dtype] * (want.abs() + 1e-4) + noise * longest(v, prefix_v)
    assert ((out - want).abs() <= bound).all(), ((out - want).abs() / bound).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(isa, dtype):
    assert _native.instruction_set() == isa
    for shape in SHAPES:
        assert_right(make(*shape, dtype))


@pytest.mark.parametrize("seed", range(4))
def test_any_shape(isa, seed):
    choose = random.Random(seed)
    for _ in range(12):
        n, m = choose.choice([(1, 1), (6, 1), (6, 2), (6, 6)])
        shape = [choose.randint(1, 20), choose.randint(1, 70), choose.choice([0, 1, 4, 20]), choose.randint(1, 70)]
        arguments = list(make(*shape, choose.choice(DTYPES), n, m, choose.randint(1, 3)))
        if choose.random() < 0.3:
            arguments[3] = None
        assert_right(arguments, choose.choice([None, 0.3]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(isa, dtype):
    """Axes in any order with NaN between the numbers; and one head that stands for all."""

    def spread(x):
        if x is None:
            return None
        order = random.Random(0).sample(range(3), 3)
        shape = [x.shape[axis] * 2 + 1 for axis in order] + [x.shape[3] + 3]
        inside = torch.full(shape, NAN, dtype=x.dtype)[1::2, 1::2, 1::2, 2:-1]
        inside = inside.permute(*(order.index(axis) for axis in range(3)), 3)
        return inside.copy_(x)

    q, k, v, size, prefix_k, prefix_v = make(14, 35, 3, 20, dtype)
    scattered = torch.full((35, 4, 2), NAN)[:, :, 0].t().copy_(size)
    assert_right([*map(spread, (q, k, v)), scattered, spread(prefix_k), spread(prefix_v)])
    one = [x[:1, :1].expand(4, 3, -1, -1) for x in (q, k, v)]
    assert_right([*one, size[:1].expand(4, -1), *(x[:, :1].expand(-1, 3, -1, -1) for x in (prefix_k, prefix_v))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_attend_to(isa, dtype):
    q, k, v, size, prefix_k, prefix_v = make(8, 21, 2, 24, dtype)
    size[1] = 0
    out, lse = attention(q, k, v, size)
    assert (out[1] == 0).all()
    assert (lse[1] == -INF).all()
    assert_right([q[::2], k[::2], v[::2], size[::2], None, None])
    assert_right([q, k, v, size, prefix_k, prefix_v])  # but for the prefix
    for length in range(1, 20):  # copies behind the last key don't count
        out, lse = attention(q, k[:, :, :length], v[:, :, :length], torch.zeros(4, length))
        assert (out == 0).all()
        assert (lse == -INF).all()


def assert_same_kind(arguments):
    """NaN and infinities where the definition has them."""
    out, lse = attention(*arguments)
    want, want_lse = exact(arguments)
    for found, right in ((out, want), (lse, want_lse)):
        assert torch.equal(found.isnan(), right.isnan())
        assert torch.equal(found.isinf(), right.isinf())
        assert torch.equal(found[found.isinf()].double(), right[right.isinf()])
        clean = right.isfinite()
        torch.testing.assert_close(found[clean].double(), right[clean], rtol=0.02, atol=0.02)
    return out, lse


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite(isa, bad):
    for dtype in DTYPES:
        for name in ("q", "k", "v", "prefix_k", "prefix_v"):
            for token in (0, 1):
                arguments = AttentionInputs(*make(8, 18, 2, 17, dtype))
                getattr(arguments, name)[0, 1, token, 16] = bad
                out, _ = assert_same_kind(arguments[:6])
                assert not out[0, 1].isfinite().all()
                assert out[2:].isfinite().all()
        arguments = make(8, 18, 2, 17, dtype)
        arguments[3][1, 17] = bad  # its logarithm: NaN, +inf, NaN
        out, _ = assert_same_kind(arguments)
        assert out[1].isnan().all()


def test_more_than_one_that_is_not_finite(isa):
    for dtype in DTYPES:
        q, k, v, _, _, _ = make(9, 18, 0, 16, dtype)
        q.copy_(q.abs() + 0.1)
        for first, second in ((INF, NAN), (INF, -INF), (-INF, NAN), (INF, INF)):
            k[1, 1, 3], k[1, 1, 17] = first, second
            assert_same_kind((q, k, v, None, None, None))
        k[1, 1] = -INF  # every score: nothing to attend to
        out, lse = assert_same_kind((q, k, v, None, None, None))
        assert (out[1, 1] == 0).all()
        assert (lse[1, 1] == -INF).all()
        size = torch.ones(4, 18)
        size[2, 5] = 0
        v[2, 1, 5, 7] = NAN  # 0 times NaN
        q[3, 1, 4, 0] = -INF  # times keys above 0: nothing to attend to
        k[3, 1, :, 0].abs_()
        _, lse = assert_same_kind((q, k, v, size, None, None))
        assert lse[3, 1, 4] == -INF


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(isa, dtype):
    """Weights from 1 down to what is 0, which is where the polynomial of the exponential ends."""
    q, k, v, size, prefix_k, prefix_v = make(9, 40, 2, 8, dtype)
    assert_right([q, k, v, size, prefix_k, prefix_v], 30.0)
    q, k = torch.ones(1, 1, 1, 1, dtype=dtype), torch.linspace(-800, 0, 161).to(dtype).view(1, 1, -1, 1)
    v = torch.ones_like(k)
    out, lse = attention(q, k, v, scale=1.0)
    assert abs(out.item() - 1) <= 4 * ROUNDOFF[lse.dtype]
    torch.testing.assert_close(lse.double(), exact((q, k, v), 1.0)[1], rtol=0, atol=8 * ROUNDOFF[lse.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential(isa, dtype):
    """The weight of the first of two keys, for each distance of their scores."""
    x = torch.cat([torch.linspace(-87, 0, 20001), torch.linspace(-2, 0, 20001)]).to(dtype).view(-1, 1, 1, 1)
    k, v = torch.cat([x, 0 * x], 2), torch.cat([0 * x + 1, 0 * x], 2)
    out, want = attention(0 * x + 1, k, v, scale=1.0)[0], x.double().sigmoid()
    assert ((out - want).abs() <= 4 * ROUNDOFF[dtype] * want).all(), ((out - want).abs() / want).max() / ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa, dtype):
    """Bit for bit, and without the log-sum too; threads share the queries of one head."""
    for n, heads, tokens in ((3, 2, 54), (1, 1, 150), (1, 3, 40)):
        arguments = make(tokens, tokens, 4, 64, dtype, n, 1, heads)
        out, lse = attention(*arguments)
        for threads in (2, 3, 7):
            again, again_lse = attention(*arguments, threads=threads)
            assert torch.equal(out, again)
            assert torch.equal(lse, again_lse)
        again, untouched = attention(*arguments, threads=2, lse=False)
        assert torch.equal(out, again)
        assert untouched.isnan().all()


def test_a_query_does_not_depend_on_its_neighbours(isa):
    q, k, v, size, _, _ = make(17, 50, 0, 64)
    out, lse = attention(q, k, v, size)
    for first in (1, 4, 6, 16):
        some, some_lse = attention(q[:, :, first:], k, v, size)
        torch.testing.assert_close(some, out[:, :, first:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(some_lse, lse[:, :, first:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 0, 8), (4, 0, 2, 8)])
def test_empty(isa, shape):
    q, k, v, size, prefix_k, prefix_v = make(*shape)
    assert_right([q, k, v, size, prefix_k, prefix_v]) if q.numel() else attention(q, k, v, size)
    out, lse = attention(*(x[:0] for x in (q, k, v, size)), threads=2)
    assert out.numel() == lse.numel() == 0


def test_thousands_of_keys(isa):
    assert_right(make(7, 3000, 4, 24, n=1, m=1, heads=2), threads=2)
