# SPDX-License-Identifier: Apache-2.0
"""The evaluations of a folder: each says of which weights, settings and videos it is, and none replaces another."""

from __future__ import annotations

import argparse
import dataclasses
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import stoptome_kernels as stk
import torch

from . import sealed
from .corpus import Split
from .errors import UsageError

NAME = "results.json"
_DATA = (
    "datatype", "data_path", "features_path", "val_csv", "max_frames", "max_words", "slice_framepos",
    "feature_framerate", "eval_frame_order",
)  # fmt: skip
_SYNTHETIC = ("synthetic_train", "synthetic_val", "synthetic_seed")


class _History(msgspec.Struct, forbid_unknown_fields=True):
    """What the file holds."""

    evaluations: list[dict[str, Any]]


def describe(args: argparse.Namespace, tome: stk.ToMeConfig, kind: str, **weights: Any) -> dict[str, Any]:
    """Return what an evaluation is of: date, versions, weights, token merging, model and data.

    Args:
        args: complete settings.
        tome: token merging of the model that is evaluated.
        kind: ``training``, after an epoch of it; ``evaluation``, of a checkpoint; ``sweep``, one of several settings.
        weights: what there is to say of the weights, such as ``checkpoint``, ``epoch`` and ``fingerprint``.
    """
    data = {name: getattr(args, name) for name in (*_DATA, *(_SYNTHETIC if args.datatype == "synthetic" else ()))}
    return {
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"stoptome_kernels": stk.__version__, "torch": torch.__version__},
        "weights": weights,
        "model": args.pretrained_clip_name,
        "tome": dataclasses.asdict(tome),
        "precision": args.precision,
        "data": {name: value for name, value in data.items() if value is not None},
    }


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


def append(folder: Path, evaluations: list[dict[str, Any]]) -> None:
    """Add evaluations to those in a folder.

    One of a training takes the place of that of the same epoch and of later ones: a run that was killed between
    evaluation and checkpoint evaluates its epoch again.

    Raises:
        UsageError: see ``read``; or the file can't be written.
    """
    first = min((found["weights"]["epoch"] for found in evaluations if found["kind"] == "training"), default=math.inf)
    kept = [
        found for found in read(folder) if found["kind"] != "training" or found["weights"]["epoch"] < first
    ]  # fmt: skip
    sealed.write_json(folder / NAME, {"evaluations": [*kept, *evaluations]})
