# SPDX-License-Identifier: Apache-2.0
"""Numbers in columns, for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(columns: Mapping[str, Sequence[object]]) -> list[str]:
    """Return the lines of a table: headings, then the cells below them, set right."""
    cells = [[heading, *map(str, column)] for heading, column in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    rows = zip(*cells, strict=True)
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
