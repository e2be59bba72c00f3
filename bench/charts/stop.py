# SPDX-License-Identifier: Apache-2.0
"""STOP's visual tower with merging, from the rows of bench/stop.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import find

# what the ToMe guide for STOP promises, in per cent: less memory, less time
GUIDE = {"r=2": ((15, 20), (10, 15)), "r=4": ((25, 30), (20, 25)), "r=8": ((40, 45), (35, 40))}
DIRECTIONS = ("inference", "training")
HEAD = [
    "what", "direction", "setting", "by", "items × tokens at the end", "time", "over upstream", "less time than r=0",
    "speed-up, ideal", "η", "memory", "less than r=0",
]  # fmt: skip


def held(row: dict) -> float:
    """Return the bytes that training keeps for backward; in inference and on a GPU, the most that lived at once."""
    return row["saved_bytes"] or row["peak_bytes"]


def end(row: dict) -> str:
    return f"{row['items'][-1]} × {row['tokens'][-1]}"


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    lines = [
        [
            row["op"], row["direction"], row["shape"], row["impl"], end(row), common.microseconds(row["p50_us"]),
            common.speedup(row["speedup_vs_upstream"]).replace("*", ""), common.less(1 / row["speedup_vs_r0"]),
            f"{row['speedup_vs_r0']:.2f}× of {row['speedup_ideal']:.2f}×", f"{row['eta']:.2f}",
            common.mebibytes(held(row)), common.less(row["memory_vs_r0"]),
        ]
        for row in rows
    ]  # fmt: skip
    return common.columns([HEAD, *lines])


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each question: without merging, with it, and against merging in eager operations."""
    parts = []
    for found in common.machines(rows, "n"):
        videos = f", {found[0]['n']} × {found[0]['frames']} frames"
        blocks = [row for row in found if row["op"] == "blocks"]
        for title, own, text in (
            ("Without merging, against upstream", [row for row in found if row["shape"] == "r=0"], _unmerged(found)),
            ("Twelve blocks with merging, against r = 0", [row for row in blocks if row["impl"] == "package"],
             _merged(blocks)),
            ("Twelve blocks, against merging in eager operations", [row for row in blocks if row["shape"] != "r=0"],
             _against_eager(blocks)),
            ("The whole visual tower, against r = 0", [row for row in found if row["op"] == "tower"],
             _merged([row for row in found if row["op"] == "tower"])),
        ):  # fmt: skip
            if own:
                parts.append(common.section(title, own, text, videos))
    return parts


def _unmerged(rows: list[dict]) -> str:
    lines = []
    for op, direction in common.distinct(rows, "op", "direction"):
        mine, theirs = (
            find(rows, op=op, direction=direction, shape="r=0", impl=impl) for impl in ("package", "upstream")
        )
        if mine and theirs:
            lines.append([
                op, direction, common.microseconds(theirs["p50_us"]), common.microseconds(mine["p50_us"]),
                common.speedup(theirs["p50_us"] / mine["p50_us"]),
                f"{common.mebibytes(held(theirs))} → {common.mebibytes(held(mine))}",
            ])  # fmt: skip
    return common.markdown_table(["what", "direction", "upstream", "package", "speed-up", "memory"], lines, words=2)


def promised(share: float, guide: tuple[int, int] | None) -> str:
    """Return a saving beside what the guide promises; one that falls short is marked."""
    text = f"{100 * share:.0f} %"
    if guide is None:
        return text
    low, high = guide
    return f"{text} ({low}–{high} %)" if 100 * share >= low - 0.5 else f"**{text}, below {low}–{high} %**"


def _merged(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if row["impl"] == "package" and row["shape"] != "r=0":
            memory, time = row["guide"] or (None, None)
            lines.append([
                row["direction"], row["shape"], end(row), common.microseconds(row["p50_us"]),
                promised(1 - 1 / row["speedup_vs_r0"], time), promised(1 - row["memory_vs_r0"], memory),
                f"{common.speedup(row['speedup_vs_r0'])} of {row['speedup_ideal']:.2f}×, {row['eta']:.2f}",
            ])  # fmt: skip
    head = ["direction", "setting", "items × tokens at the end", "time", "less time (guide)", "less memory (guide)",
            "speed-up of ideal, η"]  # fmt: skip
    return common.markdown_table(head, lines, words=3)


def _against_eager(rows: list[dict]) -> str:
    lines = []
    for direction, shape in common.distinct(rows, "direction", "shape"):
        mine, theirs = (find(rows, direction=direction, shape=shape, impl=impl) for impl in ("package", "eager"))
        if mine and theirs:
            lines.append([
                direction, shape, common.microseconds(theirs["p50_us"]), common.microseconds(mine["p50_us"]),
                common.speedup(theirs["p50_us"] / mine["p50_us"]),
                f"{common.mebibytes(held(theirs))} → {common.mebibytes(held(mine))}",
            ])  # fmt: skip
    return common.markdown_table(["direction", "setting", "eager", "package", "speed-up", "memory"], lines, words=2)


def speedup_chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw speed-up over upstream without merging against r, with the ideal line; a line of panels a machine."""
    found = [[row for row in own if row["op"] == "blocks"] for own in common.machines(rows, "n")]
    figure, axes = common.panels(len(found), 2, 3.4, sharex=True, sharey="row")
    for line, own in zip(axes, found, strict=True):
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            _lines(axis, [row for row in own if row["direction"] == direction], colours)
            axis.set_title(f"STOP's twelve blocks, {direction}")
            axis.set_xlabel("r, tokens merged per frame and layer")
        line[0].set_ylabel("times as fast as upstream\nwithout merging")
        line[0].legend(loc="upper left")
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} × {own[0]['frames']} frames" for own in found])
    return figure


def _lines(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    base = find(rows, impl="upstream", shape="r=0")
    if base is None:
        return  # nothing to compare with
    for impl, colour, name in (("package", "ours", "this package"), ("eager", "theirs", "merging in eager PyTorch")):
        own = [row for row in [*([base] if impl == "eager" else []), *rows] if row["impl"] in (impl, "upstream")]
        points = sorted((rate(row), base["p50_us"] / row["p50_us"]) for row in own
                        if row["impl"] == impl or impl == "eager" if rate(row) is not None)  # fmt: skip
        axis.plot(*zip(*points, strict=True), "o-", color=colours[colour], label=name, zorder=3, ms=5)
        for x, y in points:
            above = impl == "package"
            common.label(axis, f"{y:.1f}×", (x, y), (0, 7 if above else -14), ha="center", color=colours[colour])
    ideal = sorted({(rate(row), row["speedup_ideal"]) for row in rows if rate(row) is not None})
    axis.plot(*zip(*ideal, strict=True), "--", color=colours["ideal"], label="ideal: FLOPs of upstream's blocks")
    axis.set_xticks([x for x, _ in ideal])
    axis.set_xlim(-0.7, ideal[-1][0] + 0.7)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.6), high + 0.12 * (high - low))


def rate(row: dict) -> int | None:
    """Return r of a setting ``r=…``; None of a preset with clip merging."""
    return int(row["shape"][2:]) if row["shape"].startswith("r=") else None


def memory_chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw time and memory as per cent of upstream's without merging, with what the guide promises as a band."""
    found = [[row for row in own if row["op"] == "blocks"] for own in common.machines(rows, "n")]
    figure, axes = common.panels(len(found), 3, 3.0, sharey=True)
    for line, own in zip(axes, found, strict=True):
        for axis, direction, what, value, guide in (
            (line[0], "inference", "time, inference", lambda row: row["p50_us"], 1),
            (line[1], "training", "time, training", lambda row: row["p50_us"], 1),
            (line[2], "training", "memory, training", held, 0),
        ):
            _shares(axis, [row for row in own if row["direction"] == direction], value, guide, colours)
            axis.set_title(what)
        line[0].set_ylabel("% of upstream\nwithout merging")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncol=3)
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} × {own[0]['frames']} frames" for own in found])
    return figure


def _shares(axis: Any, rows: list[dict], value: Any, guide: int, colours: dict[str, str]) -> None:
    settings = common.distinct(rows, "shape")
    base = find(rows, impl="upstream", shape="r=0")
    if base is None:
        return  # nothing to compare with
    for impl, colour, shift, name in (
        ("package", "ours", -0.2, "this package"), ("eager", "theirs", 0.2, "merging in eager PyTorch"),
    ):  # fmt: skip
        own = [
            (settings.index(row["shape"]) + shift, 100 * value(row) / value(base))
            for row in rows
            if row["impl"] == impl
        ]
        axis.bar([x for x, _ in own], [y for _, y in own], 0.38, color=colours[colour], label=name)
        for x, y in own:
            # at the foot: at the head the guide's band would run through it
            common.label(axis, f"{y:.0f}", (x, 0), (0, 3), ha="center", color=colours["paper"])
    for place, setting in enumerate(settings):
        if setting in GUIDE:
            low, high = GUIDE[setting][guide]
            axis.fill_between(
                [place - 0.45, place + 0.45], 100 - high, 100 - low, color=colours["ideal"], lw=0, zorder=3,
                label="promised by the guide" if setting == "r=2" else None,
            )  # fmt: skip
    axis.set_xticks(range(len(settings)), settings, rotation=30, ha="right")
    axis.set_ylim(0, 105)
