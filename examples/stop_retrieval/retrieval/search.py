# SPDX-License-Identifier: Apache-2.0
"""Videos found by texts: a FAISS index over the features of a corpus."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from . import atomic, sealed
from .errors import UsageError
from .features import Features

FORMAT = 2
INDEX, ENTRIES = "index.faiss", "entries.json"
READS = 3  # of a folder that is written at the same time, before it counts as damaged
# what FAISS writes before the vectors of a flat index: magic, channels, vectors, two numbers that mean nothing, whether
# it is trained, metric (0: inner product), floats
_HEAD = struct.Struct("<4siqqqBiq")


class _Generation(msgspec.Struct, forbid_unknown_fields=True):
    """The model and the videos of an index: id, path and span of each."""

    fingerprint: str
    entries: list[tuple[str, str, tuple[float, float] | None]]


class _Entries(msgspec.Struct, forbid_unknown_fields=True):
    """Generations by the SHA-256 of the index that they belong to."""

    format: int
    generations: dict[str, _Generation]


@dataclass(frozen=True)
class Hit:
    """A video that was found.

    Attributes:
        rank: from 1.
        score: cosine of text and video.
        id, path, span: of the video, see ``Video``.
    """

    rank: int
    score: float
    id: str
    path: str
    span: tuple[float, float] | None


def require() -> None:
    """Raises UsageError without FAISS."""
    _faiss()


def build(features: Features, folder: str | os.PathLike[str]) -> None:
    """Write an index for exact search by cosine, and what its entries are, in place of the index that is there.

    Readers and a process killed at any time see the old index or the new one; one process at a time may build.

    Args:
        features: k features of a video are normalised, averaged and normalised, as in ``StopModel.similarity``.
        folder: must exist.

    Raises:
        UsageError: no videos, features that are not finite, a folder that can't be written to, or no FAISS.
    """
    faiss, folder = _faiss(), Path(folder)
    if not features.videos:
        raise UsageError(f"nothing to index in {folder}: the corpus has no video that could be read")
    vectors = _normalized(features.tensor)
    broken = (~vectors.isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise UsageError(
            f"the features of {features.videos[broken[0]].path} ({len(broken)} of {len(vectors)} videos) are not "
            "finite: the checkpoint has diverged, or it overflows in half precision (--precision fp32)"
        )
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())
    data = faiss.serialize_index(index).tobytes()
    entries = [(video.id, video.path, video.span) for video in features.videos]
    generation = {hashlib.sha256(data).hexdigest(): _Generation(features.fingerprint, entries)}

    def write_entries(generations: dict[str, _Generation]) -> None:
        sealed.write_json(folder / ENTRIES, msgspec.to_builtins(_Entries(FORMAT, generations)))

    # two files can't be replaced at once: entries of both generations are there while the index changes
    try:
        before = _generations(folder)
    except (OSError, ValueError):
        before = {}
    write_entries(before | generation)
    atomic.replace(folder / INDEX, lambda file: file.write_bytes(data))
    write_entries(generation)


class Index:
    """An index that ``build`` wrote, in memory.

    Attributes:
        fingerprint: of the model whose features it holds.
    """

    def __init__(self, vectors: np.ndarray, generation: _Generation):
        self._index = _faiss().IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)
        self._entries, self.fingerprint = generation.entries, generation.fingerprint

    def __len__(self) -> int:
        return len(self._entries)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Index:
        """Read the index in a folder.

        Raises:
            UsageError: there is none, it is damaged, or no FAISS.
        """
        require()
        folder = Path(folder)
        reason = f"{ENTRIES} does not belong to {INDEX}"
        for _ in range(READS):
            try:
                data = (folder / INDEX).read_bytes()
                generation = _generations(folder).get(hashlib.sha256(data).hexdigest())
                if generation is not None:
                    return cls(_vectors(data, len(generation.entries)), generation)
            except FileNotFoundError as error:
                raise UsageError(f"no index in {folder}: build it with --index") from error
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                break
        raise UsageError(f"the index in {folder} is damaged ({reason}): build it anew with --index")

    def search(self, text_features: Tensor, k: int) -> list[list[Hit]]:
        """The k nearest videos to each text, best first.

        Args:
            text_features: ``(Q, E)`` of any length and floating dtype.
            k: no more than there are videos are found.

        Raises:
            UsageError: features of another width than the index has, or that are not finite.
            ValueError: no matrix, or k below 1.
        """
        if text_features.dim() != 2 or k < 1:
            raise ValueError(f"text_features must be (Q, E) and k 1 or more, got {tuple(text_features.shape)} and {k}")
        if text_features.shape[1] != self._index.d:
            raise UsageError(
                f"the index holds features of {self._index.d} channels, the model makes {text_features.shape[1]}: "
                "build the index with --index and the same checkpoint"
            )
        vectors = _normalized(text_features)
        broken = (~vectors.isfinite().all(1)).nonzero()[:, 0].tolist()
        if broken:
            raise UsageError(f"the features of query {broken[0] + 1} are not finite: the checkpoint has diverged")
        found = zip(*self._index.search(vectors.numpy(), min(k, len(self))), strict=True)
        return [
            [self._hit(rank, *pair) for rank, pair in enumerate(zip(scores, places, strict=True), 1)]
            for scores, places in found
        ]

    def _hit(self, rank: int, score: np.float32, place: np.int64) -> Hit:
        return Hit(rank, float(score), *self._entries[place])


def _generations(folder: Path) -> dict[str, _Generation]:
    """Entries by the digest of the index they belong to.

    Raises:
        OSError, ValueError: they can't be read.
    """
    try:
        found = sealed.read_json(folder / ENTRIES, _Entries)
    except sealed.Damaged as error:
        raise ValueError(f"{ENTRIES} {error}") from error
    if found.format != FORMAT:
        raise ValueError(f"{ENTRIES} is of another version")
    return found.generations


def _vectors(data: bytes, count: int) -> np.ndarray:
    """``(count, E)`` float32 of a flat index by inner product, the only kind that is written; FAISS, whose own reader
    trusts the sizes in a file, never sees one.

    Raises:
        ValueError: it is of another kind or size.
    """
    floats = (len(data) - _HEAD.size) // 4
    if len(data) < _HEAD.size:
        raise ValueError(f"{INDEX} breaks off")
    magic, channels, vectors, _, _, trained, metric, told = _HEAD.unpack_from(data)
    if (magic, trained, metric) != (b"IxFI", 1, 0):
        raise ValueError(f"{INDEX} is no flat index by inner product")
    if channels < 1 or (vectors, told, len(data)) != (count, count * channels, _HEAD.size + 4 * count * channels):
        raise ValueError(f"{INDEX} holds {vectors} vectors of {channels} channels in {floats} numbers, not {count}")
    found = np.frombuffer(data, "<f4", offset=_HEAD.size).reshape(count, channels)
    if count < 1 or not np.isfinite(found).all():
        raise ValueError(f"{INDEX} holds no vectors, or some that are not finite")
    return found.astype(np.float32, copy=False)


def _normalized(features: Tensor) -> Tensor:
    """``(n, E)`` float32 of length 1 on the CPU."""
    features = F.normalize(features.detach().cpu().float(), dim=-1)
    return F.normalize(features.mean(1), dim=-1) if features.dim() == 3 else features


def _faiss() -> Any:
    with warnings.catch_warnings():
        # of Python 3.12 and later, about the types that SWIG made for some versions of FAISS
        warnings.filterwarnings("ignore", r"builtin type \w+ has no __module__ attribute", DeprecationWarning)
        try:
            import faiss
        except ImportError as error:
            raise UsageError("searching needs FAISS: pip install faiss-cpu") from error
    return faiss
