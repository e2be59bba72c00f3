# SPDX-License-Identifier: Apache-2.0
"""DiDeMo: the sentences of a video make one paragraph, its first 30 seconds are the video.

::

    --data_path      train_list.txt, test_list.txt, train_data.json, test_data.json   [{"video", "description", ...}]
    --features_path  the videos by their names in the lists, which have suffixes, or with another one behind or instead
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection

from .entries import Annotated, Entry
from .files import member

FILES = {"train": ("train_list.txt", "train_data.json"), "val": ("test_list.txt", "test_data.json")}
SPAN = (0.0, 31.0)  # seconds: annotators saw no more than 30 of a video; 31 as in CLIP4Clip and STOP


def read(data_path: str, want: Collection[str]) -> dict[str, Annotated]:
    """The wanted splits."""
    splits = {}
    names = [name for pair in FILES.values() for name in pair]
    for split in want:
        list_, source = (member(data_path, name, "didemo", names) for name in FILES[split])
        sentences = defaultdict(list)
        for number, item in enumerate(source.kind(source.json(), list, "it")):
            video = source.get(item, "video", str, f"entry {number}")
            sentences[video].append(source.get(item, "description", str, f"entry {number}").strip())
        entries = [
            Entry(video, [" ".join(sentences.get(video, []))], [video, os.path.splitext(video)[0]], SPAN)
            for video in dict.fromkeys(list_.lines())
        ]
        splits[split] = Annotated(f"{list_} with {FILES[split][1]}", entries)
    return splits
