# SPDX-License-Identifier: Apache-2.0
"""A model of the time that a launch takes on a GPU: what must be done, and how fast a device does it.

A launch takes the longest of these, and ``LAUNCH_US`` on top:

    bytes         all inputs read once and all outputs written once, at STREAM of the speed of a copy
    tensor        products on tensor cores, padded to tiles, at the data sheet's rate
    exponentials  16 a cycle and multiprocessor
    issue         instructions of all warps, at the share of the issue slots that kernels reach
    shared        cycles in which warps keep the path to shared memory
    chain         one program after the other: loads that wait for each other, and instructions that wait for the last
                  one, times the programs that a multiprocessor runs one after the other in each place it has for one
    tiles         of torch's own products and attention, which nobody here has taken apart: time of a tile, fitted

Instructions, registers and shared memory are counted in compiled kernels (harness/sass.py); bytes and products follow
from the shapes. What is fitted, is fitted to the H200 measurements in bench/results alone, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Device:
    """A GPU. Both have 132 multiprocessors with four issue slots a cycle each."""

    name: str
    copy_tb_per_s: float  # moved by a copy: bytes read and bytes written
    multiprocessors: int = 132
    clock_ghz: float = 1.755  # under load; ncu saw 1.76 to 1.97 on the H200
    tensor_tflops: float = 989.0  # bfloat16, dense, by the data sheet

    @property
    def cycles_per_us(self) -> float:
        return self.clock_ghz * 1e3


# 3.35 and 4.8 TB/s by the data sheets; on the H200 copies of 75 to 500 MB moved 3.7 to 4.2, on an H100 about 3.0
DEVICES = {device.name: device for device in (Device("H100", 3.0), Device("H200", 4.0))}

# -- fitted to bench/results/gpu, operators and fused, all of one H200 ------------------------------------------------

STREAM = 0.9  # of a copy's speed, what kernels reach that wait for nothing but memory: 0.84 to 0.93
LOAD_US = 0.6  # a load that all else waits for, under load
INTERVAL = 3.5  # cycles from one instruction of a warp to its next while nothing but the warp itself is waited for
ISSUE = 0.7  # share of the issue slots that a busy multiprocessor fills; ncu saw 0.62 to 0.73
MATCH_INTERVAL, MATCH_ISSUE = 5.0, 0.4  # of matching, whose warps meet at a barrier every few dozen instructions
# a launch behind another, as in a CUDA graph: an unmerge of one video takes 2.4 µs there
LAUNCH_US = 1.3
# a call of one video takes 1.6 to 1.8 µs more between two events, which are put into the stream besides
EVENTS_US = 1.7
# torch's LayerNorm: a program of four warps a row, 16 of them at a time; five rounds (the row, its sums through shared
# memory, the row again, weight and bias, the store) and 300 instructions: 152 µs for STOP's 82944 rows
NORM_ROUNDS, NORM_INSTRUCTIONS, NORM_RESIDENT = 5, 300, 16
# attention without sizes (cuDNN, or FlashAttention): 128 queries by 128 keys of 64 channels take a multiprocessor
# FLASH_TILE_US, and a block of queries FLASH_BLOCK_US besides: 170.5 µs at (256, 197), 303 µs at (1536, 54), 12 heads;
# 379 TFLOP/s at many keys, where nothing was measured: FlashAttention-2 is said to reach 350, cuDNN more. Two programs
# share a multiprocessor: one alone takes FLASH_ALONE times its share
FLASH_BLOCK_US, FLASH_TILE_US, FLASH_ALONE = 0.69, 1.46, 1.6
# matrix products: tiles of 256 × 128 numbers and their like at 0.86 of the data sheet's rate, and 1.5 µs for the ends
# of a tile: 721 TFLOP/s for 768 → 2304 and 3072, 819 for 3072 → 768 in STOP's blocks (76800 rows)
PRODUCT_SHARE, PRODUCT_ENDS_US = 0.86, 1.5
# smaller tiles fill the multiprocessors of small products, at a lower rate, and so do parts of the sums, which are
# added up in the end. Assumed, not measured
TILES = ((256, 128, 1.0), (192, 192, 1.0), (128, 128, 0.8), (64, 128, 0.55), (64, 64, 0.4))
SPLITS = (1, 2, 4)


@dataclass(frozen=True)
class Work:
    """The work of a launch. Of torch's kernels most is unknown, and 0."""

    name: str
    nbytes: int
    flops: float = 0.0  # on tensor cores, padded to tiles
    exponentials: float = 0.0
    programs: int = 0
    warps: int = 0  # of a program
    resident: int = 1  # programs that a multiprocessor holds
    rounds: float = 0.0  # loads and stores of a program that each wait for the one before
    instructions: float = 0.0  # of a warp
    shared: float = 0.0  # cycles in which a warp keeps the path to shared memory
    interval: float = INTERVAL
    issue: float = ISSUE
    tiles_us: float = 0.0


def bounds(work: Work, device: Device) -> dict[str, float]:
    """Return the µs that each part of the work takes by itself."""
    all_slots = 4 * device.multiprocessors * device.cycles_per_us
    turns = max(1.0, work.programs / (device.multiprocessors * work.resident))
    return {
        "bytes": work.nbytes / (STREAM * device.copy_tb_per_s * 1e6),
        "tensor": work.flops / (device.tensor_tflops * 1e6),
        "exponentials": work.exponentials / (16 * device.multiprocessors * device.cycles_per_us),
        "issue": work.programs * work.warps * work.instructions / (all_slots * work.issue),
        "shared": work.programs * work.warps * work.shared / (device.multiprocessors * device.cycles_per_us),
        "chain": turns * (work.rounds * LOAD_US + work.instructions * work.interval / device.cycles_per_us),
        "tiles": work.tiles_us,
    }


def time_us(work: Work, device: Device) -> float:
    """Return the µs that a launch takes behind another."""
    return LAUNCH_US + max(bounds(work, device).values())


def bound(work: Work, device: Device) -> str:
    """Return which part of the work takes the longest."""
    found = bounds(work, device)
    return max(found, key=found.__getitem__)


# -- what torch runs --------------------------------------------------------------------------------------------------


def elementwise(name: str, numbers: int, passes: int, itemsize: int = 2) -> Work:
    """Return an operation that reads or writes each of ``numbers`` elements so many times in all."""
    return Work(name, numbers * passes * itemsize, rounds=2)


def layer_norm(rows: int, dim: int, itemsize: int = 2) -> Work:
    """Return torch's LayerNorm."""
    return Work(
        "LayerNorm", 2 * rows * dim * itemsize, programs=rows, warps=4, resident=NORM_RESIDENT, rounds=NORM_ROUNDS,
        instructions=NORM_INSTRUCTIONS,
    )  # fmt: skip


def product(name: str, rows: int, inner: int, columns: int, device: Device, itemsize: int = 2) -> Work:
    """Return a linear layer, ``(rows, inner) → (rows, columns)``, with its bias, by the tiles that take the least."""
    rate = PRODUCT_SHARE * device.tensor_tflops * 1e6 / device.multiprocessors  # of one multiprocessor, FLOPs a µs
    flops = 2 * rows * inner * columns
    times = []
    for height, width, share in TILES:
        for pieces in SPLITS:
            tiles = ceil(rows / height) * ceil(columns / width) * pieces
            turns = ceil(tiles / device.multiprocessors)
            each = 2 * height * width * inner / pieces / (rate * share) + PRODUCT_ENDS_US
            times.append(turns * each + (PRODUCT_ENDS_US if pieces > 1 else 0.0))
    moved = (rows * inner + inner * columns + rows * columns) * itemsize
    return Work(name, moved, flops=flops, tiles_us=min(times))


def flash(items: int, heads: int, queries: int, keys: int, channels: int, device: Device, itemsize: int = 2) -> Work:
    """Return attention without sizes by the fastest of torch's backends."""
    programs = items * heads * ceil(queries / 128)
    tiles = ceil(keys / 128)
    each = FLASH_BLOCK_US + tiles * FLASH_TILE_US * channels / 64  # of a multiprocessor, by program
    share = max(programs / device.multiprocessors, FLASH_ALONE)
    return Work(
        "attention, flash", 2 * items * heads * (queries + keys) * channels * itemsize,
        flops=4 * programs * 128 * 128 * tiles * channels, exponentials=programs * 128 * 128 * tiles,
        programs=programs, tiles_us=share * each,
    )  # fmt: skip
