# SPDX-License-Identifier: Apache-2.0
"""Blocks of queries and keys, loaded, scored and stored, for the kernels of attention and of its gradient; and the
arguments of their launches.

Scores are kept in base 2, as exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...layout import unit_stride
from ...reference import AttentionInputs, prefix_length
from . import config
from .merge import _COMPILED, _narrowed
from .similarity import _dot_thirds

# integers that a kernel is not compiled anew for
NOT_SPECIALIZED = [
    "queries", "tokens", "ahead", "share", "blocks",
    *(f"{x}_{axis}" for x in ("q", "k", "v", "pk", "pv", "grad", "out") for axis in ("item", "head", "token")),
]  # fmt: skip
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def dot(u, v, total, THIRDS: tl.constexpr, TYPE: tl.constexpr):
    """Return total + u vᵀ in float32; TYPE is what is multiplied, float32 rows being taken apart where THIRDS."""
    if THIRDS:
        total = _dot_thirds(u, v, total, TYPE)
    else:
        total = tl.dot(u.to(TYPE), tl.trans(v.to(TYPE)), total, input_precision="ieee")
    return total


@triton.jit
def where_in_grid(H: tl.constexpr, blocks, share):
    """Return where this program works: item, its prefix, head, and block of rows."""
    block = tl.program_id(0) % blocks  # the blocks of a head follow each other: they read the same keys
    head = tl.program_id(0) // blocks
    item = head // H
    return item.to(tl.int64), (item // share).to(tl.int64), (head % H).to(tl.int64), block


@triton.jit
def head_of(x, item, item_stride, head, head_stride, token_stride, UNIT: tl.constexpr):
    """Return the address of a head of x, and the stride of its tokens in elements. Strides are given in UNIT elements,
    so that they are known to be aligned; the result has 64 bits, since a few tokens may be further apart than 32
    hold."""
    return x + (item * item_stride + head * head_stride) * UNIT, tl.full((), UNIT, tl.int64) * token_stride


@triton.jit
def inside(rows, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the mask of (rows, BLOCK_D)."""
    mask = (rows < count)[:, None]
    if D < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return mask


@triton.jit
def load_rows(x, stride, i, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return rows i of x, 0 past the end: (len(i), BLOCK_D)."""
    place = x + i.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(place, mask=inside(i, count, D, BLOCK_D), other=0.0)


@triton.jit
def log2(x):
    """Return log2 by the hardware's approximation, in one instruction for twenty: between 0.5 and 2 off by 2^-22 at
    most, elsewhere by a rounding of float32 or two; numbers below 2^-126 count as 0."""
    if _COMPILED:
        x = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        x = tl.log2(x)
    return x


@triton.jit
def places_of(x, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the addresses of the first BLOCK rows of x: (BLOCK, BLOCK_D)."""
    return x + tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_whole(places, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return a block of rows that are all there."""
    column = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(places, mask=column < D, other=0.0) if D < BLOCK_D else tl.load(places)


@triton.jit
def load_keys(
    x, stride, prefix, prefix_stride, j, tokens, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Return keys or values j, 0 past the end: (len(j), BLOCK_D). Those of the prefix are behind the item's own here:
    their order does not matter."""
    column = tl.arange(0, BLOCK_D)[None, :]
    places = x + j.to(tl.int64)[:, None] * stride + column
    if PREFIX:  # whole addresses are chosen: of their beginnings alone Triton 3.9 no longer knows that they are aligned
        there = prefix + (j - tokens).to(tl.int64)[:, None] * prefix_stride + column
        places = tl.where((j < tokens)[:, None], places, there)
    return tl.load(places, mask=inside(j, keys, D, BLOCK_D), other=0.0)


@triton.jit
def store_rows(x, value, item, head, i, count, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows i of x (N, count, H, D)."""
    x += (item * count * H + head) * D
    place = x + i.to(tl.int64)[:, None] * (H * D) + tl.arange(0, BLOCK_D)[None, :]
    tl.store(place, _narrowed(value, x.dtype.element_ty), mask=inside(i, count, D, BLOCK_D))


@triton.jit
def bias_of(size, j, tokens, keys, SIZED: tl.constexpr):
    """Return log2 of the sizes of keys j, 0 for those of the prefix, −inf past the end: (len(j),)."""
    bias = tl.zeros(j.shape, tl.float32)
    if SIZED:
        bias = log2(tl.load(size + j, mask=j < tokens, other=1.0))
    return tl.where(j < keys, bias, float("-inf"))


@triton.jit
def scores_of(query, key, bias, factor, BIASED: tl.constexpr, THIRDS: tl.constexpr, TYPE: tl.constexpr):
    """Return the scores of a block of queries by a block of keys, in base 2."""
    score = dot(query, key, tl.zeros((query.shape[0], key.shape[0]), tl.float32), THIRDS, TYPE) * factor
    if BIASED:
        score += bias[None, :]
    return score


# -- launches ----------------------------------------------------------------------------------------------------------


def strides_of(*tensors: Tensor | None) -> tuple[dict[str, int], list[int]]:
    """Return the constant UNIT and the strides of each tensor in UNIT elements, but the last, which is 1; zeros for
    None. Triton knows of an integer only whether 16 divides it, and so nothing of heads of 72 or 88 channels."""
    strides = [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return {"UNIT": unit}, [stride // unit for stride in strides]


def heads_of(inputs: AttentionInputs) -> int:
    """Return the number of heads of all items."""
    return inputs.q.shape[0] * inputs.q.shape[1]


def numbers_of(inputs: AttentionInputs) -> tuple[int, int, int, int]:
    """Return queries, the item's own keys, those of the prefix, and how many items share a prefix."""
    return inputs.q.shape[2], inputs.k.shape[2], prefix_length(inputs), _share(inputs)


def constants_of(inputs: AttentionInputs) -> dict:
    """Return the constants that all kernels have."""
    _, heads, _, channels = inputs.q.shape
    return {"D": channels, "H": heads, "SIZED": inputs.size is not None, "PREFIX": inputs.prefix_k is not None}


def _share(inputs: AttentionInputs) -> int:
    """Return how many items have the same prefix."""
    return 1 if inputs.prefix_k is None else inputs.q.shape[0] // inputs.prefix_k.shape[0]


def key_of(name: str, inputs: AttentionInputs) -> tuple:
    """Return what a launch depends on by these inputs, but for their addresses."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    prefix = None
    if prefix_k is not None and prefix_v is not None:
        prefix = (prefix_k.shape, prefix_k.stride(), prefix_v.stride())
    strides = (q.stride(), k.stride(), v.stride())
    return name, q.dtype, q.shape, k.shape, strides, prefix, size is None, scale, q.get_device()


def sizes_of(inputs: AttentionInputs) -> tuple:
    """Return the arguments of ``config.attention``."""
    q, keys = inputs.q, prefix_length(inputs) + inputs.k.shape[2]
    return q.shape[2], keys, q.shape[3], q.dtype, config.capability(q.get_device()), _COMPILED.value


def readable(inputs: AttentionInputs) -> AttentionInputs:
    """Return inputs with the strides that the kernels read."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    size = None if size is None else size.contiguous()
    prefix_k, prefix_v = (None if t is None else unit_stride(t) for t in (prefix_k, prefix_v))
    return AttentionInputs(unit_stride(q), unit_stride(k), unit_stride(v), size, prefix_k, prefix_v, scale)
