# SPDX-License-Identifier: Apache-2.0
"""The host's time of a call, from the rows of bench/host.py."""

from __future__ import annotations

from . import common

# operators in float32 or bfloat16; blocks in float32, or under autocast to bfloat16
BACKENDS = {"native": "native kernels", "triton": "Triton {triton}'s launch path, nothing launched"}
HEAD = ["call", "direction", "µs", "× `F.layer_norm`", "target"]


def verdict(row: dict) -> str:
    """Return the target of a row, and whether it was missed."""
    if row["target"] is None:
        return ""
    return f"≤ {row['target']}×" if row["met"] else f"≤ {row['target']}×, **missed**"


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each backend."""
    parts = []
    for backend, words in BACKENDS.items():
        for found in common.machines([row for row in rows if row["impl"] == backend], "triton"):
            lines = [
                [row["op"], row["direction"], f"{row['p50_us']:.1f}", f"{row['times_layer_norm']:.1f}", verdict(row)]
                for row in found
            ]
            parts += common.section(f"Host's time, {words.format(**found[0])}", found, HEAD, lines, words=2)
    return parts
