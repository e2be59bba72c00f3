# SPDX-License-Identifier: Apache-2.0
"""What merging does to trained weights on real pictures, from the rows of bench/fidelity.py."""

from __future__ import annotations

from typing import Any

from . import common
from .common import find

METHODS = {
    "merge": "merging", "merge, sizes off": "sizes off", "random pairs": "random pairs", "drop": "dropped at random",
    "pool": "average pool",
}  # fmt: skip
COLOURS = {"merge": "ours", "merge, sizes off": "other", "random pairs": "third", "drop": "ideal", "pool": "theirs"}
LABELS = {"digits": "handwritten digits", "small pictures": "pictures of CIFAR-10 and FashionMNIST"}
HEAD = ["what", "setting", "by", "dtype", "left", "speed-up, ideal", "class", "patches", "saliency", "top tenth",
        "accuracy", "agreement"]  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return all rows as text for a terminal."""
    lines = []
    for row in rows:
        share = {name: f"{row[name]:.1f} %" if name in row else "" for name in ("accuracy", "agreement")}
        lines.append([
            row["op"], row["shape"], row["impl"], row["dtype"], _left(row), _gain(row).replace("*", ""),
            *(_mean_and_worst(row, name) for name in ("class" if "class_mean" in row else "video", "patch",
                                                      "saliency", "overlap")), *share.values(),
        ])  # fmt: skip
    return common.columns([HEAD, *lines])


def _left(row: dict) -> str:
    """Return what stands behind the last layer."""
    if "tokens_out" not in row:
        return ""
    joined = row["items_out"] != 1 and row["op"] == "films"
    return f"{row['items_out']} × {row['tokens_out']}" if joined else str(row["tokens_out"])


def _gain(row: dict) -> str:
    if "speedup" not in row:
        return f"ideal {row['speedup_ideal']:.2f}×" if "speedup_ideal" in row else ""
    return f"{common.speedup(row['speedup'])} of {row['speedup_ideal']:.2f}×"


def _mean_and_worst(row: dict, name: str) -> str:
    if f"{name}_mean" not in row:
        return ""
    return f"{cosine(row[f'{name}_mean'])} (worst {cosine(row[f'{name}_worst'])})"


def claim(rows: list[dict]) -> str:
    """Return how near the class token stays at two schedules of about the same speed; nothing if they are not there."""
    cells = [find(rows, op="photos", shape=name, impl="merge") for name in ("r=8", "r=13 rising")]
    other = find(rows, op="photos", impl="none")
    if other is None or None in cells:
        return ""
    near = [f"{cosine(row['class_mean'])} ({common.speedup(row['speedup'])})" for row in cells if row]
    return f"r = 8: {near[0]}; r rising from 0 to 26: {near[1]}; of another picture {cosine(other['class_mean'])}"


def cosine(value: float) -> str:
    """Return a cosine, a correlation or a share with as many digits as tell it from 1."""
    return f"{value:.4f}" if value > 0.99 else f"{value:.3f}"


def _beside_merging(row: dict | None, name: str = "class") -> str:
    """Return what a method gives, with a star where it is worse than merging by the interval of the paired
    differences, and a dagger where it is better."""
    if row is None:
        return ""
    return _mean_and_worst(row, name) + _mark(row.get(f"{name}_over_merging_interval"))


def _beside_constant(row: dict) -> str:
    """Return the class token's cosine, of a schedule that is not constant with a mark as above, and what it is compared
    with."""
    mark = _mark(row.get("class_over_beside_interval"))
    return _mean_and_worst(row, "class") + (f" {mark}{row['beside']}" if mark else "")


def _mark(apart: tuple[float, float] | None) -> str:
    """Return a star if an interval of differences is below 0, a dagger if it is above."""
    return "" if apart is None else "*" if apart[1] < 0 else "†" if apart[0] > 0 else ""


def tables(rows: list[dict]) -> list[str]:
    """Return the sections of each machine and dtype."""
    parts = []
    for found in common.machines(rows):
        for section in (_photos, _methods, _layers, _libraries, _labels, _films):
            parts += section(found)
    return parts


LOSSES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03)  # 1 − cosine of the class token, mean over pictures


def advice(rows: list[dict]) -> str:
    """Return, as a table, the fastest schedule among those that move the class token by so much at most: a line for
    each that is the fastest."""
    own = next(iter(common.machines(_of(rows, "photos", "merge"))), [])
    best, lines = None, []
    for most in LOSSES:
        before, allowed = best, [row for row in own if 1 - row["class_mean"] <= most]
        best = max(allowed, key=lambda row: row["speedup"], default=None)
        if best and best is not before:
            lines.append([
                f"{most:g}", f"`tome_r={best['tome_r']}`", str(best["tokens_out"]), common.speedup(best["speedup"]),
                *(cosine(best[f"{name}_mean"]) for name in ("class", "patch", "saliency")),
            ])  # fmt: skip
    head = ["1 − cosine at most", "fastest schedule", "tokens left of 257", "speed-up", "class token", "patch tokens",
            "saliency map"]  # fmt: skip
    if not own:
        return "*Not measured.*"
    said = f"{common.short_machine(own[0])}, {own[0]['n']} photographs, {common.dates(own)}"
    return f"{common.markdown_table(head, lines, words=2)}\n\n*{said}.*"


def _section(title: str, rows: list[dict], head: list[str], lines: list[list[str]], words: int = 1) -> list[str]:
    n = f", {rows[0]['n']} pictures" if rows else ""
    return common.section(title, rows, head, lines, words=words, where=n)


def _of(rows: list[dict], op: str, impl: str | None = None) -> list[dict]:
    return [row for row in rows if row["op"] == op and impl in (None, row["impl"])]


def _photos(rows: list[dict]) -> list[str]:
    own = _of(rows, "photos", "merge")
    head = ["setting", "tokens left", "speed-up of ideal, η", "class token", "patch tokens", "saliency map",
            "its highest tenth"]  # fmt: skip
    lines = [
        [row["shape"], str(row["tokens_out"]), f"{_gain(row)}, {row['eta']:.2f}", _beside_constant(row),
         *(_mean_and_worst(row, name) for name in ("patch", "saliency", "overlap"))]
        for row in own
    ]  # fmt: skip
    other = find(rows, op="photos", impl="none")
    if own and other:
        lines.append(["another picture", "", "", _mean_and_worst(other, "class"), "", "", ""])
    return _section("Merging on photographs", own, head, lines)


def _methods(rows: list[dict]) -> list[str]:
    own = _of(rows, "photos")
    several = [name for name in common.distinct(own, "shape") if find(own, shape=name, impl="drop")]
    cells = {name: {by: find(own, shape=name, impl=by) for by in METHODS} for name in several}
    lines = [
        [f"{name}, {words}", *(_beside_merging(row, kind) for row in cells[name].values())]
        for kind, words in (("class", "class token"), ("saliency", "saliency map")) for name in several
    ]  # fmt: skip
    return _section("Ways to have fewer tokens", [row for row in own if row["shape"] in several],
                    ["setting", *METHODS.values()], lines)  # fmt: skip


def _layers(rows: list[dict]) -> list[str]:
    own = _of(rows, "one layer")
    head = ["layer", "ideal speed-up", "class token", "patch tokens", "saliency map", "its highest tenth"]
    lines = [
        [row["shape"].removeprefix("layer "), f"{row['speedup_ideal']:.2f}×",
         *(_mean_and_worst(row, name) for name in ("class", "patch", "saliency", "overlap"))]
        for row in own
    ]  # fmt: skip
    return _section("One layer alone merges 32 of 256 tokens", own, head, lines)


def _libraries(rows: list[dict]) -> list[str]:
    own = [row for row in rows if row["op"].startswith("photos, ")]
    head = ["library", "setting", "time of a batch", "speed-up of ideal", "class token", "patch tokens",
            "saliency map"]  # fmt: skip
    lines = [
        [row["op"].removeprefix("photos, "), row["shape"], common.microseconds(row["p50_us"]),
         _gain(row), *(_mean_and_worst(row, name) for name in ("class", "patch", "saliency"))]
        for row in own
    ]  # fmt: skip
    return _section("Both libraries", own, head, lines, words=2)


def _labels(rows: list[dict]) -> list[str]:
    parts = []
    for op, name in LABELS.items():
        own = _of(rows, op)
        lines = []
        for setting in common.distinct(own, "shape"):
            if setting == "r=0":
                right = f"{find(own, shape=setting)['accuracy']:.1f} % right"  # type: ignore[index]
                lines += [[setting, right, *[""] * (len(METHODS) - 1)]]
                continue
            cells = [find(own, shape=setting, impl=by) for by in METHODS]
            lines += [
                [f"{setting}, points lost", *(_lost(row) for row in cells)],
                [f"{setting}, same answer", *(f"{row['agreement']:.0f} %" if row else "" for row in cells)],
                [f"{setting}, lost beside unmerged ones", *(_mixed(row, own) for row in cells)],
            ]
        parts += _section(f"Nearest neighbours of {name}", own, ["setting", *METHODS.values()], lines)
    return parts


def _lost(row: dict | None) -> str:
    if row is None:
        return ""
    low, high = row["lost_interval"]
    return f"{row['lost'] + 0.0:.1f} ({low:.1f} to {high:.1f})"


def _mixed(row: dict | None, rows: list[dict]) -> str:
    plain = find(rows, shape="r=0")
    return f"{plain['accuracy'] - row['accuracy_mixed'] + 0.0:.1f}" if row and plain else ""


def _films(rows: list[dict]) -> list[str]:
    own = _of(rows, "films")
    head = ["setting", "by", "left", "speed-up of ideal", "a frame's class token", "the clip's mean"]
    lines = [
        [row["shape"], METHODS.get(row["impl"], ""), _left(row), _gain(row),
         *(_mean_and_worst(row, name) for name in ("class", "video"))]
        for row in own
    ]  # fmt: skip
    return common.section("Clips of films", own, head, lines, words=3,
                          where=f", {own[0]['n']} clips of 12 frames" if own else "")  # fmt: skip


def chart(rows: list[dict], colours: dict[str, str]) -> Any:
    """Draw how far class token and saliency map move against the speed-up, a curve for each method and schedule, and
    how far one layer's merging moves features."""
    found = common.machines([row for row in rows if row["op"] in ("photos", "one layer")])
    figure, axes = common.panels(len(found), 3, 3.4)
    for line, own in zip(axes, found, strict=True):
        for axis, name, words in ((line[0], "class", "class token: 1 − cosine"),
                                  (line[1], "saliency", "saliency map: 1 − correlation")):  # fmt: skip
            _curves(axis, _of(own, "photos"), name, colours)
            common.title(axis, words, own, len(found) > 1)
            axis.set_xlabel("times as fast as unmerged")
        _layer_bars(line[2], _of(own, "one layer"), colours)
        common.title(line[2], "merging in one layer alone", own, len(found) > 1)
    common.legend(figure, axes, 4)
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} photographs" for own in found])
    return figure


def _curves(axis: Any, rows: list[dict], name: str, colours: dict[str, str]) -> None:
    curves = [(method, words, "", "o-") for method, words in METHODS.items()]
    for words, style in (("rising", "^--"), ("falling", "v--")):
        curves.append(("merge", f"merging, {words}", words, style))
    for method, words, schedule, style in curves:
        own = [row for row in rows if row["impl"] == method and row["shape"].partition(" ")[2] == schedule]
        if own:
            axis.plot([row["speedup"] for row in own], [1 - row[f"{name}_mean"] for row in own], style, ms=4,
                      color=colours[COLOURS[method]], label=words)  # fmt: skip
    axis.set_yscale("log")
    axis.grid(color=colours["faint"], lw=0.6)


def _layer_bars(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    layers = [int(row["shape"].removeprefix("layer ")) for row in rows]
    for name, words, shade in (("class", "class token", "ours"), ("patch", "patch tokens", "third")):
        lost = [1 - row[f"{name}_mean"] for row in rows]
        axis.plot(layers, lost, "s--", ms=4, color=colours[shade], label=f"{words}, one layer")
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-6)  # the last layer merges behind the last attention, and moves no class token
    axis.set_xticks(layers[1::2])
    axis.set_xlabel("layer")
    axis.grid(color=colours["faint"], lw=0.6)
