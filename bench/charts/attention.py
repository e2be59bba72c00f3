# SPDX-License-Identifier: Apache-2.0
"""The tables of attention with sizes at many lengths, as multiples of the fastest of torch's kernels without sizes."""

from __future__ import annotations

from . import common
from .common import find

OURS, FORMS = "attention", ("augmented", "mask")


def tables(rows: list[dict]) -> list[str]:
    """Return the sections of bench/attention.py's rows."""
    parts = []
    for found in common.machines(rows):
        lines = []
        for shape, direction in common.distinct(found, "shape", "direction"):
            cells = {name: find(found, shape=shape, direction=direction, impl=name) for name in (OURS, *FORMS)}
            first = next(row for row in cells.values() if row)
            fastest = find(found, shape=shape, direction=direction, impl=first["fastest"])
            lines.append([
                f"{shape}, {first['n']} × {first['heads']} × {first['channels']}", direction,
                common.microseconds(fastest["p50_us"]) + f" ({first['fastest'].partition(',')[0]})" if fastest else "",
                common.multiple(cells[OURS]["times_fastest"]) if cells[OURS] else "",
                *(_plain(cells[name]) for name in FORMS),
            ])  # fmt: skip
        head = ["case and keys, N × heads × channels", "direction", "without sizes", "ours", *FORMS]
        parts += common.section("Attention with sizes", found, head, lines, words=2)
    return parts


def _plain(row: dict | None) -> str:
    """Return a time as a multiple; what is compared with ours is not marked."""
    return f"{row['times_fastest']:.2f}×" if row and row["times_fastest"] else ""
