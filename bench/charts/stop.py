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
    "what", "direction", "setting", "by", "items × tokens at the end", "time", "and the host's", "over upstream",
    "less time than r=0", "speed-up, ideal", "η", "memory", "less than r=0",
]  # fmt: skip

WAYS = {"eager": "", "graph": ", in a CUDA graph", "compile": ", compiled"}  # and what ``impl`` says of them
UNMERGED = {"upstream": "", "upstream, channels last": ", theirs channels last"}
TOWERS = {"tower": "DGL's prompts", "tower, group2-2": "STOP proper's prompts"}
END_TO_END = [
    "direction", "setting", "time", "times as fast", "less time (guide)", "less memory (guide)", "less time than r=0",
]  # fmt: skip


def memory_bytes(row: dict) -> float | None:
    """Return the bytes that training keeps for backward; in inference and on a GPU, the most that lived at once; None
    for a graph, whose memory was taken before."""
    return row["saved_bytes"] or row["peak_bytes"]


def last_size(row: dict) -> str:
    return f"{row['items'][-1]} × {row['tokens'][-1]}"


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    lines = []
    for row in rows:
        wall, gain, memory = row.get("wall_us"), row["speedup_vs_r0"], memory_bytes(row)
        lines.append([
            row["op"], row["direction"], row["shape"], row["impl"], last_size(row), common.microseconds(row["p50_us"]),
            common.microseconds(wall) if wall else "", common.speedup(row["speedup_vs_upstream"]),
            common.per_cent_less(1 / gain) if gain else "",
            f"{gain:.2f}× of {row['speedup_ideal']:.2f}×" if gain else "", f"{row['eta']:.2f}" if gain else "",
            common.mebibytes(memory) if memory else "",
            common.per_cent_less(row["memory_vs_r0"]) if row["memory_vs_r0"] is not None else "",
        ])  # fmt: skip
    return common.columns([HEAD, *lines]).replace("**", "")


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each question: without merging, with it, and against merging in eager operations."""
    parts = []
    for found in common.machines(rows, "n"):
        videos = f", {found[0]['n']} × {found[0]['frames']} frames"
        blocks = [row for row in found if row["op"] == "blocks"]
        two = ["upstream", "package", "speed-up", "memory"]
        merged = [
            "direction", "setting", "items × tokens at the end", "time, over upstream", "less time (guide)",
            "less memory (guide)", "speed-up of ideal, η",
        ]  # fmt: skip
        for title, chosen, head, lines, words in (
            ("Without merging, against upstream", found, ["part", "direction", *two], _unmerged(found), 2),
            ("Twelve blocks with merging, against r = 0", blocks, merged, _merged(blocks), 3),
            ("Twelve blocks, against merging in eager operations", blocks,
             ["direction", "setting", "eager", *two[1:]], _against_eager(blocks), 2),
            ("A call with the host's time: eager, in a CUDA graph, compiled", found,
             ["part", "setting", "by", "eager", "in a CUDA graph", "compiled"], _by_way(found), 3),
        ):  # fmt: skip
            parts += common.section(title, chosen, head, lines, words, videos)
        for op, what in TOWERS.items():
            chosen = [row for row in found if row["op"] == op]
            if any(row["speedup_vs_upstream"] for row in chosen):
                title = f"The whole visual tower with {what}, against upstream's without merging"
                parts += common.section(title, chosen, END_TO_END, _end_to_end(chosen), 2, videos)
            else:
                title = f"The whole visual tower with {what}, against r = 0"
                parts += common.section(title, chosen, merged, _merged(chosen), 3, videos)
    return parts


def _pair(theirs: dict, mine: dict) -> list[str]:
    """Return two times, their ratio, and the memory of both."""
    return [
        common.microseconds(theirs["p50_us"]), common.microseconds(mine["p50_us"]),
        common.speedup(theirs["p50_us"] / mine["p50_us"]), common.change(memory_bytes(theirs), memory_bytes(mine)),
    ]  # fmt: skip


def _unmerged(rows: list[dict]) -> list[list[str]]:
    lines = []
    for op, direction in common.distinct(rows, "op", "direction"):
        same = {"op": op, "direction": direction, "shape": "r=0"}
        mine = find(rows, impl="package", **same)
        for peer, how in UNMERGED.items():
            if mine and (theirs := find(rows, impl=peer, **same)):
                lines.append([op + how, direction, *_pair(theirs, mine)])
    return lines


def promised(share: float, guide: tuple[int, int] | None) -> str:
    """Return a saving beside what the guide promises; one that falls short, or is none, is marked."""
    text = common.per_cent_less(1 - share)
    if guide is None:
        return text
    low, high = guide
    if 100 * share >= low - 0.5:
        return f"{text} ({low}–{high} %)"
    return f"**{text.strip('*')}, below {low}–{high} %**"


def _over_upstream(row: dict) -> str:
    """Return a time, and how many times as fast it is as upstream without merging, where that was measured."""
    gain = common.speedup(row["speedup_vs_upstream"])
    return common.microseconds(row["p50_us"]) + (f", {gain}" if gain else "")


def _merged(rows: list[dict]) -> list[list[str]]:
    lines = []
    for row in rows:
        if row["impl"] == "package" and row["shape"] != "r=0":
            memory, time = row["guide"] or (None, None)
            lines.append([
                row["direction"], row["shape"], last_size(row), _over_upstream(row),
                promised(1 - 1 / row["speedup_vs_r0"], time), promised(1 - row["memory_vs_r0"], memory),
                f"{common.speedup(row['speedup_vs_r0'])} of {row['speedup_ideal']:.2f}×, {row['eta']:.2f}",
            ])  # fmt: skip
    return lines


def _end_to_end(rows: list[dict]) -> list[list[str]]:
    lines = []
    for row in rows:
        if row["impl"] == "package" and row["speedup_vs_upstream"]:
            memory, time = row["guide"] or (None, None)
            lines.append([
                row["direction"], row["shape"], common.microseconds(row["p50_us"]),
                common.speedup(row["speedup_vs_upstream"]), promised(1 - 1 / row["speedup_vs_upstream"], time),
                promised(1 - row["memory_vs_upstream"], memory), common.per_cent_less(1 / row["speedup_vs_r0"]),
            ])  # fmt: skip
    return lines


def _against_eager(rows: list[dict]) -> list[list[str]]:
    lines = []
    for direction, shape in common.distinct(rows, "direction", "shape"):
        same = {"direction": direction, "shape": shape}
        mine, theirs = find(rows, impl="package", **same), find(rows, impl="eager", **same)
        if mine and theirs:
            lines.append([direction, shape, *_pair(theirs, mine)])
    return lines


def _by_way(rows: list[dict]) -> list[list[str]]:
    """Return times as a caller sees them, where a call was measured in more ways than one."""
    lines = []
    for op, shape, impl in common.distinct([row for row in rows if row.get("way") == "eager"], "op", "shape", "impl"):
        same = {"op": op, "shape": shape, "direction": "inference"}
        found = [find(rows, impl=impl + said, **same) for said in WAYS.values()]
        if found[0] and any(found[1:]):
            lines.append([op, shape, impl, *(common.microseconds(row["wall_us"]) if row else "" for row in found)])
    return lines


def _blocks(rows: list[dict]) -> list[list[dict]]:
    """Return the rows of the twelve blocks, by machine."""
    return common.machines([row for row in rows if row["op"] == "blocks"], "n")


def _captions(found: list[list[dict]]) -> list[str]:
    return [f"{common.machine(own[0])}, {own[0]['n']} × {own[0]['frames']} frames" for own in found]


def speedup_chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw speed-up over upstream without merging against r, with the ideal line; a line of panels a machine."""
    found = _blocks(rows)
    figure, axes = common.panels(len(found), 2, 3.4, sharex=True, sharey="row")
    for line, own in zip(axes, found, strict=True):
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            _lines(axis, [row for row in own if row["direction"] == direction], colours)
            common.title(axis, f"STOP's twelve blocks, {direction}", own, len(found) > 1)
            axis.set_xlabel("r, tokens merged per frame and layer")
        line[0].set_ylabel("times as fast as upstream\nwithout merging")
    common.legend(figure, axes, 3)
    common.caption(figure, _captions(found))
    return figure


def _lines(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    base = find(rows, impl="upstream", shape="r=0")
    if base is None:
        return  # nothing to compare with
    for impls, colour, name, below in (
        (("package",), "ours", "this package", False),
        (("upstream", "eager"), "theirs", "merging in eager PyTorch", True),
    ):
        own = [row for row in rows if row["impl"] in impls and rate(row) is not None]
        points = sorted((rate(row), base["p50_us"] / row["p50_us"]) for row in own)
        axis.plot(
            [x for x, _ in points], [y for _, y in points], "o-", color=colours[colour], label=name, zorder=3, ms=5
        )
        for x, y in points:
            common.label(axis, f"{y:.1f}×", (x, y), (0, -14 if below else 7), ha="center", color=colours[colour])
    ideal = sorted({(rate(row), row["speedup_ideal"]) for row in rows if rate(row) is not None})
    axis.plot([x for x, _ in ideal], [y for _, y in ideal], "--", color=colours["ideal"],
              label="ideal: FLOPs of upstream's blocks")  # fmt: skip
    axis.set_xticks([x for x, _ in ideal])
    axis.set_xlim(-0.7, ideal[-1][0] + 0.7)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.6), high + 0.06 * (high - low))


def rate(row: dict) -> int | None:
    """Return r of a setting ``r=…``; None of a preset with clip merging."""
    return int(row["shape"][2:]) if row["shape"].startswith("r=") else None


PANELS = (  # direction, title, what is drawn, which of the guide's promises
    ("inference", "time, inference", lambda row: row["p50_us"], 1),
    ("training", "time, training", lambda row: row["p50_us"], 1),
    ("inference", "memory, inference", memory_bytes, 0),
    ("training", "memory, training", memory_bytes, 0),
)


def memory_chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw time and memory as per cent of the same code's at r = 0, with what the guide promises as a band."""
    found = _blocks(rows)
    figure, axes = common.panels(2 * len(found), 2, 2.6, sharey=True)
    for own, lines in zip(found, axes.reshape(len(found), 4), strict=True):
        for axis, (direction, what, value, guide) in zip(lines, PANELS, strict=True):
            _shares(axis, [row for row in own if row["direction"] == direction], value, guide, colours)
            common.title(axis, what, own, len(found) > 1)
    for line in axes:
        line[0].set_ylabel("% of r = 0")
    common.legend(figure, axes, 3)
    common.caption(figure, _captions(found))
    return figure


def _shares(axis: Any, rows: list[dict], value: Any, guide: int, colours: dict[str, str]) -> None:
    settings = [name for name in common.distinct(rows, "shape") if name != "r=0"]
    for impl, same, colour, shift, name in (
        ("package", "package", "ours", -0.2, "this package"),
        ("eager", "upstream", "theirs", 0.2, "merging in eager PyTorch"),
    ):
        base = find(rows, impl=same, shape="r=0")
        if base is None:
            continue
        own = [row for row in rows if row["impl"] == impl and row["shape"] in settings]
        shares = [(settings.index(row["shape"]) + shift, 100 * value(row) / value(base)) for row in own]
        axis.bar([x for x, _ in shares], [y for _, y in shares], 0.38, color=colours[colour], label=name)
        for x, y in shares:
            # at the foot: at the head the guide's band would run through it
            common.label(axis, f"{y:.0f}", (x, 0), (0, 3), ha="center", color=colours["paper"])
    for place, setting in enumerate(settings):
        if setting in GUIDE:
            low, high = GUIDE[setting][guide]
            axis.fill_between(
                [place - 0.45, place + 0.45], 100 - high, 100 - low, color=colours["ideal"], lw=0, zorder=3,
                label="promised by the guide",
            )  # fmt: skip
    axis.set_xticks(range(len(settings)), settings)
    axis.axhline(100, color=colours["ink"], lw=1)
