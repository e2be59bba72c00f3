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


def cosine(value: float) -> str:
    """Return a cosine, a correlation or a share with as many digits as tell it from 1."""
    return f"{value:.4f}" if value > 0.99 else f"{value:.3f}"


def _beside_merging(row: dict | None, name: str = "class") -> str:
    """Return what a method gives, with a star where it is worse than merging by the interval of the paired
    differences, and a dagger where it is better."""
    if row is None:
        return ""
    text, apart = _mean_and_worst(row, name), row.get(f"{name}_over_merging_interval")
    if apart is None:
        return text
    return text + ("*" if apart[1] < 0 else "†" if apart[0] > 0 else "")


def tables(rows: list[dict]) -> list[str]:
    """Return the sections of each machine."""
    parts = []
    for found in common.machines([row for row in rows if row["dtype"] == "float32"]):
        here = [row for row in rows if all(row[key] == found[0][key] for key in ("device", "torch", "threads"))]
        parts += _photos(found) + _methods(found) + _layers(found) + _libraries(here) + _labels(found) + _films(found)
    return parts


def _section(title: str, rows: list[dict], head: list[str], lines: list[list[str]], words: int = 1) -> list[str]:
    n = f", {rows[0]['n']} pictures" if rows else ""
    return common.section(title, rows, head, lines, words=words, where=n)


def _of(rows: list[dict], op: str, impl: str | None = None) -> list[dict]:
    return [row for row in rows if row["op"] == op and impl in (None, row["impl"])]


def _photos(rows: list[dict]) -> list[str]:
    own = _of(rows, "photos", "merge")
    head = ["setting", "tokens left", "speed-up of ideal", "η", "class token", "patch tokens", "saliency map",
            "its highest tenth"]  # fmt: skip
    lines = [
        [row["shape"], str(row["tokens_out"]), _gain(row), f"{row['eta']:.2f}",
         *(_mean_and_worst(row, name) for name in ("class", "patch", "saliency", "overlap"))]
        for row in own
    ]  # fmt: skip
    if other := find(rows, op="photos", impl="none"):
        lines.append(["another picture", "", "", "", _mean_and_worst(other, "class"), "", "", ""])
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
    head = ["library", "dtype", "setting", "time of a batch", "speed-up of ideal", "class token", "patch tokens",
            "saliency map"]  # fmt: skip
    lines = [
        [row["op"].removeprefix("photos, "), row["dtype"], row["shape"], common.microseconds(row["p50_us"]),
         _gain(row), *(_mean_and_worst(row, name) for name in ("class", "patch", "saliency"))]
        for row in own
    ]  # fmt: skip
    return _section("Libraries and dtypes", own, head, lines, words=3)


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
    """Draw what class token and saliency map lose against the speed-up, a curve for each method, and what one layer's
    merging costs."""
    found = common.machines([row for row in rows if row["dtype"] == "float32"])
    figure, axes = common.panels(len(found), 3, 3.4)
    for line, own in zip(axes, found, strict=True):
        for axis, name, words in ((line[0], "class", "class token: 1 − cosine"),
                                  (line[1], "saliency", "saliency map: 1 − correlation")):  # fmt: skip
            _curves(axis, [row for row in _of(own, "photos") if " " not in row["shape"]], name, colours)
            common.title(axis, words, own, len(found) > 1)
            axis.set_xlabel("times as fast as unmerged")
        _layer_bars(line[2], _of(own, "one layer"), colours)
        common.title(line[2], "merging in one layer alone", own, len(found) > 1)
    common.legend(figure, axes, 4)
    common.caption(figure, [f"{common.machine(own[0])}, {own[0]['n']} photographs" for own in found])
    return figure


def _curves(axis: Any, rows: list[dict], name: str, colours: dict[str, str]) -> None:
    for method, words in METHODS.items():
        own = [row for row in rows if row["impl"] == method]
        if own:
            axis.plot([row["speedup"] for row in own], [1 - row[f"{name}_mean"] for row in own], "o-", ms=4,
                      color=colours[COLOURS[method]], label=words)  # fmt: skip
    axis.set_yscale("log")
    axis.grid(color=colours["faint"], lw=0.6)


def _layer_bars(axis: Any, rows: list[dict], colours: dict[str, str]) -> None:
    layers = [int(row["shape"].removeprefix("layer ")) for row in rows]
    for name, words, shade in (("class", "class token", "ours"), ("patch", "patch tokens", "third")):
        lost = [1 - row[f"{name}_mean"] for row in rows]
        axis.plot(layers, lost, "s--", ms=4, color=colours[shade], label=f"{words}, one layer")
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.grid(color=colours["faint"], lw=0.6)
