#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure attention with sizes from 58 to 4096 keys against the fastest of torch's own kernels without sizes.

Beside ours: the sizes as a mask, which no flash kernel for GPUs takes, and as two channels of the keys (``augmented``).
All are compared with float64 first; a wrong result ends the run with status 1. Without arguments: on the GPU if there
is one, else on the CPU, in five minutes.
"""

from __future__ import annotations

import argparse
import sys

import torch

from harness import cli, measure
from harness.rows import percentiles
from harness.workloads.attention import CASES, Case, attention_sides
from harness.workloads.fused import DIRECTIONS, FRAMES, compare, timed


def rows_of(case: Case, args: argparse.Namespace) -> list[dict]:
    """Return a row for each side and direction."""
    dtype, rows = getattr(torch, args.dtype), []
    checked = attention_sides(
        case, args.device, dtype, FRAMES if case.prefix else 1
    )  # float64 holds all scores at once
    for name in ("attention", "augmented", "mask"):
        compare(f"{case.name}, {name}", checked[name], checked["reference"], dtype)
    del checked
    sides = attention_sides(case, args.device, dtype)
    del sides["reference"]
    for direction in DIRECTIONS:
        calls = {}
        for name, side in sides.items():
            try:
                calls[name] = [timed(*side, direction)]
                calls[name][0]()
            except RuntimeError as error:  # a kernel of torch's that does not take such inputs
                if "no sizes" not in name or isinstance(error, torch.OutOfMemoryError):
                    raise
                print(f"{case.name}: {name} left out: {str(error).partition('.')[0]}", file=sys.stderr)
                del calls[name]
        times = measure.measure(calls, args.device, args.seconds, set())
        medians = {name: measure.percentile(found["samples"], 0.5) for name, found in times.items()}
        fastest = min((name for name in medians if "no sizes" in name), key=medians.__getitem__, default=None)
        for name, found in times.items():
            rows.append(
                {
                    **{"shape": case.name, "n": case.n(args.device), "heads": case.heads, "tokens": case.tokens},
                    **{"channels": case.channels, "dtype": args.dtype, "op": "attention", "direction": direction},
                    **{"impl": name, **percentiles(found["samples"]), "wall_us": found.get("wall_us")},
                    **{"fastest": fastest, "times_fastest": fastest and round(medians[name] / medians[fastest], 4)},
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'case':16} {'direction':16} {'impl':16} {'µs':>10}  of the fastest without sizes"]
    for r in rows:
        of = "" if r["fastest"] in (None, r["impl"]) else f"{r['times_fastest']:.2f}× {r['fastest']}"
        lines.append(f"{r['shape']:16} {r['direction']:16} {r['impl']:16} {r['p50_us']:10.1f}  {of}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = cli.parser(__doc__)
    p.add_argument("--cases", type=cli.one_of("case", tuple(CASES)), default=list(CASES), metavar="NAME,NAME",
                   help=", ".join(CASES))  # fmt: skip
    cli.add_dtype(p)
    cli.add_seconds(p, 5.0, "each case and direction")
    args = cli.configure(p.parse_args(argv))
    return cli.main(args, (rows_of(CASES[name], args) for name in args.cases), table)


if __name__ == "__main__":
    sys.exit(main())
