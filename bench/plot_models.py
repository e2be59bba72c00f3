#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the chart and the table of vision transformers from the rows in bench/results/models; nothing in them is typed.

python bench/plot_models.py                        bench/results/models/*.json → bench/results/models/chart.png
python bench/plot_models.py --readme README.md     and the text between its two models markers
"""

from __future__ import annotations

import sys
from pathlib import Path

import plot
from measure import ROOT
from plot_stop import machines

MARKERS = ("<!-- models:start -->", "<!-- models:end -->")
FOLDER = ROOT / "bench/results/models"
COLOURS = {"package": "#0b6e99", "eager": "#7f8fa6"}
HEAD = ["model", "batch", "direction", "mode", "tokens", "by", "images/s", "speed-up, ideal", "η"]


def line(row: dict) -> list[str]:
    merges = row["impl"] != "unpatched"
    gain = f"{row['speedup']:.2f}× of {row['speedup_ideal']:.2f}×" if merges else ""
    if merges and row["speedup"] < 1:
        gain = f"**{gain}, slower**"
    return [
        row["shape"], str(row["n"]), row["direction"], row["op"], f"{row['tokens']} → {row['tokens_out']}",
        f"{row['impl']}, r = {row['r']}" if merges else row["impl"], f"{row['images_per_s']:.3g}", gain,
        f"{row['eta']:.2f}" if merges else "",
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as text, in columns."""
    return plot.columns([HEAD, *(line(row) for row in rows)])


def markdown(rows: list[dict]) -> str:
    parts = []
    for found in machines(rows, batch=False).values():
        lines = ["| " + " | ".join(HEAD) + " |", "|---|---:|---|---|---|---|---:|---:|---:|"]
        lines += ["| " + " | ".join(line(row)) + " |" for row in found]
        parts.append(f"**{plot.title(found[0])}** ({plot.origin(found)})\n\n" + "\n".join(lines))
    note = (
        "Random weights, medians of alternating runs of the whole model. *eager*: merging in eager operations with "
        "scaled_dot_product_attention. Speed-up: over the same model unpatched in the same mode; η: that ÷ the ideal "
        "one, by FLOPs of patch embedding and blocks (by those of the blocks alone η is lower: "
        "`speedup_ideal_blocks` in the rows). A video of VideoMAE's counts as one image. Made by "
        "`python bench/plot_models.py --readme README.md` from `bench/results/models`."
    )
    return "\n\n".join([*parts, note])


def chart(rows: list[dict], file: Path) -> None:
    """A panel for each machine and direction: speed-up over the unpatched model, against the ideal one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        (own, direction)
        for own in machines(rows, batch=False).values()
        for direction in dict.fromkeys(row["direction"] for row in own)
    ]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 3.6 * len(panels)), squeeze=False, facecolor="white", layout="constrained"
    )
    for axis, (own, direction) in zip(axes[:, 0], panels, strict=True):
        _bars(axis, [row for row in own if row["direction"] == direction and row["impl"] != "unpatched"])
        axis.set_title(f"{plot.title(own[0])}\n{direction}: speed-up over the unpatched model", size=9, loc="left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _bars(axis, rows: list[dict]) -> None:
    models = list(dict.fromkeys(row["shape"] for row in rows))
    sides = list(dict.fromkeys((row["impl"], row["op"]) for row in rows))
    width = 0.8 / max(1, len(sides))
    for place, (impl, mode) in enumerate(sides):
        own = {row["shape"]: row for row in rows if (row["impl"], row["op"]) == (impl, mode)}
        at = [models.index(name) + (place - (len(sides) - 1) / 2) * width for name in own]
        tall = [row["speedup"] for row in own.values()]
        style = {"color": COLOURS[impl], "alpha": 1.0 if mode == "plain" else 0.55}
        axis.bar(at, tall, width * 0.92, label=f"{impl}, {mode}", **style)
        ink = "white" if mode == "plain" else "black"
        for x, y in zip(at, tall, strict=True):  # at the foot: at the head the ideal's line would often run through it
            axis.annotate(f"{y:.2f}", (x, 0), (0, 4), textcoords="offset points", size=7, ha="center", color=ink)
    for place, name in enumerate(models):
        ideal = next(row["speedup_ideal"] for row in rows if row["shape"] == name)
        axis.hlines(ideal, place - 0.45, place + 0.45, color="#e07a5f", lw=2, label="ideal" if place == 0 else None)
    axis.axhline(1, color="black", lw=1)
    axis.set_xticks(range(len(models)), models, size=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, ncol=5, loc="upper left", bbox_to_anchor=(0, -0.1))


def main(argv: list[str] | None = None) -> int:
    return plot.publish(
        plot.parser(__doc__, FOLDER).parse_args(argv), FOLDER,
        "no rows: run `python bench/models.py --json bench/results/models` first", markdown, chart,
        "Speed-up of vision transformers with merging", MARKERS,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
