#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure STOP's visual tower (ViT-B/32, 12 frames) with token merging: time, memory, and the share of the ideal.

Against upstream's way of computing it without merging, and against merging in eager operations put into that; with
STOP proper's prompts (scopes `proper`, `prompts`) only if asked, since upstream's take half a minute to train. Every
result is compared with the plain reference's before it is timed; a wrong one ends the run with status 1. Without
arguments: on the GPU if there is one, else on the CPU with a smaller batch, in about ten minutes; --quick: in one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from unittest.mock import patch

from torch import Tensor

from charts.stop import GUIDE, table
from harness import cli, measure, verify
from harness.memory import memory
from harness.rows import percentiles
from harness.workloads import DIRECTIONS, Side
from harness.workloads.stop import SETTINGS, prepare, sides

SCOPES = ("block", "blocks", "tower", "proper", "prompts")
OPS = {"proper": "tower, group2-2", "prompts": "prompts of group2-2"}  # others: as the scope
HEADING = "{device}, {threads} threads, torch {torch}\n{videos} × 12 frames, {layers} layers, {dtype}"


def check(found: list[Side], dtype: str) -> None:
    """Check that implementations of one setting agree: to rounding without merging; with it a pair of tokens that are
    equally similar to rounding may be merged otherwise, so the direction of every output row is compared."""
    right: dict[str, Tensor] = {}
    for side in found:
        if side.setting not in right:  # the package's first
            with patch.dict(os.environ, STOPTOME_BACKEND="reference"):
                right[side.setting] = side.infer().float()
        who, least = f"{side.impl} at {side.setting}", 0.9999 if dtype == "float32" else 0.98
        verify.check_directions(who, side.infer().float(), right[side.setting], least)


def rows_of(found: list[Side], scope: str, direction: str, args: argparse.Namespace) -> list[dict]:
    used = {side.name: memory(side, direction, args.device) for side in found}
    times = measure.measure({side.name: [side.run(direction)] for side in found}, args.device, args.seconds, set())
    middle = measure.medians(times)
    rows = []
    for side in found:
        t, own = middle[side.name], used[side.name]
        same = "package" if side.impl == "package" else "upstream"  # eager merging at r = 0 is upstream's block
        gain, ideal = middle[f"{same} r=0"] / t, side.schedule.speedup
        before, theirs = used[f"{same} r=0"], used.get("upstream r=0")
        which = "saved_bytes" if own["saved_bytes"] else "peak_bytes"
        rows.append(
            {
                **{"shape": side.setting, "n": args.videos, "frames": 12, "op": OPS.get(scope, scope)},
                **{"direction": direction, "dtype": args.dtype, "impl": side.impl},
                **{"tokens": side.schedule.tokens, "items": side.schedule.items},
                **percentiles(times[side.name]["samples"], 1),
                "speedup_vs_r0": round(gain, 4),
                "speedup_ideal": round(ideal, 4),
                "eta": round(gain / ideal, 4),
                "speedup_vs_upstream": round(middle["upstream r=0"] / t, 4) if theirs else None,
                **own,
                "memory_vs_r0": round(own[which] / before[which], 4),
                "memory_vs_upstream": round(own[which] / theirs[which], 4) if theirs else None,
                "guide": GUIDE.get(side.setting),
            }
        )
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which schedules")
    add(
        "--scope",
        nargs="+",
        choices=SCOPES,
        default=list(SCOPES[:3]),
        help="one block, all blocks, the whole tower with DGL's prompts (default: these three), with STOP proper's, "
        "or STOP proper's prompts alone",
    )
    add("--videos", type=cli.positive(int), metavar="N", help="in a batch (default: 128 on a GPU, 4 on a CPU)")
    cli.add_models(p, DIRECTIONS, 20.0, "each scope and direction")
    add("--quick", action="store_true", help="r = 0 and 4, all blocks, inference alone")
    args = cli.configure(p.parse_args(argv))
    args.videos = args.videos or (1 if args.dry else 128 if args.device == "cuda" else 4)
    if args.quick:
        args.settings, args.scope, args.direction = ["r=0", "r=4"], ["blocks"], ["inference"]
        args.seconds = min(args.seconds, 5.0)
    if "r=0" not in args.settings:
        args.settings = ["r=0", *args.settings]  # what everything is compared with
    if args.layers < 10 and {"accuracy", "memory"} & set(args.settings):
        p.error("argument --layers: the presets accuracy and memory join frames at layers 6 to 9; leave them out")
    return args


def batches(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Measure every scope in every direction."""
    for scope in args.scope:
        with cli.measuring(f"{args.videos} videos", "--videos"):
            found = sides(*prepare(args, "group2-2" if scope in ("proper", "prompts") else "DGL"), scope, args)
            check(found, args.dtype)
            for direction in args.direction:
                yield rows_of(found, scope, direction, args)
            del found


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return cli.main(args, batches(args), table, HEADING)


if __name__ == "__main__":
    sys.exit(main())
