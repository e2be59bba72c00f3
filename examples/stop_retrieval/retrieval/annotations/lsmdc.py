# SPDX-License-Identifier: Apache-2.0
"""LSMDC: short clips of movies.

::

    --data_path      LSMDC16_annos_training.csv, LSMDC16_challenge_1000_publictect.csv
                     clip, start, end, start, end, sentence, with tabs between and no header
    --features_path  MOVIE/CLIP.avi or the like
"""

from __future__ import annotations

from collections.abc import Collection

from .entries import Annotated, Entry
from .files import member

FILES = {"train": "LSMDC16_annos_training.csv", "val": "LSMDC16_challenge_1000_publictect.csv"}


def read(data_path: str, want: Collection[str]) -> dict[str, Annotated]:
    """The wanted splits."""
    splits = {}
    for split in want:
        table = member(data_path, FILES[split], "lsmdc", [*FILES.values()])
        rows = [(row[0].strip(), row[5]) for row in table.tabbed(fields=6)]
        splits[split] = Annotated(str(table), [Entry(clip, [sentence], [clip]) for clip, sentence in rows])
    return splits
