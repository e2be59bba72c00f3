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
from harness.verify import WrongResult
from harness.workloads.fused import DIRECTIONS, SHAPES, Sides, attention_sides, norm_sides, timed

BASES = {"merge_norm": "add + layer_norm", "attention": "sdpa, no sizes"}


def check(op: str, sides: Sides, dtype: str) -> None:
    """Compare ours with the reference, forward and gradients, element by element."""
    found = []
    for name in ("reference", op):
        call, leaves = sides[name]
        out = call()
        grads = torch.autograd.grad(sum(t.float().sin().sum() for t in out), leaves)
        found.append([t.detach().double() for t in (*out, *grads)])
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    for index, (want, got) in enumerate(zip(*found, strict=True)):
        error, scale = (got - want).abs().max().item(), want.abs().max().item()
        # a sum over all rows (gradients of weight and bias) or over the keys may lose some bits more
        if not error <= 64 * unit * scale:
            raise WrongResult(f"{op}: result {index} is off by {error:.3g} of {scale:.3g}")


def rows_of(shape: shapes.Shape, args: argparse.Namespace) -> list[dict]:
    inputs = shapes.make(shape, args.device, getattr(torch, args.dtype))
    rows = []
    for op, make in (("merge_norm", norm_sides), ("attention", attention_sides)):
        sides = make(inputs)
        check(op, sides, args.dtype)
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
