#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure STOP's visual tower (ViT-B/32, 12 frames) with token merging: time, memory, and the share of the ideal.

Against upstream's way of computing it without merging, and against merging in eager operations put into that; with
STOP proper's prompts (scopes `proper`, `prompts`) only if asked, since upstream's take half a minute to train. Every
result is compared with the plain reference's before it is timed; a wrong one ends the run with status 1. Without
arguments: on the GPU if there is one, else on the CPU with a smaller batch, in about ten minutes; --quick: in one.
--ways measures inference in a CUDA graph and compiled, too, which is for batches that the host is slower with than the
device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from unittest.mock import patch

from torch import Tensor

from charts.stop import GUIDE, WAYS, table
from harness import cli, measure, verify
from harness.memory import memory
from harness.rows import percentiles
from harness.workloads import DIRECTIONS, Side
from harness.workloads.stop import SETTINGS, prepare, sides
from harness.workloads.ways import in_way

SCOPES = ("block", "blocks", "tower", "proper", "prompts")
OPS = {"proper": "tower, group2-2", "prompts": "prompts of group2-2"}  # others: as the scope
HEADING = "{device}, {threads} threads, torch {torch}\n{videos} × 12 frames, {layers} layers, {dtype}"


def references(found: list[Side]) -> dict[str, Tensor]:
    """Return what the plain reference computes at each setting; the package's sides come first."""
    right: dict[str, Tensor] = {}
    with patch.dict(os.environ, STOPTOME_BACKEND="reference"):
        for side in found:
            if side.setting not in right:
                right[side.setting] = side.infer().float()
    return right


def check(found: list[Side], right: dict[str, Tensor], dtype: str) -> None:
    """Check that implementations of one setting agree: to rounding without merging; with it a pair of tokens that are
    equally similar to rounding may be merged otherwise, so the direction of every output row is compared."""
    for side in found:
        who, least = f"{side.impl} at {side.setting}", 0.9999 if dtype == "float32" else 0.98
        verify.check_directions(who, side.infer().float(), right[side.setting], least)


def rows_of(found: list[Side], scope: str, direction: str, way: str, args: argparse.Namespace) -> list[dict]:
    # the memory of a graph is taken when it is captured
    counted = memory if way == "eager" else lambda *_: dict.fromkeys(("peak_bytes", "saved_bytes", "largest_bytes"))
    used = {side.name: counted(side, direction, args.device) for side in found}
    times = measure.measure({side.name: [side.run(direction)] for side in found}, args.device, args.seconds, set())
    middle = measure.medians(times)
    rows = []
    for side in found:
        t, own, wall = middle[side.name], used[side.name], times[side.name].get("wall_us")
        same = "package" if side.impl == "package" else "upstream"  # eager merging at r = 0 is upstream's block
        gain, ideal = ratio(middle.get(f"{same} r=0"), t), side.schedule.speedup
        before, theirs = used.get(f"{same} r=0", {}), used.get("upstream r=0", {})
        which = "saved_bytes" if own["saved_bytes"] else "peak_bytes"
        rows.append(
            {
                **{"shape": side.setting, "n": args.videos, "frames": 12, "op": OPS.get(scope, scope)},
                **{"direction": direction, "dtype": args.dtype, "impl": side.impl + WAYS[way], "way": way},
                **{"tokens": side.schedule.tokens, "items": side.schedule.items},
                **percentiles(times[side.name]["samples"], 1),
                "wall_us": round(wall, 1) if wall else None,
                "speedup_vs_r0": gain,
                "speedup_ideal": round(ideal, 4),
                "eta": ratio(gain, ideal),
                "speedup_vs_upstream": ratio(middle.get("upstream r=0"), t),
                **own,
                "memory_vs_r0": ratio(own[which], before.get(which)),
                "memory_vs_upstream": ratio(own[which], theirs.get(which)),
                "guide": GUIDE.get(side.setting),
            }
        )
    return rows


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a ratio to four places, None where a part of it was not measured."""
    return round(a / b, 4) if a and b else None


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
    add(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=["eager"],
        help="inference in a CUDA graph, or by torch.compile(mode='reduce-overhead'), too (default: eager alone)",
    )
    cli.add_models(p, DIRECTIONS, 20.0, "each scope, direction and way")
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
    if set(args.ways) - {"eager"} and args.direction != ["inference"]:
        p.error("argument --ways: graph and compile are of inference: give --direction inference")
    if "graph" in args.ways and args.device != "cuda":
        p.error("argument --ways: a CUDA graph needs a GPU")
    return args


def batches(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Measure every scope in every direction."""
    for scope in args.scope:
        with cli.measuring(f"{args.videos} videos", "--videos"):
            found = sides(*prepare(args, "group2-2" if scope in ("proper", "prompts") else "DGL"), scope, args)
            right = references(found)
            for way in args.ways:
                chosen = in_way(found, way)
                check(chosen, right, args.dtype)
                for direction in args.direction:
                    yield rows_of(chosen, scope, direction, way, args)
                del chosen
            del found


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return cli.main(args, batches(args), table, HEADING)


if __name__ == "__main__":
    sys.exit(main())
