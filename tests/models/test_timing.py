# SPDX-License-Identifier: Apache-2.0
"""Calls timed in turn, and the bytes that one takes on a GPU."""

import gc
from types import SimpleNamespace

import pytest
import torch
from stoptome_kernels.timing import measure_alternately, peak_cuda_bytes


def test_calls_are_timed_in_turn():
    """Each round begins with the next call; warm-up, ``before`` and what the clock costs count for nothing."""
    now, log = [0.0], []

    def takes(name: str, seconds: float):
        def call():
            log.append(name)
            assert not gc.isenabled()
            now[0] += seconds

        return call

    def before(name: str):
        log.append(f"before {name}")
        now[0] += 100

    def wait():
        now[0] += 0.5

    calls = {"a": takes("a", 1.0), "b": takes("b", 2.0)}
    found = measure_alternately(calls, 0, synchronize=wait, before=before, clock=lambda: now[0])
    assert found == {"a": [1.5] * 5, "b": [2.5] * 5}
    assert [name for name in log if len(name) == 1] == ["a", "b", *"abbaabbaab"]
    assert log[::2] == [f"before {name}" for name in log[1::2]]
    assert gc.isenabled()


def test_rounds_end_by_time():
    now = [0.0]

    def call():
        now[0] += 1

    assert len(measure_alternately({"a": call}, 20, clock=lambda: now[0])["a"]) == 20
    assert len(measure_alternately({"a": call}, 1e9, clock=lambda: now[0])["a"]) == 300


def test_a_failing_call_leaves_the_collector_on():
    with pytest.raises(ZeroDivisionError):
        measure_alternately({"a": lambda: 1 / 0})
    assert gc.isenabled()


def test_peak_bytes_are_above_what_was_there(monkeypatch):
    """Summed over devices; the statistics begin anew before the call."""
    log = []
    cuda = SimpleNamespace(
        synchronize=lambda device: log.append(f"wait {device}"),
        reset_peak_memory_stats=lambda device: log.append(f"reset {device}"),
        memory_allocated=lambda device: {0: 100, 1: 10}[device],
        max_memory_allocated=lambda device: {0: 150, 1: 17}[device],
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert peak_cuda_bytes(lambda: log.append("call"), [0, 1]) == 57
    assert log == ["wait 0", "reset 0", "wait 1", "reset 1", "call", "wait 0", "wait 1"]
