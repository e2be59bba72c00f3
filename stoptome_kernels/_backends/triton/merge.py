# SPDX-License-Identifier: Apache-2.0
"""Merging and its adjoint as Triton kernels: gathers, one program for a tile of output rows of one item.

A row is read once and written once, sums run in float32 in ascending member order, there are no atomics. Nearly all
tiles hold groups of one token alone; these are copied as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...layout import contiguous_groups, empty_merged, unit_stride
from ...reference import Groups
from . import config
from .launch import launch


@triton.jit
def _span(offsets, inside, tokens):
    """Return the first position and the length of groups, each within the item whatever a damaged plan holds."""
    first = tl.load(offsets, mask=inside, other=0)
    last = tl.load(offsets + 1, mask=inside, other=0)
    first = tl.minimum(tl.maximum(first, 0), tokens)
    return first, tl.minimum(tl.maximum(last, first), tokens) - first


@triton.jit
def _hash(index):
    """Return a 64-bit hash of indices: SplitMix64 (Steele et al., *Fast Splittable Pseudorandom Number Generators*,
    OOPSLA 2014)."""
    z = index.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _whole(members, offsets, tokens, groups, LANES: tl.constexpr):
    """Return whether the groups of an item hold each of its tokens once: offsets rise from 0 to tokens, and the hashes
    of the members add up to those of all tokens, which sums of 64 bits don't do by chance."""
    lane = tl.arange(0, LANES)
    nothing = tl.zeros((LANES,), tl.uint64)
    difference = nothing
    falling = tl.zeros((LANES,), tl.int32)
    for start in range(0, tokens, LANES):  # there are no more groups than tokens
        at = start + lane
        code = tl.load(members + at, mask=at < tokens, other=0)
        difference += tl.where(at < tokens, _hash(tl.where(code < 0, ~code, code)) - _hash(at), nothing)
        begin = tl.load(offsets + at, mask=at < groups, other=0)
        end = tl.load(offsets + at + 1, mask=at < groups, other=1)
        falling |= (begin >= end).to(tl.int32)
    ends = (tl.load(offsets) == 0) & (tl.load(offsets + groups) == tokens)
    return ends & (tl.sum(difference, 0) == 0) & (tl.max(falling, 0) == 0)


@triton.jit
def _fill_lost(members, offsets, out, item, tokens, groups, D: tl.constexpr):
    """Write NaN in the rows of out (N, tokens, D) of those tokens that no group of a damaged plan holds: raising would
    wait, and a row that nobody writes would show what was in memory before. For a program of its own for each item."""
    LANES: tl.constexpr = 128
    lane = tl.arange(0, LANES)
    members += item * tokens
    offsets += item * (groups + 1)
    if _whole(members, offsets, tokens, groups, LANES) == 0:
        for start in range(0, tokens, LANES):
            token = start + lane
            held = tl.zeros((LANES,), tl.int32)
            for group in range(0, groups):  # as the other programs read them
                first = tl.minimum(tl.maximum(tl.load(offsets + group), 0), tokens)
                for at in range(first, tl.minimum(tl.load(offsets + group + 1), tokens)):
                    code = tl.load(members + at)
                    held |= (tl.minimum(tl.where(code < 0, ~code, code), tokens - 1) == token).to(tl.int32)
            nan = tl.full((LANES,), float("nan"), tl.float32)
            for column in range(0, D):
                tl.store(out + (item * tokens + token) * D + column, nan, mask=(held == 0) & (token < tokens))


@triton.jit
def _tile(offsets, tokens, groups, blocks, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Return where this program works: item, chunk, its groups (ROWS,), their first position and length, its
    columns."""
    chunk = tl.program_id(0) % CHUNKS  # the chunks of a row follow each other, so that DRAM pages are read in a go
    block = tl.program_id(0) // CHUNKS
    item = (block // blocks).to(tl.int64)
    group = (block % blocks) * ROWS + tl.arange(0, ROWS)
    first, length = _span(offsets + item * (groups + 1) + group, group < groups, tokens)
    column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    return item, chunk, group, first, length, column


@triton.jit
def _rows(inside, column, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the mask of a tile: (ROWS, BLOCK_D), or (ROWS, 1) where no tile reaches past a row's end."""
    mask = inside[:, None]
    if D % BLOCK_D or D == 0:
        mask = mask & (column < D)[None, :]
    return mask


@triton.jit
def _member(members, size, at, inside, tokens, MODE: tl.constexpr, SIZED: tl.constexpr):
    """Return the token at position ``at``, whether it counts, and its weight (0 if it does not)."""
    code = tl.load(members + at, mask=inside, other=0)
    token = tl.where(code < 0, ~code, code)
    token = tl.minimum(token, tokens - 1)
    valid = inside
    if MODE != "all":
        valid = inside & (code >= 0)
    weight = valid.to(tl.float32)
    if SIZED:
        weight = tl.load(size + token, mask=valid, other=0.0)
    return token.to(tl.int64), valid, weight


@triton.jit
def _totals(members, size, first, length, longest, tokens, ROWS: tl.constexpr, SIZED: tl.constexpr):
    """Return the weight of each group, and how many members it has of weight 1: of one member alone the weight counts
    as 1."""
    total = tl.zeros((ROWS,), tl.float32)
    counted = tl.zeros((ROWS,), tl.int32)
    if longest > 1:
        for k in range(0, longest):
            _token, valid, share = _member(members, size, first + k, k < length, tokens, "mean", SIZED)
            total += share
            counted += valid.to(tl.int32)
    alone = (counted == 1) | (length < 2)
    return tl.where(alone, 1.0, total), alone


_COMPILED = tl.constexpr(isinstance(_member, triton.runtime.JITFunction))  # not interpreted (TRITON_INTERPRET=1)


@triton.jit
def _narrowed(value, dtype: tl.constexpr):
    """Round float32 to the dtype of the rows, to nearest even."""
    out = value.to(dtype)
    if dtype == tl.bfloat16 and not _COMPILED:  # the interpreter cuts off instead
        bits = value.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        out = tl.where(value == value, nearest, out)
    return out


@triton.jit(do_not_specialize=["tokens", "groups", "blocks"])
def reduce_rows(
    x, members, offsets, size, y, size_out, tokens, groups, blocks, item_stride, token_stride,
    D: tl.constexpr, MODE: tl.constexpr, SIZED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write y (N, groups, D) and size_out (N, groups) from x (N, tokens, D); grid (N·blocks·CHUNKS,)."""
    item, chunk, group, first, length, column = _tile(offsets, tokens, groups, blocks, ROWS, BLOCK_D, CHUNKS)
    inside = group < groups
    x += item * item_stride + column[None, :]
    members += item * tokens
    if SIZED:
        size += item * tokens
    y += item * groups * D + group.to(tl.int64)[:, None] * D + column[None, :]
    size_out += item * groups + group

    token, valid, total = _member(members, size, first, length > 0, tokens, MODE, SIZED)
    alone = tl.load(x + token[:, None] * token_stride, mask=_rows(valid, column, D, BLOCK_D), other=0.0)
    longest = tl.max(length, 0)
    tl.store(y, alone, mask=_rows(inside & (length <= 1), column, D, BLOCK_D))  # bit for bit
    if longest > 1:
        value = alone.to(tl.float32)
        if MODE == "max":
            value = tl.where(valid[:, None], value, float("-inf"))
        else:
            if MODE == "mean":
                value = value * total[:, None]
            value = tl.where(valid[:, None], value, 0.0) + 0.0  # sums start from +0: −0 alone would stay −0
        counted = valid.to(tl.int32)
        last = token
        for k in range(1, longest):
            token, valid, weight = _member(members, size, first + k, k < length, tokens, MODE, SIZED)
            row = tl.load(x + token[:, None] * token_stride, mask=_rows(valid, column, D, BLOCK_D), other=0.0)
            more = row.to(tl.float32)
            if MODE == "max":
                value = tl.where(valid[:, None] & ((more > value) | (more != more)), more, value)
            else:
                if MODE == "mean":
                    more = more * weight[:, None]
                value += tl.where(valid[:, None], more, 0.0)
            last = tl.where(valid, token, last)
            counted += valid.to(tl.int32)
            total += weight
        if MODE == "mean":
            weights = tl.where(length > 1, total, 1.0)
            value = tl.div_rn(value, tl.broadcast_to(weights[:, None], value.shape))
        tl.store(
            y, _narrowed(value, alone.dtype), mask=_rows(inside & (length > 1) & (counted != 1), column, D, BLOCK_D)
        )
        # all others of weight 0: rare, so the row is read again rather than kept in registers
        lonely = inside & (length > 1) & (counted == 1)
        row = tl.load(x + last[:, None] * token_stride, mask=_rows(lonely, column, D, BLOCK_D), other=0.0)
        tl.store(y, row, mask=_rows(lonely, column, D, BLOCK_D))
    if chunk == 0:
        tl.store(size_out, total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "groups", "blocks", "programs"])
def spread_rows(
    grad, members, offsets, size, x, y, out, tokens, groups, blocks, programs,
    grad_item, grad_token, x_item, x_token, y_item, y_token,
    D: tl.constexpr, MODE: tl.constexpr, SIZED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write out (N, tokens, D) from grad (N, groups, D): each program writes the tokens of its groups; grid as above,
    and N programs more for tokens that are in no group."""
    if tl.program_id(0) >= programs:
        _fill_lost(members, offsets, out, (tl.program_id(0) - programs).to(tl.int64), tokens, groups, D)
        return
    item, _chunk, group, first, length, column = _tile(offsets, tokens, groups, blocks, ROWS, BLOCK_D, CHUNKS)
    members += item * tokens
    if SIZED:
        size += item * tokens
    out += item * tokens * D + column[None, :]
    row = group.to(tl.int64)[:, None]
    mask = _rows(group < groups, column, D, BLOCK_D)
    given = tl.load(grad + item * grad_item + row * grad_token + column[None, :], mask=mask, other=0.0)
    nothing = tl.zeros(given.shape, given.dtype)

    longest = tl.max(length, 0)
    if MODE == "mean":
        total, alone = _totals(members, size, first, length, longest, tokens, ROWS, SIZED)
    if MODE == "max":
        x += item * x_item + column[None, :]
        reached = tl.load(y + item * y_item + row * y_token + column[None, :], mask=mask, other=0.0)
        reached_nan = reached != reached
        waiting = tl.full(given.shape, 1, tl.int1)
    for k in range(0, longest):
        inside = k < length
        token, valid, weight = _member(members, size, first + k, inside, tokens, MODE, SIZED)
        value = given
        if MODE == "mean":  # noqa: SIM102, the other modes are compiled without what follows
            if longest > 1:  # most groups are of one token alone, whose gradient is copied
                share = tl.where(alone, 1.0, tl.div_rn(weight, total))
                value = tl.where(alone[:, None], given, _narrowed(share[:, None] * given.to(tl.float32), given.dtype))
        if MODE == "max":
            entry = tl.load(x + token[:, None] * x_token, mask=_rows(valid, column, D, BLOCK_D), other=0.0)
            hit = ((entry == reached) | ((entry != entry) & reached_nan)) & waiting & valid[:, None]
            value = tl.where(hit, given, nothing)
            waiting = waiting & ~hit
        elif MODE != "all":
            value = tl.where(valid[:, None], value, nothing)
        tl.store(out + token[:, None] * D, value, mask=_rows(inside, column, D, BLOCK_D))


def reduce_launch(x: Tensor, groups: Groups, y: Tensor, size_out: Tensor, mode: str) -> tuple:
    """Return what reduce runs: (kernel, grid, arguments, constants and options). bench/aot_report.py compiles the
    same."""
    n, tokens, dim = x.shape
    tokens_out = y.shape[1]
    meta = config.merge(dim, tokens_out, x.dtype, mode)
    blocks = triton.cdiv(tokens_out, meta["ROWS"])
    arguments = (x, *groups, y, size_out, tokens, tokens_out, blocks, x.stride(0), x.stride(1))
    flags = {"MODE": mode, "SIZED": groups.size is not None}
    return reduce_rows, (n * blocks * meta["CHUNKS"],), arguments, {**flags, **meta}


def spread_launch(grad: Tensor, groups: Groups, out: Tensor, mode: str, x: Tensor | None, y: Tensor | None) -> tuple:
    """Return what spread runs: (kernel, grid, arguments, constants and options)."""
    n, tokens_out, dim = grad.shape
    meta = config.merge(dim, tokens_out, grad.dtype, f"grad of {mode}")
    blocks = triton.cdiv(tokens_out, meta["ROWS"])
    strides = (0, 0, 0, 0) if x is None or y is None else (*x.stride()[:2], *y.stride()[:2])
    programs = n * blocks * meta["CHUNKS"]
    arguments = (
        grad, *groups, x, y, out, out.shape[1], tokens_out, blocks, programs, grad.stride(0), grad.stride(1), *strides
    )  # fmt: skip
    flags = {"MODE": mode, "SIZED": groups.size is not None}
    return spread_rows, (programs + n,), arguments, {**flags, **meta}


def reduce(x: Tensor, groups: Groups, mode: str, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """See ``Backend.reduce``."""
    y, size_out = empty_merged(x, groups) if out is None else out
    if size_out.numel() > 0:
        x, groups = unit_stride(x), contiguous_groups(groups)
        key = ("reduce", mode, x.dtype, x.shape, x.stride(), size_out.shape, groups.size is None, x.get_device())
        launch(key, (x, *groups, y, size_out), reduce_launch, x, groups, y, size_out, mode)
    return y, size_out


def spread(grad: Tensor, groups: Groups, mode: str, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """See ``Backend.spread``."""
    n, _, dim = grad.shape
    out = grad.new_empty((n, groups.members.shape[1], dim))
    if grad.numel() > 0:
        if mode == "max":
            x, y = unit_stride(x), unit_stride(y)  # type: ignore[arg-type]
        groups = contiguous_groups(groups if mode == "mean" else Groups(groups.members, groups.offsets))
        grad = unit_stride(grad)
        strides = None if x is None or y is None else (x.stride(), y.stride())
        key = (
            "spread", mode, grad.dtype, grad.shape, grad.stride(), strides, out.shape, groups.size is None,
            grad.get_device(),
        )  # fmt: skip
        launch(key, (grad, *groups, x, y, out), spread_launch, grad, groups, out, mode, x, y)
    return out
