#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure vision transformers of timm, open_clip and transformers with token merging: images a second, and the share
of the ideal speed-up.

Each model with random weights, as it is and with a constant r, against merging in eager operations put into the same
model; all of them plain and under torch.compile. Results are compared before anything is timed; a wrong one ends the
run with status 1. Without arguments: on the GPU if there is one, else on the CPU with smaller batches, in about half an
hour; --quick: in two minutes. A library that is not installed is said and left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

import torch
from stoptome_kernels.tome.schedule import plan_layers
from torch import Tensor

from charts.models import table
from harness import cli, measure, verify
from harness.rows import percentiles
from harness.workloads import Side
from harness.workloads.models import IMPLS, MODELS, MODES, Model, batch_of, installed, sides

HEADING = "{device}, {threads} threads, torch {torch}, {layers} layers, {dtype}"


def check(name: str, found: list[Side], dtype: str) -> None:
    """Check that implementations of merging agree, up to pairs of tokens that are equally similar to rounding, and so
    do a model and its compiled form."""
    first: dict[bool, Tensor] = {}
    for side in found:
        got = side.infer().float()
        right = first.setdefault(side.impl == "unpatched", got)
        verify.check_directions(f"{name}: {side.name}", got, right, 0.999 if dtype == "float32" else 0.98)


def rows_of(name: str, model: Model, found: list[Side], direction: str, args: argparse.Namespace) -> list[dict]:
    times = measure.measure({side.name: [side.run(direction)] for side in found}, args.device, args.seconds, set())
    middle = measure.medians(times)
    schedule = plan_layers(model.r, args.layers, model.tokens, 1, model.protected, width=model.width)
    n = batch_of(model, args)
    # every pixel meets every channel once in the patch embedding, of which merging saves nothing
    embedding = 2 * math.prod(model.shape) * model.width
    whole = (schedule.flops_unmerged + embedding) / (schedule.flops + embedding)
    rows = []
    for side in found:
        t, merges = middle[side.name], side.impl != "unpatched"
        gain = middle[f"unpatched {side.setting}"] / t
        ideal, blocks = (whole, schedule.speedup) if merges else (1.0, 1.0)
        rows.append(
            {
                **{"shape": name, "library": model.library, "n": n, "op": side.setting, "direction": direction},
                **{"dtype": args.dtype, "impl": side.impl, "layers": args.layers, "r": model.r if merges else 0},
                **{"tokens": model.tokens, "tokens_out": schedule.tokens[-1] if merges else model.tokens},
                **percentiles(times[side.name]["samples"], 1),
                "images_per_s": round(n / t * 1e6, 3),
                "speedup": round(gain, 4),
                "speedup_ideal": round(ideal, 4),
                "speedup_ideal_blocks": round(blocks, 4),
                "eta": round(gain / ideal, 4),
            }
        )
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    add("--impls", nargs="+", choices=IMPLS, default=list(IMPLS), help="unpatched is always measured")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--batch", type=cli.positive(int), metavar="N", help="images (default: by model)")
    cli.add_models(p, ["inference"], 60.0, "each model and direction")
    add("--quick", action="store_true", help="ViT-S/16 alone, plain, four layers")
    args = cli.configure(p.parse_args(argv))
    if args.quick:
        args.models, args.modes, args.layers, args.seconds = ["ViT-S/16"], ["plain"], 4, min(args.seconds, 10.0)
    args.impls = [impl for impl in IMPLS if impl in {"unpatched", *args.impls}]
    return args


def batches(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Measure every model whose library is there."""
    there = False
    for name in args.models:
        model = MODELS[name]
        if not installed(model.library):
            print(f"{name}: {model.library} is not installed, left out")
            continue
        there = True
        torch._dynamo.reset()
        with cli.measuring(name, "--batch"):
            found = sides(model, args)
            check(name, found, args.dtype)
            for direction in args.direction:
                yield rows_of(name, model, found, direction, args)
            del found
    if not there:
        raise cli.Failure("nothing was measured: pip install timm open_clip_torch transformers", 2)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return cli.main(args, batches(args), table, HEADING, live=True)


if __name__ == "__main__":
    sys.exit(main())
