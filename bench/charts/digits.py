# SPDX-License-Identifier: Apache-2.0
"""The cost of merging in accuracy on digits, from the rows of bench/digits.py."""

from __future__ import annotations

from typing import Any

from . import common
from .accuracy import WHEN, beside_merging, mean_and_deviation, points_lost, tenths
from .common import find
from .fidelity import COLOURS, METHODS

HEAD = ["setting", "tokens left", *METHODS.values()]
GAINS = ["setting", "tokens left", "same digit, merging", *[f"same digit, {name}" for name in [*METHODS.values()][1:]],
         "forward", "speed-up", "ideal", "η"]  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    parts = [[HEAD, *_losses(rows)], [GAINS, *_gains(rows)]]
    return "\n\n".join(common.columns(part) for part in parts).replace("**", "")


def tables(rows: list[dict]) -> list[str]:
    """Return two sections for each machine: accuracy lost; agreement with the model without merging, and speed."""
    parts = []
    for found in common.machines(rows, "n"):
        seeds = len(found[0]["seeds"])
        where = f", {found[0]['n']} digits, {seeds} seed{'s' if seeds > 1 else ''}"
        parts += common.section("Points of accuracy lost", found, HEAD, _losses(found), words=2, where=where)
        parts += common.section(
            "The same digit as without merging, and speed", found, GAINS, _gains(found), words=2, where=where
        )
    return parts


def _losses(rows: list[dict]) -> list[list[str]]:
    lines = []
    for direction, setting in common.distinct(rows, "direction", "shape"):
        own = {method: find(rows, shape=setting, direction=direction, impl=method) for method in METHODS}
        if (row := own.pop("merge")) is None:
            continue
        if row["r"] == 0:
            mine = f"accuracy {mean_and_deviation(row['accuracy_mean'], row['accuracy_spread'])}"
        else:
            mine = points_lost(row)
            if any(other and round(other["lost_mean"], 1) < round(row["lost_mean"], 1) for other in own.values()):
                mine = f"**{mine} (a baseline lost less)**"
        lines.append([f"{setting}, {WHEN[direction]}", _left(row), mine, *map(beside_merging, own.values())])
    return lines


def _left(row: dict) -> str:
    """Return how many tokens are left after the last layer, and their share."""
    left = row["tokens"][-1]
    return f"{left} ({100 * left / row['tokens_in']:.0f} %)"


def _gains(rows: list[dict]) -> list[list[str]]:
    lines = []
    for row in rows:
        if (row["impl"], row["direction"]) != ("merge", "inference"):
            continue
        same = [find(rows, shape=row["shape"], direction="inference", impl=method) for method in METHODS]
        told = ["" if one is None or one["r"] == 0 else f"{tenths(one['same_digit_mean'])} %" for one in same]
        lines.append([
            row["shape"], _left(row), *told, f"{common.microseconds(row['p50_us'])}", common.speedup(row["speedup"]),
            f"{row['speedup_ideal']:.2f}×", f"{row['eta']:.2f}",
        ])  # fmt: skip
    return lines


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw points of accuracy lost against r, a curve for each method, with merging at inference alone and in training
    too."""
    found = common.machines(rows, "n")
    figure, axes = common.panels(len(found), 2, 3.4, sharex=True)
    for line, own in zip(axes, found, strict=True):
        for axis, (direction, words) in zip(line, WHEN.items(), strict=True):
            _curves(axis, [row for row in own if row["direction"] == direction], colours)
            common.title(axis, f"merging {words}", own, len(found) > 1)
        line[0].set_ylabel("accuracy lost, points\n(mean and 95 % interval)")
    for axis in axes[-1]:
        axis.set_xlabel("r, tokens merged in each layer (left at the end)")
    common.legend(figure, axes, len(METHODS))
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} digits" for own in found])
    return figure


def _curves(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    ticks = {row["r"]: f"{row['r']}\n({row['tokens'][-1]})" for row in rows}
    apart = max(ticks, default=0) / 120
    for place, (method, name) in enumerate(METHODS.items()):
        own = sorted((row for row in rows if row["impl"] == method and row["r"]), key=lambda row: row["r"])
        if not own:
            continue
        at = [row["r"] + (place - (len(METHODS) - 1) / 2) * apart for row in own]
        halves = [row["lost_interval"][1] - row["lost_mean"] if row["lost_interval"] else 0 for row in own]
        axis.errorbar([0, *at], [0, *[row["lost_mean"] for row in own]], [0, *halves], fmt="o-", ms=4, capsize=2,
                      color=colours[COLOURS[method]], label=name)  # fmt: skip
    axis.axhline(0, color=colours["ink"], lw=1)
    axis.set_xticks(list(ticks), ticks.values())
