# SPDX-License-Identifier: Apache-2.0
"""MSR-VTT.

::

    --data_path      MSRVTT_data.json   {"videos": [{"video_id", "split", ...}, ...],
                                         "sentences": [{"video_id", "caption", ...}, ...]}
    --train_csv      MSRVTT_train.9k.csv, MSRVTT_train.7k.csv    column video_id
    --val_csv        MSRVTT_JSFUSION_test.csv (1k-A)             columns video_id, sentence
    --features_path  video0.mp4, …

The CSVs say which videos are trained on and which pairs are evaluated. Without them the "split" of the JSON does, with
all captions of a video.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from .entries import Annotated, Entry
from .files import File

# the JSON's name of a split may be any of these; the first that occurs counts
SPLITS = {"train": ("train",), "val": ("test", "validate", "val")}


def read(data_path: str, want: Collection[str], train_csv: str | None, val_csv: str | None) -> dict[str, Annotated]:
    """The wanted splits. The JSON isn't read where --val_csv alone tells everything."""
    tables = {name: path for name, path in (("train", train_csv), ("val", val_csv)) if path}
    splits: dict[str, Annotated] = {}
    videos: list[tuple[str, str]] = []
    captions: dict[str, list[str]] = {}
    source = File(data_path, "--data_path", "for msrvtt it is the file MSRVTT_data.json")
    if any(name not in tables or name == "train" for name in want):
        videos, captions = _read_json(source)
    for name in want:
        if name not in tables:
            found = {split for _, split in videos}
            split = next((split for split in SPLITS[name] if split in found), None)
            if split is None:
                raise source.wrong(f"none of its videos has the split {' or '.join(SPLITS[name])}; found: "
                                   f"{', '.join(sorted(found)) or '-'}; --{name}_csv names videos too")  # fmt: skip
            ids = [video for video, of in videos if of == split]
            splits[name] = Annotated(str(source), [_entry(video, captions.get(video, [])) for video in ids])
        elif name == "train":
            table = File(tables[name], "--train_csv", "it is a file like MSRVTT_train.9k.csv")
            ids = [row["video_id"].strip() for row in table.table(["video_id"])]
            entries = [_entry(video, captions.get(video, [])) for video in dict.fromkeys(ids)]
            splits[name] = Annotated(f"{table} with {source}", entries)
        else:
            table = File(tables[name], "--val_csv", "it is a file like MSRVTT_JSFUSION_test.csv")
            rows = table.table(["video_id", "sentence"])
            splits[name] = Annotated(str(table), [_entry(row["video_id"].strip(), [row["sentence"]]) for row in rows])
    return splits


def _entry(video: str, captions: list[str]) -> Entry:
    return Entry(video, captions, [video])


def _read_json(source: File) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """(video, split) of each video, and the captions by video."""
    data = source.json()
    captions = defaultdict(list)
    for number, item in enumerate(source.get(data, "sentences", list, "it")):
        where = f"entry {number} of 'sentences'"
        captions[source.get(item, "video_id", str, where)].append(source.get(item, "caption", str, where))
    videos = {}
    for number, item in enumerate(source.get(data, "videos", list, "it")):
        where = f"entry {number} of 'videos'"
        videos[source.get(item, "video_id", str, where)] = source.get(item, "split", str, where)
    return [*videos.items()], captions
