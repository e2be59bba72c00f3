# SPDX-License-Identifier: Apache-2.0
"""Where a block's time goes, from the rows of bench/blocks.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import find

PARTS = {  # by name in the rows: what is in them
    "attention": "attention, with QKV and projection",
    "match": "match",
    "merge": "add, merge, norm",
    "MLP": "MLP",
}
COLOURS = {"attention": "ours", "match": "ideal", "merge": "third", "MLP": "theirs"}
SIDES = {"unmerged": "no merging", "eager": "eager PyTorch", "package": "this package"}


def times(rows: list[dict], shape: str, impl: str) -> dict[str, float]:
    """Return the µs of each part of a side, 0 of one that it does not have."""
    found = {part: find(rows, shape=shape, impl=impl, op=part) for part in PARTS}
    return {part: row["p50_us"] if row else 0.0 for part, row in found.items()}


def _lines(rows: list[dict]) -> list[list[str]]:
    lines = []
    for shape in common.distinct(rows, "shape"):
        for impl, name in SIDES.items():
            own = times(rows, shape, impl)
            lines.append(
                [shape, name, *(common.microseconds(t) if t else "" for t in own.values()), _total(rows, shape, impl)]
            )
    return lines


def _total(rows: list[dict], shape: str, impl: str) -> str:
    total = sum(times(rows, shape, impl).values())
    unmerged = sum(times(rows, shape, "unmerged").values())
    return f"{common.microseconds(total)}, {common.speedup(unmerged / total)}"


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    return common.columns([["shape", "merging", *PARTS, "sum, over no merging"], *_lines(rows)]).replace("*", "")


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each machine."""
    parts = []
    for own in common.machines(rows):
        head = ["shape", "merging", *PARTS.values(), "sum, over no merging"]
        parts.append(common.section("A block in inference", own, common.markdown_table(head, _lines(own), words=2)))
    return parts


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw the parts of a block stacked, as per cent of the block without merging; a line of panels a machine."""
    found = common.machines(rows)
    across = max(len(common.distinct(own, "shape")) for own in found)
    figure, axes = common.panels(len(found), across, 3.0, sharey="row")
    for line, own in zip(axes, found, strict=True):
        for axis, shape in zip(line, common.distinct(own, "shape"), strict=False):
            _stack(axis, own, shape, colours)
        line[0].set_ylabel("% of the block without merging")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncol=4)
    common.caption(figure, [common.machine(own[0]) for own in found])
    return figure


def _stack(axis: Any, rows: list[dict], shape: str, colours: dict[str, str]) -> None:
    whole = sum(times(rows, shape, "unmerged").values())
    first = find(rows, shape=shape)
    assert first is not None
    for place, impl in enumerate(SIDES):
        bottom = 0.0
        for part, time in times(rows, shape, impl).items():
            share = 100 * time / whole
            axis.bar(
                place, share, 0.62, bottom, color=colours[COLOURS[part]], label=PARTS[part] if place == 0 else None
            )
            bottom += share
        common.label(axis, f"{bottom:.0f}", (place, bottom), (0, 3), ha="center")
    axis.set_xticks(range(len(SIDES)), [name.replace(" ", "\n") for name in SIDES.values()])
    axis.set_ylim(0, axis.get_ylim()[1] * 1.06)
    axis.set_title(f"{first['n']} × {first['tokens']} tokens, r = {first['r']}")
