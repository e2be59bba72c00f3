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


def same(rows: list[dict], row: dict, impl: str) -> dict | None:
    """Return the row of the same model, batch, direction and mode by another implementation."""
    return find(rows, impl=impl, **{key: row[key] for key in ("shape", "direction", "op", "n")})


def over_eager(rows: list[dict], row: dict) -> float | None:
    """Return a row's speed as a multiple of that of merging in eager operations; None where that was not measured."""
    eager = same(rows, row, "eager")
    return row["images_per_s"] / eager["images_per_s"] if eager else None


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each direction: the package against no merging, and against merging in eager operations."""
    parts = []
    for found in common.machines(rows):
        for direction in common.distinct(found, "direction"):
            own, lines = [row for row in found if row["direction"] == direction], []
            for row in own:
                if row["impl"] == "package":
                    plain = same(own, row, "unpatched")
                    before = f"{plain['images_per_s']:.3g} → " if plain else ""
                    lines.append([
                        f"{row['shape']}, batch {row['n']}", row["op"],
                        f"{row['tokens']} → {row['tokens_out']}, r = {row['r']}", f"{before}{row['images_per_s']:.3g}",
                        _gain(row), f"{row['eta']:.2f}", common.speedup(over_eager(own, row)),
                    ])  # fmt: skip
            head = ["model", "mode", "tokens", "images/s", "speed-up of ideal", "η", "over eager merging"]
            parts += common.section(f"Whole models, {direction}", own, head, lines, words=3)
    return parts


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw the speed-up over the unpatched model beside the ideal one; a panel for each machine and direction."""
    merged = [row for row in rows if row["impl"] != "unpatched"]
    found = [
        [row for row in own if row["direction"] == direction]
        for own in common.machines(merged, "n") for direction in common.distinct(own, "direction")
    ]  # fmt: skip
    found.sort(key=lambda own: own[0]["direction"])
    tall = [len(common.distinct(own, "shape")) for own in found]
    figure, axes = common.panels(
        len(found), 1, 0.8 + 0.7 * sum(tall) / max(1, len(tall)), sharex=True, gridspec_kw={"height_ratios": tall}
    )
    for axis, own in zip(axes[:, 0], found, strict=True):
        _bars(axis, own, colours)
        axis.set_title(f"{own[0]['direction']}, batch {own[0]['n']}: {common.machine(own[0])}")
    axes[-1, 0].set_xlabel("times as fast as the unpatched model in the same mode")
    common.legend(figure, axes, 3)
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
        axis.vlines(ideal, place - 0.45, place + 0.45, color=colours["ideal"], lw=2, label="ideal, by FLOPs")
    axis.axvline(1, color=colours["ink"], lw=1)
    axis.set_yticks(range(len(models)), models)
