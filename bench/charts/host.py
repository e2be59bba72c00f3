# SPDX-License-Identifier: Apache-2.0
"""The host's time of a call, and where it goes, from the rows of bench/host.py."""

from __future__ import annotations

from harness.rows import WHOLE

from . import common

# operators in float32 or bfloat16; blocks in float32, or under autocast to bfloat16
BACKENDS = {"native": "native kernels", "triton": "Triton {triton}'s launch path, nothing launched"}
HEAD = ["call", "direction", "µs", "× `F.layer_norm`", "× unpatched", "target"]


def verdict(row: dict) -> str:
    """Return the target of a row, and whether it was missed."""
    if row["target"] is None:
        return ""
    beside = "" if row.get("times_unpatched") is None else " unpatched"
    return f"≤ {row['target']}×{beside}" + ("" if row["met"] else ", **missed**")


def tables(rows: list[dict]) -> list[str]:
    """Return two sections for each backend: calls, and the parts of some."""
    sections = []
    for backend, words in BACKENDS.items():
        for found in common.machines([row for row in rows if row["impl"] == backend], "triton"):
            whole, parts = ([row for row in found if (row.get("part") is None) == wanted] for wanted in (True, False))
            name = words.format(**found[0])
            sections += common.section(f"Host's time, {name}", whole, HEAD, map(_line, whole), words=2)
            sections += _parts_section(f"Where a call's time goes, {name}", parts)
    return sections


def _line(row: dict) -> list[str]:
    beside = row.get("times_unpatched")
    numbers = [f"{row['p50_us']:.1f}", f"{row['times_layer_norm']:.1f}", "" if beside is None else f"{beside:.2f}"]
    return [row["op"], row["direction"], *numbers, verdict(row)]


def _parts_section(title: str, rows: list[dict]) -> list[str]:
    """Return the section of parts: a line each, by the way that a call takes, and a column for each op."""
    ops = common.distinct(rows, "op")
    lines = []
    for way in common.distinct(rows, "direction"):
        own = [row for row in rows if row["direction"] == way]
        for part in common.distinct(own, "part"):
            cells = [common.find(own, op=op, part=part) for op in ops]
            mark = "**" if part == WHOLE else ""
            values = ["" if row is None else f"{mark}{row['p50_us']:.1f}{mark}" for row in cells]
            lines.append([way, f"{mark}{part}{mark}", *values])
    return common.section(title, rows, ["way", "µs of", *ops], lines, words=2)
