# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: a training saves what it has and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from . import terminal


class Stopped(KeyboardInterrupt):
    """An end that a user asked for. The message is one line that says how to go on."""


class Request:
    """A request to end, made or not."""

    def __init__(self) -> None:
        self.made = False

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at once where nothing is half done, and now if an end was asked for already."""
        if self.made:
            raise KeyboardInterrupt
        with _handling(signal.default_int_handler):
            yield


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Note the first Ctrl-C in place of raising KeyboardInterrupt; the second one raises it.

    A step of the optimizer is done or not done: what is saved between two steps is what a run that was never stopped
    had there.
    """
    request = Request()

    def note(*_: object) -> None:
        if request.made:
            raise KeyboardInterrupt
        request.made = True
        terminal.complain("Ctrl-C: stopping after this step; once more stops at once, and loses it", kind="note")

    with _handling(note):
        yield request


@contextlib.contextmanager
def _handling(handler: Any) -> Iterator[None]:
    """Handle Ctrl-C in another way; only the main thread can, and elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def withheld() -> Iterator[None]:
    """Withhold Ctrl-C until the end of the block. A process that is started meanwhile never hears of it."""
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True

    with _handling(note):
        # a new process has the mask of the thread that starts it; other threads of this one hear Ctrl-C all the same
        masked = hasattr(signal, "pthread_sigmask") and signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            if masked is not False:
                signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    if asked:
        raise KeyboardInterrupt


def ignore(*_: object) -> None:
    """Leave Ctrl-C to the process that started this one; to be called in its workers, which a terminal tells too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
