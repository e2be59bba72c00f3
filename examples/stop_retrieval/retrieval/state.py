# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: settings, log, results, checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import filelock
import torch

from . import atomic, lock, sealed, terminal
from .errors import UsageError

SETTINGS, LAST, BEST, LOG, INDEX = "hparams_train.json", "ckpt.pth.tar", "ckpt.best.pth.tar", "log.txt", "index"
_ANEW = "remove it to begin anew, or give another --output_dir"


class Folder:
    """The folder of a run."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._lock: filelock.BaseFileLock | None = None
        self._made: list[Path] = []

    def open(self, alone: bool) -> None:
        """Make it, be sure that files can be written there, and log into it; ``alone``: lock others out until
        ``close``.

        Raises:
            UsageError: it can't be written to, or is locked.
        """
        try:
            for path in (*reversed(self.path.parents), self.path):
                self._make(path, path.mkdir)
        except OSError as error:
            raise UsageError(f"--output_dir {self.path} can't be made: {error.strerror or error}") from error
        if alone:
            with contextlib.suppress(OSError):  # what can't be locked is told of by the lock
                self._make(self.path / lock.NAME, partial((self.path / lock.NAME).touch, exist_ok=False))
            self._lock = lock.hold(self.path)
        atomic.sweep(self.path)
        probe = self.path / ".writable"
        atomic.replace(probe, lambda file: file.write_bytes(b""))
        probe.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._make(self.path / LOG, partial((self.path / LOG).touch, exist_ok=False))
        terminal.log_to_file(self.path / LOG)

    def _make(self, path: Path, make: Callable[[], object]) -> None:
        """Make a file or folder, and remember it, if it isn't there."""
        if path.exists():
            return
        try:
            make()
        except FileExistsError:  # another process was quicker, and whatever it is is that one's
            if not path.exists():
                raise
            return
        self._made.append(path)

    def close(self, refused: bool = False) -> None:
        """Unlock it. ``refused``: nothing came of the call, and what ``open`` made is removed, unless it holds more or
        another process is at work there."""
        if refused and self._made and self.path.is_dir():
            if self._lock is None:
                with contextlib.suppress(UsageError):
                    self._lock = lock.hold(self.path)
                self._made.append(self.path / lock.NAME)
            if self._lock is not None:
                for path in sorted(self._made, key=lambda path: -len(path.parts)):
                    with contextlib.suppress(OSError):  # a folder that holds more stays
                        path.rmdir() if path.is_dir() else path.unlink()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def must_be_new(self) -> None:
        """Raises UsageError where there is a run already."""
        for name in (LAST, BEST):
            if (self.path / name).exists():
                raise UsageError(
                    f"--output_dir {self.path} holds another run ({name}): give another folder, or go on with it by "
                    "--resume auto"
                )

    def settings(self) -> dict[str, Any] | None:
        """Those that a run here was begun with, if one was."""
        path = self.path / SETTINGS
        try:
            return sealed.read_json(path, dict[str, Any]) if path.exists() else None
        except sealed.Damaged as error:
            raise UsageError(f"{path} {error}; {_ANEW}") from error
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror or error}; {_ANEW}") from error

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write settings; see ``sealed``."""
        sealed.write_json(self.path / name, value)

    def save(self, checkpoint: dict[str, Any], best: bool) -> None:
        """Write the last checkpoint, whole or not at all, and before it the best one if it is that: a run that is
        killed between the two finds it to be the best again."""
        last, kept = self.path / LAST, self.path / BEST
        if best:
            atomic.replace(kept, lambda path: _save(checkpoint, path))
            atomic.replace(last, lambda path: shutil.copyfile(kept, path))
        else:
            atomic.replace(last, lambda path: _save(checkpoint, path))

    def weights(self) -> Path:
        """The best checkpoint, else the last one."""
        for name in (BEST, LAST):
            if (self.path / name).exists():
                return self.path / name
        raise UsageError(f"no checkpoint in --output_dir {self.path}: give --init_model FILE, or train first")


class _Disk:
    """A file that keeps the reason why it can't be written, for which torch.save has an exception of its own."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        disk = _Disk(file)
        try:
            torch.save(checkpoint, disk)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise disk.error or error from error
