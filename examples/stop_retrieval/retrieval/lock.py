# SPDX-License-Identifier: Apache-2.0
"""One process at a time: the lock on the folder of a run."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from .errors import UsageError

NAME = ".lock"
_WAIT = 60.0  # seconds for another process to write a small file
# how a file system says that it has no locks
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
log = logging.getLogger("stop_retrieval")


@contextlib.contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Let one process at a time read, change and write a file; ``path`` is of the lock, and stays. On a file system
    that has no locks it is as without this.

    Raises:
        UsageError: another process holds it for long.
    """
    lock = filelock.FileLock(path, timeout=_WAIT, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(f"{path} is held by another process: wait until that has ended") from None
    except (OSError, NotImplementedError):
        yield  # what can't be written says so itself
        return
    try:
        yield
    finally:
        lock.release()


def hold(folder: str | os.PathLike[str]) -> filelock.BaseFileLock | None:
    """Lock a folder for this process, until it ends in whatever way, or the lock is released. The file stays, and means
    nothing by itself.

    Returns:
        The lock; None on a file system that has none, which is logged.

    Raises:
        UsageError: another process holds it, or the file can't be opened or locked.
    """
    # without the library's own stand-in for file systems that have no locks, a file that would outlast a killed process
    path = Path(folder) / NAME
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(
            f"--output_dir {folder} is in use by another training or --index: wait until that has ended, or give "
            "another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise UsageError(
                f"{path} can't be locked: {reason}; it must be a file that you may write: see to that, or give another "
                "--output_dir"
            ) from error
        log.warning("%s can't be locked (%s): see to it that no other process trains in it", folder, reason)
        return None
    return lock
