# SPDX-License-Identifier: Apache-2.0
"""match and merge against PyTorch, from the rows of bench/merge.py; merge_norm and attention, of bench/fused.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import Draw, find

OURS = ("triton", "native")  # best first
DIRECTIONS = {"forward": "forward", "forward+backward": "forward and backward"}
BOUNDS = (  # like with like: existing memory against existing memory, fresh against fresh
    ("merge into `out=` ÷ `copy_`", "forward, out=", "times_copy_of_result"),
    ("merge ÷ `clone`", "forward", "times_clone_of_result"),
    ("backward ÷ `clone`", "backward", "times_clone_of_result"),
)


def ours(rows: list[dict], **values: object) -> dict | None:
    """Return the row of the package's best backend that was measured."""
    return next((row for name in OURS if (row := find(rows, impl=name, **values))), None)


def over(rows: list[dict], impl: str, **values: object) -> float | None:
    """Return how many times as fast as ``impl`` the best backend is; None where one of them was not measured."""
    mine, theirs = ours(rows, **values), find(rows, impl=impl, **values)
    return theirs["p50_us"] / mine["p50_us"] if mine and theirs else None


def size(row: dict) -> str:
    out = row["tokens"] - min(row["r"], (row["tokens"] - row["protected"]) // 2)
    return f"{row['n']} × {row['tokens']} → {out}, {row['dim']}"


# -- match and merge --------------------------------------------------------------------------------------------------


def tables(rows: list[dict]) -> list[str]:
    """Return the sections of bench/merge.py's rows."""
    parts = []
    for found in common.machines(rows):
        for direction, words in DIRECTIONS.items():
            own = [row for row in found if row["op"] == "match+merge" and row["direction"] == direction]
            if own:
                parts.append(common.section(f"match + merge, {words}", own, _against(own)))
        merges = [row for row in found if row["op"] == "merge"]
        parts.append(common.section("merge against a copy of its result", merges, _bounds(merges)))
    return parts


def reference_tables(rows: list[dict]) -> list[str]:
    """Return the sections that time the reference implementation, which nobody is meant to run."""
    parts = []
    for found in common.machines(rows):
        own = [row for row in found if row["op"] == "match+merge"]
        lines = []
        for shape in common.distinct(own, "shape"):
            cells = [find(own, shape=shape, direction=direction, impl="reference") for direction in DIRECTIONS]
            if any(cells):
                texts = [
                    part for row in cells for part in
                    ((common.microseconds(row["p50_us"]), common.speedup(row["speedup_vs_eager"])) if row else ("", ""))
                ]  # fmt: skip
                lines.append([shape, *texts])
        if lines:
            head = ["shape", "forward", "over eager", "forward and backward", "over eager"]
            parts.append(common.section("Reference, match + merge", own, common.markdown_table(head, lines)))
    return parts


def _against(rows: list[dict]) -> str:
    """Return the table of one direction: ours as a time, the others as ratios."""
    lines = []
    for shape in common.distinct(rows, "shape"):
        mine, eager = ours(rows, shape=shape), find(rows, shape=shape, impl="eager")
        if mine is None:
            continue
        graphs = mine["graph_us"] and eager and eager["graph_us"]
        lines.append([
            shape, size(mine), common.microseconds(mine["p50_us"]),
            *(common.speedup(over(rows, impl, shape=shape)) for impl in ("eager", "compile", "tome")),
            f"{common.microseconds(mine['graph_us'])}, {eager['graph_us'] / mine['graph_us']:.2f}×" if graphs else "",
        ])  # fmt: skip
    backend = next(
        (row["impl"] for row in (ours(rows, shape=shape) for shape in common.distinct(rows, "shape")) if row), ""
    )
    head = [
        "shape",
        "N × T → T′, D",
        backend,
        "over eager",
        "over `torch.compile`",
        "over ToMe",
        "in a CUDA graph, over eager",
    ]
    return common.markdown_table(head, lines, words=2)


def _bounds(rows: list[dict]) -> str:
    lines = []
    for shape in common.distinct(rows, "shape"):
        cells = [(ours(rows, shape=shape, direction=direction), key) for _, direction, key in BOUNDS]
        lines.append([shape, *(f"{row[key]:.2f}" if row and row[key] else "" for row, key in cells)])
    return common.markdown_table(["shape", *(name for name, _, _ in BOUNDS)], lines)


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw how many times as fast as eager PyTorch our backend and torch.compile are: a line of panels a machine."""
    found = [[row for row in own if row["op"] == "match+merge"] for own in common.machines(rows)]
    shapes = max(len(common.distinct(own, "shape")) for own in found)
    figure, axes = common.panels(len(found), 2, 1.1 + 0.32 * shapes, sharex=True, sharey="row")
    for line, own in zip(axes, found, strict=True):
        for axis, (direction, words) in zip(line, DIRECTIONS.items(), strict=True):
            _bars(axis, [row for row in own if row["direction"] == direction], colours)
            axis.set_title(f"match + merge, {words}")
            axis.set_xlabel("times as fast as eager PyTorch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncol=2)
    right = max(axis.get_xlim()[1] for axis in axes.flat)
    axes[0, 0].set_xlim(0, right * 1.1)  # room for the labels; all panels share the axis
    common.caption(figure, [common.machine(own[0]) for own in found])
    return figure


def _bars(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    shapes = common.distinct(rows, "shape")[::-1]
    sides = [("ours", lambda shape: over(rows, "eager", shape=shape), "this package")]
    if any(row["impl"] == "compile" for row in rows):
        sides.append(("theirs", lambda shape: _compiled(rows, shape), "torch.compile"))
    thick = 0.8 / len(sides)
    for place, (colour, ratio, name) in enumerate(sides):
        heights = [height + ((len(sides) - 1) / 2 - place) * thick for height in range(len(shapes))]
        values = [ratio(shape) for shape in shapes]
        present = [(y, value) for y, value in zip(heights, values, strict=True) if value]
        axis.barh([y for y, _ in present], [v for _, v in present], thick * 0.9, color=colours[colour], label=name)
        for y, value in present:
            common.label(axis, f"{value:.1f}×", (value, y), (3, 0), va="center")
    axis.axvline(1, color=colours["ink"], linewidth=1)
    axis.set_yticks(range(len(shapes)), shapes)


def _compiled(rows: list[dict], shape: str) -> float | None:
    eager, compiled = find(rows, shape=shape, impl="eager"), find(rows, shape=shape, impl="compile")
    return eager["p50_us"] / compiled["p50_us"] if eager and compiled else None


# -- merge_norm and attention -----------------------------------------------------------------------------------------


def fused_tables(rows: list[dict]) -> list[str]:
    """Return the sections of bench/fused.py's rows: multiples of what a block does that merges nothing."""
    parts = []
    for found in common.machines(rows):
        for op in common.distinct(found, "op"):
            own = [row for row in found if row["op"] == op]
            base = own[0]["against"]
            names = [name for name in common.distinct(own, "impl") if name != base]
            lines = []
            for shape, direction in common.distinct(own, "shape", "direction"):
                first = find(own, shape=shape, direction=direction, impl=base)
                cells = [find(own, shape=shape, direction=direction, impl=name) for name in names]
                assert first is not None
                lines.append([
                    shape, f"{first['n']} × {first['tokens']}", DIRECTIONS[direction],
                    common.microseconds(first["p50_us"]),
                    *((common.multiple if name.startswith(op) else "{:.2f}×".format)(row["times_base"]) if row else ""
                      for name, row in zip(names, cells, strict=True)),
                ])  # fmt: skip
            head = ["shape", "N × T", "direction", base, *names]
            parts.append(common.section(f"{op} against {base}", own, common.markdown_table(head, lines, words=3)))
    return parts


CHART: Draw = chart
