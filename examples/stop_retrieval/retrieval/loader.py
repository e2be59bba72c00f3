# SPDX-License-Identifier: Apache-2.0
"""Batches of videos and captions, decoded in worker processes.

What a sample holds depends on the seed, the epoch and its number alone, not on which process or worker makes it: two
processes see what one would, and a run that goes on sees what it would have seen.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import interrupt
from .corpus import Split, Video
from .errors import UsageError
from .parallel import Processes
from .terminal import counted
from .tokenizer import Tokenizer
from .video import BrokenVideo, read_video, sample_indices

KEPT = 3  # times as many frames as are taken stay in memory with --cache_frames
ATTEMPTS = 10  # other videos that are tried in place of a broken one
log = logging.getLogger("stop_retrieval")


class Sample(NamedTuple):
    """One video and perhaps a caption."""

    frames: Tensor  # (T, 3, H, W) uint8
    real: int  # frames that are no repetition of the last one; 0: neither this video nor one in its place could be read
    ids: Tensor  # (W,), or none: (0,)
    broken: tuple[tuple[str, str], ...]  # path and reason of every file that could not be read on the way


class Batch(NamedTuple):
    """Samples side by side."""

    video: Tensor  # (B, T, 3, H, W) uint8
    mask: Tensor  # (B, T) bool, the frames that are no repetition; none in a video that could not be read
    ids: Tensor  # (B, W)
    broken: tuple[tuple[str, str], ...]

    @property
    def readable(self) -> Tensor:
        """``(B,)`` bool."""
        return self.mask.any(1)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, video and mask on a device."""
        return tuple(t.to(device, non_blocking=True) for t in (self.ids, self.video, self.mask))  # type: ignore


class _Reader:
    """How a video file becomes frames, by the settings of the run."""

    def __init__(self, args: argparse.Namespace, size: int, order: int):
        self.options = {
            "frames": args.max_frames, "size": size, "slice_framepos": args.slice_framepos,
            "feature_framerate": args.feature_framerate, "order": order, "max_pixels": args.max_pixels,
        }  # fmt: skip

    def __call__(self, video: Video, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        return read_video(video.path, span=video.span, rng=rng, **self.options)

    def nothing(self) -> Tensor:
        """In place of a video that can't be read: batches keep their shape, in all processes."""
        size = self.options["size"]
        return torch.zeros(self.options["frames"], 3, size, size, dtype=torch.uint8)


class _Cached(_Reader):
    """A reader that decodes a video once: it keeps ``KEPT`` times as many frames as are taken, spread over the video,
    and takes from these as a reader does from the file."""

    shared: dict[Video, tuple[Tensor, int]] | None = None

    def __init__(self, args: argparse.Namespace, size: int, order: int):
        super().__init__(args, size, order)
        self.kept: dict[Video, tuple[Tensor, int]] = {} if self.shared is None else self.shared

    def __call__(self, video: Video, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        wanted = self.options["frames"]
        if video not in self.kept:
            more = self.options | {"frames": KEPT * wanted}
            self.kept[video] = read_video(video.path, span=video.span, **more)
        frames, real = self.kept[video]
        return frames[torch.from_numpy(sample_indices(real, wanted, rng))], min(real, wanted)


@contextmanager
def sharing_frames() -> Iterator[None]:
    """Let all readers of this process that are made meanwhile decode a video once for all of them; they must take as
    many frames of the same size, of files that don't change."""
    _Cached.shared = {}
    try:
        yield
    finally:
        _Cached.shared = None


def _reader(args: argparse.Namespace, size: int, order: int) -> _Reader:
    return (_Cached if args.cache_frames else _Reader)(args, size, order)


class TrainSet(Dataset):
    """Samples by ``(epoch, number)``: a caption with its video, or a video with one of its captions by lot."""

    def __init__(self, split: Split, ids: Tensor, reader: _Reader, every_caption: bool, seed: int):
        self.videos, self.ids, self.reader, self.seed = split.videos, ids, reader, seed
        owners = torch.tensor([owner for owner, _ in split.captions])
        self.owners = owners
        self.first = torch.searchsorted(owners, torch.arange(len(split.videos) + 1))  # of each video's captions
        self.every_caption = every_caption

    def __len__(self) -> int:
        return len(self.owners) if self.every_caption else len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, number = key
        rng = np.random.default_rng((self.seed, epoch, number))
        broken: list[tuple[str, str]] = []
        for _ in range(ATTEMPTS):
            if self.every_caption:
                caption = number
                video = int(self.owners[caption])
            else:
                video = number
                caption = int(rng.integers(self.first[video], self.first[video + 1]))
            try:
                frames, real = self.reader(self.videos[video], rng)
                return Sample(frames, real, self.ids[caption], tuple(broken))
            except BrokenVideo as error:
                broken.append((error.path, error.reason))
            number = int(rng.integers(len(self)))  # another one, so that batches keep their size
        return Sample(self.reader.nothing(), 0, self.ids[0], tuple(broken))


class VideoSet(Dataset):
    """Videos by number, as they are evaluated."""

    def __init__(self, videos: Sequence[Video], reader: _Reader):
        self.videos, self.reader = videos, reader

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, number: int) -> Sample:
        none = torch.empty(0, dtype=torch.int32)
        try:
            return Sample(*self.reader(self.videos[number], None), none, ())
        except BrokenVideo as error:
            return Sample(self.reader.nothing(), 0, none, ((error.path, error.reason),))


class TrainSampler:
    """Numbers of samples, batch by batch: each epoch another order, the same for all processes, each of which takes
    every ``world``-th. What doesn't fill a step is left out, as in STOP.

    Args:
        samples: how many there are.
        batch: samples of one process in one batch.
        parts: batches in a step.
    """

    def __init__(self, samples: int, batch: int, parts: int, seed: int, processes: Processes):
        self.samples, self.batch, self.parts, self.seed = samples, batch, parts, seed
        self.rank, self.world = processes.rank, processes.world
        self.epoch, self.first_step = 0, 0

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.samples // (self.batch * self.parts * self.world)

    def start(self, epoch: int, step: int = 0) -> None:
        """Give this epoch next, from this step on."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples).tolist()
        each = self.batch * self.world
        for part in range(self.first_step * self.parts, self.steps * self.parts):
            chosen = order[part * each : (part + 1) * each]
            yield [(self.epoch, number) for number in chosen[self.rank :: self.world]]


def collate(samples: list[Sample]) -> Batch:
    """A batch of samples, in their order."""
    video, ids = (torch.stack(parts) for parts in zip(*((s.frames, s.ids) for s in samples), strict=True))
    real = torch.tensor([sample.real for sample in samples])
    mask = torch.arange(video.shape[1]) < real[:, None]
    return Batch(video, mask, ids, tuple(pair for sample in samples for pair in sample.broken))


class Broken:
    """The files that could not be read: each is named once, and counted."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def note(self, batch: Batch) -> None:
        for path, reason in batch.broken:
            if path not in self.files:
                log.warning("skipped %s: %s", path, reason)
                self.files[path] = reason

    def say(self, processes: Processes) -> int:
        """How many there were in all processes; the first one says it."""
        files = {path for each in processes.all_know(sorted(self.files)) for path in each}
        if files and processes.first:
            log.warning("%s could not be read and %s skipped", counted(len(files), "video"),
                        "was" if len(files) == 1 else "were")  # fmt: skip
        return len(files)


def tokens(split: Split, tokenizer: Tokenizer, max_words: int) -> Tensor:
    """``(captions, max_words)`` int32 of a split; how many were cut is logged."""
    texts = [text for _, text in split.captions]
    ids = tokenizer(texts, max_words + 1)  # one more, to see which are longer
    cut = ids[:, -1] != 0
    ids[cut, max_words - 1] = tokenizer.end
    if cut.any():
        log.info(
            "%s: %d of %d captions are longer than --max_words %d and are cut",
            split.name,
            int(cut.sum()),
            len(texts),
            max_words,
        )
    return ids[:, :max_words].int()


def train_loader(
    args: argparse.Namespace, split: Split, ids: Tensor, size: int, processes: Processes
) -> tuple[DataLoader, TrainSampler]:
    """Batches to train on; see ``TrainSampler`` for what they hold.

    Raises:
        UsageError: there are fewer samples than processes.
    """
    # outside of MSR-VTT STOP trains on every caption
    every_caption = args.expand_msrvtt_sentences or args.datatype not in ("msrvtt", "synthetic")
    data = TrainSet(split, ids, _reader(args, size, args.train_frame_order), every_caption, args.seed)
    batch, parts = args.batch_size // args.gradient_accumulation_steps, args.gradient_accumulation_steps
    if len(data) < batch * parts * processes.world:
        batch, parts = len(data) // processes.world, 1
        if batch < 1 or len(data) < 2:
            each = counted(processes.world, "process", "processes")
            raise UsageError(f"too few for {each}: {counted(len(data), 'training sample')}")
        if processes.first:
            log.warning(
                "only %d training samples: --batch_size is %d in place of %d", len(data), batch, args.batch_size
            )
    sampler = TrainSampler(len(data), batch, parts, args.seed, processes)
    return _loader(args, data, processes, batch_sampler=sampler), sampler


def video_loader(args: argparse.Namespace, videos: Sequence[Video], size: int, processes: Processes) -> DataLoader:
    """Batches of videos in their order."""
    return _loader(
        args, VideoSet(videos, _reader(args, size, args.eval_frame_order)), processes, batch_size=args.batch_size_val
    )


def _loader(args: argparse.Namespace, data: Dataset, processes: Processes, **options) -> DataLoader:
    workers = args.num_thread_reader
    return DataLoader(
        data, num_workers=workers, collate_fn=collate, pin_memory=processes.device.type == "cuda",
        persistent_workers=workers > 0 and "batch_sampler" in options, worker_init_fn=interrupt.ignore, **options,
    )  # fmt: skip
