# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching (ToMe, section 3) as Triton kernels.

One launch of one program per item while all sources fit a tile. Beyond, one launch scores and one plans, both parallel
over blocks of tokens. Sorting is done by counting: the place of a token is the number of tokens that come before it, so
there are no atomics and no order that could differ from run to run.

Sources are the set A, targets the set B of the reference; both are counted from 0 in ascending token order. Without
``order`` they are the even and the odd tokens; the kernels are then compiled without what follows. With it, it is what
``reference.arrange`` gives, a permutation of the tokens: ``protected`` of neither set, then ``sources``, then the
targets; and ``before`` holds how many sources come before each target in token order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_plan, unit_stride
from . import config
from .launch import launch
from .similarity import nearest, token_of

_LOWEST = tl.constexpr(-(1 << 31))  # below all similarities as integers
# A merge is one number: its target, then its source in BITS, in which the number of sources fits, too; of 32 bits while
# BITS are fewer than 16, else of 64. Merges that are ordered as numbers are in order of destination, then of token.


@triton.jit
def _sets(order, tokens, protected, sources):
    """Return whether the first source comes right before the first target (0 or 1; without order), where each set
    begins (its first token, or its first place in order), and the sizes of both."""
    if order is None:
        even = 1 - protected % 2
        first_a = protected + 1 - even
        first_b = protected + even
        sources = (tokens - protected + even) // 2
        targets = (tokens - protected + 1 - even) // 2
    else:
        even = 0
        first_a = protected
        first_b = protected + sources
        targets = tokens - first_b
    return even, first_a, first_b, sources, targets


@triton.jit
def _sources_before(before, b, even, inside):
    """Return how many sources come before target b in token order."""
    return b + even if before is None else tl.load(before + b, mask=inside, other=0)


@triton.jit
def _sorted_bits(score):
    """Return float32 numbers, no -0 and no NaN among them, as integers of the same order."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count_merges(merges, r, own, merge, before_own, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """Return what decides the places of the sources ``own``, whose merges these are or would be: how many sources that
    come before it in token order are merged, and how many merges come before its own; and of the targets ``own``: how
    many merge into targets before it, and with those that merge into it and come before it in token order."""
    # after all merges, of a source after all others
    LAST: tl.constexpr = 0x7FFFFFFF if BITS < 16 else 0x7FFFFFFFFFFFFFFF
    HALF: tl.constexpr = 16 if BITS < 16 else 32  # two counts travel in a number, through one reduction
    MASK: tl.constexpr = 0xFFFF if BITS < 16 else 0xFFFFFFFF
    first = own.to(merge.dtype) << BITS  # before all merges into own
    next = first + before_own
    of_sources = tl.zeros(own.shape, merge.dtype)
    of_targets = tl.zeros(own.shape, merge.dtype)
    for start in range(0, r, CHUNK):
        # the pointer advances, so that addresses of a thread differ by constants; merges are rows, so that a thread
        # counts for itself first
        place = tl.arange(0, CHUNK)
        other = tl.load(merges + place, mask=place < r - start, other=LAST)[:, None]
        merges += CHUNK
        removed = ((other & ((1 << BITS) - 1)) < own[None, :]).to(merge.dtype)
        of_sources += tl.sum(removed + ((other < merge[None, :]).to(merge.dtype) << HALF), 0)
        below = (other < first[None, :]).to(merge.dtype)
        of_targets += tl.sum(below + ((other < next[None, :]).to(merge.dtype) << HALF), 0)
    return of_sources & MASK, of_sources >> HALF, of_targets & MASK, of_targets >> HALF


@triton.jit
def _write_sources(
    dest, members, offsets, order, before, a, merged, partner, best, removed, ahead, first_a, sources, protected, base,
    even,
):  # fmt: skip
    inside = a < sources
    token = token_of(order, first_a, a, inside)
    out = tl.where(merged, base + partner, protected + a - removed)
    # a target comes before its source if its token does
    after = (a >= _sources_before(before, partner, even, merged)).to(tl.int32)
    place = tl.where(merged, out + ahead + after, out)
    weightless = merged & (best == float("-inf"))
    tl.store(dest + token, out, mask=inside)
    tl.store(members + place, tl.where(weightless, ~token, token), mask=inside)
    tl.store(offsets + out, out, mask=inside & ~merged)


@triton.jit
def _write_targets(dest, members, offsets, order, b, below, behind, first_b, targets, base):
    inside = b < targets
    token = token_of(order, first_b, b, inside)
    out = base + b
    tl.store(dest + token, out, mask=inside)
    tl.store(offsets + out, out + below, mask=inside)
    tl.store(members + out + behind, token, mask=inside)


@triton.jit
def _write_protected(dest, members, offsets, order, first, step, protected, BLOCK: tl.constexpr):
    for start in range(first, protected, step):
        i = start + tl.arange(0, BLOCK)
        inside = i < protected
        token = i
        if order is not None:
            token = tl.load(order + i, mask=inside, other=0)
        tl.store(dest + token, i, mask=inside)
        tl.store(members + i, token, mask=inside)
        tl.store(offsets + i, i, mask=inside)


@triton.jit(do_not_specialize=["tokens", "r", "protected", "sources"])
def match_item(
    metric, dest, members, offsets, order, before, tokens, r, protected, sources,
    item_stride, head_stride, token_stride,
    C: tl.constexpr, H: tl.constexpr, SHRINK: tl.constexpr, SHIFT: tl.constexpr,
    PRODUCT: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Match an item whose sources and targets fit one tile; grid (N,)."""
    item = tl.program_id(0).to(tl.int64)
    even, first_a, first_b, sources, targets = _sets(order, tokens, protected, sources)
    base = protected + sources - r
    metric += item * item_stride
    dest += item * tokens
    members += item * tokens
    offsets += item * (tokens - r + 1)

    a = tl.arange(0, BLOCK_A)
    best, partner = nearest(
        metric, order, a, first_a, first_b, sources, targets, head_stride, token_stride,
        C, H, SHRINK, SHIFT, PRODUCT, TYPE, BLOCK_B, BLOCK_C,
    )  # fmt: skip
    # rank: how many are better; of two that are as good the first is
    key = _sorted_bits(best)
    limit = key[:, None] - (a[None, :] < a[:, None]).to(tl.int32)
    rank = tl.sum((key[None, :] > limit).to(tl.int32), 1)
    merged = (rank < r) & (a < sources)
    merge = (partner << BITS) | a
    # Merges travel between threads through what the plan overwrites in the end, by rank, of which there is one each: no
    # memory of their own, and they never leave the cache.
    tl.store(dest + rank, merge, mask=merged)
    tl.debug_barrier()
    before_a = _sources_before(before, a, even, a < targets)  # a counts targets too
    removed, ahead, below, behind = _count_merges(dest, r, a, merge, before_a, BITS, CHUNK)
    tl.debug_barrier()
    _write_sources(
        dest, members, offsets, order, before, a, merged, partner, best, removed, ahead, first_a, sources, protected,
        base, even,
    )  # fmt: skip
    _write_targets(dest, members, offsets, order, a, below, behind, first_b, targets, base)
    _write_protected(dest, members, offsets, order, 0, BLOCK_A, protected, BLOCK_A)
    tl.store(offsets + tokens - r, tokens)


@triton.jit(do_not_specialize=["tokens", "protected", "sources", "blocks"])
def score_blocks(
    metric, best, partner, order, tokens, protected, sources, blocks, item_stride, head_stride, token_stride,
    C: tl.constexpr, H: tl.constexpr, SHRINK: tl.constexpr, SHIFT: tl.constexpr,
    PRODUCT: tl.constexpr, TYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the proposals of a block of sources: best (N, |A|) float32, partner (N, |A|) int32; grid (N·blocks,)."""
    block = tl.program_id(0) % blocks
    item = (tl.program_id(0) // blocks).to(tl.int64)
    _, first_a, first_b, sources, targets = _sets(order, tokens, protected, sources)
    a = block * BLOCK_A + tl.arange(0, BLOCK_A)
    value, target = nearest(
        metric + item * item_stride, order, a, first_a, first_b, sources, targets,
        head_stride, token_stride, C, H, SHRINK, SHIFT, PRODUCT, TYPE, BLOCK_B, BLOCK_C,
    )  # fmt: skip
    tl.store(best + item * sources + a, value, mask=a < sources)
    tl.store(partner + item * sources + a, target, mask=a < sources)


@triton.jit
def _load_keys(best, a, sources):
    """Return similarities as integers of the same order; _LOWEST, below all of them, past the end."""
    return tl.where(a < sources, _sorted_bits(tl.load(best + a, mask=a < sources, other=0.0)), _LOWEST)


@triton.jit
def _at_least(best, keys, limit, sources, ONE: tl.constexpr, SPAN: tl.constexpr):
    """Return how many sources have a key of at least limit."""
    count = tl.sum((keys >= limit).to(tl.int32), 0)
    if not ONE:
        for start in range(SPAN, sources, SPAN):
            more = _load_keys(best, start + tl.arange(0, SPAN), sources)
            count += tl.sum((more >= limit).to(tl.int32), 0)
    return count


@triton.jit
def _select(best, sources, r, ONE: tl.constexpr, SPAN: tl.constexpr):
    """Return the r-th best source: a key, and its index. Those of a higher key, and those of the same key up to that
    index, are merged."""
    span = tl.arange(0, SPAN)
    keys = _load_keys(best, span, sources)
    most = tl.max(keys, 0)
    limit = tl.min(tl.where(span < sources, keys, most), 0)
    if not ONE:
        for start in range(SPAN, sources, SPAN):
            more = _load_keys(best, start + span, sources)
            most = tl.maximum(most, tl.max(more, 0))
            limit = tl.minimum(limit, tl.min(tl.where(start + span < sources, more, most), 0))
    # at least r sources reach limit, fewer than r are above most
    while limit < most:
        middle = (limit | most) - ((limit ^ most) >> 1)  # of the sum the half, rounded up
        count = _at_least(best, keys, middle, sources, ONE, SPAN)
        limit = tl.where(count >= r, middle, limit)
        most = tl.where(count > r, most, tl.where(count == r, middle, middle - 1))  # exactly r: found
    need = r - _at_least(best, keys, limit + 1, sources, ONE, SPAN)
    tied = (keys == limit).to(tl.int32)
    cut = tl.max(tl.where((tied > 0) & (tl.cumsum(tied, 0) <= need), span, -1), 0)
    if not ONE:
        need -= tl.sum(tied, 0)
        for start in range(SPAN, sources, SPAN):
            tied = (_load_keys(best, start + span, sources) == limit).to(tl.int32)
            cut = tl.maximum(cut, tl.max(tl.where((tied > 0) & (tl.cumsum(tied, 0) <= need), start + span, -1), 0))
            need -= tl.sum(tied, 0)
    return limit, cut


@triton.jit
def _merged(best, a, sources, limit, cut):
    """Return which sources are merged."""
    key = _load_keys(best, a, sources)
    return (a < sources) & ((key > limit) | ((key == limit) & (a <= cut)))


@triton.jit
def _list_merges(merges, best, partner, sources, limit, cut, BITS: tl.constexpr, SPAN: tl.constexpr):
    """Write all merges, in order of their sources."""
    for start in range(0, sources, SPAN):
        a = start + tl.arange(0, SPAN)
        merged = _merged(best, a, sources, limit, cut)
        target = tl.load(partner + a, mask=merged, other=0).to(merges.dtype.element_ty)
        place = tl.cumsum(merged.to(tl.int32), 0)
        tl.store(merges + place - 1, (target << BITS) | a, mask=merged)
        merges += tl.max(place, 0)


@triton.jit(do_not_specialize=["tokens", "r", "protected", "sources", "blocks"])
def plan_blocks(
    best, partner, merges, dest, members, offsets, order, before, tokens, r, protected, sources, blocks,
    ONE: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the plan's lines for a block of sources and a block of targets; grid (N·blocks,). Every program lists all
    merges of its item: all of them write the same numbers to the same (N, r) places."""
    block = tl.program_id(0) % blocks
    item = (tl.program_id(0) // blocks).to(tl.int64)
    even, first_a, first_b, sources, targets = _sets(order, tokens, protected, sources)
    base = protected + sources - r
    best += item * sources
    partner += item * sources
    merges += item * r
    dest += item * tokens
    members += item * tokens
    offsets += item * (tokens - r + 1)

    limit, cut = _select(best, sources, r, ONE, SPAN)
    _list_merges(merges, best, partner, sources, limit, cut, BITS, SPAN)
    tl.debug_barrier()
    own = block * BLOCK + tl.arange(0, BLOCK)  # as sources and as targets
    merged = _merged(best, own, sources, limit, cut)
    score = tl.load(best + own, mask=own < sources, other=0.0)
    target = tl.load(partner + own, mask=own < sources, other=0)
    merge = (target.to(merges.dtype.element_ty) << BITS) | own
    before_own = _sources_before(before, own, even, own < targets)
    removed, ahead, below, behind = _count_merges(merges, r, own, merge, before_own, BITS, CHUNK)
    _write_sources(
        dest, members, offsets, order, before, own, merged, target, score, removed, ahead, first_a, sources, protected,
        base, even,
    )  # fmt: skip
    _write_targets(dest, members, offsets, order, own, below, behind, first_b, targets, base)
    _write_protected(dest, members, offsets, order, block * BLOCK, blocks * BLOCK, protected, BLOCK)
    if block == 0:
        tl.store(offsets + tokens - r, tokens)


_COMPILED = isinstance(match_item, triton.runtime.JITFunction)  # and not interpreted (TRITON_INTERPRET=1)


def _larger(tokens: int, protected: int) -> int:
    """Return how many tokens the larger of the two sets has, where they alternate."""
    return (tokens - protected + 1) // 2


def _configuration(metric: Tensor, larger: int) -> dict:
    """Return the constants of each kernel, None for one not run."""
    return config.match(metric.shape[1], metric.shape[3], larger, metric.dtype, _COMPILED)


def launches(
    metric: Tensor, r: int, protected: int, plan: tuple[Tensor, Tensor, Tensor], order: Tensor | None = None,
    before: Tensor | None = None,
) -> list[tuple]:  # fmt: skip
    """Return what one matching runs: (kernel, grid, arguments, constants and options) of each launch, in order; with
    dest, members and offsets to write.

    bench/aot_report.py calls this with tensors on the meta device and compiles what it returns.
    """
    n, _, tokens, _ = metric.shape
    given = None  # how many sources, where the kernels can't count them
    if order is None or before is None:
        sources = (tokens - protected + 1 - protected % 2) // 2
        larger = _larger(tokens, protected)
    else:
        targets = before.shape[0]
        sources = given = tokens - protected - targets
        larger = max(sources, targets)
    meta = _configuration(metric, larger)
    strides = metric.stride()[:3]
    if meta["item"]:
        arguments = (metric, *plan, order, before, tokens, r, protected, given, *strides)
        return [(match_item, (n,), arguments, meta["item"])]

    best = metric.new_empty(n, sources, dtype=torch.float32)
    partner = metric.new_empty(n, sources, dtype=torch.int32)
    blocks = triton.cdiv(sources, meta["score"]["BLOCK_A"])
    arguments = (metric, best, partner, order, tokens, protected, given, blocks, *strides)
    steps = [(score_blocks, (n * blocks,), arguments, meta["score"])]
    blocks = triton.cdiv(larger, meta["plan"]["BLOCK"])
    merges = metric.new_empty(n, r, dtype=torch.int32 if meta["plan"]["BITS"] < 16 else torch.int64)
    arguments = (best, partner, merges, *plan, order, before, tokens, r, protected, given, blocks)
    steps.append((plan_blocks, (n * blocks,), arguments, meta["plan"]))
    return steps


def match(
    metric: Tensor, r: int, protected: int, order: Tensor | None = None, sources: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``Backend.match``."""
    metric = unit_stride(metric)
    before = None
    if order is not None:
        first_b = protected + sources
        before = torch.searchsorted(order[protected:first_b], order[first_b:], out_int32=True)
    plan = empty_plan(metric, r)
    if order is None and _configuration(metric, _larger(metric.shape[2], protected))["item"]:
        key = ("match", metric.dtype, metric.shape, metric.stride(), r, protected, metric.get_device())
        launch(key, (metric, *plan, None, None), launches, metric, r, protected, plan)
        return plan
    for kernel, grid, arguments, meta in launches(metric, r, protected, plan, order, before):
        kernel[grid](*arguments, **meta)
    return plan
