# SPDX-License-Identifier: Apache-2.0
"""Proportional attention as a Triton kernel (FlashAttention, Dao et al., arXiv 2205.14135).

The scores of a block of queries never leave the registers, ToMe's log size is one vector, and the keys of a shared
prefix are read where they are, nothing is concatenated. A program walks blocks of keys: whole blocks of the item's own
keys without a mask, then what is left of them together with the prefix, so that few keys are one block.

At these sizes a multiprocessor's time goes into issuing instructions, not into memory or tensor cores: what is done for
each score counts (docs/dev/performance.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_heads_last
from ...reference import AttentionInputs, scale_of
from . import config
from .attention_blocks import (
    LN2,
    LOG2E,
    NOT_SPECIALIZED,
    bias_of,
    constants_of,
    dot,
    head_of,
    heads_of,
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
def _attend_block(
    query, key, value, bias, largest, total, result, factor, FIRST: tl.constexpr, BIASED: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Return the largest score, the sum of the weights and the weighted values, with those of one more block of
    keys."""
    score = scores_of(query, key, bias, factor, BIASED, THIRDS, TYPE)
    higher = tl.max(score, 1)
    if not FIRST:
        higher = tl.maximum(largest, higher)
    level = tl.where(higher == float("-inf"), 0.0, higher)  # keys that weigh nothing alone so far: 0, not NaN
    p = tl.exp2(score - level[:, None])
    if FIRST:
        total = tl.sum(p, 1)
        result = tl.zeros(result.shape, tl.float32)
    else:
        fade = tl.exp2(largest - level)
        total = total * fade + tl.sum(p, 1)
        result = result * fade[:, None]
    result = dot(_narrowed(p, query.dtype), tl.trans(value), result, THIRDS, TYPE)
    return higher, total, result


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attend(
    q, k, v, size, prefix_k, prefix_v, out, lse, queries, tokens, ahead, share, blocks, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, UNIT: tl.constexpr, MANY: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write out (N, queries, H, D) and lse (N, H, queries); grid (N·H·blocks,). Without MANY one block holds all
    keys."""
    item, shared, head, block = where_in_grid(H, blocks, share)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.arange(0, BLOCK_K)
    keys = tokens + ahead
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
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    whole = 0
    if MANY:
        whole = tokens // BLOCK_K * BLOCK_K
        key_places, value_places = places_of(k, k_token, BLOCK_K, BLOCK_D), places_of(v, v_token, BLOCK_K, BLOCK_D)
        for start in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
            key = load_whole(key_places, D, BLOCK_D)
            value = load_whole(value_places, D, BLOCK_D)
            bias = largest  # not read where there are no sizes
            if SIZED:
                bias = log2(tl.load(size + start + row))
            largest, total, result = _attend_block(
                query, key, value, bias, largest, total, result, factor, False, SIZED, THIRDS, TYPE
            )
            key_places += BLOCK_K * k_token
            value_places += BLOCK_K * v_token
    for start in tl.range(whole, keys, BLOCK_K, num_stages=1):
        j = start + row
        key = load_keys(k, k_token, prefix_k, pk_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        value = load_keys(v, v_token, prefix_v, pv_token, j, tokens, keys, D, BLOCK_D, PREFIX)
        bias = bias_of(size, j, tokens, keys, SIZED)
        largest, total, result = _attend_block(
            query, key, value, bias, largest, total, result, factor, not MANY, True, THIRDS, TYPE
        )
    lse += (item * H + head) * queries
    tl.store(lse + i, (largest + log2(total)) * LN2, mask=i < queries)
    result = result * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    store_rows(out, result, item, head, i, queries, H, D, BLOCK_D)


def attend_launch(inputs: AttentionInputs, out: Tensor, lse: Tensor) -> tuple:
    """Return what attention runs: (kernel, grid, arguments, constants and options). bench/aot_report.py compiles the
    same."""
    meta = config.attention(*sizes_of(inputs))["attend"]
    queries, tokens, ahead, _ = numbers = numbers_of(inputs)
    blocks, many = triton.cdiv(queries, meta["BLOCK_Q"]), ahead + tokens > meta["BLOCK_K"]
    unit, strides = strides_of(inputs.q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v)
    arguments = (*inputs[:6], out, lse, *numbers, blocks, scale_of(inputs), *strides)
    return attend, (heads_of(inputs) * blocks,), arguments, {**constants_of(inputs), **unit, **meta, "MANY": many}


def attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """See ``Backend.attention``."""
    inputs = readable(inputs)
    q = inputs.q
    out, lse = empty_heads_last(q, *q.shape[:3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch(key_of("attention", inputs), (*inputs[:6], out, lse), attend_launch, inputs, out, lse)
    return out, lse
