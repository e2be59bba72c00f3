# SPDX-License-Identifier: Apache-2.0
"""Time and memory of calls that are compared with each other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping

import torch

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 300


def measure_alternately(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 10.0,
    *,
    synchronize: Callable[[], None] | None = None,
    before: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time calls in turn, round by round, so that whatever else the machine does slows all of them alike.

    Each call runs once unmeasured, then once in every round; each round begins with the next of them, so that none
    always follows the same. Python's garbage collector waits meanwhile.

    Args:
        calls: what is timed, by name.
        seconds: how long rounds are begun; there are at least 5 and at most 300.
        synchronize: waits for the device, before and after each call within its time: ``torch.cuda.synchronize``; None
            on a CPU.
        before: ``before(name)``, what is done before each call and not timed.
        clock: seconds.

    Returns:
        Seconds of each call in each round, by name.
    """

    def run(name: str) -> float:
        if before is not None:
            before(name)
        if synchronize is not None:
            synchronize()
        begin = clock()
        result = calls[name]()
        if synchronize is not None:
            synchronize()
        end = clock()
        del result  # freed after the clock has stopped
        return end - begin

    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            run(name)
        start, turn = clock(), 0
        while turn < _LEAST_ROUNDS or (turn < _MOST_ROUNDS and clock() - start < seconds):
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                samples[name].append(run(name))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def peak_cuda_bytes(call: Callable[[], object], devices: Iterable[torch.device]) -> int:
    """Return the most bytes that a call holds on CUDA devices beyond what is there before it, summed over devices.

    The devices' own peak statistics begin anew.
    """
    devices = list(devices)
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    there = sum(map(torch.cuda.memory_allocated, devices))
    call()
    for device in devices:
        torch.cuda.synchronize(device)
    return sum(map(torch.cuda.max_memory_allocated, devices)) - there
