# SPDX-License-Identifier: Apache-2.0
"""Whole vision transformers with merging, from the rows of bench/models.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import find

HEAD = ["model", "batch", "direction", "mode", "tokens", "by", "images/s", "speed-up, ideal", "η"]


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    lines = []
    for row in rows:
        merges = row["impl"] != "unpatched"
        lines.append([
            row["shape"], str(row["n"]), row["direction"], row["op"], f"{row['tokens']} → {row['tokens_out']}",
            f"{row['impl']}, r = {row['r']}" if merges else row["impl"], f"{row['images_per_s']:.3g}",
            _gain(row).replace("*", "") if merges else "", f"{row['eta']:.2f}" if merges else "",
        ])  # fmt: skip
    return common.columns([HEAD, *lines])


def _gain(row: dict) -> str:
    return f"{common.speedup(row['speedup'])} of {row['speedup_ideal']:.2f}×"


def over_eager(rows: list[dict]) -> list[tuple[dict, float]]:
    """Return our rows, each with its speed as a multiple of that of merging in eager operations."""
    found = []
    for row in rows:
        if row["impl"] == "package":
            same = {key: row[key] for key in ("shape", "direction", "op", "n")}
            if eager := find(rows, impl="eager", **same):
                found.append((row, row["images_per_s"] / eager["images_per_s"]))
    return found


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each direction: the package against no merging, and against merging in eager operations."""
    parts = []
    for found in common.machines(rows):
        for direction in common.distinct(found, "direction"):
            own = [row for row in found if row["direction"] == direction]
            lines = []
            for row, eager in over_eager(own):
                plain = find(own, impl="unpatched", shape=row["shape"], op=row["op"])
                assert plain is not None
                lines.append([
                    f"{row['shape']}, batch {row['n']}", row["op"],
                    f"{row['tokens']} → {row['tokens_out']}, r = {row['r']}",
                    f"{plain['images_per_s']:.3g} → {row['images_per_s']:.3g}", _gain(row), f"{row['eta']:.2f}",
                    common.speedup(eager),
                ])  # fmt: skip
            head = ["model", "mode", "tokens", "images/s", "speed-up of ideal", "η", "over eager merging"]
            parts.append(common.section(f"Whole models, {direction}", own, common.markdown_table(head, lines, words=3)))
    return parts


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw the speed-up over the unpatched model beside the ideal one; a panel for each machine and direction."""
    found = [
        [row for row in own if row["direction"] == direction and row["impl"] != "unpatched"]
        for own in common.machines(rows) for direction in common.distinct(own, "direction")
    ]  # fmt: skip
    tall = [len(common.distinct(own, "shape")) for own in found]
    figure, axes = common.panels(len(found), 1, 3.6, sharex=True, gridspec_kw={"height_ratios": tall})
    for axis, own in zip(axes[:, 0], found, strict=True):
        _bars(axis, own, colours)
        axis.set_title(f"{own[0]['direction']}: {common.machine(own[0])}")
    axes[-1, 0].set_xlabel("times as fast as the unpatched model in the same mode")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncol=3)
    return figure


def _bars(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    models = common.distinct(rows, "shape")[::-1]
    sides = common.distinct(rows, "impl", "op")
    thick = 0.84 / max(1, len(sides))
    shades = {("package", "plain"): "ours", ("package", "compiled"): "other", ("eager", "plain"): "theirs",
              ("eager", "compiled"): "faint"}  # fmt: skip
    for place, (impl, mode) in enumerate(sides):
        own = {row["shape"]: row for row in rows if (row["impl"], row["op"]) == (impl, mode)}
        at = [models.index(name) + ((len(sides) - 1) / 2 - place) * thick for name in own]
        long = [row["speedup"] for row in own.values()]
        name = {"package": "this package", "eager": "eager merging"}[impl]
        axis.barh(at, long, thick * 0.92, label=f"{name}, {mode}", color=colours[shades[impl, mode]])
        for x, y in zip(long, at, strict=True):
            common.label(axis, f"{x:.2f}", (0, y), (4, -0.5), va="center",
                         color=colours["paper"] if mode == "plain" else colours["ink"])  # fmt: skip
    for place, name in enumerate(models):
        ideal = next(row["speedup_ideal"] for row in rows if row["shape"] == name)
        axis.vlines(ideal, place - 0.45, place + 0.45, color=colours["ideal"], lw=2,
                    label="ideal, by FLOPs" if place == 0 else None)  # fmt: skip
    axis.axvline(1, color=colours["ink"], lw=1)
    axis.set_yticks(range(len(models)), models)
