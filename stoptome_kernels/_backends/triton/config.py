# SPDX-License-Identifier: Apache-2.0
"""The one table of tuned configurations: block sizes, warps and stages as a function of shape and dtype.

Each function is cached and returns what its kernels are launched with: the constants and the compiler's options.
enable_fp_fusion is off but in attention and in the products of spectra: products and sums are then rounded one by one,
in merging as in the reference, and in matching in the same way for every row, so that copies tie. tl.dot is made of
fused operations all the same.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ONE_LAUNCH = 128  # sources of an item that one program matches alone: a tile of 128 x 128 counts, T up to 257


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# What a program of matching works on, by the metric and by the sources of a tile (BLOCK_A): targets (BLOCK_B), channels
# of a row longer than 64 (BLOCK_C), merges at a time when counting (CHUNK: about as many as there usually are), warps,
# and the most registers a thread may have (None: as many as the compiler likes). Heads are read 16 or 32 targets at a
# time because the loads of all heads are in flight together; rows in three parts (float32) take three times the
# registers. With 8 warps 128 registers leave two programs to a multiprocessor, 80 three; with 4 warps 96 leave five.
# Without limits Triton 3.6 takes up to 186 registers on sm_90 (one program) and spills some on sm_100; with them,
# nothing under 3.6 and 3.9 (bench/results/aot).
_MATCH: dict[str, dict[int, tuple[int, int, int, int, int | None]]] = {
    "heads, 16 bits": {
        16: (16, 32, 8, 4, 96), 32: (16, 32, 8, 8, 80), 64: (16, 32, 16, 8, 128), 128: (32, 32, 16, 8, None),
    },
    "heads, 32 bits": {
        16: (16, 32, 8, 4, 104), 32: (16, 32, 8, 4, None), 64: (16, 32, 16, 4, None), 128: (32, 32, 16, 8, None),
    },
    "rows, 16 bits": {
        16: (16, 64, 16, 4, 96), 32: (32, 64, 16, 8, 80), 64: (64, 32, 32, 8, 128), 128: (64, 64, 32, 16, None),
    },
    "rows, 32 bits": {
        16: (16, 32, 16, 4, None), 32: (16, 32, 16, 4, None), 64: (64, 16, 32, 8, 128), 128: (64, 16, 32, 8, 128),
    },
}  # fmt: skip


@cache
def match(heads: int, channels: int, larger: int, dtype: torch.dtype, compiled: bool = True) -> dict:
    """Return, for the size of the larger of the two sets, the constants of each kernel of matching, None for one not
    run."""
    whole = larger <= ONE_LAUNCH
    # beyond one tile the heads of all targets are read again (from the L2) for every block of sources: large blocks
    tile = max(16, _pow2(larger)) if whole else 128 if heads > 1 else 64
    full = dtype == torch.float32
    kind = f"{'heads' if heads > 1 else 'rows'}, {32 if full else 16} bits"
    targets, piece, chunk, warps, registers = _MATCH[kind][tile]
    narrow = heads == 1 and not full  # multiplied as they are
    half = narrow and dtype == torch.float16
    # the interpreter's dot is BLAS, whose sums differ from row to row, and it takes bfloat16 for integers
    product = "sums" if not compiled else "narrow" if narrow else "thirds" if tile > 32 else "float32"
    common = {"num_stages": 1, "enable_fp_fusion": False}
    score = {
        "C": channels,
        "H": heads,
        "SHRINK": 1.0 / _pow2(heads),
        "PRODUCT": product,
        "TYPE": tl.float16 if half else tl.bfloat16 if compiled else tl.float32,
        "SHIFT": 15 if half else 0,  # all 40 binades of float16 stay in its range
        "BLOCK_A": tile,
        "BLOCK_B": targets,
        "BLOCK_C": max(16, _pow2(channels)) if channels <= 64 else piece,
        "num_warps": warps,
        "maxnreg": registers,
        **common,
    }
    if whole:
        return {"item": {**score, "BITS": tile.bit_length(), "CHUNK": chunk}, "score": None, "plan": None}
    span = min(_pow2(larger), 4096)
    plan = {
        "ONE": larger <= span, "SPAN": span, "BITS": larger.bit_length(), "BLOCK": 64, "CHUNK": 32, "num_warps": 8,
        "maxnreg": 128 if span > 1024 else None, **common,
    }  # fmt: skip
    return {"item": None, "score": score, "plan": plan}


# Channels of one warp: a row, several short ones, or a piece of a long one. A tile of several warps waits at barriers
# for its slowest row, and all its rows walk as many members as the one that has most. On an H200 in bfloat16 that took
# 1.2 times as long in merging and 1.4 times in merge_norm, forward and backward (bench/results/gpu).
_WARP = 1024


@cache
def merge(dim: int, rows: int, dtype: torch.dtype, work: str) -> dict:
    """Return the configuration of merging in a mode, or of its adjoint (``work``: "mean", "grad of mean", …): rows and
    channels of a tile, how many tiles make a row."""
    block = max(8, _pow2(dim))
    if dim > _WARP:  # the pieces that leave the fewest lanes idle at the row's end: 256 for 1280, 128 for 1152
        block = min((1024, 512, 256, 128), key=lambda b: -(-dim // b) * b)
    # the most registers a thread may have, where Triton 3.6 or 3.9 aims at fewer, misses by two, and spills
    full = dtype == torch.float32
    limits = {"grad of mean": 128 if full or block < _WARP else None, "grad of max": 168 if full else None}
    return {
        "D": dim, "ROWS": min(_WARP // block, _pow2(rows)), "BLOCK_D": block, "CHUNKS": max(1, -(-dim // block)),
        "num_warps": 1, "maxnreg": limits.get(work), "num_stages": 1, "enable_fp_fusion": False,
    }  # fmt: skip


@cache
def norm(dim: int, rows: int, dtype: torch.dtype, backward: bool = False, affine: bool = False) -> dict:
    """Return the configuration of merge_norm or of its backward: whole rows, a warp for each 1024 channels or for
    shorter rows of 512 channels in all."""
    block = max(8, _pow2(dim))
    full = dtype == torch.float32
    warps = max(1, block // _WARP)
    if affine and full and block >= _WARP:  # sums for the gradients of weight and bias: a warp alone would spill
        warps *= 2
    # the most registers a thread may have: at 768 channels Triton 3.6 takes 121 without a limit, and 8 % more time
    limit = None if backward or full or block < _WARP else 104 if dim <= 0.75 * block else 128
    # EARLY: what follows the row's reductions is loaded before them. Forward, weight and bias take too many registers.
    return {
        "D": dim, "ROWS": min(max(1, 512 // block), _pow2(rows)), "BLOCK_D": block, "EARLY": backward,
        "maxnreg": limit, "num_warps": min(16, warps), "num_stages": 1, "enable_fp_fusion": False,
    }  # fmt: skip


def norm_resident(meta: dict) -> int:
    """Return how many programs of a configuration a multiprocessor holds, of at most 255 registers a thread."""
    return 8 // meta["num_warps"] or 1


def norm_programs(tiles: int, meta: dict) -> int:
    """Return how many programs the backward with the gradients of weight and bias gets: so few that the sums they write
    are few next to the rows, at most what the 132 multiprocessors of an H100 run at once."""
    return min(-(-tiles // 4), 132 * norm_resident(meta))


# Queries and keys of a block, warps, how far loads are ahead (stages), and the most registers a thread may have, where
# that is limited: forward, gradient by queries, gradient by keys; by bits of a number and the most channels of a head
# (None: any number). On sm_90 tensor cores take products of 64 rows as they lie in shared memory (wgmma), float32 in
# three parts; elsewhere such blocks would spill registers. More stages cost instructions, and pay where registers leave
# few warps to wait for loads.
_ATTENTION_90 = (
    (16, 64, ((64, 128, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1))),
    (16, None, ((64, 32, 4, 3), (64, 32, 4, 1), (32, 64, 4, 1))),
    (32, 64, ((64, 16, 4, 1), (64, 16, 4, 1), (16, 64, 4, 1))),
    (32, None, ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1))),
)
_ATTENTION = (
    (16, 64, ((64, 32, 4, 1), (64, 16, 4, 1), (32, 64, 4, 1))),
    (16, None, ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1))),
    (32, 64, ((32, 32, 4, 1), (16, 16, 8, 1, 96), (16, 16, 8, 1))),
    (32, None, ((16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1))),
)
ONE_BLOCK = 64  # queries and keys of a head whose gradient is one program, of 16 bits and as many channels


@cache
def capability(device: int) -> int:
    """Return the major number of a device's compute capability times ten (8.6 → 80); 90 for what is no GPU (-1)."""
    return 90 if device < 0 else 10 * torch.cuda.get_device_capability(device)[0]


@cache
def attention(
    queries: int,
    keys: int,
    channels: int,
    dtype: torch.dtype,
    architecture: int,
    compiled: bool = True,
) -> dict:
    """Return the constants of each kernel of attention; ``item``, if not None, is what replaces ``queries`` and
    ``keys``."""
    full, few = dtype == torch.float32, channels <= 64
    gradients_in_parts = full and few and architecture == 90
    blocks = next(
        blocks
        for bits, widest, blocks in (_ATTENTION_90 if architecture == 90 else _ATTENTION)
        if bits == (32 if full else 16) and channels <= (widest or channels)
    )

    def constants(rows: int, columns: int, warps: int, stages: int, *limit: int, parts: bool) -> dict:
        return {
            "THIRDS": parts and compiled,
            # the interpreter takes bfloat16 for integers
            "TYPE": tl.bfloat16 if parts and compiled else tl.float32 if full or not compiled else _TRITON[dtype],
            "BLOCK_Q": min(rows, max(16, _pow2(queries))),
            "BLOCK_K": min(columns, max(16, _pow2(keys))),
            "BLOCK_D": max(16, _pow2(channels)),
            "STAGES": stages,
            "num_warps": warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
            **({"maxnreg": limit[0]} if limit else {}),
        }

    attend, by_queries, by_keys = (
        constants(*block, parts=full if forward else gradients_in_parts)
        for block, forward in zip(blocks, (True, False, False), strict=True)
    )
    attend["MANY"] = keys > attend["BLOCK_K"]  # for tune.py: a launch asks its own blocks
    item = None
    if max(queries, keys) <= ONE_BLOCK and few and not full:
        item = constants(ONE_BLOCK, ONE_BLOCK, 4, 1, parts=False)
        del item["STAGES"]  # there is no loop
    return {"attend": attend, "item": item, "queries": by_queries, "keys": by_keys}


@cache
def spectra(frames: int) -> dict:
    """Return the constants of the products of spectra: frames of a tile and frequencies of a block. A thread
    holds eight complex sums. Not tuned: no GPU has run it yet."""
    tile = min(16, _pow2(frames))
    return {
        "FRAMES": tile, "BLOCK": max(64, 1024 // tile), "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
