# SPDX-License-Identifier: Apache-2.0
"""The evaluations of a folder: each says of which weights, settings and videos it is."""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import stoptome_kernels as stk
import torch

from . import lock, sealed
from .corpus import Split
from .errors import UsageError

NAME, _LOCK = "results.json", ".results.lock"
_MODEL = (
    "pretrained_clip_name", "activation", "random_weights", "temporal_prompt", "shared_latent_space",
    "visual_output_type", "lora",
)  # fmt: skip
_DATA = (
    "datatype", "data_path", "features_path", "val_csv", "max_frames", "max_words", "slice_framepos",
    "feature_framerate", "eval_frame_order",
)  # fmt: skip
_QB_NORM = ("qb_norm", "train_csv")
_SYNTHETIC = ("synthetic_train", "synthetic_val", "synthetic_seed")


class _History(msgspec.Struct, forbid_unknown_fields=True):
    """The content of the file."""

    evaluations: list[dict[str, Any]]


def describe(args: argparse.Namespace, tome: stk.ToMeConfig, kind: str, **weights: Any) -> dict[str, Any]:
    """Return what an evaluation is of: date, versions, weights, token merging, model and data.

    Args:
        args: complete settings.
        tome: token merging of the model that is evaluated.
        kind: ``training``, after an epoch of it; ``evaluation``, of a checkpoint; ``sweep``, one of several settings.
        weights: what there is to say of the weights, such as ``checkpoint``, ``epoch`` and ``fingerprint``.
    """
    data = [*_DATA, *(_SYNTHETIC if args.datatype == "synthetic" else ()), *(_QB_NORM if args.qb_norm else ())]
    return {
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"stoptome_kernels": stk.__version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "weights": weights,
        "model": _told(args, _MODEL),
        "tome": dataclasses.asdict(tome),
        "precision": args.precision,
        "batch_size_val": args.batch_size_val,
        "data": _told(args, data),
    }


def _told(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def count(split: Split, videos: int, captions: int) -> dict[str, dict[str, int]]:
    """Return how many videos and captions of a split were evaluated, and where the others are: the numbers add up."""
    return {
        "videos": {
            "listed": len(split.videos) + len(split.missing),
            "missing": len(split.missing),
            "unreadable": len(split.videos) - videos,
            "evaluated": videos,
        },
        "captions": {
            "listed": len(split.captions) + split.captions_of_missing,
            "of missing videos": split.captions_of_missing,
            "of unreadable videos": len(split.captions) - captions,
            "evaluated": captions,
        },
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations in a folder, the newest last; none where there is no file.

    Raises:
        UsageError: the file is damaged or can't be read.
    """
    path = folder / NAME
    try:
        return sealed.read_json(path, _History).evaluations
    except FileNotFoundError:
        return []
    except sealed.Damaged as error:
        raise UsageError(f"{path} {error}; move it away, and a new one is begun") from error
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}; move it away") from error


def append(folder: Path, evaluations: list[dict[str, Any]], resumed: bool = False) -> None:
    """Add evaluations to those in a folder.

    ``resumed``: of a training that went on. One that was killed between evaluation and checkpoint evaluates its epoch
    again, and that takes the place of what it had found then.

    Raises:
        UsageError: see ``read``; or the file can't be written.
    """
    with lock.waiting(folder / _LOCK):
        kept, last = read(folder), math.inf
        first = evaluations[0]["weights"].get("epoch", math.inf) if resumed else math.inf
        for place in reversed(range(len(kept))):
            if kept[place]["kind"] != "training":
                continue
            epoch = kept[place]["weights"]["epoch"]
            if not first <= epoch < last:  # from here on back they are of the epochs before, or of an earlier training
                break
            last = epoch
            del kept[place]
        sealed.write_json(folder / NAME, {"evaluations": [*kept, *evaluations]})
