#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare configurations of the Triton kernels on the GPU: rows and warps, tiles, the order of loads.

Each kernel runs alone. What the default writes is compared with the reference, what a variant writes with the default:
bit for bit where the contract fixes it, else within rounding. A wrong one is reported, not timed, and the status is 1.
Times are medians of alternating runs, as a share of a copy of as many bytes in the same run. The most important kernels
come first, and the rows of each are saved before the next begins; SIGINT ends the run with what it has.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator

import torch
from stoptome_kernels import reference
from torch import Tensor

from harness import cli, measure, no_gpu, shapes, variants, verify
from harness.rows import percentiles
from harness.variants import Job, Kernel, launch
from harness.workloads.operators import input_sets


class Broken(Exception):
    """The device can't be used any more: a kernel read or wrote where it may not."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    names = cli.one_of("kernel", tuple(variants.KERNELS))
    add("--kernels", type=names, default=list(variants.KERNELS), metavar="A,B", help=", ".join(variants.KERNELS))
    names = cli.one_of("shape", tuple(shapes.SHAPES))
    said = f"default: {variants.STOP}, for some kernels {variants.VIT}"
    add("--shapes", type=names, metavar="NAME,NAME", help=said)
    cli.add_dtype(p)
    cli.add_seconds(p, 1.0, "the clocks of each kernel and shape")
    args = cli.configure(p.parse_args(argv))
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        p.error("it needs an NVIDIA GPU (without one its own tests run under TRITON_INTERPRET=1)")
    return args


def cases(args: argparse.Namespace) -> list[tuple[Kernel, shapes.Shape]]:
    pairs = (
        variants.ORDER if args.shapes is None else [(kernel, shape) for kernel in args.kernels for shape in args.shapes]
    )
    return [(variants.KERNELS[name], shapes.SHAPES[shape]) for name, shape in pairs if name in args.kernels]


# -- right or wrong ---------------------------------------------------------------------------------------------------


def read(job: Job, steps: list[tuple]) -> tuple[dict[str, Tensor], list]:
    """Run a job once into poisoned outputs, so that an element nobody writes is seen."""
    for tensor in job.written(steps).values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    built = launch(steps)
    # the programs' parts of the gradients of weight and bias depend on how many they are, their sum does not
    return {name: t.sum(0) if name == "affine" else t.clone() for name, t in job.written(steps).items()}, built


def compare(who: str, got: dict[str, Tensor], want: dict[str, Tensor], bounds: dict[str, float]) -> None:
    """Raise verify.WrongResult if an output is further off than its bound; without one, if a bit differs."""
    for name, right in want.items():
        if name not in bounds:
            if not torch.equal(got[name], right):
                raise verify.WrongResult(f"{who}: {name} differs in {int((got[name] != right).sum())} elements")
            continue
        error = (got[name].double() - right.double()).abs().max().item()
        if not error <= bounds[name]:  # a NaN is wrong too
            raise verify.WrongResult(f"{who}: {name} is off by {error:.3g}, which may be {bounds[name]:.3g}")


def check_plan(who: str, got: dict[str, Tensor], truth: verify.Truth) -> int:
    """Check a plan against exact similarities; return how many decisions differ from theirs, within rounding."""
    differences = truth.differences(got["dest"], who)
    groups = reference.build_groups(
        got["dest"], torch.zeros_like(got["dest"], dtype=torch.bool), truth.inputs.shape.tokens_out
    )
    compare(who, got, dict(zip(("members", "offsets"), groups, strict=True)), {})
    return differences


# -- rows -------------------------------------------------------------------------------------------------------------


def usage(built: list) -> dict:
    """Registers of a thread and bytes spilled, the most of its launches; None in the interpreter."""
    found = {}
    for name in ("n_regs", "n_spills"):
        values = [getattr(kernel, name, None) for kernel in built]
        found[name] = None if None in values else max(values)
    return found


def prepare(kernel: Kernel, jobs: list[Job], inputs: shapes.Inputs, status: list[str]) -> dict[str, dict]:
    """Run the default and every variant once: by label what to time (``steps``), or why not (``reason``).

    Raises:
        verify.WrongResult: the default is wrong, so there is nothing to compare with.
    """
    name, truth = kernel.name, verify.Truth(inputs) if kernel.name == "match" else None
    default = variants.default_of(kernel, jobs[0])
    tried, missing = variants.variants_of(kernel, default)
    found: dict[str, dict] = {flag: {"reason": f"this build has no {flag}", "changes": {}} for flag in missing}
    want, bounds = jobs[0].right(), {}
    for label, changes in {"default": {}, **tried}.items():
        entry = found[label] = {"reason": None, "changes": changes, "config": {**default, **changes}}
        if lacking := [key for key in changes if key not in {*default, *variants.OPTIONS, "programs"}]:
            entry["reason"] = f"this build has no {', '.join(lacking)}"
            continue
        try:
            with variants.configured(kernel, changes):
                steps = [job.launches() for job in jobs]
            got, built = read(jobs[0], steps[0])
            if inputs.x.is_cuda:
                torch.cuda.synchronize()
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the compiler or the driver says: the others are still of interest
            entry["reason"] = variants.reason_of(error)
            _still_alive(inputs, f"{name}, {label}: {entry['reason']}")
            if label == "default":
                raise verify.WrongResult(f"{name}, default: {entry['reason']}") from error
            continue
        try:
            if no_gpu.pretending():
                pass  # nothing ran, so there is nothing to compare
            elif truth is not None:
                entry["plan_differences"] = check_plan(f"{name}, {label}", got, truth)
            else:
                bounds = bounds or jobs[0].bounds(want)
                compare(f"{name}, {label}", got, want, bounds)
        except verify.WrongResult as error:
            if label == "default":
                raise
            entry["reason"] = f"wrong: {error}"
            status.append(str(error))
            continue
        entry |= {"steps": steps, **usage(built)}
        want = got if label == "default" else want
    return found


def _still_alive(inputs: shapes.Inputs, what: str) -> None:
    """Raise Broken where a failed launch has taken the device with it."""
    if inputs.x.is_cuda:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise Broken(what) from error


def rows_of(kernel: Kernel, shape: shapes.Shape, args: argparse.Namespace, status: list[str]) -> list[dict]:
    """Measure one kernel on one shape: a row for the default and each variant."""
    dtype = getattr(torch, args.dtype)
    sets = input_sets(shape, args.device, dtype)
    jobs = [kernel.job(inputs) for inputs in sets]
    found = prepare(kernel, jobs, sets[0], status)
    sides = {
        label: [lambda steps=steps: launch(steps) for steps in entry["steps"]]
        for label, entry in found.items()
        if "steps" in entry
    }
    nbytes = jobs[0].nbytes
    sides["copy"] = measure.copies(nbytes, len(sets), args.device)
    times = measure.measure(sides, args.device, args.seconds, set())
    middle = measure.medians(times)
    rows = []
    for label, entry in found.items():
        t = middle.get(label)
        rows.append(
            {
                **shape.columns(args.device),
                **{"dtype": args.dtype, "op": kernel.name, "direction": kernel.direction, "impl": label},
                "reason": entry["reason"],
                "config": {key: _plain(value) for key, value in entry.get("config", {}).items()},
                **percentiles(times[label]["samples"] if t else []),
                **{"bytes": nbytes, "copy_us": round(middle["copy"], 3)},
                "copy_gb_per_s": round(nbytes / middle["copy"] / 1e3, 3),
                "share_of_copy": round(middle["copy"] / t, 4) if t else None,
                "gain": round(middle["default"] / t, 4) if t else None,
                "plan_differences": entry.get("plan_differences"),
                **{name: entry.get(name) for name in ("n_regs", "n_spills")},
            }
        )
    return rows


def _plain(value: object) -> object:
    return value if isinstance(value, (int, float, str)) or value is None else str(value)


def table(rows: list[dict]) -> str:
    """Return, per kernel and shape, the default, the best, and what it gains; then what was not timed."""
    head = f"{'kernel':15} {'shape':17} {'dtype':8} {'default µs':>10} {'of copy':>7} {'best µs':>10} {'of copy':>7}"
    lines = [f"{head}   gain  best"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    for (op, shape, dtype), found in groups.items():
        timed = [row for row in found if row["p50_us"]]
        default, best = next(row for row in timed if row["impl"] == "default"), min(timed, key=lambda r: r["p50_us"])
        lines.append(
            f"{op:15} {shape:17} {dtype:8} {default['p50_us']:10.1f} {default['share_of_copy']:7.0%} "
            f"{best['p50_us']:10.1f} {best['share_of_copy']:7.0%} {best['gain']:5.2f}×  {best['impl']}"
        )
    left = [f"not timed: {row['op']}, {row['shape']}, {row['impl']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([*lines, *left])


def batches(args: argparse.Namespace, wrong: list[str]) -> Iterator[list[dict]]:
    """Measure one kernel on one shape after the other; a wrong one is noted in ``wrong``, and the next begins."""
    for kernel, shape in cases(args):
        try:
            rows = rows_of(kernel, shape, args, wrong)
        except verify.WrongResult as error:
            wrong.append(str(error))
            continue
        except Broken as error:
            wrong.append(f"{error}; the device is lost, nothing more is run")
            return
        except torch.OutOfMemoryError:
            print(f"{kernel.name}, {shape.name}: skipped, not enough GPU memory", file=sys.stderr)
            continue
        finally:
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        yield rows
        print(f"{kernel.name}, {shape.name}: {sum(bool(row['p50_us']) for row in rows)} timed", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    wrong: list[str] = []
    stopped = cli.main(args, batches(args, wrong), table, "{device}, torch {torch}, Triton {triton}, {dtype}")
    for text in wrong:
        print(f"error: wrong result, not timed: {text}", file=sys.stderr)
    return 1 if wrong else stopped


if __name__ == "__main__":
    sys.exit(main())
