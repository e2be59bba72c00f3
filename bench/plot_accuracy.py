#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the chart and the table of what merging costs in accuracy from the rows in bench/results/accuracy.

python bench/plot_accuracy.py                       bench/results/accuracy/*.json → bench/results/accuracy/chart.png
python bench/plot_accuracy.py --readme README.md    and the text between its two accuracy markers
"""

from __future__ import annotations

import sys
from pathlib import Path

import plot
from measure import ROOT
from plot_stop import OURS, THEIRS, machines, saved

MARKERS = ("<!-- accuracy:start -->", "<!-- accuracy:end -->")
RESULTS = ROOT / "bench/results/accuracy"
GUIDE = {"r=2": "under 1 %", "r=4": "1–3 %", "r=8": "3–7 %"}  # of accuracy lost, as the ToMe guide for STOP has it
BY = {"merge": OURS, "merge, sizes off": "#7cc4de", "drop": "#e07a5f", "pool": THEIRS}
WHEN = {"inference": "merging at inference alone", "training": "merging in training too"}
HEAD = [
    "setting", "items × tokens at the end", "merging", "R@1", "lost", "the guide", "sizes off", "dropped at random",
    "average pool", "inference", "training", "ideal", "memory, training",
]  # fmt: skip


def spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def lines(rows: list[dict]) -> list[list[str]]:
    """A line for each setting and whether the model was trained with it, beside r = 0 of the same kind."""
    of = {(row["shape"], row["direction"], row["impl"]): row for row in rows}
    base = next(row for row in rows if row["shape"] == "r=0")
    found = []
    for when, setting in dict.fromkeys((row["direction"], row["shape"]) for row in rows):
        row = of[setting, when, "merge"]
        others = [of.get((setting, when, by)) for by in ("merge, sizes off", "drop", "pool")]
        speeds = [
            f"{row[f'{kind}_videos_per_s']:.0f}/s, {base[f'{kind}_us'] / row[f'{kind}_us']:.2f}×"
            for kind in ("inference", "training")
        ]
        found.append([
            setting, f"{row['items'][-1]} × {row['tokens'][-1]}", _trained(row),
            spread(row["r1_mean"], row["r1_spread"]),
            "" if setting == "r=0" else spread(row["lost_mean"], row["lost_spread"]), row["guide"] or "",
            *("" if other is None else spread(other["r1_mean"], other["r1_spread"]) for other in others),
            *speeds, f"{row['speedup_ideal']:.2f}×", saved(row["training_bytes"] / base["training_bytes"]) + " less",
        ])  # fmt: skip
    return found


def _trained(row: dict) -> str:
    number = len(row["seeds"])
    seeds = f"{number} seed{'s' if number > 1 else ''}"
    if row["shape"] == "r=0":
        return f"none, {seeds}" if row["direction"] == "inference" else f"none, trained as far, {seeds}"
    return f"{row['direction']}, {seeds}"


def table(rows: list[dict]) -> str:
    """The rows as text, in columns."""
    return plot.columns([HEAD, *lines(rows)])


def markdown(rows: list[dict]) -> str:
    parts = []
    for found in machines(rows, batch=False).values():
        text = ["| " + " | ".join(HEAD) + " |", "|---|---|---|" + "---:|" * (len(HEAD) - 3)]
        text += ["| " + " | ".join(line) + " |" for line in lines(found)]
        first = found[0]
        what = f"{first['n']} videos, chance {100 / first['n']:.2g} %"
        parts.append(f"**{plot.title(first)}: synthetic videos** ({what}; {plot.origin(found)})\n\n" + "\n".join(text))
    note = (
        "**This is a synthetic set and a small model, not MSR-VTT and CLIP.** R@1 in per cent, text to video, mean ± "
        "deviation over the seeds; *lost*: points of R@1 against r = 0 of the same seed, with merging in training "
        "against a model trained as far without. *sizes off*: merging without proportional attention; *dropped at "
        "random* and *average pool*: as many tokens fewer in every layer, chosen blindly. Inference and training: "
        "videos a second through the visual tower and the speed-up over r = 0; ideal: by FLOPs of the blocks; memory: "
        "on a CPU what the tower keeps for backward, on a GPU the allocator's peak. Made by `python "
        "examples/stop_retrieval/accuracy.py --json bench/results/accuracy` and `python bench/plot_accuracy.py "
        "--readme README.md`."
    )
    return "\n\n".join([*parts, note])


def chart(rows: list[dict], file: Path) -> None:
    """For each machine: R@1 at each setting, with merging at inference alone and in training too, and the speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = machines(rows, batch=False)
    figure, axes = plt.subplots(
        len(found), 3, figsize=(13, 3.6 * len(found)), squeeze=False, facecolor="white", layout="constrained"
    )
    for panels, own in zip(axes, found.values(), strict=True):
        settings = list(dict.fromkeys(row["shape"] for row in own))
        for panel, (when, what) in zip(panels, WHEN.items(), strict=False):
            _recall(panel, [row for row in own if row["direction"] == when], settings, what)
        panels[1].sharey(panels[0])
        _speed(panels[2], own, settings)
        panels[0].set_title(f"{plot.title(own[0])}, synthetic videos", size=11, weight="bold", loc="left", pad=20)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _recall(axis, rows: list[dict], settings: list[str], what: str) -> None:
    if not rows:
        return  # not measured
    base = next(row for row in rows if row["shape"] == "r=0")
    for by, colour in BY.items():
        own = [base, *(row for row in rows if row["impl"] == by and row["shape"] != "r=0")]
        steps = [row for row in own if row["shape"] != "clips"]
        axis.plot(
            [settings.index(row["shape"]) for row in steps], [row["r1_mean"] for row in steps], color=colour, lw=1.4
        )
        places = [settings.index(row["shape"]) for row in own]
        deviations = [row["r1_spread"] or 0 for row in own]
        axis.errorbar(
            places, [row["r1_mean"] for row in own], deviations, fmt="o", ms=4, capsize=2, color=colour, label=by
        )
    chance = 100 / base["n"]
    axis.axhline(chance, color="#999999", lw=0.8, ls=":")
    last = (len(settings) - 1, chance)
    axis.annotate("chance", last, (0, 3), textcoords="offset points", size=7, color="#666666", ha="right")
    axis.set_xticks(range(len(settings)), settings, size=8)
    axis.set_ylim(0, None)
    _head(axis, f"R@1, %: {what}")
    axis.legend(fontsize=7, frameon=False, loc="lower left")


def _speed(axis, rows: list[dict], settings: list[str]) -> None:
    of = {row["shape"]: row for row in rows if row["impl"] == "merge"}
    for kind, colour, shift in (("inference", OURS, -0.2), ("training", THEIRS, 0.2)):
        for place, setting in enumerate(settings):
            times = of["r=0"][f"{kind}_us"] / of[setting][f"{kind}_us"]
            axis.bar(place + shift, times, 0.38, color=colour, label=kind if place == 0 else None)
            axis.annotate(
                f"{times:.2f}", (place + shift, times), (0, 2), textcoords="offset points", size=7, ha="center"
            )
    for place, setting in enumerate(settings):
        ideal = of[setting]["speedup_ideal"]
        label = "ideal, by FLOPs" if place == 0 else None
        axis.plot([place - 0.42, place + 0.42], [ideal, ideal], color="#e07a5f", lw=2, label=label)
    axis.set_xticks(range(len(settings)), settings, size=8)
    _head(axis, "visual tower, times as fast as r=0")
    axis.legend(fontsize=7, frameon=False, loc="upper left")


def _head(axis, text: str) -> None:
    axis.annotate(text, (0, 1), (0, 4), "axes fraction", textcoords="offset points", size=9)
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> int:
    return plot.publish(
        plot.parser(__doc__, RESULTS, table=False).parse_args(argv), RESULTS,
        "no rows: run `python examples/stop_retrieval/accuracy.py --json bench/results/accuracy`", markdown, chart,
        "R@1 and speed with merging", MARKERS,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
