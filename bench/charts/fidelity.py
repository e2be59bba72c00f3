# SPDX-License-Identifier: Apache-2.0
"""Tables, charts and advice about merging in a model with trained weights, from the rows of bench/fidelity.py."""

from __future__ import annotations

from typing import Any

from . import common
from .accuracy import points_lost
from .common import find
from .methods import COLOURS, METHODS, mark

LABELS = {"digits": "handwritten digits", "small pictures": "pictures of CIFAR-10 and FashionMNIST"}
LOSSES = ("class", "patch", "saliency", "top")
LOST = ["class token", "patch tokens", "saliency map", "its highest tenth"]
LIMITS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)  # of what the class token loses in half of the pictures
HEAD = ["what", "setting", "by", "dtype", "left", "speed-up, ideal", *LOST, "clip's mean", "accuracy", "agreement"]


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    lines = []
    for row in rows:
        share = [f"{row[name]:.1f} %" if name in row else "" for name in ("accuracy", "agreement")]
        lost = [_lost(row, name) for name in (*LOSSES, "clip")]
        lines.append([row["op"], row["shape"], row["impl"], row["dtype"], _left(row), _gain(row).replace("*", ""),
                      *lost, *share])  # fmt: skip
    return common.columns([HEAD, *lines])


def _left(row: dict) -> str:
    """Return what stands behind the last layer."""
    if "tokens_out" not in row:
        return ""
    several = row["op"] == "films" and row["items_out"] > 1
    return f"{row['items_out']} × {row['tokens_out']}" if several else str(row["tokens_out"])


def _gain(row: dict) -> str:
    if "speedup" not in row:
        return f"ideal {row['speedup_ideal']:.2f}×" if "speedup_ideal" in row else ""
    return f"{common.speedup(row['speedup'])} of {row['speedup_ideal']:.2f}×"


def thousandths(value: float) -> str:
    """Return a loss of cosine, correlation or share in thousandths."""
    return f"{1e3 * value:.0f}" if value > 0.0095 else f"{1e3 * value:.2g}" if value > 5e-6 else "0"


def _lost(row: dict | None, name: str) -> str:
    """Return median, mean and worst of what pictures lost, in thousandths."""
    if row is None or f"{name}_median" not in row:
        return ""
    median, mean, worst = (thousandths(row[f"{name}_{kind}"]) for kind in ("median", "mean", "worst"))
    return f"{median} ({mean}, {worst})"


def tables(rows: list[dict]) -> list[str]:
    """Return the sections of each machine and dtype."""
    parts = []
    for found in common.machines(rows):
        for section in (_photos, _methods, _layers, _libraries, _labels, _films):
            parts += section(found)
    return parts


def claim(rows: list[dict]) -> str:
    """Return what the class token loses by two schedules of about the same speed; nothing if they are not there."""
    cells = [find(rows, op="photos", shape=name, impl="merge") for name in ("r=8", "r=13 rising")]
    other = find(rows, op="photos", impl="none")
    if other is None or None in cells:
        return ""
    lost = [f"{row['class_median']:.4f} ({common.speedup(row['speedup'])})" for row in cells if row]
    return f"r = 8: {lost[0]}; r rising from 0 to 26: {lost[1]}; another photograph: {other['class_median']:.2f}"


def advice(rows: list[dict]) -> str:
    """Return, as a table, the schedule with the largest ideal speed-up among those by which half of the pictures lose
    so much at most: a line for each that is it. One that is slower than another and loses more is left out."""
    own = next(iter(common.machines(_of(rows, "photos", "merge"))), [])
    if not own:
        return "*Not measured.*"
    best, lines = None, []
    for most in LIMITS:
        before, allowed = best, [row for row in own if row["class_median"] <= most and not _is_beaten(row, own)]
        best = max(allowed, key=lambda row: row["speedup_ideal"], default=None)
        if best and best is not before:
            lines.append([
                f"{1e3 * most:g}", f"`tome_r={best['tome_r']}`", str(best["tokens_out"]), _gain(best),
                *(_lost(best, name) for name in LOSSES[:3]),
            ])  # fmt: skip
    head = ["at most", "schedule", f"left of {own[0]['tokens_in']}", "speed-up of ideal", *LOST[:3]]
    said = f"{common.short_machine(own[0])}, {own[0]['n']} photographs, {common.dates(own)}"
    return f"{common.markdown_table(head, lines, words=2)}\n\n*{said}.*"


def _is_beaten(row: dict, rows: list[dict]) -> bool:
    """Return whether another schedule was measured faster and loses less."""
    return any(other["speedup"] > row["speedup"] and other["class_median"] < row["class_median"] for other in rows)


def _section(title: str, rows: list[dict], head: list[str], lines: list[list[str]], words: int = 1) -> list[str]:
    n = f", {rows[0]['n']} pictures" if rows else ""
    return common.section(title, rows, head, lines, words=words, where=n)


def _of(rows: list[dict], op: str, impl: str | None = None) -> list[dict]:
    return [row for row in rows if row["op"] == op and impl in (None, row["impl"])]


def _photos(rows: list[dict]) -> list[str]:
    own = _of(rows, "photos", "merge")
    lines = [
        [row["shape"], str(row["tokens_out"]), f"{_gain(row)}, {row['eta']:.2f}",
         _lost(row, "class") + mark(row.get("over_constant_interval")), *(_lost(row, name) for name in LOSSES[1:])]
        for row in own
    ]  # fmt: skip
    other = find(rows, op="photos", impl="none")
    if own and other:
        lines.append(["another picture", "", "", _lost(other, "class"), "", "", ""])
    return _section("Merging on photographs", own, ["setting", "tokens left", "speed-up of ideal, η", *LOST], lines)


def _methods(rows: list[dict]) -> list[str]:
    own = _of(rows, "photos")
    several = [name for name in common.distinct(own, "shape") if find(own, shape=name, impl="drop")]
    lines = []
    for name, words in zip(LOSSES[:3], LOST[:3], strict=True):
        for setting in several:
            cells = [find(own, shape=setting, impl=method) for method in METHODS]
            lines.append([f"{setting}, {words}", *(_beside_merging(row, name) for row in cells)])
    found = [row for row in own if row["shape"] in several]
    return _section("Ways to have fewer tokens", found, ["setting", *METHODS.values()], lines)


def _beside_merging(row: dict | None, name: str) -> str:
    return _lost(row, name) + mark(row.get(f"{name}_over_merging_interval")) if row else ""


def _layers(rows: list[dict]) -> list[str]:
    own = _of(rows, "one layer")
    lines = [
        [row["shape"].removeprefix("layer "), f"{row['speedup_ideal']:.2f}×", *(_lost(row, name) for name in LOSSES)]
        for row in own
    ]  # fmt: skip
    return _section("One layer alone merges 32 of 256 tokens", own, ["layer", "ideal speed-up", *LOST], lines)


def _libraries(rows: list[dict]) -> list[str]:
    own = [row for row in rows if row["op"].startswith("photos, ")]
    lines = [
        [row["op"].removeprefix("photos, "), row["shape"], common.microseconds(row["p50_us"]), _gain(row),
         *(_lost(row, name) for name in LOSSES[:3])]
        for row in own
    ]  # fmt: skip
    head = ["library", "setting", "time of a batch", "speed-up of ideal", *LOST[:3]]
    return _section("Both libraries", own, head, lines, words=2)


def _labels(rows: list[dict]) -> list[str]:
    parts = []
    for op, name in LABELS.items():
        own, lines = _of(rows, op), []
        plain = find(own, shape="r=0")
        if plain:
            lines.append(["r=0", f"{plain['accuracy']:.1f} % right", *[""] * (len(METHODS) - 1)])
        for setting in [setting for setting in common.distinct(own, "shape") if setting != "r=0"]:
            cells = [find(own, shape=setting, impl=method) for method in METHODS]
            lines += [
                [f"{setting}, points lost", *map(points_lost, cells)],
                [f"{setting}, lost beside unmerged ones", *(_beside_unmerged(row, plain) for row in cells)],
                [f"{setting}, same answer", *(f"{row['agreement']:.0f} %" if row else "" for row in cells)],
            ]
        parts += _section(f"Nearest neighbours of {name}", own, ["setting", *METHODS.values()], lines)
    return parts


def _beside_unmerged(row: dict | None, plain: dict | None) -> str:
    """Return the points of accuracy that merged pictures lose among unmerged ones."""
    return f"{plain['accuracy'] - row['accuracy_mixed'] + 0.0:.1f}" if row and plain else ""


def _films(rows: list[dict]) -> list[str]:
    own = _of(rows, "films")
    lines = [
        [row["shape"], METHODS.get(row["impl"], ""), _left(row), _gain(row), _lost(row, "class"), _lost(row, "clip")]
        for row in own
    ]  # fmt: skip
    head = ["setting", "by", "left", "speed-up of ideal", "a frame's class token", "the clip's mean of them"]
    where = f", {own[0]['n']} clips of 12 frames" if own else ""
    return common.section("Clips of films", own, head, lines, words=3, where=where)


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw what class token and saliency map lose against the ideal speed-up, a curve for each method and schedule, and
    what features lose by one layer's merging."""
    found = common.machines([row for row in rows if row["op"] in ("photos", "one layer")])
    figure, axes = common.panels(len(found), 3, 3.4)
    for line, own in zip(axes, found, strict=True):
        for axis, name, words in ((line[0], "class", "class token: 1 − cosine"),
                                  (line[1], "saliency", "saliency map: 1 − correlation")):  # fmt: skip
            _curves(axis, _of(own, "photos"), name, colours)
            common.title(axis, words, own, len(found) > 1)
            axis.set_xlabel("ideal speed-up")
        _layers_alone(line[2], _of(own, "one layer"), colours)
        common.title(line[2], "32 tokens merged in one layer", own, len(found) > 1)
        line[0].set_ylabel("median over photographs")
    common.legend(figure, axes, 4)
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} photographs{_measured(own)}" for own in found])
    return figure


def _measured(rows: list[dict]) -> str:
    """Say how the measured speed-ups of merging compare with the ideal ones."""
    etas = [row["eta"] for row in _of(rows, "photos", "merge")]
    return f"; measured speed-ups are {min(etas):.2f} to {max(etas):.2f} of the ideal ones" if etas else ""


def _curves(axis: Any, rows: list[dict], name: str, colours: dict[str, str]) -> None:
    curves = [(method, words, "", "o-") for method, words in METHODS.items()]
    for words, style in (("rising", "^--"), ("falling", "v--"), ("other schedules", "d")):
        curves.append(("merge", f"merging, {words}", words, style))
    for method, words, schedule, style in curves:
        own = [row for row in rows if row["impl"] == method and f"{name}_median" in row and _schedule(row) == schedule]
        if own:
            axis.plot([row["speedup_ideal"] for row in own], [row[f"{name}_median"] for row in own], style, ms=4,
                      color=colours[COLOURS[method]], label=words)  # fmt: skip
    axis.set_yscale("log")
    axis.grid(color=colours["faint"], lw=0.6)


def _schedule(row: dict) -> str:
    """Return how r goes over the layers: nothing if it is constant."""
    words = row["shape"].partition(" ")[2]
    return words if words in ("", "rising", "falling") else "other schedules"


def _layers_alone(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    layers = [int(row["shape"].removeprefix("layer ")) for row in rows]
    for name, words, shade in (("class", "class token", "ours"), ("patch", "patch tokens", "third")):
        lost = [row[f"{name}_median"] for row in rows]
        axis.plot(layers, lost, "s:", ms=4, color=colours[shade], label=f"{words}, one layer")
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-6)  # the last layer merges behind the last attention, and moves no class token
    axis.set_xticks(layers[1::2])
    axis.set_xlabel("layer")
    axis.grid(color=colours["faint"], lw=0.6)
