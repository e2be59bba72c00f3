# SPDX-License-Identifier: Apache-2.0
"""match and merge against PyTorch, from the rows of bench/merge.py; merge_norm and attention, of bench/fused.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import find

OURS = ("triton", "native")  # best first
DIRECTIONS = {"forward": "forward", "forward+backward": "forward and backward"}
BOUNDS = (  # like with like: existing memory against existing memory, fresh against fresh
    ("merge into `out=` ÷ `copy_`", "forward, out=", "times_copy_of_result"),
    ("merge ÷ `clone`", "forward", "times_clone_of_result"),
    ("backward ÷ `clone`", "backward", "times_clone_of_result"),
)
# of each fused operator: the same in several operators
SEPARATE = {"merge_norm": "add, merge, layer_norm", "attention": "concatenated, mask"}


def ours(rows: list[dict], **values: object) -> dict | None:
    """Return the row of the package's best backend that was measured."""
    return next((row for name in OURS if (row := find(rows, impl=name, **values))), None)


def over(rows: list[dict], impl: str, **values: object) -> float | None:
    """Return how many times as fast as ``impl`` the best backend is; None where one of them was not measured."""
    mine, theirs = ours(rows, **values), find(rows, impl=impl, **values)
    return theirs["p50_us"] / mine["p50_us"] if mine and theirs else None


def both(rows: list[dict], direction: str) -> list[dict]:
    """Return the rows of match + merge in a direction."""
    return [row for row in rows if row["op"] == "match+merge" and row["direction"] == direction]


def size(row: dict) -> str:
    out = row["tokens"] - min(row["r"], (row["tokens"] - row["protected"]) // 2)
    return f"{row['n']} × {row['tokens']} → {out}, {row['dim']}"


# -- match and merge --------------------------------------------------------------------------------------------------


def tables(rows: list[dict]) -> list[str]:
    """Return the sections of bench/merge.py's rows."""
    parts = []
    for found in common.machines(rows):
        for direction, words in DIRECTIONS.items():
            own = both(found, direction)
            best = (ours(own, shape=shape) for shape in _shapes(own))
            backend = next((row["impl"] for row in best if row), "")
            head = ["shape", "N × T → T′, D", backend, "over eager", "over `torch.compile`", "over ToMe",
                    "in a CUDA graph, over eager"]  # fmt: skip
            parts += common.section(f"match + merge, {words}", own, head, _against(own), words=2)
        merges = [row for row in found if row["op"] == "merge"]
        head = ["shape", *(name for name, _, _ in BOUNDS)]
        parts += common.section("merge against a copy of its result", merges, head, _bounds(merges))
    return parts


def reference_tables(rows: list[dict]) -> list[str]:
    """Return the sections that time the reference implementation, which nobody is meant to run."""
    parts = []
    for found in common.machines(rows):
        own, lines = [row for row in found if row["op"] == "match+merge"], []
        for shape in _shapes(own):
            line = [shape]
            for direction in DIRECTIONS:
                row = find(own, shape=shape, direction=direction, impl="reference")
                cells = (
                    (common.microseconds(row["p50_us"]), common.speedup(row["speedup_vs_eager"])) if row else ("", "")
                )
                line += cells
            if any(line[1:]):
                lines.append(line)
        head = ["shape", "forward", "over eager", "forward and backward", "over eager"]
        parts += common.section("Reference, match + merge", own, head, lines)
    return parts


def _shapes(rows: list[dict]) -> list[str]:
    return common.distinct(rows, "shape")


def _against(rows: list[dict]) -> list[list[str]]:
    """Return the lines of one direction: ours as a time, the others as ratios."""
    lines = []
    for shape in _shapes(rows):
        mine, eager = ours(rows, shape=shape), find(rows, shape=shape, impl="eager")
        if mine is None:
            continue
        graphs = mine["graph_us"] and eager and eager["graph_us"]
        lines.append([
            shape, size(mine), common.microseconds(mine["p50_us"]),
            *(common.speedup(over(rows, impl, shape=shape)) for impl in ("eager", "compile", "tome")),
            f"{common.microseconds(mine['graph_us'])}, {common.speedup(eager['graph_us'] / mine['graph_us'])}"
            if graphs else "",
        ])  # fmt: skip
    return lines


def _bounds(rows: list[dict]) -> list[list[str]]:
    lines = []
    for shape in _shapes(rows):
        cells = [(ours(rows, shape=shape, direction=direction), key) for _, direction, key in BOUNDS]
        texts = [f"{row[key]:.2f}" if row and row[key] else "" for row, key in cells]
        if any(texts):
            lines.append([shape, *texts])
    return lines


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw how many times as fast as eager PyTorch our backend and torch.compile are: a line of panels a machine."""
    found = [own for own in common.machines(rows) if any(both(own, direction) for direction in DIRECTIONS)]
    shapes = max((len(_shapes(own)) for own in found), default=0)
    figure, axes = common.panels(len(found), 2, 1.1 + 0.32 * shapes, sharex=True, sharey="row")
    for line, own in zip(axes, found, strict=True):
        for axis, (direction, words) in zip(line, DIRECTIONS.items(), strict=True):
            _bars(axis, both(own, direction), _shapes(own)[::-1], colours)
            common.title(axis, f"match + merge, {words}", own, len(found) > 1)
            axis.set_xlabel("times as fast as eager PyTorch")
    right = max(axis.get_xlim()[1] for axis in axes.flat)
    axes[0, 0].set_xlim(0, right * 1.1)  # room for the labels; all panels share the axis
    common.legend(figure, axes, 2)
    common.caption(figure, [common.machine(own[0]) for own in found])
    return figure


def _bars(axis: Any, rows: list[dict], shapes: list[str], colours: dict[str, str]) -> None:
    sides = [("ours", "this package", {shape: over(rows, "eager", shape=shape) for shape in shapes})]
    if any(row["impl"] == "compile" for row in rows):
        sides.append(("theirs", "torch.compile", {shape: _compiled(rows, shape) for shape in shapes}))
    thick = 0.8 / len(sides)
    for place, (colour, name, ratios) in enumerate(sides):
        shift = ((len(sides) - 1) / 2 - place) * thick
        present = [(height + shift, ratios[shape]) for height, shape in enumerate(shapes) if ratios[shape]]
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
            base, names = own[0]["against"], common.distinct(own, "impl")
            others = [name for name in names if name != base]
            lines = []
            for shape, direction in common.distinct(own, "shape", "direction"):
                cells = {name: find(own, shape=shape, direction=direction, impl=name) for name in names}
                first = next(row for row in cells.values() if row)
                lines.append([
                    f"{shape}, {first['n']} × {first['tokens']}", DIRECTIONS[direction],
                    *(common.microseconds(row["p50_us"]) if (row := cells.get(base)) else "",),
                    *(_multiple(op, name, cells[name]) for name in others),
                    common.speedup(_over_separate(op, cells)),
                ])  # fmt: skip
            head = ["shape, N × T", "direction", base, *others, f"{op} over {SEPARATE[op]}"]
            parts += common.section(f"{op} against {base}", own, head, lines, words=2)
    return parts


def _multiple(op: str, name: str, row: dict | None) -> str:
    """Return a time as a multiple of the base's; of what is compared with ours nothing is marked."""
    if row is None:
        return ""
    return common.multiple(row["times_base"]) if name.startswith(op) else f"{row['times_base']:.2f}×"


def _over_separate(op: str, cells: dict[str, dict | None]) -> float | None:
    mine, theirs = cells.get(op), cells.get(SEPARATE[op])
    return theirs["p50_us"] / mine["p50_us"] if mine and theirs else None
