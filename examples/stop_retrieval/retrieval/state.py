# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its folder: settings, log, checkpoints; and how it goes on from them.

The keys of a checkpoint are STOP's (``epoch, global_step, arch, state_dict, best_acc1, optimizer, scaler``), its
weights have STOP's names; ``step`` and ``hparams`` are this program's. It holds tensors and plain values
alone, so that ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded

from . import atomic
from .errors import UsageError

SETTINGS, LAST, BEST, LOG, INDEX = "hparams_train.json", "ckpt.pth.tar", "ckpt.best.pth.tar", "log.txt", "index"
RESULTS = "results.json"
log = logging.getLogger("stop_retrieval")


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: epochs that are finished.
        step: steps of the next one that are.
        global_step: steps in all.
        best: R@1 of the best epoch, text to video, per cent.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: float = -1.0


class Folder:
    """The folder of a run."""

    def __init__(self, path: str):
        self.path = Path(path)

    def open(self) -> None:
        """Make it, and be sure that files can be written there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {self.path} can't be made: {error.strerror or error}") from error
        atomic.sweep(self.path)
        probe = self.path / ".writable"
        atomic.replace(probe, lambda file: file.write_bytes(b""))
        probe.unlink(missing_ok=True)

    def log(self) -> None:
        """Write what is logged into the folder too."""
        handler = logging.FileHandler(self.path / LOG, delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)

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
            return json.loads(path.read_text()) if path.exists() else None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} can't be read: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        atomic.replace(self.path / name, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))

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


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:  # so that a full disk is an OSError
        torch.save(checkpoint, file)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint of :meth:`Folder.save`.

    Raises:
        UsageError: no such file, or another kind of file.
    """
    if not os.path.isfile(path):
        raise UsageError(f"no checkpoint at {os.fspath(path)}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UsageError(f"{os.fspath(path)} can't be read as a checkpoint: {reason}") from error
    return found if isinstance(found, dict) else {}


def settings_of(path: str | os.PathLike) -> dict[str, Any] | None:
    """The settings that a checkpoint of this program was trained with; None for other weights, such as STOP's own or
    OpenAI's TorchScript archives."""
    try:
        found = read(path)
    except UsageError:
        if os.path.isfile(path):
            return None  # read as weights alone, it will say better what is wrong with it
        raise
    return found.get("hparams")


def to_resume(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint that a training can go on from."""
    found = read(path)
    for key in ("state_dict", "optimizer", "hparams", "step", "global_step"):
        if key not in found:
            raise UsageError(
                f"{os.fspath(path)} is no checkpoint of this program ({key} is missing); to begin with its weights "
                "alone give --init_model"
            )
    return found


_WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, progress: Progress, hparams: dict
) -> dict[str, Any]:
    """A checkpoint; to be called by all processes, complete in the first."""
    told = asdict(progress)
    return {
        "arch": "STOP",
        "state_dict": sharded.get_model_state_dict(model, options=_WHOLE),
        "optimizer": sharded.get_optimizer_state_dict(model, optimizer, options=_WHOLE),
        "scaler": scaler.state_dict(),
        "best_acc1": told.pop("best"),
        "hparams": hparams,
        **told,
    }


def restore(
    found: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """Put a checkpoint of :func:`to_resume` into model and optimizer; to be called by all processes.

    Raises:
        UsageError: it is of a model of another size.
    """
    try:
        sharded.set_model_state_dict(model, found["state_dict"], options=_WHOLE)
        sharded.set_optimizer_state_dict(model, optimizer, found["optimizer"], options=_WHOLE)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UsageError(
            f"the checkpoint fits no model of these settings: {' '.join(str(error).split())[:300]}"
        ) from error
    if found["scaler"]:
        scaler.load_state_dict(found["scaler"])
    names = ("epoch", "step", "global_step")
    return Progress(**{name: found[name] for name in names}, best=found["best_acc1"])
