# SPDX-License-Identifier: Apache-2.0
"""Curves for TensorBoard, written as they come: torch's SummaryWriter does it in a thread, which prints a traceback
when the disk is full."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from .errors import UsageError


class Curves:
    """A file of events in a folder, which is made if it isn't there.

    Args:
        folder: of this run and those that it goes on from.
        first: step from which on what those wrote is void; None: they wrote nothing.

    Raises:
        UsageError: the folder can't be written to. So do all methods.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int | None = None):
        self.folder = Path(folder)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / name, "xb")  # noqa: SIM115, close() closes it
        except OSError as error:
            raise self._full(error) from error
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first is not None:
            self._write(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))

    def add(self, name: str, value: float, step: int) -> None:
        """Write the value of a curve at a step."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # each value was flushed, and the one that could not be was told of
            self._file.close()

    def _write(self, event: Event) -> None:
        try:
            self._writer.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> UsageError:
        reason = error.strerror or str(error)
        return UsageError(f"{self.folder} can't be written: {reason}; give a folder that is writable and has room")
