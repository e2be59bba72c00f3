# SPDX-License-Identifier: Apache-2.0
"""Functions in processes of their own, all of which end when one fails or somebody asks for an end.

The pools of the standard library wait, after Ctrl-C, for work that they have handed out, or for locks of processes that
they have ended. Here no two processes share a lock.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from . import interrupt

_PATIENCE = 0.2  # seconds between two calls of ``meanwhile``


def call(
    functions: Sequence[Callable[[], Any]], at_once: int, meanwhile: Callable[[], object] = lambda: None
) -> list[Any]:
    """Call functions in processes of their own, and return what they return, in their order.

    Args:
        functions: without arguments; they and what they return can be pickled.
        at_once: processes that run at the same time. They are spawned, since whoever calls may have threads, and Ctrl-C
            does nothing to them.
        meanwhile: called several times a second.

    Raises:
        RuntimeError: a process died. What a function raises is raised here.
    """
    spawn = multiprocessing.get_context("spawn")
    found: dict[int, Any] = {}
    running: dict[Any, tuple[int, Any]] = {}
    begun = 0
    resource_tracker.ensure_running()  # starting it lets Ctrl-C through, whatever the block below wants
    try:
        while len(found) < len(functions):
            while begun < len(functions) and len(running) < at_once:
                ours, theirs = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_tell, args=(functions[begun], theirs), daemon=True)
                with interrupt.withheld():
                    process.start()
                    running[ours] = begun, process
                theirs.close()
                begun += 1
            for ended in wait([*running], _PATIENCE):
                number, process = running.pop(ended)
                found[number] = _result(ended, process)
            meanwhile()
        return [found[number] for number in range(len(functions))]
    finally:
        for left, (_, process) in running.items():
            process.terminate()
            process.join()
            left.close()


def _tell(function: Callable[[], Any], to: Connection) -> None:
    """Send what a function returns or raises; the work of a process."""
    interrupt.ignore()  # where it could not be withheld
    try:
        to.send((function(), None))
    except Exception as error:
        to.send((None, error))


def _result(ended: Any, process: Any) -> Any:
    """Return what a process has sent, or raise it."""
    try:
        value, error = ended.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a process died with exit code {process.exitcode}") from None
    finally:
        ended.close()
    process.join()
    if error is not None:
        raise error
    return value
