# SPDX-License-Identifier: Apache-2.0
"""Device functions of the matching: cosine similarity, and the most similar target of every source.

Everything is float32 arithmetic, and every row goes through the same operations in the same order, so that tokens that
are copies of each other tie exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITE = tl.constexpr(0x7F800000)  # float32 bits of inf; |x| as bits is at least this for inf and NaN alone


@triton.jit
def head_mean(
    metric, token, inside, head_stride, token_stride, first,
    C: tl.constexpr, H: tl.constexpr, SHRINK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return channels first.. of the mean over heads, times a power of two: (ROWS, BLOCK_C) float32; of all rows if
    inside is None."""
    channel = first + tl.arange(0, BLOCK_C)
    mask = None if inside is None else inside[:, None]
    if C % BLOCK_C:
        mask = (channel < C)[None, :] if inside is None else mask & (channel < C)[None, :]
    nothing = None if mask is None else 0.0
    place = metric + token.to(tl.int64)[:, None] * token_stride + channel[None, :]
    total = tl.load(place, mask=mask, other=nothing).to(tl.float32)
    # SHRINK is a power of two ≤ 1/H: exact, and the sum of finite heads stays finite
    if H > 1:
        total = total * SHRINK
        if H <= 16:
            for _ in tl.static_range(1, H):  # unrolled: all heads' loads are in flight together
                place += head_stride
                total = tl.fma(tl.load(place, mask=mask, other=nothing).to(tl.float32), SHRINK, total)
        else:
            for _ in range(1, H):
                place += head_stride
                total = tl.fma(tl.load(place, mask=mask, other=nothing).to(tl.float32), SHRINK, total)
    return total


@triton.jit
def _magnitude(m):
    """Return the bits of |m| as int32, which are in its order; at least INFINITE if it is not finite."""
    return m.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scaled(m, peak, SHIFT: tl.constexpr):
    """Return rows scaled by the power of two that brings their peak to 2^SHIFT; exact, so cos keeps every bit. Bad
    rows: 0."""
    exponent = tl.minimum(tl.maximum(254 + SHIFT - (peak >> 23), 1), 254)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where((peak < INFINITE)[:, None], m * scale[:, None], 0.0)


@triton.jit
def _inverse_norm(squares):
    """Return 1 / |m|, and 0 for a zero row, whose similarity to everything is 0."""
    # scaled rows have squares in [1, 4·C·2^(2·SHIFT)], so that one Newton step on the 2^-22 of the hardware's rsqrt is
    # good to the last bit or two; exact division and root would cost registers for cases that can't occur
    safe = tl.where(squares > 0, squares, 1.0)
    root = tl.rsqrt(safe)
    root = root * (1.5 - 0.5 * safe * root * root)
    return tl.where(squares > 0, root, 0.0)


@triton.jit
def _halves(m):
    """Return the even and the odd channels of (ROWS, K): (ROWS, K/2) each; neighbours share a thread, so nothing
    moves."""
    return tl.split(tl.reshape(m, (m.shape[0], m.shape[1] // 2, 2)))


@triton.jit
def _dot_half(u, v, score):
    """Return score + u vᵀ of at most 32 channels."""
    if u.shape[1] > 16:
        u_even, u_odd = _halves(u)
        v_even, v_odd = _halves(v)
        score = tl.dot(u_even, tl.trans(v_even), score, input_precision="ieee")
        score = tl.dot(u_odd, tl.trans(v_odd), score, input_precision="ieee")
    else:
        score = tl.dot(u, tl.trans(v), score, input_precision="ieee")
    return score


@triton.jit
def _dot_float32(u, v, score):
    """Return score + u vᵀ of at most 64 channels by float32 FMAs, 16 at a time: a thread holds them all."""
    if u.shape[1] > 32:
        u_even, u_odd = _halves(u)
        v_even, v_odd = _halves(v)
        score = _dot_half(u_even, v_even, score)
        score = _dot_half(u_odd, v_odd, score)
    else:
        score = _dot_half(u, v, score)
    return score


@triton.jit
def _thirds(m, TYPE: tl.constexpr):
    """Return float32 as a sum of three bfloat16: 3 × 8 bits are the 24 of float32, nothing is lost."""
    high = m.to(tl.bfloat16)
    rest = m - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high.to(TYPE), middle.to(TYPE), low.to(TYPE)


@triton.jit
def _dot_thirds(u, v, score, TYPE: tl.constexpr):
    """Return score + u vᵀ on tensor cores. A product of two bfloat16 is exact; the three products left out are below
    2^-25 of the whole, less than the rounding of a float32 product."""
    u1, u2, u3 = _thirds(u, TYPE)
    v1, v2, v3 = _thirds(v, TYPE)
    v1 = tl.trans(v1)
    v2 = tl.trans(v2)
    score = tl.dot(u3, v1, score)
    score = tl.dot(u1, tl.trans(v3), score)
    score = tl.dot(u2, v2, score)
    score = tl.dot(u2, v1, score)
    score = tl.dot(u1, v2, score)
    return tl.dot(u1, v1, score)


@triton.jit
def _dot(u, v, score, PRODUCT: tl.constexpr, TYPE: tl.constexpr):
    """Return score + u vᵀ of float32 rows, every product exact or rounded to float32, summed in float32; never tf32."""
    if PRODUCT == "thirds":
        score = _dot_thirds(u, v, score, TYPE)
    elif PRODUCT == "narrow":  # rows of 16-bit numbers scaled by powers of two: still exact in their own type
        score = tl.dot(u.to(TYPE), tl.trans(v.to(TYPE)), score)
    elif PRODUCT == "sums":  # for the interpreter alone
        score += tl.sum(u[:, None, :] * v[None, :, :], 2)
    else:
        score = _dot_float32(u, v, score)
    return score


@triton.jit
def _row_peak(
    metric, token, inside, head_stride, token_stride,
    C: tl.constexpr, H: tl.constexpr, SHRINK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the peaks of rows that are longer than BLOCK_C, in a pass before; the second reading comes from the
    cache."""
    peaks = tl.zeros((token.shape[0], BLOCK_C // 4), tl.int32)  # of neighbours, which share a thread
    for first in range(0, C, BLOCK_C):
        m = head_mean(metric, token, inside, head_stride, token_stride, first, C, H, SHRINK, BLOCK_C)
        peaks = tl.maximum(peaks, tl.max(tl.reshape(_magnitude(m), (token.shape[0], BLOCK_C // 4, 4)), 2))
    return tl.max(peaks, 1)


@triton.jit
def token_of(order, first, place, inside):
    """Return the tokens at these places of a set: every other one from ``first`` on, or what ``order`` holds from there
    on."""
    return first + 2 * place if order is None else tl.load(order + first + place, mask=inside, other=0)


@triton.jit
def nearest(
    metric, order, a, first_a, first_b, sources, targets, head_stride, token_stride,
    C: tl.constexpr, H: tl.constexpr, SHRINK: tl.constexpr, SHIFT: tl.constexpr,
    PRODUCT: tl.constexpr, TYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return what sources a propose: best similarity (BLOCK_A,) float32 and its target (BLOCK_A,) int32, lowest on a
    tie."""
    WHOLE: tl.constexpr = BLOCK_C >= C
    inside_a = a < sources
    # What is past the end of a set repeats its last token, so that loads need no masks; no set of a matching is empty.
    # Small tiles keep them: without, ptxas has more loads in flight than fit the registers of three programs.
    MASKED: tl.constexpr = a.shape[0] < 64
    mask_a = inside_a if MASKED else None
    token_a = token_of(order, first_a, tl.minimum(a, sources - 1), inside_a)
    if WHOLE:
        u = head_mean(metric, token_a, mask_a, head_stride, token_stride, 0, C, H, SHRINK, BLOCK_C)
        peak_a = tl.max(_magnitude(u), 1)
        u = _scaled(u, peak_a, SHIFT)
        square_a = tl.sum(u * u, 1)
    else:
        peak_a = _row_peak(metric, token_a, mask_a, head_stride, token_stride, C, H, SHRINK, BLOCK_C)

    best = tl.full(a.shape, float("-inf"), tl.float32)
    partner = tl.zeros(a.shape, tl.int32)
    for start in range(0, targets, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        inside_b = b < targets
        token_b = token_of(order, first_b, tl.minimum(b, targets - 1), inside_b)
        mask_b = inside_b if MASKED else None
        if WHOLE:
            v = head_mean(metric, token_b, mask_b, head_stride, token_stride, 0, C, H, SHRINK, BLOCK_C)
            peak_b = tl.max(_magnitude(v), 1)
            v = _scaled(v, peak_b, SHIFT)
            square_b = tl.sum(v * v, 1)
            score = _dot(u, v, tl.zeros((a.shape[0], BLOCK_B), tl.float32), PRODUCT, TYPE)
        else:
            peak_b = _row_peak(metric, token_b, mask_b, head_stride, token_stride, C, H, SHRINK, BLOCK_C)
            square_a = tl.zeros(a.shape, tl.float32)
            square_b = tl.zeros(b.shape, tl.float32)
            score = tl.zeros((a.shape[0], BLOCK_B), tl.float32)
            for first in range(0, C, BLOCK_C):
                u = head_mean(metric, token_a, mask_a, head_stride, token_stride, first, C, H, SHRINK, BLOCK_C)
                v = head_mean(metric, token_b, mask_b, head_stride, token_stride, first, C, H, SHRINK, BLOCK_C)
                u = _scaled(u, peak_a, SHIFT)
                v = _scaled(v, peak_b, SHIFT)
                square_a += tl.sum(u * u, 1)
                square_b += tl.sum(v * v, 1)
                score = _dot(u, v, score, PRODUCT, TYPE)
        score = score * _inverse_norm(square_b)[None, :] * _inverse_norm(square_a)[:, None]
        score = tl.where((inside_b & (peak_b < INFINITE))[None, :], score, float("-inf"))
        value, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        partner = tl.where(value > best, start + at, partner)
        best = tl.maximum(value, best)
    best = tl.where(inside_a & (peak_a < INFINITE), best, float("-inf"))
    best = tl.where(best == 0.0, 0.0, best)  # −0 = 0, also where bits are compared
    return best, tl.where(best > float("-inf"), partner, 0)
