#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure merge_norm and attention against what a block does without merging: residual add + LayerNorm, and plain SDPA.

Both are to cost no more than that, though they merge and weigh tokens. Results are compared with the reference first; a
wrong one ends the run with status 1. Without arguments: on the GPU if there is one, else on the CPU, in a minute.
"""

from __future__ import annotations

import argparse
import sys

import torch

from harness import cli, measure, shapes
from harness.rows import percentiles
from harness.workloads.fused import DIRECTIONS, SHAPES, attention_sides, compare, norm_sides, timed

BASES = {"merge_norm": "add + layer_norm", "attention": "sdpa, no sizes"}


def rows_of(shape: shapes.Shape, args: argparse.Namespace) -> list[dict]:
    inputs = shapes.make(shape, args.device, getattr(torch, args.dtype))
    rows = []
    for op, make in (("merge_norm", norm_sides), ("attention", attention_sides)):
        sides = make(inputs)
        compare(op, sides[op], sides["reference"], getattr(torch, args.dtype))
        del sides["reference"]
        for direction in DIRECTIONS:
            calls = {name: [timed(*side, direction)] for name, side in sides.items()}
            times = measure.measure(calls, args.device, args.seconds, set())
            base = measure.percentile(times[BASES[op]]["samples"], 0.5)
            for name, found in times.items():
                own = percentiles(found["samples"])
                rows.append(
                    {
                        **{"shape": shape.name, "n": shape.n(args.device), "tokens": shape.tokens, "r": shape.r},
                        **{"dtype": args.dtype, "op": op, "direction": direction, "impl": name, **own},
                        **{"wall_us": found.get("wall_us"), "against": BASES[op]},
                        "times_base": round(own["p50_us"] / base, 4),
                    }
                )
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'shape':17} {'op':10} {'direction':16} {'impl':24} {'µs':>10}  of what it is compared with"]
    for r in rows:
        ratio = f"{r['times_base']:.2f}× {r['against']}" if r["impl"] != r["against"] else ""
        lines.append(f"{r['shape']:17} {r['op']:10} {r['direction']:16} {r['impl']:24} {r['p50_us']:10.1f}  {ratio}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return cli.main_by_shape(
        argv, __doc__, rows_of, table, allowed=SHAPES, default=SHAPES, seconds=2.0, each="each shape, op and direction"
    )


if __name__ == "__main__":
    sys.exit(main())
