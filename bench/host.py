#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure the host's time of each op as a multiple of F.layer_norm's in the same run, of a patched block as a multiple
of the same unpatched, and where the time of a call goes.

Tensors are so small that computing takes next to nothing. --backend native: the CPU's kernels; triton: Triton's launch
path on the CPU, over a driver that launches nothing (harness/no_gpu.py), as an upper bound of what a GPU's host spends
without the launch itself; both, the default: one after the other, each in a process of its own. In two minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from charts.host import BACKENDS, verdict
from harness import cli, measure, no_gpu
from harness.rows import ROOT, percentiles, version_of
from harness.workloads import host as calls
from harness.workloads import host_parts

FOLDER = ROOT / "bench/results/host"
# at most so many times F.layer_norm's; a block: so many times the same unpatched
TARGETS = {
    ("match", "forward"): 6, ("merge", "forward"): 6, ("merge_norm", "forward"): 8,
    (calls.SIZED, "forward"): 8,
    ("merge", "with gradient"): 12, ("merge_norm", "with gradient"): 16,
    (calls.VIT, "forward"): 1.25,
}  # fmt: skip
OFTEN = {"STOP": 3, "timm": 10}  # calls of a block in a sample; of an op 100


def measured(backend: str, seconds: float) -> tuple[list[tuple[str, str]], dict[tuple[str, str], list[float]]]:
    """Measure, on the backend that ``auto`` takes, in float32 on a CPU and in bfloat16 as a GPU's user has it.

    Returns:
        (op, direction) of each row, and the samples of all in µs, by op and direction or piece.
    """
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "native" else torch.bfloat16
    plain, differentiable = (calls.inputs(dtype, grad) for grad in (False, True))
    sides = {**calls.op_sides(plain, differentiable), **calls.block_sides(backend)}
    nested = host_parts.nested(backend, plain, differentiable)
    pieces = {(op, name): call for op, found in nested.items() for name, call in found.items()}
    often = {key: OFTEN.get(key[0].partition(" ")[0], 100) for key in (*sides, *pieces)}
    samples = {
        "\n".join(key): [partial(host_parts.again, call, often[key], key[1].partition(",")[0])]
        for key, call in {**sides, **pieces}.items()
    }
    # of this thread alone, which does all the work: what else the machine runs doesn't count
    times = measure.measure(samples, "cpu", seconds, set(), time.thread_time_ns)
    found = {key: [us / count for us in times["\n".join(key)]["samples"]] for key, count in often.items()}
    return list(sides), found


def rows_of(backend: str, seconds: float) -> list[dict]:
    """Measure all calls, and the parts of some."""
    sides, samples = measured(backend, seconds)
    medians = {key: measure.percentile(found, 0.5) for key, found in samples.items()}
    base = medians[calls.BASE, "forward"]
    where = {"shape": "tiny", "n": calls.ITEMS, "dtype": "float32" if backend == "native" else "bfloat16"}

    def row(op: str, way: str, part: str | None, own: dict) -> dict:
        target, ratio, beside = None, own["p50_us"] / base, None
        if part is None:
            target = TARGETS.get((op, way))
            if op == calls.VIT:
                beside = own["p50_us"] / medians[calls.UNPATCHED, way]
        return {
            **where,
            **{"op": op, "direction": way, "part": part, "impl": backend},
            **own,
            **{"base_us": round(base, 3), "times_layer_norm": round(ratio, 2)},
            "times_unpatched": None if beside is None else round(beside, 3),
            "target": target,
            "met": None if target is None else (ratio if beside is None else beside) <= target,
        }

    rows = [row(op, way, None, percentiles(samples[op, way])) for op, way in sides]
    # a difference of medians has neither samples of its own nor their percentiles
    alone = {"p20_us": None, "p80_us": None, "runs": len(samples[calls.BASE, "forward"])}
    for op in host_parts.OPS:
        own = {name: median for (of, name), median in medians.items() if of == op}
        for way, part, us in host_parts.parts(own):
            rows.append(row(op, way, part, alone | {"p50_us": round(us, 3)}))
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as text, in columns."""
    lines = [
        f"{r['impl']:7} {r['op']:28} {r['direction']:16} {r['p50_us']:9.1f} µs {r['times_layer_norm']:7.1f}×  "
        + verdict(r).replace("*", "")
        for r in rows
        if r["part"] is None
    ]
    lines += [
        f"{r['impl']:7} {r['op']:28} {r['direction']:16} {r['p50_us']:9.1f} µs           {r['part']}"
        for r in rows
        if r["part"] is not None
    ]
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.bare_parser(__doc__)
    add = p.add_argument
    add(
        "--json", type=Path, metavar="FILE", nargs="?", const=FOLDER,
        help="add the rows to FILE; in a folder: to one named by device and backend (default: bench/results/host)",
    )  # fmt: skip
    add("--backend", choices=(*BACKENDS, "both"), default="both")
    cli.add_seconds(p, 45.0, "each backend")
    cli.add_commit(p)
    return p.parse_args(argv)


def batches(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Measure one backend."""
    yield rows_of(args.backend, args.seconds)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.backend == "both":
        return next((status for backend in BACKENDS if (status := _in_a_process(backend, args))), 0)
    torch.set_num_threads(1)  # a pool of threads has its own host's time
    args.device, args.pages = "cpu", None
    release = ""
    if args.backend == "triton":
        no_gpu.install(results=False)
        release = ".".join(version_of("triton").split(".")[:2])
    heading = "{device}, torch {torch}, Triton {triton}"
    return cli.main(args, batches(args), table, heading, suffix=f"-{args.backend}{release}")


def _in_a_process(backend: str, args: argparse.Namespace) -> int:
    """Measure one backend: a process has either the CPU's kernels or the driver that launches nothing."""
    options = ["--backend", backend, "--seconds", str(args.seconds)]
    options += ["--json", str(args.json)] if args.json else []
    options += ["--commit", args.commit] if args.commit else []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, __file__, *options], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
