# SPDX-License-Identifier: Apache-2.0
"""Residual add, merge and LayerNorm as one Triton kernel, and their gradient as another.

A program holds whole rows in registers: nothing is read twice, neither for the variance in two passes nor for the
gradient. y is summed as in merge.py, each product and each sum rounded on its own. There are no atomics: the gradients
of weight and bias are summed over the rows of each program, and the programs' sums by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import contiguous_groups, empty_merged, unit_stride
from ...reference import Groups, MergedRows
from . import config
from .launch import launch
from .merge import _fill_lost, _member, _narrowed, _rows, _span, _tile, _totals


@triton.jit
def _sums(x, residual, token, x_token, residual_token, mask):
    """Return x + residual of a tile of tokens, in float32 and not rounded further."""
    row = tl.load(x + token[:, None] * x_token, mask=mask, other=0.0).to(tl.float32)
    return row + tl.load(residual + token[:, None] * residual_token, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "groups", "blocks"])
def norm_rows(
    x, residual, members, offsets, size, weight, bias, y, normed, size_out, mean_out, rstd_out, eps,
    tokens, groups, blocks, x_item, x_token, residual_item, residual_token,
    D: tl.constexpr, SIZED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write y and normed (N, groups, D) from x and residual (N, tokens, D); size, mean, rstd (N, groups)."""
    item, _chunk, group, first, length, column = _tile(offsets, tokens, groups, blocks, ROWS, BLOCK_D, 1)
    inside = group < groups
    x += item * x_item + column[None, :]
    residual += item * residual_item + column[None, :]
    members += item * tokens
    if SIZED:
        size += item * tokens
    row = item * groups + group
    if EARLY:
        if WEIGHT:
            scale = tl.load(weight + column, mask=column < D, other=0.0)
        if BIAS:
            shift = tl.load(bias + column, mask=column < D, other=0.0)

    token, valid, total = _member(members, size, first, length > 0, tokens, "mean", SIZED)
    value = _sums(x, residual, token, x_token, residual_token, _rows(valid, column, D, BLOCK_D))
    longest = tl.max(length, 0)
    if longest > 1:
        merged = tl.where(valid[:, None], value * total[:, None], 0.0) + 0.0  # sums start from +0
        counted = valid.to(tl.int32)
        last = token
        for k in range(1, longest):
            token, valid, share = _member(members, size, first + k, k < length, tokens, "mean", SIZED)
            more = _sums(x, residual, token, x_token, residual_token, _rows(valid, column, D, BLOCK_D))
            merged += tl.where(valid[:, None], more * share[:, None], 0.0)
            last = tl.where(valid, token, last)
            counted += valid.to(tl.int32)
            total += share
        # all others of weight 0: rare, so the row is read again rather than kept in registers
        lonely = inside & (length > 1) & (counted == 1)
        again = _sums(x, residual, last, x_token, residual_token, _rows(lonely, column, D, BLOCK_D))
        weights = tl.where(counted > 1, total, 1.0)
        merged = tl.div_rn(merged, tl.broadcast_to(weights[:, None], merged.shape))
        value = tl.where((length > 1)[:, None], tl.where(lonely[:, None], again, merged), value)

    mask = _rows(inside, column, D, BLOCK_D)
    rounded = _narrowed(value, y.dtype.element_ty)
    place = row[:, None] * D + column[None, :]
    tl.store(y + place, rounded, mask=mask)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) * (1.0 / D)  # columns beyond D hold 0
    centered = tl.where((column < D)[None, :], value - mean[:, None], 0.0)
    rstd = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(tl.sum(centered * centered, 1) * (1.0 / D) + eps))
    value = centered * rstd[:, None]
    if not EARLY:
        if WEIGHT:
            scale = tl.load(weight + column, mask=column < D, other=0.0)
        if BIAS:
            shift = tl.load(bias + column, mask=column < D, other=0.0)
    if WEIGHT:
        value *= scale.to(tl.float32)[None, :]
    if BIAS:
        value += shift.to(tl.float32)[None, :]
    tl.store(normed + place, _narrowed(value, y.dtype.element_ty), mask=mask)
    tl.store(size_out + row, total, mask=inside)
    tl.store(mean_out + row, mean, mask=inside)
    tl.store(rstd_out + row, rstd, mask=inside)


@triton.jit(do_not_specialize=["tokens", "groups", "blocks", "tiles", "programs"])
def norm_grad_rows(
    grad_normed, grad_y, y, means, rstds, members, offsets, size, weight, out, partial,
    tokens, groups, blocks, tiles, programs, normed_item, normed_token, y_item, y_token,
    D: tl.constexpr, SIZED: tl.constexpr, GIVEN: tl.constexpr, WEIGHT: tl.constexpr, AFFINE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write out (N, tokens, D) from grad_normed and, if GIVEN, grad_y (N, groups, D), and the parts of the gradients of
    weight and bias, partial (programs, 2, D), if AFFINE. Program p of P takes the tiles p, p + P, p + 2 P, …; N more
    see to tokens that are in no group."""
    if tl.program_id(0) >= programs:
        _fill_lost(members, offsets, out, (tl.program_id(0) - programs).to(tl.int64), tokens, groups, D)
        return
    column = tl.arange(0, BLOCK_D)
    within = column < D
    if WEIGHT:
        scale = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)[None, :]
    if AFFINE:
        to_weight = tl.zeros((ROWS, BLOCK_D), tl.float32)
        to_bias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for tile in range(tl.program_id(0), tiles, programs):
        item = (tile // blocks).to(tl.int64)
        group = (tile % blocks) * ROWS + tl.arange(0, ROWS)
        inside = group < groups
        row = item * groups + group
        mask = _rows(inside, column, D, BLOCK_D)
        mean = tl.load(means + row, mask=inside, other=0.0)
        rstd = tl.load(rstds + row, mask=inside, other=0.0)
        place = group.to(tl.int64)[:, None]
        mine = members + item * tokens
        sizes = size
        if SIZED:
            sizes = size + item * tokens
        start = offsets + item * (groups + 1) + group
        if EARLY:
            first, length = _span(start, inside, tokens)
        value = tl.load(y + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        given = tl.load(grad_normed + item * normed_item + place * normed_token + column[None, :], mask=mask, other=0.0)
        if GIVEN:
            more = grad_y + item * y_item + place * y_token + column[None, :]
        if EARLY:
            if GIVEN:
                direct = tl.load(more, mask=mask, other=0.0)
            longest = tl.max(length, 0)
            total, alone = _totals(mine, sizes, first, length, longest, tokens, ROWS, SIZED)
            token, valid, share = _member(mine, sizes, first, length > 0, tokens, "mean", SIZED)
        up = given.to(tl.float32)
        hat = tl.where(within[None, :], (value - mean[:, None]) * rstd[:, None], 0.0)
        if AFFINE:
            to_weight += up * hat
            to_bias += up
        if WEIGHT:
            up *= scale
        shift = tl.sum(up, 1) * (1.0 / D)
        slope = tl.sum(up * hat, 1) * (1.0 / D)
        grad = (up - shift[:, None] - hat * slope[:, None]) * rstd[:, None]
        if GIVEN:
            if not EARLY:
                direct = tl.load(more, mask=mask, other=0.0)
            grad += direct.to(tl.float32)

        if not EARLY:
            first, length = _span(start, inside, tokens)
            longest = tl.max(length, 0)
            total, alone = _totals(mine, sizes, first, length, longest, tokens, ROWS, SIZED)
        for k in range(0, longest):
            if not EARLY:
                token, valid, share = _member(mine, sizes, first + k, k < length, tokens, "mean", SIZED)
            part = tl.where(valid, tl.where(alone, 1.0, tl.div_rn(share, total)), 0.0)
            spread = tl.where(valid[:, None], part[:, None] * grad, 0.0)  # 0 though the gradient be NaN
            tl.store(
                out + item * tokens * D + token[:, None] * D + column[None, :],
                _narrowed(spread, out.dtype.element_ty),
                mask=_rows(k < length, column, D, BLOCK_D),
            )
            if EARLY:
                token, valid, share = _member(mine, sizes, first + k + 1, k + 1 < length, tokens, "mean", SIZED)
    if AFFINE:
        partial += tl.program_id(0).to(tl.int64) * 2 * D + column
        tl.store(partial, tl.sum(to_weight, 0), mask=within)
        tl.store(partial + D, tl.sum(to_bias, 0), mask=within)


def norm_launch(
    x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> tuple:  # fmt: skip
    """Return what merge_norm runs: (kernel, grid, arguments, constants and options), with (y, normed, size, mean, rstd)
    as outputs. bench/aot_report.py compiles the same."""
    n, tokens, dim = x.shape
    tokens_out = outputs[0].shape[1]
    meta = config.norm(dim, tokens_out, outputs[0].dtype)
    blocks = triton.cdiv(tokens_out, meta["ROWS"])
    arguments = (
        x, residual, *groups, weight, bias, *outputs, eps, tokens, tokens_out, blocks,
        x.stride(0), x.stride(1), residual.stride(0), residual.stride(1),
    )  # fmt: skip
    flags = {"SIZED": groups.size is not None, "WEIGHT": weight is not None, "BIAS": bias is not None}
    return norm_rows, (n * blocks,), arguments, {**flags, **meta}


def norm_partial(grad_normed: Tensor) -> Tensor:
    """Return memory for each program's part of the gradients of weight and bias, ``(programs, 2, D)``."""
    n, tokens_out, dim = grad_normed.shape
    meta = config.norm(dim, tokens_out, grad_normed.dtype, True, True)
    programs = config.norm_programs(n * triton.cdiv(tokens_out, meta["ROWS"]), meta)
    return grad_normed.new_empty((programs, 2, dim), dtype=torch.float32)


def norm_grad_launch(
    grad_normed: Tensor, grad_y: Tensor | None, rows: MergedRows, groups: Groups, weight: Tensor | None, out: Tensor,
    partial: Tensor | None,
) -> tuple:  # fmt: skip
    """Return what merge_norm_backward runs, with ``partial`` of ``norm_partial``."""
    n, tokens_out, dim = grad_normed.shape
    affine = partial is not None
    meta = config.norm(dim, tokens_out, grad_normed.dtype, True, affine)
    blocks = triton.cdiv(tokens_out, meta["ROWS"])
    tiles = n * blocks
    programs = tiles if partial is None else partial.shape[0]
    strides = (*grad_normed.stride()[:2], *((0, 0) if grad_y is None else grad_y.stride()[:2]))
    arguments = (
        grad_normed, grad_y, *rows, *groups, weight, out, partial, out.shape[1], tokens_out, blocks, tiles, programs,
        *strides,
    )  # fmt: skip
    flags = {
        "SIZED": groups.size is not None, "GIVEN": grad_y is not None, "WEIGHT": weight is not None, "AFFINE": affine
    }  # fmt: skip
    return norm_grad_rows, (programs + n,), arguments, {**flags, **meta}


def merge_norm(
    x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``Backend.merge_norm``."""
    given = x.dtype, residual.dtype
    y, size_out = empty_merged(x, groups, given[0] if given[0] == given[1] else torch.promote_types(*given))
    outputs = (y, torch.empty_like(y), size_out, torch.empty_like(size_out), torch.empty_like(size_out))
    if size_out.numel() > 0:
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        x, residual, groups = unit_stride(x), unit_stride(residual), contiguous_groups(groups)
        affine = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        key = (
            "merge_norm", given, x.shape, x.stride(), residual.stride(), size_out.shape, groups.size is None, affine,
            eps, x.get_device(),
        )  # fmt: skip
        tensors = (x, residual, *groups, weight, bias, *outputs)
        launch(key, tensors, norm_launch, x, residual, groups, weight, bias, eps, outputs)
    return outputs


def merge_norm_backward(
    grad_normed: Tensor, grad_y: Tensor | None, rows: MergedRows, groups: Groups, weight: Tensor | None, affine: bool
) -> tuple[Tensor, Tensor]:
    """See ``Backend.merge_norm_backward``."""
    n, tokens_out, dim = grad_normed.shape
    out = grad_normed.new_empty((n, groups.members.shape[1], dim))
    if n * tokens_out == 0:
        return out, rows.mean.new_zeros((2 if affine else 0, dim))
    grad_y = None if grad_y is None else unit_stride(grad_y)
    weight = None if weight is None else weight.contiguous()
    rows, groups = MergedRows(*(t.contiguous() for t in rows)), contiguous_groups(groups)
    grad_normed, partial = unit_stride(grad_normed), norm_partial(grad_normed) if affine else None
    key = (
        "merge_norm_backward", grad_normed.dtype, grad_normed.shape, grad_normed.stride(),
        None if grad_y is None else grad_y.stride(), out.shape, groups.size is None,
        None if weight is None else weight.dtype, affine, grad_normed.get_device(),
    )  # fmt: skip
    tensors = (grad_normed, grad_y, *rows, *groups, weight, out, partial)
    launch(key, tensors, norm_grad_launch, grad_normed, grad_y, rows, groups, weight, out, partial)
    return out, rows.mean.new_empty((0, dim)) if partial is None else partial.sum(0)
