# SPDX-License-Identifier: Apache-2.0
"""Kernels that models launch and compile, from the rows of bench/launches.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from . import common


def load(files: Iterable[Path]) -> list[dict]:
    """Return the rows of files; they are counts, of no machine."""
    return [row for file in files for row in json.loads(file.read_text())]


def listed(names: dict[str, int]) -> str:
    return ", ".join(name if times == 1 else f"{times} {name}" for name, times in names.items()) or "none"


def tables(rows: list[dict]) -> list[str]:
    """Return a section for each version of Triton."""
    parts = []
    for triton in sorted(common.distinct(rows, "triton"), reverse=True):
        own = [row for row in rows if row["triton"] == triton]
        lines = [
            [
                row["model"], row["direction"], f"**{row['launches']}**: {listed(row['kernels'])}",
                " → ".join(row["blocks"][1]) or "none", f"**{row['compiled']}**", str(row["operations"]),
            ]
            for row in own
        ]  # fmt: skip
        head = ["model", "direction", "kernels launched", "second block, forward", "variants", "other operations"]
        table = common.markdown_table(head, lines, words=4)
        commit = (own[0]["commit"] or "unknown")[:9] + (", changed" if own[0]["dirty"] else "")
        title = f"### Triton {triton}, torch {own[0]['torch']}, {common.dates(own)}"
        parts.append(f"{title}\n\nCommit {commit}.\n\n{table}")
    return parts
