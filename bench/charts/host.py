# SPDX-License-Identifier: Apache-2.0
"""The host's time of a call, from the rows of bench/host.py."""

from __future__ import annotations

from . import common

BACKENDS = {"native": "native kernels", "triton": "Triton's launch path, nothing launched"}


def verdict(row: dict) -> str:
    """Return the target of a row, and whether it was missed."""
    if row["target"] is None:
        return ""
    return f"≤ {row['target']}×" if row["met"] else f"≤ {row['target']}×, **missed**"


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each backend."""
    parts = []
    for backend, words in BACKENDS.items():
        for found in common.machines([row for row in rows if row["impl"] == backend]):
            lines = [
                [row["op"], row["direction"], f"{row['p50_us']:.1f}", f"{row['times_layer_norm']:.1f}", verdict(row)]
                for row in found
            ]
            head = ["call", "direction", "µs", "× `F.layer_norm`", "target"]
            parts.append(common.section(f"Host's time, {words}", found, common.markdown_table(head, lines, words=2)))
    return parts
