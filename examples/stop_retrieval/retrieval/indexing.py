# SPDX-License-Identifier: Apache-2.0
"""A corpus of videos made searchable: features in shards, and an index over them."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from . import features, search, terminal
from .annotations.files import SUFFIXES
from .corpus import Video
from .errors import UsageError
from .evaluate import encode_texts, encode_videos
from .loader import Broken
from .parallel import Processes
from .tokenizer import Tokenizer

log = logging.getLogger("stop_retrieval")


def videos_in(folder: str) -> list[Video]:
    """Every video file in a folder and below, by its path in it.

    Raises:
        UsageError: there is none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"--index {folder} is no folder")
    found = sorted(
        os.path.join(where, name) for where, _, names in os.walk(root) for name in names
        if name.lower().endswith(SUFFIXES)
    )  # fmt: skip
    if not found:
        raise UsageError(f"no videos in --index {folder} ({', '.join(SUFFIXES)})")
    return [Video(os.path.relpath(path, root), path) for path in found]


def index(
    model: nn.Module, args: argparse.Namespace, videos: Sequence[Video], folder: Path, size: int, processes: Processes
) -> None:
    """Write what features of the videos are not there yet, each process its shards, then the index.

    Raises:
        UsageError: the folder holds features of another model or corpus, or no video could be read.
    """
    names = ("max_frames", "slice_framepos", "feature_framerate", "eval_frame_order", "precision", "visual_output_type")
    told = {name: getattr(args, name) for name in names} | {"tome": str(args.tome)}
    mark = f"{features.weights_of(model)} {features.fingerprint({}, told)}"
    store = features.FeatureStore(folder, videos, mark, args.shard_size)
    broken = Broken()
    for shard in store.pending(processes.rank, processes.world):
        part = videos[shard.start : shard.stop]
        (seen,), kept = encode_videos([model], args, part, size, processes, broken)
        store.write(shard, seen, kept)
    processes.wait()
    broken.say(processes)

    def build() -> int:
        found = store.load()
        if not found.videos:
            raise UsageError("none of the videos could be read: there is nothing to search")
        search.build(found, folder)
        return len(found.videos)

    count = processes.first_does(build)
    if processes.first:
        log.info("%d of %d videos can be searched in %s", count, len(videos), folder)


def query(
    model: nn.Module, texts: Sequence[str], folder: Path, args: argparse.Namespace, tokenizer: Tokenizer,
    processes: Processes,
) -> None:  # fmt: skip
    """Print the videos nearest to each text, best first.

    Raises:
        UsageError: no index, or one made by another model.
    """
    found = search.Index.open(folder)
    if found.fingerprint.split(" ")[0] != features.weights_of(model):
        raise UsageError(f"the index in {folder} was made by other weights: remove it and build it with --index")
    asked = encode_texts(model, tokenizer(texts, args.max_words), 4 * args.batch_size_val, processes)
    for text, hits in zip(texts, found.search(asked, args.top_k), strict=True) if processes.first else ():
        terminal.say(text)
        for hit in hits:
            span = f"  {hit.span[0]:g}–{hit.span[1]:g} s" if hit.span else ""
            terminal.say(f"{hit.rank:4d}  {hit.score:.3f}  {hit.path}{span}")
