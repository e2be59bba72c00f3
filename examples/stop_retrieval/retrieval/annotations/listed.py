# SPDX-License-Identifier: Apache-2.0
"""MSVD and VATEX: a list of videos for each split, and one file with the captions of all. A video has several, which
are evaluated together (multi-sentence retrieval).

::

    --data_path      msvd:   train_list.txt, test_list.txt, raw-captions.pkl    {video: [[word, ...], ...]}
                     vatex:  train_list.txt, test_list.txt, ref_captions.json   {video: [caption, ...]}
    --features_path  VIDEO.avi or the like
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from .entries import Annotated, Entry
from .files import File, member, stem

LISTS = {"train": "train_list.txt", "val": "test_list.txt"}


def read_msvd(data_path: str, want: Collection[str]) -> dict[str, Annotated]:
    """The wanted splits of MSVD."""
    return _read("msvd", data_path, want, "raw-captions.pkl", File.unpickle)


def read_vatex(data_path: str, want: Collection[str]) -> dict[str, Annotated]:
    """The wanted splits of VATEX."""
    return _read("vatex", data_path, want, "ref_captions.json", File.json)


def _read(
    datatype: str, data_path: str, want: Collection[str], name: str, load: Callable[[File], Any]
) -> dict[str, Annotated]:
    names = (*LISTS.values(), name)
    source = member(data_path, name, datatype, names)
    lists = {split: member(data_path, LISTS[split], datatype, names) for split in want}
    videos = {split: list_.lines() for split, list_ in lists.items()}
    captions = source.kind(load(source), dict, "it")
    by_stem = {stem(video): value for video, value in captions.items() if isinstance(video, str)}

    def entry(video: str) -> Entry:
        found = captions.get(video, by_stem.get(stem(video), []))  # one of the two may have the suffix of a file
        return Entry(video, _captions(source, video, found), [video, stem(video)])

    return {
        split: Annotated(f"{lists[split]} with {name}", [entry(video) for video in dict.fromkeys(ids)])
        for split, ids in videos.items()
    }


def _captions(source: File, video: str, captions: Any) -> list[str]:
    """Strings, of which a list of words makes one."""
    texts = []
    for caption in source.kind(captions, (list, tuple), f"the value of {video!r}"):
        if isinstance(source.kind(caption, (str, list, tuple), f"a caption of {video!r}"), str):
            texts.append(caption)
        else:
            texts.append(" ".join(source.kind(word, str, f"a word in a caption of {video!r}") for word in caption))
    return texts
