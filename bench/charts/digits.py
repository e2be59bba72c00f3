# SPDX-License-Identifier: Apache-2.0
"""The cost of merging in accuracy on digits, from the rows of bench/digits.py."""

from __future__ import annotations

from typing import Any

from . import common
from .accuracy import WHEN, beside_merging, mean_and_deviation, points_lost, tenths
from .common import find
from .methods import COLOURS, METHODS

HEAD = ["setting", "tokens left", *METHODS.values()]
SPEED = ["setting", "tokens left", "forward", "speed-up of ideal", "η"]


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    parts = [[HEAD, *_losses(rows)], [HEAD, *_same(rows)], [SPEED, *_speed(rows)]]
    return "\n\n".join(common.columns(part) for part in parts).replace("**", "")


def tables(rows: list[dict]) -> list[str]:
    """Return three sections for each machine: accuracy lost, agreement with the model without merging, speed."""
    parts = []
    for found in common.machines(rows, "n"):
        seeds = len(found[0]["seeds"])
        where = f", {found[0]['n']} digits, {seeds} seed{'s' if seeds > 1 else ''}"
        for title, head, lines in (
            ("Points of accuracy lost", HEAD, _losses(found)),
            ("The same digit as without merging", HEAD, _same(found)),
            ("The small ViT's speed", SPEED, _speed(found)),
        ):
            parts += common.section(title, found, head, lines, words=2, where=where)
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


def _merged(rows: list[dict]) -> list[dict]:
    """Return the rows of merging at inference alone."""
    return [row for row in rows if (row["impl"], row["direction"]) == ("merge", "inference")]


def _same(rows: list[dict]) -> list[list[str]]:
    lines = []
    for row in _merged(rows):
        if row["r"]:
            own = [find(rows, shape=row["shape"], direction="inference", impl=method) for method in METHODS]
            told = [f"{tenths(one['same_digit_mean'])} %" if one else "" for one in own]
            lines.append([row["shape"], _left(row), *told])
    return lines


def _speed(rows: list[dict]) -> list[list[str]]:
    return [
        [row["shape"], _left(row), common.microseconds(row["p50_us"]),
         f"{common.speedup(row['speedup'])} of {row['speedup_ideal']:.2f}×", f"{row['eta']:.2f}"]
        for row in _merged(rows)
    ]  # fmt: skip


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
