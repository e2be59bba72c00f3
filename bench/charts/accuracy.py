# SPDX-License-Identifier: Apache-2.0
"""What merging costs in accuracy, from the rows of examples/stop_retrieval/accuracy.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import find

GUIDE = {"r=2": "under 1 %", "r=4": "1–3 %", "r=8": "3–7 %"}  # of accuracy lost, as the ToMe guide for STOP has it
BY = {"merge": "merging", "merge, sizes off": "sizes off", "drop": "dropped at random", "pool": "average pool"}
COLOURS = {"merge": "ours", "merge, sizes off": "other", "drop": "ideal", "pool": "theirs"}
WHEN = {"inference": "at inference alone", "training": "in training too"}
HEAD = [
    "setting",
    "merging",
    "R@1",
    "lost",
    "the guide",
    "sizes off",
    "dropped",
    "pooled",
    "inference",
    "training",
    "memory",
]


def deviating(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def lost(row: dict | None) -> str:
    return "" if row is None or row["shape"] == "r=0" else deviating(row["lost_mean"], row["lost_spread"])


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    base, lines = find(rows, shape="r=0"), []
    for direction, setting in common.distinct(rows, "direction", "shape"):
        cells = [find(rows, shape=setting, direction=direction, impl=by) for by in BY]
        row = cells[0]
        assert base is not None
        assert row is not None
        lines.append([
            setting, WHEN[direction], deviating(row["r1_mean"], row["r1_spread"]), lost(row), row["guide"] or "",
            *map(lost, cells[1:]), *_speeds(row, base), common.less(row["training_bytes"] / base["training_bytes"]),
        ])  # fmt: skip
    return common.columns([HEAD, *lines])


def _speeds(row: dict, base: dict) -> list[str]:
    return [
        f"{row[f'{kind}_videos_per_s']:.0f}/s, {common.speedup(base[f'{kind}_us'] / row[f'{kind}_us'])}"
        for kind in ("inference", "training")
    ]


def tables(rows: list[dict]) -> list[str]:
    """Return two sections for each machine: R@1 lost, and what is gained."""
    parts = []
    for found in common.machines(rows):
        n = found[0]["n"]
        where = f", {n} synthetic videos (chance {100 / n:.2g} %), {len(found[0]['seeds'])} seed(s)"
        parts.append(common.section("Points of R@1 lost", found, _losses(found), where))
        parts.append(common.section("The small model's speed", found, _gains(found), where))
    return parts


def _losses(rows: list[dict]) -> str:
    lines = []
    for direction, setting in common.distinct(rows, "direction", "shape"):
        cells = {by: find(rows, shape=setting, direction=direction, impl=by) for by in BY}
        row = cells["merge"]
        assert row is not None
        if setting == "r=0":
            lines.append([f"r=0, {WHEN[direction]}", f"R@1 {deviating(row['r1_mean'], row['r1_spread'])}", *[""] * 4])
            continue
        others = [cell["lost_mean"] for by, cell in cells.items() if cell and by != "merge"]
        mine = lost(row)
        if others and row["lost_mean"] > min(others):
            mine = f"**{mine}, more than another**"
        lines.append(
            [f"{setting}, {WHEN[direction]}", mine, row["guide"] or "", *(lost(cells[by]) for by in [*BY][1:])]
        )
    head = ["setting", "merging", "the guide", "sizes off", "dropped at random", "average pool"]
    return common.markdown_table(head, lines)


def _gains(rows: list[dict]) -> str:
    base, lines = find(rows, shape="r=0"), []
    assert base is not None
    for row in rows:
        if row["impl"] == "merge" and row["direction"] == "inference":
            lines.append([
                row["shape"], f"{row['items'][-1]} × {row['tokens'][-1]}", *_speeds(row, base),
                f"{row['speedup_ideal']:.2f}×", common.less(row["training_bytes"] / base["training_bytes"]),
            ])  # fmt: skip
    head = [
        "setting",
        "items × tokens at the end",
        "videos/s, inference",
        "videos/s, training",
        "ideal",
        "less memory, training",
    ]
    return common.markdown_table(head, lines, words=2)


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw points of R@1 lost against r = 0 of the same seed, with merging at inference alone and in training too."""
    found = common.machines(rows)
    figure, axes = common.panels(len(found), 2, 3.4, sharey="row", sharex=True)
    for line, own in zip(axes, found, strict=True):
        settings = [name for name in common.distinct(own, "shape") if name != "r=0"]
        for axis, (direction, words) in zip(line, WHEN.items(), strict=True):
            _differences(axis, [row for row in own if row["direction"] == direction], settings, colours)
            axis.set_title(f"merging {words}")
        line[0].set_ylabel("R@1 against r = 0, points\n(mean ± deviation over seeds)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncol=4)
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} synthetic videos" for own in found])
    return figure


def _differences(axis: Any, rows: list[dict], settings: list[str], colours: dict[str, str]) -> None:
    for place, (by, name) in enumerate(BY.items()):
        own = [row for row in rows if row["impl"] == by and row["shape"] in settings]
        at = [settings.index(row["shape"]) + (place - (len(BY) - 1) / 2) * 0.17 for row in own]
        axis.errorbar(at, [-row["lost_mean"] for row in own], [row["lost_spread"] or 0 for row in own], fmt="o", ms=5,
                      capsize=3, color=colours[COLOURS[by]], label=name)  # fmt: skip
    axis.axhline(0, color=colours["ink"], lw=1)
    axis.set_xticks(range(len(settings)), settings)
    axis.set_xlim(-0.5, len(settings) - 0.5)
