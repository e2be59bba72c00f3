# SPDX-License-Identifier: Apache-2.0
"""ActivityNet Captions: the sentences of a video make one paragraph, which is searched for in all of it.

::

    --data_path      train_ids.json, val_ids.json   ["v_...", ...]
                     train.json, val_1.json         {"v_...": {"duration": seconds, "sentences": [...], ...}}
    --features_path  the videos by their ids, with or without v_ in front
"""

from __future__ import annotations

import math
from collections.abc import Collection

from .entries import Annotated, Entry
from .files import member

FILES = {"train": ("train_ids.json", "train.json"), "val": ("val_ids.json", "val_1.json")}


def read(data_path: str, want: Collection[str]) -> dict[str, Annotated]:
    """The wanted splits."""
    splits = {}
    names = [name for pair in FILES.values() for name in pair]
    for split in want:
        list_, source = (member(data_path, name, "activity", names) for name in FILES[split])
        ids = [list_.kind(id_, str, "one of its ids") for id_ in list_.kind(list_.json(), list, "it")]
        data = source.kind(source.json(), dict, "it")
        entries = []
        for id_ in dict.fromkeys(ids):
            if id_ not in data:
                continue
            sentences = source.get(data[id_], "sentences", list, repr(id_))
            duration = source.get(data[id_], "duration", (int, float), repr(id_))
            paragraph = " ".join(source.kind(text, str, f"a sentence of {id_!r}").strip() for text in sentences)
            video = id_.removeprefix("v_")
            span = (0.0, float(math.ceil(duration))) if 0 < duration < math.inf else None
            entries.append(Entry(video, [paragraph], [video, f"v_{video}"], span))
        splits[split] = Annotated(f"{list_} with {FILES[split][1]}", entries)
    return splits
