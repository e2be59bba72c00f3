# SPDX-License-Identifier: Apache-2.0
"""Videos found by texts: a FAISS index over the features of a corpus."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from . import atomic
from .errors import UsageError
from .features import Features

FORMAT = 1
INDEX, ENTRIES = "index.faiss", "entries.json"
READS = 3  # of a folder that is written at the same time, before it counts as damaged


@dataclass(frozen=True)
class Hit:
    """A video that was found.

    Attributes:
        rank: from 1.
        score: cosine of text and video.
        id, path, span: of the video, see :class:`Video`.
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
    entries = [[video.id, video.path, video.span] for video in features.videos]
    generation = {hashlib.sha256(data).hexdigest(): {"fingerprint": features.fingerprint, "entries": entries}}

    def write_entries(generations: dict[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, "generations": generations}) + "\n"
        atomic.replace(folder / ENTRIES, lambda file: file.write_text(text))

    # two files can't be replaced at once: entries of both generations are there while the index changes
    try:
        before = _generations(folder)
    except (OSError, ValueError):
        before = {}
    write_entries(before | generation)
    atomic.replace(folder / INDEX, lambda file: file.write_bytes(data))
    write_entries(generation)


class Index:
    """An index that :func:`build` wrote, in memory.

    Attributes:
        fingerprint: of the model whose features it holds.
    """

    def __init__(self, index: Any, entries: list[list[Any]], fingerprint: str):
        self._index, self._entries, self.fingerprint = index, entries, fingerprint

    def __len__(self) -> int:
        return len(self._entries)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Index:
        """Read the index in a folder.

        Raises:
            UsageError: there is none, it is damaged, or no FAISS.
        """
        faiss, folder = _faiss(), Path(folder)
        reason = f"{ENTRIES} does not belong to {INDEX}"
        for _ in range(READS):
            try:
                data = (folder / INDEX).read_bytes()
                generation = _generations(folder).get(hashlib.sha256(data).hexdigest())
            except FileNotFoundError as error:
                raise UsageError(f"no index in {folder}: build it with --index") from error
            except (OSError, ValueError) as error:
                reason = str(error)
                break
            if generation:
                index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
                return cls(index, generation["entries"], generation["fingerprint"])
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
        id, path, span = self._entries[place]
        return Hit(rank, float(score), id, path, tuple(span) if span else None)


def _generations(folder: Path) -> dict[str, Any]:
    """Entries by the digest of the index they belong to.

    Raises:
        OSError, ValueError: they can't be read.
    """
    found = json.loads((folder / ENTRIES).read_bytes())
    if not isinstance(found, dict) or found.get("format") != FORMAT or "generations" not in found:
        raise ValueError(f"{ENTRIES} is of another version")
    return found["generations"]


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
