#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the chart and the table of STOP's visual tower from the rows in bench/results/stop; nothing in them is typed.

python bench/plot_stop.py                          bench/results/stop/*.json → bench/results/stop/chart.png
python bench/plot_stop.py --readme README.md       and the text between its two stop markers
"""

from __future__ import annotations

import sys
from pathlib import Path

import plot
from measure import ROOT

MARKERS = ("<!-- stop:start -->", "<!-- stop:end -->")
# what the ToMe guide for STOP promises, in per cent: less memory, less time
GUIDE = {"r=2": ((15, 20), (10, 15)), "r=4": ((25, 30), (20, 25)), "r=8": ((40, 45), (35, 40))}
FOLDER = ROOT / "bench/results/stop"
FUSED = ROOT / "bench/results/fused"
OURS, THEIRS = "#0b6e99", "#7f8fa6"


def machines(rows: list[dict], batch: bool = True) -> dict[tuple, list[dict]]:
    """The rows of each machine and dtype, and perhaps batch."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        size = row["n"] if batch else 0
        key = (row["device_kind"] != "cuda", row["device"], row["torch"], row["threads"], row["dtype"], size)
        found.setdefault(key, []).append(row)
    return dict(sorted(found.items()))


def saved(ratio: float) -> str:
    """A ratio to r = 0 as per cent less."""
    return f"{100 * (1 - ratio):.0f} %"


def promise(row: dict) -> str:
    if not row["guide"]:
        return ""
    (low, high), (slow, fast) = row["guide"]
    return f"{slow}–{fast} %, {low}–{high} %"


def line(row: dict) -> list[str]:
    less_time = saved(1 / row["speedup_vs_r0"])
    against = f"{row['speedup_vs_upstream']:.2f}×" if row["speedup_vs_upstream"] else ""
    if row["speedup_vs_upstream"] and row["speedup_vs_upstream"] < 1:
        against = f"**{against}, slower**"
    return [
        row["op"], row["direction"], row["shape"], row["impl"], f"{row['items'][-1]} × {row['tokens'][-1]}",
        plot.microseconds(row["p50_us"]), against, less_time,
        f"{row['speedup_vs_r0']:.2f}× of {row['speedup_ideal']:.2f}×", f"{row['eta']:.2f}",
        f"{(row['saved_bytes'] or row['peak_bytes']) / 2**20:.0f} MiB",
        saved(row["memory_vs_r0"]), promise(row),
    ]  # fmt: skip


HEAD = [
    "what", "direction", "setting", "by", "items × tokens at the end", "time", "over upstream", "less time than r=0",
    "speed-up, ideal", "η", "memory", "less than r=0", "the guide: less time, memory",
]  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as text, in columns."""
    return plot.columns([HEAD[:12], *(line(row)[:12] for row in rows)])


def markdown(rows: list[dict]) -> str:
    parts = []
    for found in machines(rows).values():
        lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---|---|---|" + "---:|" * (len(HEAD) - 5)]
        lines += ["| " + " | ".join(line(row)) + " |" for row in found]
        first = found[0]
        title = f"{plot.title(first)}, {first['n']} × {first['frames']} frames"
        parts.append(f"**{title}** ({plot.origin(found)})\n\n" + "\n".join(lines))
    note = (
        "Median times. *upstream*: the blocks as STOP's code computes them; *eager*: the same with merging in eager "
        "operations. η: speed-up over the same implementation at r = 0 ÷ the ideal one (its share of the FLOPs). "
        "Memory: on a GPU the allocator's peak; on a CPU what training keeps for backward, and in inference the most "
        "that lived at one time. Made by `python bench/plot_stop.py --readme README.md` from `bench/results/stop`."
    )
    return "\n\n".join([*parts, note])


def fused(rows: list[dict]) -> str:
    """The rows of bench/fused.py: each operator against what a block does that merges nothing."""
    parts = []
    for found in machines(rows, batch=False).values():
        names = {op: [r["impl"] for r in found if r["op"] == op] for op in dict.fromkeys(r["op"] for r in found)}
        for op, impls in names.items():
            impls = list(dict.fromkeys(impls))
            base = next(r["against"] for r in found if r["op"] == op)
            head = ["shape", "N × T", "direction", base, *(name for name in impls if name != base)]
            lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
            cells = {(r["shape"], r["direction"], r["impl"]): r for r in found if r["op"] == op}
            for shape, direction in dict.fromkeys(key[:2] for key in cells):
                first = cells[shape, direction, base]
                text = [shape, f"{first['n']} × {first['tokens']}", direction, plot.microseconds(first["p50_us"])]
                text += [f"{cells[shape, direction, name]['times_base']:.2f}×" for name in head[4:]]
                lines.append("| " + " | ".join(text) + " |")
            parts.append(f"**{op}: {plot.title(found[0])}** ({plot.origin(found)})\n\n" + "\n".join(lines))
    note = (
        "Median time of what a block does that merges nothing; the others as multiples of it (`python bench/fused.py`)."
    )
    return "\n\n".join([*parts, note]) if parts else ""


def chart(rows: list[dict], file: Path) -> None:
    """A line of panels for each machine: time and memory in per cent of upstream's, against what the guide promises."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = machines(rows)
    figure, axes = plt.subplots(
        len(found), 3, figsize=(13, 3.4 * len(found)), squeeze=False, facecolor="white", layout="constrained"
    )
    for panels, own in zip(axes, found.values(), strict=True):
        _bars(panels[0], own, "inference", "time, inference", lambda row: row["p50_us"], 1)
        _bars(panels[1], own, "training", "time, training", lambda row: row["p50_us"], 1)
        _bars(panels[2], own, "training", "memory, training", lambda row: row["saved_bytes"] or row["peak_bytes"], 0)
        title = f"{plot.title(own[0])}, {own[0]['n']} × {own[0]['frames']} frames"
        panels[0].set_title(title, size=11, weight="bold", loc="left", pad=20)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _bars(axis, rows: list[dict], direction: str, what: str, value, guide: int) -> None:
    rows = [row for row in rows if row["op"] == "blocks" and row["direction"] == direction]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    base = next((value(row) for row in rows if row["impl"] == "upstream"), None)
    if base is None:
        return  # nothing to compare with
    for impl, colour, shift in (("package", OURS, -0.2), ("eager", THEIRS, 0.2)):
        own = [row for row in rows if row["impl"] == impl]
        here = [(shapes.index(row["shape"]) + shift, 100 * value(row) / base) for row in own]
        axis.bar([x for x, _ in here], [y for _, y in here], 0.38, color=colour, label=impl)
        for x, y in here:
            axis.annotate(f"{y:.0f}", (x, y), (0, 2), textcoords="offset points", size=7, ha="center")
    for place, shape in enumerate(shapes):
        if shape in GUIDE:
            low, high = GUIDE[shape][guide]
            axis.fill_between([place - 0.45, place + 0.45], 100 - high, 100 - low, color="#e07a5f", alpha=0.6, lw=0)
    axis.plot([], [], color="#e07a5f", lw=6, alpha=0.6, label="the guide's promise")
    axis.set_xticks(range(len(shapes)), shapes, size=8)
    axis.set_ylim(0, 118)
    axis.annotate(
        f"{what}, % of upstream without merging", (0, 1), (0, 4), "axes fraction", textcoords="offset points", size=9
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper right", ncol=3)


def main(argv: list[str] | None = None) -> int:
    p = plot.parser(__doc__, FOLDER)
    p.add_argument("--fused", type=Path, nargs="+", metavar="FILE.json", help="(default: bench/results/fused/*.json)")
    args = p.parse_args(argv)

    def operators() -> str:
        return fused(plot.rows_in(args.fused or sorted(FUSED.glob("*.json")), args.readme))

    return plot.publish(
        args, FOLDER, "no rows: run `python bench/stop.py --json bench/results/stop` first", markdown, chart,
        "Time and memory of STOP's blocks with merging", MARKERS, operators,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
