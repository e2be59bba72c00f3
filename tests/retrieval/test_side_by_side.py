# SPDX-License-Identifier: Apache-2.0
"""Functions in processes of their own: results in order, errors, deaths, Ctrl-C."""

import multiprocessing
import os
import signal
import time
from functools import partial

import pytest

from retrieval import side_by_side
from retrieval.errors import UsageError


def slept(seconds: float, value):
    time.sleep(seconds)
    return value


def failing():
    raise UsageError("a folder is full")


def dying():
    os._exit(3)


@pytest.mark.slow  # processes start
def test_results_come_in_the_order_of_the_functions():
    big, seen = "x" * 10**6, []  # more than a pipe holds
    works = [partial(slept, 0.5, 1), partial(slept, 0, big), partial(slept, 0, 3)]
    assert side_by_side.call(works, 2, lambda: seen.append(1)) == [1, big, 3]
    assert seen


@pytest.mark.parametrize(("work", "error", "said"), [(failing, UsageError, "is full"), (dying, RuntimeError, "code 3")])
def test_the_others_end_when_one_fails(work, error, said):
    begun = time.monotonic()
    with pytest.raises(error, match=said):
        side_by_side.call([partial(slept, 300, 1), work, partial(slept, 300, 3)], 2)
    assert time.monotonic() - begun < 60


def test_ctrl_c_ends_all_and_is_not_lost_while_processes_start(monkeypatch):
    """It comes as soon as the first one is started."""
    spawn = multiprocessing.get_context("spawn")
    start, started = spawn.Process.start, []

    def start_and_stop(process):
        start(process)
        started.append(process)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(spawn.Process, "start", start_and_stop)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        side_by_side.call([partial(slept, 300, 1), partial(slept, 300, 2)], 2)
    assert time.monotonic() - begun < 60
    assert len(started) == 1
    assert not started[0].is_alive()
