# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, which doesn't remove a file that is open
    fcntl = None  # type: ignore[assignment]

PREFIX = ".partial-"


def replace(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file; what was there before stays until the new one is complete and on the disk.

    Args:
        path: of the file; its folder must exist.
        write: writes the file it is given, which lies in the same folder under a name that ends like that of ``path``.
            Let it write through Python's ``open``: torch.save and others that open the file themselves report a full
            disk by exceptions of their own, which are raised as they are.

    Raises:
        UsageError: the folder can't be written to, the disk is full, or any other OSError.
    """
    path = Path(path)
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}-{path.name}")
    try:
        with _created(temporary):
            write(temporary)
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{path} can't be written: {reason}; give a folder that is writable and has room") from error
    finally:
        with contextlib.suppress(OSError):  # where all went well it has its new name
            temporary.unlink()


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of ``replace`` in a folder. Files that living ones write are locked and
    stay, so that any process may do this at any time; where the file system has no locks, everything stays."""
    for left in Path(folder).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(left, "r+b") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        if not fcntl:
            with contextlib.suppress(OSError):
                left.unlink()


@contextlib.contextmanager
def _created(path: Path) -> Iterator[None]:
    """An empty file, locked until the end or until the process dies."""
    if not fcntl:
        yield
        return
    while True:
        with open(path, "xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():  # else a sweep came between the two
                yield
                return


def _sync_folder(folder: Path) -> None:
    """Make a new name outlast a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
