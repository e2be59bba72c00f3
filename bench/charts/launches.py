# SPDX-License-Identifier: Apache-2.0
"""Kernels that models launch and compile, from the rows of bench/launches.py."""

from __future__ import annotations

from . import common


def listed(names: dict[str, int]) -> str:
    return ", ".join(name if times == 1 else f"{times} {name}" for name, times in names.items()) or "none"


HEAD = ["model", "direction", "kernels launched", "second block, forward", "variants", "other operations"]


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each version of Triton and torch, the newest first."""
    parts = []
    versions = common.distinct(rows, "triton", "torch")
    for triton, torch in sorted(versions, key=lambda both: [int(n) for n in both[0].split(".")], reverse=True):
        own = [row for row in rows if (row["triton"], row["torch"]) == (triton, torch)]
        lines = [
            [
                row["model"], row["direction"], f"**{row['launches']}**: {listed(row['kernels'])}",
                " → ".join(row["blocks"][1]) or "none", f"**{row['compiled']}**", str(row["operations"]),
            ]
            for row in own
        ]  # fmt: skip
        table = common.markdown_table(HEAD, lines, words=4)
        parts.append(f"### Triton {triton}, torch {torch}, {common.dates(own)}\n\n{common.commits(own)}.\n\n{table}")
    return parts
