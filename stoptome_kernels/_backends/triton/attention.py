# SPDX-License-Identifier: Apache-2.0
"""Proportional attention as Triton kernels, and its gradient.

Few keys (at most 256; more are left to torch): the scores of a block of queries never leave the registers, ToMe's log
size is one vector, and the keys of a shared prefix are read where they are, nothing is concatenated. The gradient is
one launch while one block holds all keys of a head, so that every row is read once; beyond, one for dq and one for dk
and dv. There are no atomics: an item's part of the prefix's gradient is written on its own, and summed afterwards.

Scores are kept in base 2, as exp2 is what the hardware has.
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
from .merge import _narrowed
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
def _keys(
    x, stride, prefix, first, prefix_stride, j, ahead, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Return keys or values j of an item, those of the prefix (from its element first) ahead, 0 past the end."""
    token = j.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    place = x + (token - ahead) * stride + column
    if PREFIX:
        place = tl.where(token < ahead, prefix + first + token * prefix_stride + column, place)
    return tl.load(place, mask=_inside(j, keys, D, BLOCK_D), other=0.0)


@triton.jit
def _store_rows(x, value, item, head, i, count, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows i of x (N, count, H, D)."""
    place = x + ((item * count + i) * H + head)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(place, _narrowed(value, x.dtype.element_ty), mask=_inside(i, count, D, BLOCK_D))


@triton.jit
def _store_keys(
    x, prefix, value, item, head, j, ahead, tokens,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Write rows j of the prefix's part (N, H, ahead, D) float32 and of x (N, tokens, H, D)."""
    mask = _inside(j, ahead + tokens, D, BLOCK_D)
    column = tl.arange(0, BLOCK_D)[None, :]
    token = j - ahead
    if PREFIX:
        place = prefix + ((item * H + head) * ahead + j)[:, None] * D + column
        tl.store(place, value, mask=mask & (token < 0)[:, None])
        mask = mask & (token >= 0)[:, None]
    place = x + ((item * tokens + token) * H + head)[:, None] * D + column
    tl.store(place, _narrowed(value, x.dtype.element_ty), mask=mask)


@triton.jit
def _bias(size, first, j, ahead, keys, SIZED: tl.constexpr):
    """Return log2 of the sizes of keys j, −inf past the end: (len(j),)."""
    bias = tl.zeros(j.shape, tl.float32)
    if SIZED:
        bias = tl.log2(tl.load(size + first + (j - ahead), mask=(j >= ahead) & (j < keys), other=1.0))
    return tl.where(j < keys, bias, float("-inf"))


@triton.jit(do_not_specialize=["queries", "tokens", "ahead", "share", "blocks"])
def attend(
    q, k, v, size, prefix_k, prefix_v, out, lse, queries, tokens, ahead, share, blocks, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, THIRDS: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write out (N, queries, H, D) and lse (N, H, queries); grid (N·H·blocks,)."""
    item, shared, head, block = _where(H, blocks, share)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = ahead + tokens
    query = _rows(q + item * q_item + head * q_head, q_token, i, queries, D, BLOCK_D)
    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    key_first = shared * pk_item + head * pk_head
    value_first = shared * pv_item + head * pv_head
    nothing = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        key = _keys(k, k_token, prefix_k, key_first, pk_token, j, ahead, keys, D, BLOCK_D, PREFIX)
        if EARLY:  # on their way while the scores are computed
            value = _keys(v, v_token, prefix_v, value_first, pv_token, j, ahead, keys, D, BLOCK_D, PREFIX)
        bias = _bias(size, item * tokens, j, ahead, keys, SIZED)
        score = _dot(query, key, nothing, THIRDS, TYPE) * (scale * _LOG2E) + bias[None, :]
        higher = tl.maximum(largest, tl.max(score, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # sizes of 0 alone so far: 0, not NaN
        fade = tl.exp2(largest - level)
        p = tl.exp2(score - level[:, None])
        total = total * fade + tl.sum(p, 1)
        if not EARLY:
            value = _keys(v, v_token, prefix_v, value_first, pv_token, j, ahead, keys, D, BLOCK_D, PREFIX)
        result = _dot(_narrowed(p, query.dtype), tl.trans(value), result * fade[:, None], THIRDS, TYPE)
        largest = higher
    lse += (item * H + head) * queries
    tl.store(lse + i, (largest + tl.log2(total)) * _LN2, mask=i < queries)
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    _store_rows(out, result, item, head, i, queries, H, D, BLOCK_D)


@triton.jit
def _weights(score, bias, lse, i, queries, scale):
    """Return the softmax once more, from the logarithm of its sum; 0 past the end and where there was nothing to attend
    to."""
    lse = tl.load(lse + i, mask=i < queries, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return tl.exp2(score * (scale * _LOG2E) + bias[None, :] - (lse * _LOG2E)[:, None])


@triton.jit(do_not_specialize=["queries", "tokens", "ahead", "share", "blocks"])
def grad_queries(
    q, k, v, size, prefix_k, prefix_v, grad, lse, out, dq, delta, queries, tokens, ahead, share, blocks, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    out_item, out_head, out_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, THIRDS: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dq (N, queries, H, D) and delta = Σ grad · out (N, H, queries), for grad_keys; grid (N·H·blocks,)."""
    item, shared, head, block = _where(H, blocks, share)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = ahead + tokens
    row = (item * H + head) * queries
    given = _rows(grad + item * grad_item + head * grad_head, grad_token, i, queries, D, BLOCK_D)
    reached = _rows(out + item * out_item + head * out_head, out_token, i, queries, D, BLOCK_D)
    taken = tl.sum(given.to(tl.float32) * reached.to(tl.float32), 1)
    tl.store(delta + row + i, taken, mask=i < queries)
    query = _rows(q + item * q_item + head * q_head, q_token, i, queries, D, BLOCK_D)
    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    key_first = shared * pk_item + head * pk_head
    value_first = shared * pv_item + head * pv_head
    nothing = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    dquery = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        key = _keys(k, k_token, prefix_k, key_first, pk_token, j, ahead, keys, D, BLOCK_D, PREFIX)
        value = _keys(v, v_token, prefix_v, value_first, pv_token, j, ahead, keys, D, BLOCK_D, PREFIX)
        bias = _bias(size, item * tokens, j, ahead, keys, SIZED)
        p = _weights(_dot(query, key, nothing, THIRDS, TYPE), bias, lse + row, i, queries, scale)
        dp = _dot(given, value, nothing, THIRDS, TYPE)
        ds = _narrowed(p * (dp - taken[:, None]), query.dtype)
        dquery = _dot(ds, tl.trans(key), dquery, THIRDS, TYPE)
    _store_rows(dq, dquery * scale, item, head, i, queries, H, D, BLOCK_D)


@triton.jit(do_not_specialize=["queries", "tokens", "ahead", "share", "blocks"])
def grad_keys(
    q, k, v, size, prefix_k, prefix_v, grad, lse, delta, dq, dk, dv, dprefix_k, dprefix_v,
    queries, tokens, ahead, share, blocks, scale,
    q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token,
    pk_item, pk_head, pk_token, pv_item, pv_head, pv_token, grad_item, grad_head, grad_token,
    D: tl.constexpr, H: tl.constexpr, SIZED: tl.constexpr, PREFIX: tl.constexpr, WHOLE: tl.constexpr,
    THIRDS: tl.constexpr, TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dk and dv (N, tokens, H, D) and an item's part of the prefix's (N, H, ahead, D) float32; where one block
    holds all keys (WHOLE), dq as well, and delta is not asked for. Grid (N·H·blocks,)."""
    item, shared, head, block = _where(H, blocks, share)
    j = block * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = ahead + tokens
    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    key_first = shared * pk_item + head * pk_head
    value_first = shared * pv_item + head * pv_head
    key = _keys(k, k_token, prefix_k, key_first, pk_token, j, ahead, keys, D, BLOCK_D, PREFIX)
    value = _keys(v, v_token, prefix_v, value_first, pv_token, j, ahead, keys, D, BLOCK_D, PREFIX)
    bias = _bias(size, item * tokens, j, ahead, keys, SIZED)
    q += item * q_item + head * q_head
    grad += item * grad_item + head * grad_head
    row = (item * H + head) * queries

    dkey = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dvalue = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    nothing = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for start in range(0, queries, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        query = _rows(q, q_token, i, queries, D, BLOCK_D)
        given = _rows(grad, grad_token, i, queries, D, BLOCK_D)
        p = _weights(_dot(query, key, nothing, THIRDS, TYPE), bias, lse + row, i, queries, scale)
        dvalue = _dot(tl.trans(_narrowed(p, query.dtype)), tl.trans(given), dvalue, THIRDS, TYPE)
        dp = _dot(given, value, nothing, THIRDS, TYPE)
        taken = tl.sum(p * dp, 1) if WHOLE else tl.load(delta + row + i, mask=i < queries, other=0.0)
        ds = _narrowed(p * (dp - taken[:, None]), query.dtype)
        dkey = _dot(tl.trans(ds), tl.trans(query), dkey, THIRDS, TYPE)
        if WHOLE:
            dquery = _dot(ds, tl.trans(key), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), THIRDS, TYPE)
            _store_rows(dq, dquery * scale, item, head, i, queries, H, D, BLOCK_D)
    _store_keys(dk, dprefix_k, dkey * scale, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)
    _store_keys(dv, dprefix_v, dvalue, item, head, j, ahead, tokens, H, D, BLOCK_D, PREFIX)


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]


def attend_launch(inputs: AttentionInputs, out: Tensor, lse: Tensor) -> tuple:
    """Return what attention runs: (kernel, grid, arguments, constants and options). bench/aot_report.py compiles the
    same."""
    q, k, v, size, prefix_k, prefix_v, _ = inputs
    n, heads, queries, _ = q.shape
    tokens, ahead = k.shape[2], prefix_length(inputs)
    meta = config.attention(*_sizes(inputs), _COMPILED)["attend"]
    blocks = triton.cdiv(queries, meta["BLOCK_Q"])
    arguments = (
        q, k, v, size, prefix_k, prefix_v, out, lse, queries, tokens, ahead, _share(inputs), blocks, scale_of(inputs),
        *_strides(q, k, v, prefix_k, prefix_v),
    )  # fmt: skip
    return attend, (n * heads * blocks,), arguments, {**_constants(inputs), **meta}


def grad_launches(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor, grads: tuple[Tensor | None, ...]
) -> list[tuple]:
    """Return what the gradient runs: (kernel, grid, arguments, constants and options) of each launch, in order; with
    the gradients of q, k and v to write, and each item's of prefix_k and prefix_v."""
    q, k, v, size, prefix_k, prefix_v, _ = inputs
    n, heads, queries, _ = q.shape
    tokens, ahead, constants = k.shape[2], prefix_length(inputs), _constants(inputs)
    table = config.attention(*_sizes(inputs), _COMPILED)
    given, numbers = (q, k, v, size, prefix_k, prefix_v, grad, lse), (queries, tokens, ahead, _share(inputs))
    strides, scale = _strides(q, k, v, prefix_k, prefix_v, grad), scale_of(inputs)
    whole, delta, steps = table["whole"], None, []
    if not whole:
        delta = torch.empty_like(lse)
        blocks = triton.cdiv(queries, table["queries"]["BLOCK_Q"])
        arguments: tuple = (*given, out, grads[0], delta, *numbers, blocks, scale, *strides, *_strides(out))
        steps = [(grad_queries, (n * heads * blocks,), arguments, {**constants, **table["queries"]})]
    meta = {**constants, "WHOLE": whole is not None, **(whole or table["keys"])}
    blocks = triton.cdiv(ahead + tokens, meta["BLOCK_K"])
    arguments = (*given, delta, *grads, *numbers, blocks, scale, *strides)
    return [*steps, (grad_keys, (n * heads * blocks,), arguments, meta)]


def _constants(inputs: AttentionInputs) -> dict:
    """Return the constants that all kernels have."""
    _, heads, _, channels = inputs.q.shape
    return {"D": channels, "H": heads, "SIZED": inputs.size is not None, "PREFIX": inputs.prefix_k is not None}


def _share(inputs: AttentionInputs) -> int:
    """Return how many items have the same prefix."""
    return 1 if inputs.prefix_k is None else inputs.q.shape[0] // inputs.prefix_k.shape[0]


_COMPILED = isinstance(attend, triton.runtime.JITFunction)  # and not interpreted (TRITON_INTERPRET=1)


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
    if config.attention(*_sizes(inputs), _COMPILED)["whole"]:
        tensors = (*inputs[:6], grad, lse, None, *grads)
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
    """Return queries, keys, channels and dtype, by which blocks are chosen."""
    q = inputs.q
    return q.shape[2], prefix_length(inputs) + inputs.k.shape[2], q.shape[3], q.dtype


def _readable(inputs: AttentionInputs) -> AttentionInputs:
    """Return inputs with the strides that the kernels read."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    size = None if size is None else size.contiguous()
    prefix_k, prefix_v = (None if t is None else unit_stride(t) for t in (prefix_k, prefix_v))
    return AttentionInputs(unit_stride(q), unit_stride(k), unit_stride(v), size, prefix_k, prefix_v, scale)
