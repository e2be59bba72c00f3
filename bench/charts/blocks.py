# SPDX-License-Identifier: Apache-2.0
"""Where a block's time goes, from the rows of bench/blocks.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import find

PARTS = {  # by name in the rows: what is in them
    "attention": "norm, attention",
    "match": "match",
    "merge": "add, merge, norm",
    "MLP": "MLP, add",
}
COLOURS = {"attention": "ours", "match": "ideal", "merge": "third", "MLP": "theirs"}
SIDES = {"unmerged": "no merging", "eager": "eager PyTorch", "package": "this package"}


def times(rows: list[dict], shape: str, impl: str) -> dict[str, float]:
    """Return the µs of each part of a side; nothing of a side that was not measured whole."""
    found = {part: find(rows, shape=shape, impl=impl, op=part) for part in PARTS}
    known = {part: row["p50_us"] for part, row in found.items() if row}
    whole = set(PARTS) - ({"match"} if impl == "unmerged" else set())
    return known if set(known) == whole else {}


def total(rows: list[dict], shape: str, impl: str) -> float | None:
    """Return the µs of all parts of a side; None of one that was not measured whole."""
    return sum(times(rows, shape, impl).values()) or None


def _lines(rows: list[dict]) -> list[list[str]]:
    lines = []
    for shape in common.distinct(rows, "shape"):
        for impl, name in SIDES.items():
            if own := times(rows, shape, impl):
                parts = [common.microseconds(own[part]) if part in own else "" for part in PARTS]
                lines.append([shape, name, *parts, _sum(rows, shape, impl)])
    return lines


def _sum(rows: list[dict], shape: str, impl: str) -> str:
    """Return the time of all parts, and of the package how many times as fast it is as the others."""
    own = total(rows, shape, impl)
    assert own is not None  # asked of sides that were measured whole
    text = common.microseconds(own)
    if impl == "package":
        for other, name in SIDES.items():
            if other != impl and (theirs := total(rows, shape, other)):
                text += f"; {common.speedup(theirs / own)} {name}"
    return text


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    return common.columns([["shape", "merging", *PARTS, "sum, as fast as"], *_lines(rows)]).replace("*", "")


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each machine."""
    head = ["shape", "merging", *PARTS.values(), "sum, times as fast as"]
    return [
        part for own in common.machines(rows)
        for part in common.section("A block in inference", own, head, _lines(own), words=2)
    ]  # fmt: skip


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw the parts of a block stacked, as per cent of the block without merging; a line of panels a machine."""
    found = [own for own in common.machines(rows) if _shapes(own)]
    across = max((len(_shapes(own)) for own in found), default=1)
    figure, axes = common.panels(len(found), across, 3.0, sharey="row")
    for line, own in zip(axes, found, strict=True):
        for axis, shape in zip(line, _shapes(own), strict=False):
            _stack(axis, own, shape, colours, len(found) > 1)
        line[0].set_ylabel("% of the block without merging")
    common.legend(figure, axes, 4)
    common.caption(figure, [common.machine(own[0]) for own in found])
    return figure


def _shapes(rows: list[dict]) -> list[str]:
    """Return the shapes that were measured without merging, by which the others are divided."""
    return [shape for shape in common.distinct(rows, "shape") if times(rows, shape, "unmerged")]


def _stack(axis: Any, rows: list[dict], shape: str, colours: dict[str, str], several: bool) -> None:
    whole, first = total(rows, shape, "unmerged"), find(rows, shape=shape)
    assert whole is not None  # of the shapes above
    assert first is not None
    for place, impl in enumerate(SIDES):
        bottom = 0.0
        for part, time in times(rows, shape, impl).items():
            share = 100 * time / whole
            axis.bar(place, share, 0.62, bottom, color=colours[COLOURS[part]], label=PARTS[part])
            bottom += share
        if bottom:
            common.label(axis, f"{bottom:.0f}", (place, bottom), (0, 3), ha="center")
    axis.set_xticks(range(len(SIDES)), [name.replace(" ", "\n") for name in SIDES.values()])
    axis.set_ylim(0, axis.get_ylim()[1] * 1.06)
    common.title(axis, f"{first['n']} × {first['tokens']} tokens, r = {first['r']}", rows, several)
