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


@cache
def match(
    heads: int, channels: int, larger: int, dtype: torch.dtype, compiled: bool = True, given: bool = False
) -> dict:
    """Of matching, with the size of the larger of the two sets, and whether they were given by index: the constants of
    each kernel, None for one not run."""
    whole = larger <= ONE_LAUNCH
    common = {"num_stages": 1, "enable_fp_fusion": False}
    # beyond one tile the heads of all targets are read again (from the L2) for every block of sources: large blocks
    tile = max(16, _pow2(larger)) if whole else 128 if heads > 1 else 64
    narrow = heads == 1 and dtype != torch.float32
    small = tile <= 32 and dtype == torch.float32  # its loads take twice the registers: half as many in flight
    # what keeps registers from spilling (bench/aot_report.py): half as many heads in flight here too, and where tokens
    # are found by index, short pieces of rows, or fewer threads with more registers each
    tight = whole and tile == 64 and heads > 1 and dtype == torch.float32
    piece = 32 if not narrow or (given and dtype == torch.float16) else 64
    product = "narrow" if narrow else "thirds" if tile > 32 else "float32"
    if not compiled:  # the interpreter's dot is BLAS: sums differ from row to row, and it takes bfloat16 for integers
        product = "sums"
    score = {
        **_metric(heads, channels),
        "PRODUCT": product,
        "TYPE": tl.float16 if dtype == torch.float16 and narrow else tl.bfloat16 if compiled else tl.float32,
        "SHIFT": 15 if dtype == torch.float16 and narrow else 0,  # all 40 binades of float16 stay in its range
        "BLOCK_A": tile,
        # the heads of 32 targets in flight at once are enough; long rows are read again for every block of targets
        "BLOCK_B": min(tile, 16 if small or tight else 32 if heads > 1 else 128 if narrow and channels > 64 else 64),
        # long rows come in pieces; operands in three parts take three times the registers
        "BLOCK_C": max(16, _block(channels, 64) if channels <= 64 else piece),
        "num_warps": 2 if given and tile < 32 and not small else 4 if tile < 32 or small else 8,
        **common,
    }
    if whole:
        return {"item": {**score, "CHUNK": min(tile, 32)}, "score": None, "plan": None}
    span = min(_pow2(larger), 4096)
    plan = {"ONE": larger <= span, "SPAN": span, "BLOCK": 64, "CHUNK": 32, "num_warps": 8, **common}
    return {"item": None, "score": score, "plan": plan}


def _metric(heads: int, channels: int) -> dict:
    return {"C": channels, "H": heads, "SHRINK": 1.0 / _pow2(heads)}


def _block(n: int, most: int) -> int:
    return min(_pow2(n), most)


@cache
def merge(dim: int, rows: int, dtype: torch.dtype) -> dict:
    """Of the merge kernels: rows and channels of a tile, and how many tiles make a row."""
    # the tile that leaves the fewest lanes idle at the row's end: 256 for 768 and 1024, 128 for 384 and 1152
    block = min((256, 512, 128, 64), key=lambda b: -(-dim // b) * b) if dim > 64 else max(8, _pow2(dim))
    # 32 bytes a thread, two loads of 16: 48 registers, so that 40 KiB of loads per multiprocessor are in flight; twice
    # as much takes twice the registers (and spills in float32), half as much halves the loads (bench/aot_report.py)
    tile = 4096 // dtype.itemsize
    return {
        "D": dim, "ROWS": min(tile // block, _pow2(rows)), "BLOCK_D": block, "CHUNKS": max(1, -(-dim // block)),
        "num_warps": 4, "num_stages": 1, "enable_fp_fusion": False,
    }  # fmt: skip


@cache
def norm(dim: int, rows: int, dtype: torch.dtype) -> dict:
    """Of merge_norm and its backward: a tile is as many whole rows as 128 threads load in two (of two tensors, four)
    accesses of 16 bytes; longer rows take more threads."""
    block = max(8, _pow2(dim))
    tile = max(block, 1024)
    return {
        "D": dim, "ROWS": min(tile // block, _pow2(rows)), "BLOCK_D": block,
        "num_warps": min(16, max(4, tile // 256)), "num_stages": 1, "enable_fp_fusion": False,
    }  # fmt: skip


def norm_programs(tiles: int) -> int:
    """Of the backward with the gradients of weight and bias: so few that the sums they write are little beside the
    rows, at most what an H100 runs at once: 5 of some 95 registers on each of its 132 multiprocessors."""
    return min(-(-tiles // 4), 5 * 132)


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
    # three programs of 4 warps fit a multiprocessor's registers (bench/aot_report.py); float32 takes so many of them
    # that its gradients are left to FMAs
    attend = {**common, "BLOCK_Q": min(rows, (16 if full else 32) if long else 32 if full else 64)}
    attend["BLOCK_K"] = min(columns, 32 if full else 64)
    by_queries = {**attend, "BLOCK_Q": min(attend["BLOCK_Q"], 32)}
    by_keys = {**by_queries, "BLOCK_K": min(columns, 32 if full or long else 64)}
    if full:
        fma = {"THIRDS": False, "TYPE": tl.float32, "num_warps": 8}
        by_queries |= {**fma, "BLOCK_K": 16}
        by_keys |= fma
    whole = by_keys if keys <= 64 and not full and not long else None
    return {"attend": attend, "whole": whole, "queries": by_queries, "keys": by_keys}
