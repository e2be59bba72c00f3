# SPDX-License-Identifier: Apache-2.0
"""The cost of merging in accuracy, from the rows of examples/stop_retrieval/accuracy.py."""

from __future__ import annotations

from typing import Any

from . import common, methods
from .common import find

LOSSES = {"r=2": (0, 1), "r=4": (1, 3), "r=8": (3, 7)}  # per cent of accuracy, as the ToMe guide for STOP has it
GUIDE = {setting: f"{low}–{high} %" if low else f"under {high} %" for setting, (low, high) in LOSSES.items()}
METHODS = {method: words for method, words in methods.METHODS.items() if method != "random pairs"}
WHEN = {"inference": "at inference alone", "training": "in training too"}
HEAD = [
    "setting",
    "merging",
    "R@1",
    "lost",
    "guide",
    "sizes off",
    "dropped",
    "pooled",
    "inference",
    "training",
    "memory",
]


def mean_and_deviation(mean: float, deviation: float | None) -> str:
    return tenths(mean) if deviation is None else f"{tenths(mean)} ± {deviation:.1f}"


def points_lost(row: dict | None) -> str:
    """Return the points of R@1 that a row lost, with their 95 % interval; an empty cell for what lost none by
    definition, or was not measured."""
    if row is None or row["shape"] == "r=0":
        return ""
    if row.get("lost_interval") is None:  # of one seed
        return tenths(row["lost_mean"])
    low, high = map(tenths, row["lost_interval"])
    return f"{tenths(row['lost_mean'])} ({low} to {high})"


def tenths(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # no minus before a zero


def beside_merging(row: dict | None) -> str:
    """Return what a baseline lost, with a star where that is more than merging lost, by the interval of the paired
    differences, and a dagger where it is less."""
    text = points_lost(row)
    return text + methods.mark(row.get("over_merging_interval")) if row and text else text


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    lines = []
    for direction, setting in common.distinct(rows, "direction", "shape"):
        cells = [find(rows, shape=setting, direction=direction, impl=method) for method in METHODS]
        if row := cells[0]:
            lines.append([
                setting, WHEN[direction], mean_and_deviation(row["r1_mean"], row["r1_spread"]), points_lost(row),
                row["guide"] or "", *map(beside_merging, cells[1:]), *_gains(row, find(rows, shape="r=0")),
            ])  # fmt: skip
    return common.columns([HEAD, *lines]).replace("**", "")


def _gains(row: dict, base: dict | None) -> list[str]:
    """Return videos per second in both directions with their speed-up over r = 0, and the memory saved."""
    if base is None:
        return ["", "", ""]
    speeds = [
        f"{row[f'{kind}_videos_per_s']:.0f}/s, {common.speedup(base[f'{kind}_us'] / row[f'{kind}_us'])}"
        for kind in ("inference", "training")
    ]
    return [*speeds, common.per_cent_less(row["training_bytes"] / base["training_bytes"])]


def tables(rows: list[dict]) -> list[str]:
    """Return two sections for each machine: R@1 lost, and what is gained."""
    parts = []
    for found in common.machines(rows, "n"):
        n, seeds = found[0]["n"], len(found[0]["seeds"])
        where = f", {n} synthetic videos (chance {100 / n:.2g} %), {seeds} seed{'s' if seeds > 1 else ''}"
        head = ["setting", "merging", "the guide", *[*METHODS.values()][1:]]
        parts += common.section("Points of R@1 lost", found, head, _losses(found), where=where)
        head = ["setting", "items × tokens at the end", "videos/s, inference", "videos/s, training",
                "less memory, training", "ideal"]  # fmt: skip
        lines = [
            [row["shape"], f"{row['items'][-1]} × {row['tokens'][-1]}", *_gains(row, find(found, shape="r=0")),
             f"{row['speedup_ideal']:.2f}×"]
            for row in found if row["impl"] == "merge" and row["direction"] == "inference"
        ]  # fmt: skip
        parts += common.section("The small model's speed", found, head, lines, words=2, where=where)
    return parts


def _losses(rows: list[dict]) -> list[list[str]]:
    lines = []
    for direction, setting in common.distinct(rows, "direction", "shape"):
        cells = {method: find(rows, shape=setting, direction=direction, impl=method) for method in METHODS}
        row, others = cells["merge"], [cells[method] for method in [*METHODS][1:]]
        if row is None:
            continue
        if setting == "r=0":
            mean = mean_and_deviation(row["r1_mean"], row["r1_spread"])
            lines.append([f"r=0, {WHEN[direction]}", f"R@1 {mean}", "", *map(beside_merging, others)])
            continue
        faults = []
        if any(other and other["lost_mean"] < row["lost_mean"] for other in others):
            faults.append("a baseline lost less")
        if setting in LOSSES and row["lost_mean"] > LOSSES[setting][1]:
            faults.append("more than the guide")
        mine = points_lost(row)
        if faults:
            mine = f"**{mine} ({', '.join(faults)})**"
        lines.append([f"{setting}, {WHEN[direction]}", mine, row["guide"] or "", *map(beside_merging, others)])
    return lines


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw points of R@1 lost against r = 0 of the same seed, with merging at inference alone and in training too."""
    found = common.machines(rows, "n")
    figure, axes = common.panels(len(found), 2, 3.4, sharey="row", sharex=True)
    for line, own in zip(axes, found, strict=True):
        settings = [name for name in common.distinct(own, "shape") if name != "r=0"]
        for axis, (direction, words) in zip(line, WHEN.items(), strict=True):
            _differences(axis, [row for row in own if row["direction"] == direction], settings, colours)
            common.title(axis, f"merging {words}", own, len(found) > 1)
        line[0].set_ylabel("R@1 against r = 0, points\n(mean and 95 % interval)")
    common.legend(figure, axes, 4)
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} synthetic videos" for own in found])
    return figure


def _differences(axis: Any, rows: list[dict], settings: list[str], colours: dict[str, str]) -> None:
    for place, (method, name) in enumerate(METHODS.items()):
        own = [row for row in rows if row["impl"] == method and row["shape"] in settings]
        at = [settings.index(row["shape"]) + (place - (len(METHODS) - 1) / 2) * 0.17 for row in own]
        halves = [row["lost_mean"] - row["lost_interval"][0] if row.get("lost_interval") else 0 for row in own]
        axis.errorbar(at, [-row["lost_mean"] for row in own], halves, fmt="o", ms=5, capsize=3,
                      color=colours[methods.COLOURS[method]], label=name)  # fmt: skip
    axis.axhline(0, color=colours["ink"], lw=1)
    axis.set_xticks(range(len(settings)), settings)
    axis.set_xlim(-0.5, len(settings) - 0.5)
