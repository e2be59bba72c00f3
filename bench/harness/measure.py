# SPDX-License-Identifier: Apache-2.0
"""How it is measured: clocks, and the bytes that must move."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from . import no_gpu
from .shapes import HEAD_DIM, Shape

Calls = list[Callable[[], object]]  # one for each set of inputs; the GPU rotates through them

# -- clocks -----------------------------------------------------------------------------------------------------------


class Times(dict):
    """``samples`` in µs of one call; on a GPU also ``wall_us`` (launch-inclusive) and ``graph_us`` (CUDA graph)."""


def measure(
    sides: dict[str, Calls],
    device: str,
    seconds: float,
    graph: set[str],
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Times]:
    """Alternate between the sides for about ``seconds``; at least 5 rounds, at most 300; one in a dry run. ``clock`` is
    a CPU's."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _gpu(sides, seconds, graph) if device == "cuda" else _cpu(sides, seconds, clock)
    finally:
        if collecting:
            gc.enable()


def _rounds(sides: dict[str, Calls], seconds: float, sample: Callable[[str, int], float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in sides}
    names, start, turn = list(sides), time.perf_counter(), 0
    least, most = (1, 1) if no_gpu.pretending() else (5, 300)
    while turn < least or (turn < most and time.perf_counter() - start < seconds):
        for place in range(len(names)):  # each round begins with another side, so that none always follows the same
            name = names[(place + turn) % len(names)]
            found[name].append(sample(name, turn))
        turn += 1
    return found


def _cpu(sides: dict[str, Calls], seconds: float, clock: Callable[[], int]) -> dict[str, Times]:
    def run(call: Callable[[], object], times: int) -> float:
        begin = clock()
        for _ in range(times):
            result = call()
        end = clock()
        del result  # a result is freed after the clock has stopped
        return (end - begin) / times / 1e3

    # a sample lasts 200 µs at least: a short op then runs from warm caches, whoever ran before it
    inner = {}
    for name, (call,) in sides.items():
        run(call, 1)
        inner[name] = max(1, min(100, math.ceil(200 / run(call, 1))))
    found = _rounds(sides, seconds, lambda name, turn: run(sides[name][0], inner[name]))
    return {name: Times(samples=samples) for name, samples in found.items()}


def configure_heap(pages: str) -> str | None:
    """Fix where the C library takes large blocks from; what was fixed, or None where it is not glibc.

    By default glibc moves the limit as a program runs, so that whether a 30 MB temporary reuses warm pages or pays for
    fresh ones hangs on what ran before it: eager PyTorch took 15 or 40 ms for the same merge. ``reused``: all freed
    memory stays with the process, as with jemalloc or tcmalloc. ``fresh``: blocks of 16 MiB and more come from the
    system each time, as glibc has it for the full-size batches that a CPU run is scaled down from.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return None
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 16 << 20) if pages == "fresh" else mallopt(mmap_max, 0)
    return pages


def _gpu(sides: dict[str, Calls], seconds: float, graph: set[str]) -> dict[str, Times]:
    enqueue, inner = {}, {}
    for name, calls in sides.items():
        for call in calls:  # compiles, tunes, and fills the allocator's cache
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls:
            call()
        enqueue[name] = (time.perf_counter() - begin) / len(calls)
        torch.cuda.synchronize()
        once = (time.perf_counter() - begin) / len(calls)
        inner[name] = max(1, min(len(calls), math.ceil(100e-6 / once)))

    def sample(name: str, turn: int) -> float:
        calls, times = sides[name], inner[name]
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # the device sleeps while the host enqueues, so that the events enclose device time and no waiting for launches;
        # 2 GHz is more than any clock, at most 20 ms
        torch.cuda._sleep(int(min(0.02, 3 * enqueue[name] * times + 50e-6) * 2e9))
        begin.record()
        for step in range(times):
            calls[(turn * times + step) % len(calls)]()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / times

    found = {name: Times(samples=samples) for name, samples in _rounds(sides, seconds, sample).items()}
    for name, calls in sides.items():
        found[name]["wall_us"] = _wall(calls)
        if name in graph:
            found[name]["graph_us"] = _graph(calls)
    return found


def _wall(calls: Calls, seconds: float = 0.5) -> float:
    """Return what a caller sees that does nothing else: host and device, over calls back to back; nine times, or as
    often as ``seconds`` allow."""
    samples: list[float] = []
    start = time.perf_counter()
    while not samples or (len(samples) < 9 and time.perf_counter() - start < seconds and not no_gpu.pretending()):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) / len(calls) * 1e6)
    return median(samples)


def _graph(calls: Calls) -> float | None:
    """Return µs of a call in a CUDA graph that holds one for each set of inputs; None if it can't be captured."""
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
            for call in calls:
                call()
    except RuntimeError as error:
        print(f"not captured in a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples = []
    for _ in range(12):
        begin.record()
        captured.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return median(samples[2:])


def copies(nbytes: int, sets: int, device: str, fresh: bool = False) -> Calls:
    """Return plain copies that move ``nbytes`` in all, into memory that is already there or into ``fresh`` memory."""

    def one() -> Callable[[], object]:
        source = torch.ones(max(1, nbytes // 8), device=device)
        target = torch.zeros_like(source)
        return source.clone if fresh else lambda: target.copy_(source)

    return [one() for _ in range(sets)]


def percentile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def medians(times: dict[str, Times]) -> dict[str, float]:
    """Return the median of every side in µs."""
    return {name: percentile(found["samples"], 0.5) for name, found in times.items()}


# -- bytes ------------------------------------------------------------------------------------------------------------


def least_bytes(shape: Shape, n: int, itemsize: int, op: str, direction: str) -> int:
    """Return bytes that any implementation must move: each input read once, each output written once."""
    tokens, out = shape.tokens, shape.tokens_out
    rows_in, rows_out = tokens * shape.dim * itemsize, out * shape.dim * itemsize
    wide = shape.dim if shape.metric == "x" else shape.heads * HEAD_DIM
    gather = 4 * tokens + 4 * (out + 1)  # members and offsets
    match = (tokens - shape.protected) * wide * itemsize + 4 * tokens + gather  # keys read, plan written
    forward = rows_in + rows_out + gather + 4 * tokens + 4 * out  # and the sizes
    backward = rows_out + rows_in + gather + 4 * tokens
    parts = {
        ("match", "forward"): match,
        ("merge", "forward"): forward,
        ("merge", "forward, out="): forward,
        ("merge", "backward"): backward,
        ("merge", "forward+backward"): forward + backward,
        ("match+merge", "forward"): match + forward,
        ("match+merge", "forward+backward"): match + forward + backward,
        ("unmerge", "forward"): rows_out + rows_in + gather,
    }
    return n * parts[op, direction]
