# SPDX-License-Identifier: Apache-2.0
"""The annotations of MSR-VTT, MSVD, DiDeMo, ActivityNet Captions, LSMDC and VATEX, in the file layouts that CLIP4Clip
and STOP read. Each module's docstring shows its files.

What is evaluated under the name ``val`` are the test videos, as in STOP: MSR-VTT's 1k-A, ActivityNet's val_1, and
test_list.txt or the like elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from ..corpus import Split, Video
from ..errors import UsageError
from ..terminal import counted
from . import activity, didemo, listed, lsmdc, msrvtt
from .entries import Annotated, Entry
from .files import SUFFIXES, VideoFiles


def load(
    datatype: str,
    data_path: str,
    features_path: str,
    train_csv: str | None = None,
    val_csv: str | None = None,
    want: Collection[str] = ("train", "val"),
) -> dict[str, Split]:
    """The wanted splits of a data set, by name.

    A video whose file isn't there is left out and named in ``Split.missing``, one that has no captions in
    ``Split.silent``; a caption that is empty or of no video of the split is left out without a word.

    Args:
        datatype: msrvtt, msvd, didemo, activity, lsmdc or vatex.
        data_path: MSRVTT_data.json; of the others the folder that holds their files.
        features_path: folder of the videos; those in folders inside it count too.
        train_csv, val_csv: of msrvtt alone; ignored for the others, as STOP's scripts always pass them.
        want: of ``train`` and ``val``; what isn't wanted needn't be there.

    Raises:
        UsageError: a file is missing or is not what it should be, or a split comes out without captions or videos.
    """
    readers: dict[str, Callable[[], dict[str, Annotated]]] = {
        "msrvtt": lambda: msrvtt.read(data_path, want, train_csv, val_csv),
        "msvd": lambda: listed.read_msvd(data_path, want),
        "vatex": lambda: listed.read_vatex(data_path, want),
        "didemo": lambda: didemo.read(data_path, want),
        "activity": lambda: activity.read(data_path, want),
        "lsmdc": lambda: lsmdc.read(data_path, want),
    }
    if datatype not in readers:
        raise UsageError(f"--datatype {datatype} is none of {', '.join(readers)}")
    splits = readers[datatype]()
    files = VideoFiles(features_path)  # the slow part comes last
    return {name: _split(name, annotated, files) for name, annotated in splits.items()}


def _split(name: str, annotated: Annotated, files: VideoFiles) -> Split:
    every = _once(annotated.entries)
    entries = [entry for entry in every if entry.captions]
    if not entries:
        raise UsageError(f"{annotated.source} has no captions for the {name} split")
    videos: list[Video] = []
    captions: list[tuple[int, str]] = []
    missing: list[str] = []
    captions_of_missing = 0
    for entry in entries:
        path = files.find(entry.files)
        if path is None:
            missing.append(os.path.join(files.folder, _file_name(entry)))
            captions_of_missing += len(entry.captions)
            continue
        captions += [(len(videos), caption) for caption in entry.captions]
        videos.append(Video(entry.id, path, entry.span))
    if not videos:
        there = (
            f"there: {counted(files.count, 'video')} like {files.example}"
            if files.count
            else "no videos at all are there"
        )
        raise UsageError(
            f"{files.folder} (--features_path), with the folders inside, has none of the {len(entries)} {name} videos "
            f"that {annotated.source} names, such as {_file_name(entries[0])} (or {' '.join(SUFFIXES[1:5])} …); {there}"
        )
    silent = tuple(entry.id for entry in every if not entry.captions)
    return Split(name, tuple(videos), tuple(captions), tuple(missing), captions_of_missing, silent)


def _once(entries: list[Entry]) -> list[Entry]:
    """Each video once, with all its captions that say anything."""
    captions: dict[str, list[str]] = {}
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.id, entry)
        captions.setdefault(entry.id, []).extend(text for caption in entry.captions if (text := caption.strip()))
    return [entry._replace(captions=captions[id_]) for id_, entry in first.items()]


def _file_name(entry: Entry) -> str:
    name = entry.files[0]
    return name if name.lower().endswith(SUFFIXES) else f"{name}{SUFFIXES[0]}"
