# SPDX-License-Identifier: Apache-2.0
"""The gradient of proportional attention as Triton kernels: one launch where a head's queries and keys are one block,
so that every row is read once; beyond, one for dq and one for dk and dv. There are no atomics: an item's part of the
prefix's gradient is written on its own, and summed afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_heads_last, unit_stride
from ...reference import AttentionInputs, prefix_length, scale_of
from . import config
from .attention_blocks import (
    LOG2E,
    NOT_SPECIALIZED,
    bias_of,
    constants_of,
    dot,
    head_of,
    heads_of,
    inside,
    key_of,
    load_keys,
    load_rows,
    load_whole,
    log2,
    numbers_of,
    places_of,
    readable,
    scores_of,
    sizes_of,
    store_rows,
    strides_of,
    where_in_grid,
)
from .launch import launch
from .merge import _narrowed


@triton.jit
def _store_keys(
    x, prefix, value, item, head, j, ahead, tokens,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Write rows j of x (N, tokens, H, D), and behind them of the prefix's part (N, H, ahead, D) float32."""
    store_rows(x, value, item, head, j, tokens, H, D, BLOCK_D)
    if PREFIX:
        prefix += (item * H + head) * ahead * D
        place = prefix + (j - tokens).to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(place, value, mask=inside(j, tokens + ahead, D, BLOCK_D) & (j >= tokens)[:, None])


@triton.jit
def _level(lse, i, queries):
    """Return log2 of the softmax's sums of queries i, inf past the end and where there was nothing to attend to, so
    that weights are 0."""
    level = tl.load(lse + i, mask=i < queries, other=float("inf"))
    return tl.where(level == float("-inf"), float("inf"), level) * LOG2E


@triton.jit
def _grad_scores(
    query, key, value, given, level, delta, bias, factor, BIASED: tl.constexpr, THIRDS: tl.constexpr, TYPE: tl.constexpr
):
    """Return the gradient of the scores of a block of queries by a block of keys, to be multiplied by the scale."""
    p = tl.exp2(scores_of(query, key, bias, factor, BIASED, THIRDS, TYPE) - level[:, None])
    dp = dot(given, value, tl.zeros(p.shape, tl.float32), THIRDS, TYPE)
    return _narrowed(p * (dp - delta[:, None]), query.dtype)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def grad_queries(
    q, k, v, size, prefix_k, prefix_v, grad, lse, out, dq, levels, deltas,
    queries, tokens, ahead, share, blocks, padded, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    out_item, out_head, out_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, UNIT: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq (N, queries, H, D), and for grad_keys (N, H, padded): levels, lse in base 2, and deltas, Σ grad · out.
    Grid (N·H·blocks,)."""
    item, shared, head, block = where_in_grid(H, blocks, share)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.arange(0, BLOCK_K)
    keys = tokens + ahead
    line = (item * H + head) * padded
    grad, grad_token = head_of(grad, item, grad_item, head, grad_head, grad_token, UNIT)
    out, out_token = head_of(out, item, out_item, head, out_head, out_token, UNIT)
    given = load_rows(grad, grad_token, i, queries, D, BLOCK_D)
    reached = load_rows(out, out_token, i, queries, D, BLOCK_D)
    delta = tl.sum(given.to(tl.float32) * reached.to(tl.float32), 1)
    level = _level(lse + (item * H + head) * queries, i, queries)
    tl.store(levels + line + i, level)
    tl.store(deltas + line + i, delta)
    q, q_token = head_of(q, item, q_item, head, q_head, q_token, UNIT)
    query = load_rows(q, q_token, i, queries, D, BLOCK_D)
    k, k_token = head_of(k, item, k_item, head, k_head, k_token, UNIT)
    v, v_token = head_of(v, item, v_item, head, v_head, v_token, UNIT)
    if PREFIX:
        prefix_k, pk_token = head_of(prefix_k, shared, pk_item, head, pk_head, pk_token, UNIT)
        prefix_v, pv_token = head_of(prefix_v, shared, pv_item, head, pv_head, pv_token, UNIT)
    if SIZED:
        size += item * tokens
    factor = scale * LOG2E
    dquery = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    whole = tokens // BLOCK_K * BLOCK_K
    key_places, value_places = places_of(k, k_token, BLOCK_K, BLOCK_D), places_of(v, v_token, BLOCK_K, BLOCK_D)
    for start in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
        key = load_whole(key_places, D, BLOCK_D)
        value = load_whole(value_places, D, BLOCK_D)
        bias = level  # not read where there are no sizes
        if SIZED:
            bias = log2(tl.load(size + start + row))
        ds = _grad_scores(query, key, value, given, level, delta, bias, factor, SIZED, THIRDS, TYPE)
        dquery = dot(ds, tl.trans(key), dquery, THIRDS, TYPE)
        key_places += BLOCK_K * k_token
        value_places += BLOCK_K * v_token
    for start in tl.range(whole, keys, BLOCK_K, num_stages=1):
        j = start + row
        key = load_keys(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        value = load_keys(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        bias = bias_of(size, j, tokens, keys, SIZED)
        ds = _grad_scores(query, key, value, given, level, delta, bias, factor, True, THIRDS, TYPE)
        dquery = dot(ds, tl.trans(key), dquery, THIRDS, TYPE)
    store_rows(dq, dquery * scale, item, head, i, queries, H, D, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def grad_keys(
    q, k, v, size, prefix_k, prefix_v, grad, levels, deltas, dk, dv, dprefix_k, dprefix_v,
    queries, tokens, ahead, share, blocks, padded, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, UNIT: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv (N, tokens, H, D) and an item's part of the prefix's (N, H, ahead, D) float32; grid
    (N·H·blocks,). Scores are (keys, queries) here: as they come out of one product they go into the next."""
    item, shared, head, block = where_in_grid(H, blocks, share)
    j = block * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = tokens + ahead
    k, k_token = head_of(k, item, k_item, head, k_head, k_token, UNIT)
    v, v_token = head_of(v, item, v_item, head, v_head, v_token, UNIT)
    if PREFIX:
        prefix_k, pk_token = head_of(prefix_k, shared, pk_item, head, pk_head, pk_token, UNIT)
        prefix_v, pv_token = head_of(prefix_v, shared, pv_item, head, pv_head, pv_token, UNIT)
    if SIZED:
        size += item * tokens
    key = load_keys(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    value = load_keys(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    bias = bias_of(size, j, tokens, keys, SIZED)
    q, q_token = head_of(q, item, q_item, head, q_head, q_token, UNIT)
    grad, grad_token = head_of(grad, item, grad_item, head, grad_head, grad_token, UNIT)
    query_places, grad_places = places_of(q, q_token, BLOCK_Q, BLOCK_D), places_of(grad, grad_token, BLOCK_Q, BLOCK_D)
    levels += (item * H + head) * padded
    deltas += (item * H + head) * padded
    factor = scale * LOG2E
    dkey = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dvalue = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    nothing = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    for start in tl.range(0, queries, BLOCK_Q, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_Q)
        query = tl.load(query_places, mask=inside(i, queries, D, BLOCK_D), other=0.0)
        given = tl.load(grad_places, mask=inside(i, queries, D, BLOCK_D), other=0.0)
        score = dot(key, query, nothing, THIRDS, TYPE) * factor + bias[:, None]
        p = tl.exp2(score - tl.load(levels + i)[None, :])
        dvalue = dot(_narrowed(p, query.dtype), tl.trans(given), dvalue, THIRDS, TYPE)
        dp = dot(value, given, nothing, THIRDS, TYPE)
        ds = _narrowed(p * (dp - tl.load(deltas + i)[None, :]), query.dtype)
        dkey = dot(ds, tl.trans(query), dkey, THIRDS, TYPE)
        query_places += BLOCK_Q * q_token
        grad_places += BLOCK_Q * grad_token
    _store_keys(dk, dprefix_k, dkey * scale, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)
    _store_keys(dv, dprefix_v, dvalue, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def grad_item(
    q, k, v, size, prefix_k, prefix_v, grad, lse, dq, dk, dv, dprefix_k, dprefix_v,
    queries, tokens, ahead, share, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, UNIT: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dq, dk, dv and an item's part of the prefix's, see grad_queries and grad_keys, of a head whose queries and
    keys are one block. Every row is read once, all of them at the beginning; delta is Σ p · dp, which is as much as
    Σ grad · out, so that out is not read. Grid (N·H,)."""
    item, shared, head, _ = where_in_grid(H, 1, share)
    i, j = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    keys = tokens + ahead
    k, k_token = head_of(k, item, k_item, head, k_head, k_token, UNIT)
    v, v_token = head_of(v, item, v_item, head, v_head, v_token, UNIT)
    if PREFIX:
        prefix_k, pk_token = head_of(prefix_k, shared, pk_item, head, pk_head, pk_token, UNIT)
        prefix_v, pv_token = head_of(prefix_v, shared, pv_item, head, pv_head, pv_token, UNIT)
    if SIZED:
        size += item * tokens
    q, q_token = head_of(q, item, q_item, head, q_head, q_token, UNIT)
    query = load_rows(q, q_token, i, queries, D, BLOCK_D)
    key = load_keys(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    grad, grad_token = head_of(grad, item, grad_item, head, grad_head, grad_token, UNIT)
    given = load_rows(grad, grad_token, i, queries, D, BLOCK_D)
    value = load_keys(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
    level = _level(lse + (item * H + head) * queries, i, queries)
    score = scores_of(query, key, bias_of(size, j, tokens, keys, SIZED), scale * LOG2E, True, THIRDS, TYPE)
    p = tl.exp2(score - level[:, None])
    none = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dvalue = dot(tl.trans(_narrowed(p, query.dtype)), tl.trans(given), none, THIRDS, TYPE)
    _store_keys(dv, dprefix_v, dvalue, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)
    dp = dot(given, value, tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), THIRDS, TYPE)
    ds = _narrowed(p * (dp - tl.sum(p * dp, 1)[:, None]), query.dtype)
    dkey = dot(tl.trans(ds), tl.trans(query), none, THIRDS, TYPE)
    _store_keys(dk, dprefix_k, dkey * scale, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)
    dquery = dot(ds, tl.trans(key), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), THIRDS, TYPE)
    store_rows(dq, dquery * scale, item, head, i, queries, H, D, BLOCK_D)


def grad_launches(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor, grads: tuple[Tensor | None, ...]
) -> list[tuple]:
    """Return what the gradient runs: (kernel, grid, arguments, constants and options) of each launch, in order; with
    the gradients of q, k and v to write, and each item's of prefix_k and prefix_v."""
    if config.attention(*sizes_of(inputs))["item"]:
        return [_item_launch(grad, inputs, lse, grads)]
    sums = _sums(inputs)
    return [_queries_launch(grad, inputs, out, lse, grads[0], sums), _keys_launch(grad, inputs, sums, grads[1:])]


def _item_launch(grad: Tensor, inputs: AttentionInputs, lse: Tensor, grads: tuple) -> tuple:
    meta, (unit, strides) = config.attention(*sizes_of(inputs))["item"], _strides(inputs, grad)
    arguments = (*inputs[:6], grad, lse, *grads, *numbers_of(inputs), scale_of(inputs), *strides)
    return grad_item, (heads_of(inputs),), arguments, {**constants_of(inputs), **unit, **meta}


def _queries_launch(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor, dq: Tensor | None, sums: tuple[Tensor, Tensor]
) -> tuple:
    meta, (unit, strides) = config.attention(*sizes_of(inputs))["queries"], _strides(inputs, grad, out)
    padded = sums[0].shape[2]
    blocks = padded // meta["BLOCK_Q"]
    arguments = (
        *inputs[:6], grad, lse, out, dq, *sums, *numbers_of(inputs), blocks, padded, scale_of(inputs), *strides
    )  # fmt: skip
    return grad_queries, (heads_of(inputs) * blocks,), arguments, {**constants_of(inputs), **unit, **meta}


def _keys_launch(grad: Tensor, inputs: AttentionInputs, sums: tuple[Tensor, Tensor], grads: tuple) -> tuple:
    meta, (unit, strides) = config.attention(*sizes_of(inputs))["keys"], _strides(inputs, grad)
    blocks = triton.cdiv(prefix_length(inputs) + inputs.k.shape[2], meta["BLOCK_K"])
    arguments = (
        *inputs[:6], grad, *sums, *grads, *numbers_of(inputs), blocks, sums[0].shape[2], scale_of(inputs), *strides
    )  # fmt: skip
    return grad_keys, (heads_of(inputs) * blocks,), arguments, {**constants_of(inputs), **unit, **meta}


def _strides(inputs: AttentionInputs, *others: Tensor) -> tuple[dict[str, int], list[int]]:
    return strides_of(inputs.q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v, *others)


def _sums(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return memory for what grad_queries leaves for grad_keys, ``(N, H, padded)``: whole blocks of either."""
    table, (n, heads, queries, _) = config.attention(*sizes_of(inputs)), inputs.q.shape
    step = max(table["queries"]["BLOCK_Q"], table["keys"]["BLOCK_Q"])
    shape = n, heads, triton.cdiv(queries, step) * step
    return inputs.q.new_empty(shape, dtype=torch.float32), inputs.q.new_empty(shape, dtype=torch.float32)


def attention_backward(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See ``Backend.attention_backward``."""
    inputs = readable(inputs)
    q, prefix = inputs.q, inputs.prefix_k
    dq, dk, dv = (empty_heads_last(x, *x.shape[:3]) for x in inputs[:3])
    shape = None if prefix is None else (q.shape[0], *prefix.shape[1:])
    parts = [None if shape is None else q.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    grad, out, lse, grads = unit_stride(grad), unit_stride(out), lse.contiguous(), (dq, dk, dv, *parts)
    key = (*key_of("attention_backward", inputs), grad.stride())
    if config.attention(*sizes_of(inputs))["item"]:
        launch(key, (*inputs[:6], grad, lse, *grads), _item_launch, grad, inputs, lse, grads)
    else:
        sums = _sums(inputs)
        tensors = (*inputs[:6], grad, lse, out, dq, *sums)
        launch((*key, out.stride()), tensors, _queries_launch, grad, inputs, out, lse, dq, sums)
        launch(key, (*inputs[:6], grad, *sums, *grads[1:]), _keys_launch, grad, inputs, sums, grads[1:])
    if prefix is None:
        return dq, dk, dv, None, None
    shared = (part.unflatten(0, (prefix.shape[0], -1)).sum(1).to(q.dtype) for part in parts if part is not None)
    return dq, dk, dv, *shared  # type: ignore[return-value]
