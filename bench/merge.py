#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure match, merge and unmerge against eager PyTorch, torch.compile and the copy bandwidth of the machine.

Without arguments: on the GPU if there is one, else on the CPU, in about two minutes. Every result is compared with
float64 before it is timed; a wrong one ends the run with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from harness import cli, measure, shapes, verify
from harness.baselines import operators
from harness.rows import percentiles
from harness.workloads.operators import calls, input_sets

CELLS = (  # what is measured of every shape
    ("match", "forward"),
    ("merge", "forward"),
    ("merge", "forward, out="),  # into memory that is there already, as copy_ does; eager PyTorch has no such way
    ("merge", "backward"),
    ("merge", "forward+backward"),
    ("match+merge", "forward"),
    ("match+merge", "forward+backward"),
    ("unmerge", "forward"),
)
BACKENDS = ("triton", "native", "reference")
GRAPH_ITEMS = 12  # CUDA-graph times where launches rule: one video


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--plot", type=Path, metavar="FILE.png", help="draw the chart of this run")
    names = cli.one_of("shape", (*shapes.SHAPES, "list", "all"))
    add("--shapes", type=names, default=["all"], metavar="NAME,NAME", help="which shapes; `list` shows them")
    cli.add_dtype(p, (*cli.DTYPES, "all"))
    some = cli.one_of("backend", BACKENDS)
    add("--backend", type=some, metavar="A,B", help=f"of {', '.join(BACKENDS)}; default: all that can run")
    add("--quick", action="store_true", help="two shapes without torch.compile and reference: about 20 seconds")
    said = "time for the clocks; checks and compilation come on top"
    add("--seconds", type=cli.positive(float), metavar="S", help=said)
    add("--no-compile", action="store_true", help="leave torch.compile out")
    args = p.parse_args(argv)
    if args.plot and args.plot.suffix != ".png":
        p.error(f"argument --plot: must end in .png, got {str(args.plot)!r}")
    cli.configure(args)
    args.dtypes = cli.DTYPES if args.dtype == "all" else (args.dtype,)
    wanted = args.backend or (BACKENDS[:2] if args.quick else BACKENDS)
    reasons = {name: operators.unavailable_reason(name, args.device, getattr(torch, args.dtypes[0])) for name in wanted}
    args.skipped = {backend: reason for backend, reason in reasons.items() if reason}
    args.backends = [backend for backend, reason in reasons.items() if not reason]
    if args.backend and args.skipped:
        p.error("argument --backend: " + "; ".join(f"{b}: {reason}" for b, reason in args.skipped.items()))
    return args


def chosen_shapes(args: argparse.Namespace) -> list[shapes.Shape]:
    if args.shapes != ["all"]:
        return [shapes.SHAPES[name] for name in args.shapes if name in shapes.SHAPES]
    return [shape for shape in shapes.SHAPES.values() if (shape.quick if args.quick else shape.default)]


def measure_shape(
    shape: shapes.Shape, dtype: torch.dtype, args: argparse.Namespace, bar: tqdm, seconds: float
) -> Iterator[list[dict]]:
    """Yield the rows of one shape, cell by cell. Raises verify.WrongResult before anything is timed."""
    device, n = args.device, shape.n(args.device)
    sets = input_sets(shape, device, dtype)
    competing_compiler = device in shape.compile_on and not (args.no_compile or args.quick)
    # the reference is there to be read, not to be fast: on most shapes one number of it is enough
    brief = {"reference"} if args.backend is None and not shape.compile_on else set()
    image = shape.cell > 0
    competitors = [operators.eager(image), *(operators.package(name, name in brief, image) for name in args.backends)]
    if (theirs := operators.tome(sets[0])) is not None:
        competitors.append(theirs)
    if competing_compiler:
        bar.set_postfix_str("torch.compile")
        competitors.insert(1, operators.compiled())
    bar.set_postfix_str("checking")
    truth = verify.Truth(sets[0])
    checks = {peer.name: verify.check(peer, truth).fields() for peer in competitors}
    del truth
    ready = {peer.name: [calls(peer, inputs) for inputs in sets] for peer in competitors}

    for op, direction in CELLS:
        bar.set_postfix_str(f"{op} {direction}")
        sides = {name: [c[op, direction] for c in each] for name, each in ready.items() if (op, direction) in each[0]}
        nbytes = measure.least_bytes(shape, n, dtype.itemsize, op, direction)
        sides["copy"] = measure.copies(nbytes, len(sets), device)
        if op == "merge" and direction != "forward+backward":
            result = (sets[0].x if direction == "backward" else sets[0].grad).nbytes
            sides["copy of result"] = measure.copies(2 * result, len(sets), device)
            sides["clone of result"] = measure.copies(2 * result, len(sets), device, fresh=True)
        graph = {p.name for p in competitors if p.graphs and n <= GRAPH_ITEMS and direction != "backward"}
        times = measure.measure(sides, device, seconds, graph)
        middle = measure.medians(times)
        yield [
            {
                **shape.columns(device),
                **{"channels": sets[0].metric.shape[-1], "dtype": str(dtype).removeprefix("torch.")},
                "metric_form": "x" if shape.metric == "x" else peer.metric_form,
                **{"op": op, "direction": direction, "impl": peer.name, "backend": peer.backend},
                **numbers(times[peer.name], nbytes, middle, peer.name),
                **{"input_sets": len(sets), **checks[peer.name]},
            }
            for peer in competitors
            if peer.name in times
        ]
        bar.update()


def numbers(times: measure.Times, nbytes: int, middle: dict[str, float], name: str) -> dict:
    """Return the measured part of a row; ``middle`` holds every side's median in µs."""
    t, copy = middle[name], middle["copy"]
    result = {how: middle.get(f"{how} of result") for how in ("copy", "clone")}
    return {
        **percentiles(times["samples"]),
        **{"wall_us": times.get("wall_us"), "graph_us": times.get("graph_us")},
        **{"bytes": nbytes, "gb_per_s": round(nbytes / t / 1e3, 3), "copy_gb_per_s": round(nbytes / copy / 1e3, 3)},
        "share_of_copy": round(copy / t, 4),
        **{f"times_{how}_of_result": round(t / other, 4) if other else None for how, other in result.items()},
        "speedup_vs_eager": round(middle["eager"] / t, 4),
    }


def table(rows: list[dict]) -> str:
    """Return a line for each measurement: µs, speed-up over eager and, of the fastest, the share of the copy speed."""
    names = list(dict.fromkeys(row["impl"] for row in rows))
    head = f"{'shape':17} {'dtype':8} {'op':11} {'direction':16}"
    lines, lost = [head + "".join(f" {name:>18}" for name in names) + "  fastest: share of copy speed"], []
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["shape"], row["dtype"], row["op"], row["direction"])
        cells.setdefault(key, {})[row["impl"]] = row
    for (shape, dtype, op, direction), found in cells.items():
        line = f"{shape:17} {dtype:8} {op:11} {direction:16}"
        for name in names:
            if name not in found:
                line += f" {'–':>17} "
                continue
            t, ratio = found[name]["p50_us"], found[name]["speedup_vs_eager"]
            slower = ratio < 1 and found[name]["backend"] is not None
            if slower:
                lost.append(f"{name}: {shape}, {dtype}, {op}, {direction}: {ratio:.2f}×")
            line += f" {t:9.1f} {ratio:6.2f}×{'!' if slower else ' '}"
        best = min(found.values(), key=lambda row: row["p50_us"])
        result = best["times_copy_of_result"]
        line += f" {best['impl']}: {best['share_of_copy']:.0%}"
        line += f", {result:.2f}× copy_ of its result" if result else ""
        graphs = [f"{name} {row['graph_us']:.1f}" for name, row in found.items() if row["graph_us"]]
        lines.append(line + (f"; in a CUDA graph, µs: {', '.join(graphs)}" if graphs else ""))
    lines.append(
        "µs of a call (median) and speed-up over eager; copy speed: copy_ of as many bytes as must move, same run"
    )
    unsteady = sum(row["p80_us"] > 2 * row["p20_us"] for row in rows)
    if unsteady:
        lines.append(f"{unsteady} of {len(rows)} times are unsteady (p80 > 2 × p20): is something else running here?")
    fast = [text for text in lost if not text.startswith("reference")]
    if fast:
        lines += [f"\n! slower than eager PyTorch in {len(fast)} places:", *(f"!   {text}" for text in fast)]
    if len(lost) > len(fast):
        lines.append(
            f"! reference: slower than eager PyTorch in {len(lost) - len(fast)} places; it is there to be read"
        )
    return "\n".join(lines)


def batches(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Measure everything."""
    for backend, reason in args.skipped.items():
        print(f"not measured: {backend}: {reason}")
    chosen = chosen_shapes(args)
    cells = len(chosen) * len(CELLS) * len(args.dtypes)
    seconds = (args.seconds or (10 if args.quick else 45)) / cells
    with tqdm(total=cells, unit="cell", disable=None) as bar:
        for dtype in args.dtypes:
            for shape in chosen:
                bar.set_description(f"{shape.name} {dtype}")
                try:
                    yield from measure_shape(shape, getattr(torch, dtype), args, bar, seconds)
                except torch.OutOfMemoryError:
                    bar.write(f"{shape.name}, {dtype}: skipped, not enough GPU memory for N = {shape.n(args.device)}")
                    bar.update(len(CELLS))
                if args.device == "cuda":
                    torch.cuda.empty_cache()


def list_shapes(device: str) -> None:
    for shape in shapes.SHAPES.values():
        sizes = f"T {shape.tokens:4} → {shape.tokens_out:4}  D {shape.dim:4}  heads {shape.heads:2}"
        rest = f"protected {shape.protected:2}  metric {shape.metric}"
        print(f"{shape.name:17} N {shape.n(device):4} on {device}  {sizes}  {rest}")


def plot(rows: list[dict], file: Path) -> None:
    from charts import common, operators

    common.draw(operators.chart, rows, file)
    print(f"chart: {file}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if "list" in args.shapes:
        list_shapes(args.device)
        return 0
    memory = ", {pages} pages" if args.pages else ""
    heading = f"{{device}}, {{threads}} threads{memory}, torch {{torch}}, package {{package}}"
    return cli.main(
        args, batches(args), table, heading, after=lambda rows: plot(rows, args.plot) if args.plot else None
    )


if __name__ == "__main__":
    sys.exit(main())
