# SPDX-License-Identifier: Apache-2.0
"""Entries that the modules of this package hand over, before anyone has looked for the videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """A video as the annotations name it; the same one may come again, with more captions."""

    id: str
    captions: Sequence[str]
    files: Sequence[str]  # names that its file may have, whole or without the suffix; the first is the usual one
    span: tuple[float, float] | None = None


class Annotated(NamedTuple):
    """Entries of a split, in its order, and the file that they are from, as messages name it."""

    source: str
    entries: list[Entry]
