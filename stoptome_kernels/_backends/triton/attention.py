# SPDX-License-Identifier: Apache-2.0
"""Proportional attention as Triton kernels, and its gradient (FlashAttention, Dao et al., arXiv 2205.14135).

The scores of a block of queries never leave the registers, ToMe's log size is one vector, and the keys of a shared
prefix are read where they are, nothing is concatenated. A program walks blocks of keys: whole blocks of the item's own
keys without a mask, then what is left of them together with the prefix, so that few keys are one block. The gradient is
one launch while one block holds all keys of a head, so that every row is read once; beyond, one for dq and one for dk
and dv. There are no atomics: an item's part of the prefix's gradient is written on its own, and summed afterwards.

Scores are kept in base 2, as exp2 is what the hardware has. At these sizes a multiprocessor's time goes into issuing
instructions, not into memory or tensor cores: what is done for each score counts (docs/dev/performance.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_heads_last, unit_stride
from ...reference import AttentionInputs, prefix_length, scale_of
from . import config
from .launch import launch
from .merge import _COMPILED, _narrowed
from .similarity import _dot_thirds

_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def _dot(u, v, total, THIRDS: tl.constexpr, TYPE: tl.constexpr):
    """Return total + u vᵀ in float32; TYPE is what is multiplied, float32 rows being taken apart where THIRDS."""
    if THIRDS:
        total = _dot_thirds(u, v, total, TYPE)
    else:
        total = tl.dot(u.to(TYPE), tl.trans(v.to(TYPE)), total, input_precision="ieee")
    return total


@triton.jit
def _where(H: tl.constexpr, blocks, share):
    """Return where this program works: item, its prefix, head, and block of rows."""
    block = tl.program_id(0) % blocks  # the blocks of a head follow each other: they read the same keys
    head = tl.program_id(0) // blocks
    item = head // H
    return item.to(tl.int64), (item // share).to(tl.int64), (head % H).to(tl.int64), block


@triton.jit
def _inside(rows, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the mask of (rows, BLOCK_D)."""
    mask = (rows < count)[:, None]
    if D < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return mask


@triton.jit
def _rows(x, stride, i, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return rows i of x, 0 past the end: (len(i), BLOCK_D)."""
    place = x + i.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(place, mask=_inside(i, count, D, BLOCK_D), other=0.0)


@triton.jit
def _log2(x):
    """Return log2 by the hardware's approximation, 2^-22 off at most, in one instruction for twenty; numbers below
    2^-126 count as 0."""
    if _COMPILED:
        x = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        x = tl.log2(x)
    return x


@triton.jit
def _places(x, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the addresses of the first BLOCK rows of x: (BLOCK, BLOCK_D)."""
    return x + tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_whole(places, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return a block of rows that are all there."""
    column = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(places, mask=column < D, other=0.0) if D < BLOCK_D else tl.load(places)


@triton.jit
def _load_last(
    x, stride, prefix, prefix_stride, j, tokens, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Return keys or values j, those of the prefix behind the item's own, 0 past the end: (len(j), BLOCK_D)."""
    places = x + j.to(tl.int64)[:, None] * stride
    if PREFIX:
        places = tl.where((j < tokens)[:, None], places, prefix + (j - tokens).to(tl.int64)[:, None] * prefix_stride)
    return tl.load(places + tl.arange(0, BLOCK_D)[None, :], mask=_inside(j, keys, D, BLOCK_D), other=0.0)


@triton.jit
def _store_rows(x, value, item, head, i, count, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows i of x (N, count, H, D)."""
    x += (item * count * H + head) * D
    place = x + i.to(tl.int64)[:, None] * (H * D) + tl.arange(0, BLOCK_D)[None, :]
    tl.store(place, _narrowed(value, x.dtype.element_ty), mask=_inside(i, count, D, BLOCK_D))


@triton.jit
def _store_keys(
    x, prefix, value, item, head, j, ahead, tokens,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Write rows j of x (N, tokens, H, D), and behind them of the prefix's part (N, H, ahead, D) float32."""
    _store_rows(x, value, item, head, j, tokens, H, D, BLOCK_D)
    if PREFIX:
        prefix += (item * H + head) * ahead * D
        place = prefix + (j - tokens).to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(place, value, mask=_inside(j, tokens + ahead, D, BLOCK_D) & (j >= tokens)[:, None])


@triton.jit
def _bias(size, j, tokens, keys, SIZED: tl.constexpr):
    """Return log2 of the sizes of keys j, 0 for those of the prefix, −inf past the end: (len(j),)."""
    bias = tl.zeros(j.shape, tl.float32)
    if SIZED:
        bias = _log2(tl.load(size + j, mask=j < tokens, other=1.0))
    return tl.where(j < keys, bias, float("-inf"))


@triton.jit
def _scores(query, key, bias, factor, BIASED: tl.constexpr, THIRDS: tl.constexpr, TYPE: tl.constexpr):
    """Return the scores of a block of queries by a block of keys, in base 2."""
    score = _dot(query, key, tl.zeros((query.shape[0], key.shape[0]), tl.float32), THIRDS, TYPE) * factor
    if BIASED:
        score += bias[None, :]
    return score


@triton.jit
def _attend_block(
    query, key, value, bias, largest, total, result, factor, FIRST: tl.constexpr, BIASED: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Return the largest score, the sum of the weights and the weighted values, with those of one more block of
    keys."""
    score = _scores(query, key, bias, factor, BIASED, THIRDS, TYPE)
    higher = tl.max(score, 1)
    if not FIRST:
        higher = tl.maximum(largest, higher)
    level = higher
    if BIASED:
        level = tl.where(higher == float("-inf"), 0.0, higher)  # sizes of 0 alone so far: 0, not NaN
    p = tl.exp2(score - level[:, None])
    if FIRST:
        total = tl.sum(p, 1)
        result = tl.zeros(result.shape, tl.float32)
    else:
        fade = tl.exp2(largest - level)
        total = total * fade + tl.sum(p, 1)
        result = result * fade[:, None]
    result = _dot(_narrowed(p, query.dtype), tl.trans(value), result, THIRDS, TYPE)
    return higher, total, result


@triton.jit(do_not_specialize=["queries", "tokens", "ahead", "share", "blocks"])
def attend(
    q, k, v, size, prefix_k, prefix_v, out, lse, queries, tokens, ahead, share, blocks, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, MANY: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write out (N, queries, H, D) and lse (N, H, queries); grid (N·H·blocks,). Without MANY one block holds all
    keys."""
    item, shared, head, block = _where(H, blocks, share)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.arange(0, BLOCK_K)
    keys = tokens + ahead
    query = _rows(q + item * q_item + head * q_head, q_token, i, queries, D, BLOCK_D)
    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    if PREFIX:
        prefix_k += shared * pk_item + head * pk_head
        prefix_v += shared * pv_item + head * pv_head
    if SIZED:
        size += item * tokens
    factor = scale * _LOG2E
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    whole = 0
    if MANY:
        whole = tokens // BLOCK_K * BLOCK_K
        key_places, value_places = _places(k, k_token, BLOCK_K, BLOCK_D), _places(v, v_token, BLOCK_K, BLOCK_D)
        for start in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
            key = _load_whole(key_places, D, BLOCK_D)
            value = _load_whole(value_places, D, BLOCK_D)
            bias = largest
            if SIZED:
                bias = _log2(tl.load(size + start + row))
            largest, total, result = _attend_block(
                query, key, value, bias, largest, total, result, factor, False, SIZED, THIRDS, TYPE
            )
            key_places += BLOCK_K * k_token
            value_places += BLOCK_K * v_token
    for start in tl.range(whole, keys, BLOCK_K, num_stages=1):
        j = start + row
        key = _load_last(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        value = _load_last(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        bias = _bias(size, j, tokens, keys, SIZED)
        largest, total, result = _attend_block(
            query, key, value, bias, largest, total, result, factor, not MANY, True, THIRDS, TYPE
        )
    lse += (item * H + head) * queries
    tl.store(lse + i, (largest + _log2(total)) * _LN2, mask=i < queries)
    result = result * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    _store_rows(out, result, item, head, i, queries, H, D, BLOCK_D)


@triton.jit
def _level(lse, i, queries):
    """Return log2 of the softmax's sums of queries i, inf past the end and where there was nothing to attend to, so
    that weights are 0."""
    level = tl.load(lse + i, mask=i < queries, other=float("inf"))
    return tl.where(level == float("-inf"), float("inf"), level) * _LOG2E


@triton.jit
def _grad_scores(
    query, key, value, given, level, taken, bias, factor, BIASED: tl.constexpr, THIRDS: tl.constexpr, TYPE: tl.constexpr
):
    """Return the gradient of the scores of a block of queries by a block of keys, to be multiplied by the scale."""
    p = tl.exp2(_scores(query, key, bias, factor, BIASED, THIRDS, TYPE) - level[:, None])
    dp = _dot(given, value, tl.zeros(p.shape, tl.float32), THIRDS, TYPE)
    return _narrowed(p * (dp - taken[:, None]), query.dtype)


@triton.jit(do_not_specialize=["queries", "tokens", "ahead", "share", "blocks"])
def grad_queries(
    q, k, v, size, prefix_k, prefix_v, grad, lse, out, dq, level, delta, queries, tokens, ahead, share, blocks, padded,
    scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    out_item, out_head, out_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, THIRDS: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq (N, queries, H, D), and for grad_keys (N, H, padded): level, lse in base 2, and delta = Σ grad · out.
    Grid (N·H·blocks,)."""
    item, shared, head, block = _where(H, blocks, share)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.arange(0, BLOCK_K)
    keys = tokens + ahead
    line = (item * H + head) * padded
    given = _rows(grad + item * grad_item + head * grad_head, grad_token, i, queries, D, BLOCK_D)
    reached = _rows(out + item * out_item + head * out_head, out_token, i, queries, D, BLOCK_D)
    taken = tl.sum(given.to(tl.float32) * reached.to(tl.float32), 1)
    sums = _level(lse + (item * H + head) * queries, i, queries)
    tl.store(level + line + i, sums)
    tl.store(delta + line + i, taken)
    query = _rows(q + item * q_item + head * q_head, q_token, i, queries, D, BLOCK_D)
    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    if PREFIX:
        prefix_k += shared * pk_item + head * pk_head
        prefix_v += shared * pv_item + head * pv_head
    if SIZED:
        size += item * tokens
    factor = scale * _LOG2E
    dquery = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    whole = tokens // BLOCK_K * BLOCK_K
    key_places, value_places = _places(k, k_token, BLOCK_K, BLOCK_D), _places(v, v_token, BLOCK_K, BLOCK_D)
    for start in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
        key = _load_whole(key_places, D, BLOCK_D)
        value = _load_whole(value_places, D, BLOCK_D)
        bias = taken
        if SIZED:
            bias = _log2(tl.load(size + start + row))
        ds = _grad_scores(query, key, value, given, sums, taken, bias, factor, SIZED, THIRDS, TYPE)
        dquery = _dot(ds, tl.trans(key), dquery, THIRDS, TYPE)
        key_places += BLOCK_K * k_token
        value_places += BLOCK_K * v_token
    for start in tl.range(whole, keys, BLOCK_K, num_stages=1):
        j = start + row
        key = _load_last(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        value = _load_last(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        bias = _bias(size, j, tokens, keys, SIZED)
        ds = _grad_scores(query, key, value, given, sums, taken, bias, factor, True, THIRDS, TYPE)
        dquery = _dot(ds, tl.trans(key), dquery, THIRDS, TYPE)
    _store_rows(dq, dquery * scale, item, head, i, queries, H, D, BLOCK_D)


@triton.jit(do_not_specialize=["queries", "tokens", "ahead", "share", "blocks"])
def grad_keys(
    q, k, v, size, prefix_k, prefix_v, grad, level, delta, dk, dv, dprefix_k, dprefix_v,
    queries, tokens, ahead, share, blocks, padded, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, THIRDS: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv (N, tokens, H, D) and an item's part of the prefix's (N, H, ahead, D) float32; grid
    (N·H·blocks,). Scores are (keys, queries) here: as they come out of one product they go into the next."""
    item, shared, head, block = _where(H, blocks, share)
    j = block * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = tokens + ahead
    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    if PREFIX:
        prefix_k += shared * pk_item + head * pk_head
        prefix_v += shared * pv_item + head * pv_head
    if SIZED:
        size += item * tokens
    key = _load_last(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    value = _load_last(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    bias = _bias(size, j, tokens, keys, SIZED)
    query_places = _places(q + item * q_item + head * q_head, q_token, BLOCK_Q, BLOCK_D)
    grad_places = _places(grad + item * grad_item + head * grad_head, grad_token, BLOCK_Q, BLOCK_D)
    level += (item * H + head) * padded
    delta += (item * H + head) * padded
    factor = scale * _LOG2E
    dkey = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dvalue = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    nothing = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    for start in tl.range(0, queries, BLOCK_Q, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_Q)
        query = tl.load(query_places, mask=_inside(i, queries, D, BLOCK_D), other=0.0)
        given = tl.load(grad_places, mask=_inside(i, queries, D, BLOCK_D), other=0.0)
        score = _dot(key, query, nothing, THIRDS, TYPE) * factor + bias[:, None]
        p = tl.exp2(score - tl.load(level + i)[None, :])
        dvalue = _dot(_narrowed(p, query.dtype), tl.trans(given), dvalue, THIRDS, TYPE)
        dp = _dot(value, given, nothing, THIRDS, TYPE)
        ds = _narrowed(p * (dp - tl.load(delta + i)[None, :]), query.dtype)
        dkey = _dot(ds, tl.trans(query), dkey, THIRDS, TYPE)
        query_places += BLOCK_Q * q_token
        grad_places += BLOCK_Q * grad_token
    _store_keys(dk, dprefix_k, dkey * scale, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)
    _store_keys(dv, dprefix_v, dvalue, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)


@triton.jit(do_not_specialize=["queries", "tokens", "ahead", "share"])
def grad_item(
    q, k, v, size, prefix_k, prefix_v, grad, lse, dq, dk, dv, dprefix_k, dprefix_v,
    queries, tokens, ahead, share, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, THIRDS: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write all gradients of a head whose queries and keys are one block, as grad_queries and grad_keys do; every row
    is read once, all of them at the beginning. Grid (N·H,)."""
    item, shared, head, _ = _where(H, 1, share)
    i, j = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    keys = tokens + ahead
    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    if PREFIX:
        prefix_k += shared * pk_item + head * pk_head
        prefix_v += shared * pv_item + head * pv_head
    if SIZED:
        size += item * tokens
    query = _rows(q + item * q_item + head * q_head, q_token, i, queries, D, BLOCK_D)
    key = _load_last(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    given = _rows(grad + item * grad_item + head * grad_head, grad_token, i, queries, D, BLOCK_D)
    value = _load_last(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    level = _level(lse + (item * H + head) * queries, i, queries)
    score = _scores(query, key, _bias(size, j, tokens, keys, SIZED), scale * _LOG2E, True, THIRDS, TYPE)
    p = tl.exp2(score - level[:, None])
    none = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dvalue = _dot(tl.trans(_narrowed(p, query.dtype)), tl.trans(given), none, THIRDS, TYPE)
    _store_keys(dv, dprefix_v, dvalue, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)
    dp = _dot(given, value, tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), THIRDS, TYPE)
    ds = _narrowed(p * (dp - tl.sum(p * dp, 1)[:, None]), query.dtype)
    dkey = _dot(tl.trans(ds), tl.trans(query), none, THIRDS, TYPE)
    _store_keys(dk, dprefix_k, dkey * scale, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)
    dquery = _dot(ds, tl.trans(key), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), THIRDS, TYPE)
    _store_rows(dq, dquery * scale, item, head, i, queries, H, D, BLOCK_D)


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]


def attend_launch(inputs: AttentionInputs, out: Tensor, lse: Tensor) -> tuple:
    """Return what attention runs: (kernel, grid, arguments, constants and options). bench/aot_report.py compiles the
    same."""
    q, k, v, size, prefix_k, prefix_v, _ = inputs
    n, heads, queries, _ = q.shape
    tokens, ahead = k.shape[2], prefix_length(inputs)
    meta = config.attention(*_sizes(inputs))["attend"]
    blocks = triton.cdiv(queries, meta["BLOCK_Q"])
    arguments = (
        q, k, v, size, prefix_k, prefix_v, out, lse, queries, tokens, ahead, _share(inputs), blocks, scale_of(inputs),
        *_strides(q, k, v, prefix_k, prefix_v),
    )  # fmt: skip
    many = ahead + tokens > meta["BLOCK_K"]
    return attend, (n * heads * blocks,), arguments, {**_constants(inputs), "MANY": many, **meta}


def grad_launches(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor, grads: tuple[Tensor | None, ...]
) -> list[tuple]:
    """Return what the gradient runs: (kernel, grid, arguments, constants and options) of each launch, in order; with
    the gradients of q, k and v to write, and each item's of prefix_k and prefix_v."""
    q, k, v, size, prefix_k, prefix_v, _ = inputs
    n, heads, queries, _ = q.shape
    tokens, ahead, constants = k.shape[2], prefix_length(inputs), _constants(inputs)
    table = config.attention(*_sizes(inputs))
    given, numbers = (q, k, v, size, prefix_k, prefix_v, grad), (queries, tokens, ahead, _share(inputs))
    strides, scale, grid = _strides(q, k, v, prefix_k, prefix_v, grad), scale_of(inputs), n * heads
    if table["item"]:
        arguments: tuple = (*given, lse, *grads, *numbers, scale, *strides)
        return [(grad_item, (grid,), arguments, {**constants, **table["item"]})]
    by_queries, by_keys = table["queries"], table["keys"]
    step = max(by_queries["BLOCK_Q"], by_keys["BLOCK_Q"])
    padded = triton.cdiv(queries, step) * step
    level, delta = (lse.new_empty((n, heads, padded)) for _ in range(2))
    blocks = padded // by_queries["BLOCK_Q"]
    arguments = (
        *given, lse, out, grads[0], level, delta, *numbers, blocks, padded, scale, *strides, *_strides(out)
    )  # fmt: skip
    steps = [(grad_queries, (grid * blocks,), arguments, {**constants, **by_queries})]
    blocks = triton.cdiv(ahead + tokens, by_keys["BLOCK_K"])
    arguments = (*given, level, delta, *grads[1:], *numbers, blocks, padded, scale, *strides)
    return [*steps, (grad_keys, (grid * blocks,), arguments, {**constants, **by_keys})]


def _constants(inputs: AttentionInputs) -> dict:
    """Return the constants that all kernels have."""
    _, heads, _, channels = inputs.q.shape
    return {"D": channels, "H": heads, "SIZED": inputs.size is not None, "PREFIX": inputs.prefix_k is not None}


def _share(inputs: AttentionInputs) -> int:
    """Return how many items have the same prefix."""
    return 1 if inputs.prefix_k is None else inputs.q.shape[0] // inputs.prefix_k.shape[0]


def attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """See ``Backend.attention``."""
    inputs = _readable(inputs)
    q = inputs.q
    out, lse = empty_heads_last(q, *q.shape[:3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch(_key("attention", inputs), (*inputs[:6], out, lse), attend_launch, inputs, out, lse)
    return out, lse


def attention_backward(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See ``Backend.attention_backward``."""
    inputs = _readable(inputs)
    q, prefix = inputs.q, inputs.prefix_k
    dq, dk, dv = (empty_heads_last(x, *x.shape[:3]) for x in inputs[:3])
    shape = None if prefix is None else (q.shape[0], *prefix.shape[1:])
    parts = [None if shape is None else q.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    grad, out, lse, grads = unit_stride(grad), unit_stride(out), lse.contiguous(), (dq, dk, dv, *parts)
    if config.attention(*_sizes(inputs))["item"]:
        tensors = (*inputs[:6], grad, lse, *grads)
        launch(
            (*_key("attention_backward", inputs), grad.stride()), tensors, grad_launches, grad, inputs, out, lse, grads
        )
    else:
        for kernel, grid, arguments, meta in grad_launches(grad, inputs, out, lse, grads):
            kernel[grid](*arguments, **meta)
    if prefix is None:
        return dq, dk, dv, None, None
    shared = (part.unflatten(0, (prefix.shape[0], -1)).sum(1).to(q.dtype) for part in parts if part is not None)
    return dq, dk, dv, *shared  # type: ignore[return-value]


def _key(name: str, inputs: AttentionInputs) -> tuple:
    """Return what a launch depends on, but for addresses and for what else it is given."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    prefix = None
    if prefix_k is not None and prefix_v is not None:
        prefix = (prefix_k.shape, prefix_k.stride(), prefix_v.stride())
    strides = (q.stride(), k.stride(), v.stride())
    return name, q.dtype, q.shape, k.shape, strides, prefix, size is None, scale, q.get_device()


def _sizes(inputs: AttentionInputs) -> tuple:
    """Return what blocks are chosen by: queries, keys, channels, dtype, the device's compute capability, and whether
    there is a prefix."""
    q, ahead = inputs.q, prefix_length(inputs)
    keys, capability = ahead + inputs.k.shape[2], config.capability(q.get_device())
    return q.shape[2], keys, q.shape[3], q.dtype, capability, ahead > 0, _COMPILED.value


def _readable(inputs: AttentionInputs) -> AttentionInputs:
    """Return inputs with the strides that the kernels read."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    size = None if size is None else size.contiguous()
    prefix_k, prefix_v = (None if t is None else unit_stride(t) for t in (prefix_k, prefix_v))
    return AttentionInputs(unit_stride(q), unit_stride(k), unit_stride(v), size, prefix_k, prefix_v, scale)
