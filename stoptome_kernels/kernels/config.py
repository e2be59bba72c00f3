# SPDX-License-Identifier: Apache-2.0
"""The one table of tuned configurations: block sizes, warps and stages as a function of shape and dtype.

Each function is cached and returns what its kernels are launched with: the constants and the compiler's options.
enable_fp_fusion is off but in attention: products and sums are then rounded one by one, in merging as in the
reference, and in matching in the same way for every row, so that copies tie. tl.dot is made of fused operations all the
same.
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
# of a row longer than 64 (BLOCK_C), sources at a time when counting (CHUNK), warps, and the most registers a thread may
# have (None: as many as the compiler likes). Heads are read 16 or 32 targets at a time because the loads of all heads
# are in flight together; rows in three parts (float32) take three times the registers. With 8 warps 128 registers leave
# two programs to a multiprocessor, 80 three; with 4 warps 96 leave five. Without limits Triton 3.6 takes up to 186
# registers on sm_90 (one program) and spills some on sm_100; with them, nothing under 3.6 and 3.9 (bench/results/aot).
_MATCH: dict[str, dict[int, tuple[int, int, int, int, int | None]]] = {
    "heads, 16 bits": {
        16: (16, 32, 16, 4, 96), 32: (32, 32, 8, 8, 80), 64: (16, 32, 32, 8, 128), 128: (32, 32, 32, 8, None),
    },
    "heads, 32 bits": {
        16: (16, 32, 16, 4, None), 32: (16, 32, 32, 4, None), 64: (16, 32, 32, 8, None), 128: (32, 32, 32, 8, None),
    },
    "rows, 16 bits": {
        16: (16, 64, 16, 4, 96), 32: (32, 64, 8, 8, 80), 64: (64, 32, 32, 8, 128), 128: (32, 64, 16, 8, 128),
    },
    "rows, 32 bits": {
        16: (16, 32, 16, 4, None), 32: (16, 32, 32, 4, None), 64: (64, 16, 32, 8, 128), 128: (64, 16, 16, 8, 128),
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
        return {"item": {**score, "CHUNK": chunk}, "score": None, "plan": None}
    span = min(_pow2(larger), 4096)
    plan = {"ONE": larger <= span, "SPAN": span, "BLOCK": 64, "CHUNK": 32, "num_warps": 8, **common}
    return {"item": None, "score": score, "plan": plan}


@cache
def merge(dim: int, rows: int, dtype: torch.dtype, work: str, sized: bool) -> dict:
    """Return the configuration of merging in a mode, or of its adjoint (``work``: "mean", "grad of mean", …): rows and
    channels of a tile, how many tiles make a row."""
    # the tile that leaves the fewest lanes idle at the row's end: 256 for 768 and 1024, 128 for 384 and 1152
    block = min((256, 512, 128, 64), key=lambda b: -(-dim // b) * b) if dim > 64 else max(8, _pow2(dim))
    # 32 bytes a thread, two loads of 16: STOP's mean takes 48 registers under Triton 3.9 and 56 under 3.6, so that 40
    # or 36 KiB of loads per multiprocessor are in flight; twice as much takes twice the registers (and spills in
    # float32), half as much halves the loads (bench/aot_report.py)
    tile = 4096 // dtype.itemsize
    # the most registers a thread may have: without a limit Triton 3.6 spills 8 bytes of these, Triton 3.9 of the
    # gradient of mean on sm_80, or takes 90 registers (the gradient of max); 64 are 8 programs a multiprocessor, 72 7
    limits = {"max": 64, "all": 64, "grad of max": 72, "grad of mean": 64}
    limit = limits.get(work, 64 if work == "mean" and not sized else None)
    return {
        "D": dim, "ROWS": min(tile // block, _pow2(rows)), "BLOCK_D": block, "CHUNKS": max(1, -(-dim // block)),
        "num_warps": 4, "maxnreg": limit, "num_stages": 1, "enable_fp_fusion": False,
    }  # fmt: skip


@cache
def norm(dim: int, rows: int, dtype: torch.dtype, backward: bool = False, affine: bool = False) -> dict:
    """Return the configuration of merge_norm or of its backward: a tile is as many whole rows as 128 threads load in
    two (of two tensors, four) accesses of 16 bytes; longer rows take more threads."""
    block = max(8, _pow2(dim))
    tile = max(block, 1024)
    # the most registers a thread may have, without which Triton 3.6 or 3.9 takes more at some width or spills: rows of
    # 513 to 4096 columns 48 (10 programs of 4 warps a multiprocessor; forward in float32 it spills, so 56: 9), and 80
    # (6) with sums for the gradients of weight and bias; of shorter rows these sums, 96 (5), in float32 104 (4), and
    # the backward without them in 16 bits, 64 (8)
    limit, full = None, dtype == torch.float32
    if 1024 <= block <= 4096:
        limit = 80 if affine else 56 if full and not backward else 48
    elif affine and block < 1024:
        limit = 104 if full else 96
    elif backward and block < 1024 and not full:
        limit = 64
    # EARLY: what follows the row's reductions is loaded before them, so that nothing waits for memory behind their
    # barriers. Backward that takes no more registers; forward, for weight and bias, 56 in place of 48.
    return {
        "D": dim, "ROWS": min(tile // block, _pow2(rows)), "BLOCK_D": block, "EARLY": backward, "maxnreg": limit,
        "num_warps": min(16, max(4, tile // 256)), "num_stages": 1, "enable_fp_fusion": False,
    }  # fmt: skip


def norm_resident(meta: dict) -> int:
    """Return how many programs of a configuration the 65536 registers of a multiprocessor hold."""
    return 65536 // (32 * meta["num_warps"] * (meta["maxnreg"] or 128))


def norm_programs(tiles: int, meta: dict) -> int:
    """Return how many programs the backward with the gradients of weight and bias gets: so few that the sums they write
    are little beside the rows, at most what the 132 multiprocessors of an H100 run at once."""
    return min(-(-tiles // 4), 132 * norm_resident(meta))


@cache
def attention(queries: int, keys: int, channels: int, dtype: torch.dtype, compiled: bool = True) -> dict:
    """Of attention: the constants of each kernel; ``whole``, if not None, is what replaces ``queries`` and ``keys``."""
    thirds = compiled and dtype == torch.float32
    common = {
        "THIRDS": thirds,
        # the interpreter takes bfloat16 for integers
        "TYPE": tl.bfloat16 if thirds else tl.float32 if not compiled else _TRITON[dtype],
        "BLOCK_D": max(16, _pow2(channels)),
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    rows, columns = (min(max(16, _pow2(n)), 64) for n in (queries, keys))
    full, long = dtype == torch.float32, channels > 64
    # three programs of 4 warps fit a multiprocessor's registers (bench/results/aot; of the gradient at STOP's shape two
    # under Triton 3.6, which takes 190 registers for 3.9's 167); float32 takes so many of them that its gradients are
    # left to FMAs
    attend = {**common, "BLOCK_Q": min(rows, (16 if full else 32) if long else 32 if full else 64)}
    attend["BLOCK_K"] = min(columns, 32 if full else 64)
    by_queries = {**attend, "BLOCK_Q": min(attend["BLOCK_Q"], 32)}
    by_keys = {**by_queries, "BLOCK_K": min(columns, 32 if full or long else 64)}
    if full:
        fma = {"THIRDS": False, "TYPE": tl.float32, "num_warps": 8}
        by_queries |= {**fma, "BLOCK_K": 16}
        by_keys |= fma
    whole = by_keys if keys <= 64 and not full and not long else None
    # Values are loaded before the scores are computed where one block holds all keys: at STOP's shape in bfloat16 that
    # takes 126 registers for 133 under Triton 3.6 (four programs a multiprocessor for three), 123 for 128 under 3.9.
    # Beyond, it takes more: 149 for 139 at ViT-B/16 under 3.6.
    attend["EARLY"] = keys <= 64 and not full and not long
    return {"attend": attend, "whole": whole, "queries": by_queries, "keys": by_keys}
