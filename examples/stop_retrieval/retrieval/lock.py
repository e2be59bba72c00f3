# SPDX-License-Identifier: Apache-2.0
"""One process at a time: the lock on the folder of a run."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import filelock

from .errors import UsageError

NAME = ".lock"
log = logging.getLogger("stop_retrieval")


def hold(folder: str | os.PathLike[str]) -> filelock.BaseFileLock | None:
    """Lock a folder for this process, until it ends in whatever way, or the lock is released. The file stays, and means
    nothing by itself.

    Returns:
        The lock; None on a file system that has none, which is logged.

    Raises:
        UsageError: another process holds it.
    """
    # without the library's own stand-in for file systems that have no locks, a file that would outlast a killed process
    lock = filelock.FileLock(Path(folder) / NAME, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(
            f"--output_dir {folder} is in use by another training or --index: wait until that has ended, or give "
            "another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        log.warning("%s can't be locked (%s): see to it that no other process trains in it", folder, reason)
        return None
    return lock
