# SPDX-License-Identifier: Apache-2.0
"""Features of a corpus of videos, in shards that any number of processes write and that outlast their death."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import atomic
from .corpus import Video
from .errors import UsageError

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = (torch.float32, torch.float16)
# all metadata under one key: safetensors writes several in random order, and equal shards should be equal files
KEY = "stop_retrieval"


@dataclass(frozen=True)
class Shard:
    """``videos[start:stop]`` of the corpus."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Features:
    """What a model sees in videos.

    Attributes:
        videos: those that could be read, in the order of the corpus.
        tensor: ``(n, E)`` or ``(n, k, E)``, float32 or float16, on the CPU.
        fingerprint: of the model, see :func:`fingerprint`.
    """

    videos: tuple[Video, ...]
    tensor: Tensor
    fingerprint: str = ""


def fingerprint(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """What tells features of one model from those of another: 64 hexadecimal digits, the same in every process.

    Args:
        state: the weights, in any order and on any device; copied to the CPU one by one.
        settings: what else the features depend on; anything that JSON can hold, in any order.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name].detach().cpu()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureStore:
    """Features of one corpus by one model in a folder.

    A shard is a safetensors file of ``features`` whose metadata names the videos they belong to. It is written whole or
    not at all, by whichever process; what is there is never computed again. That goes for videos that could not be
    read, too: to try them again, remove the folder.

    Args:
        folder: made if it isn't there.
        videos: the corpus. It is told from others by ids, paths and spans, not by what is in the files.
        fingerprint: of the model.
        shard_size: videos in a shard. A store that is there keeps the size it began with.

    Raises:
        UsageError: the folder can't be written to, or it holds features of another model or corpus. So do all methods
            that touch the folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], videos: Sequence[Video], fingerprint: str, shard_size: int = 256
    ):
        if not videos:
            raise ValueError("videos must be one or more, got none")
        if shard_size < 1:
            raise ValueError(f"shard_size must be 1 or more, got {shard_size}")
        self.folder, self.videos, self.fingerprint = Path(folder), tuple(videos), fingerprint
        corpus = hashlib.sha256(json.dumps([_plain(video) for video in videos]).encode()).hexdigest()
        self._identity = {"format": FORMAT, "fingerprint": fingerprint, "corpus": corpus, "shard_size": shard_size}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder} can't be made: {error.strerror or error}; give another folder") from error
        atomic.sweep(self.folder)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            text = json.dumps(self._identity, indent=1) + "\n"
            atomic.replace(manifest, lambda file: file.write_text(text))
        self.shard_size: int = self._manifest().get("shard_size", shard_size)
        self._identity["shard_size"] = self.shard_size
        self._agree()
        starts = range(0, len(self.videos), self.shard_size)
        self.shards = tuple(Shard(n, at, min(at + self.shard_size, len(self.videos))) for n, at in enumerate(starts))

    @property
    def complete(self) -> bool:
        """Every shard is there."""
        return not self.pending()

    def pending(self, rank: int = 0, world: int = 1) -> list[Shard]:
        """The shards that are not there yet, or not whole.

        Shard n falls to process ``n % world``: every process knows its own, whatever the others write meanwhile.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to world - 1 = {world - 1}, got {rank}")
        self._agree()
        return [shard for shard in self.shards[rank::world] if self._read(shard) is None]

    def write(self, shard: Shard, features: Tensor, kept: Sequence[int]) -> None:
        """Put a shard there, in place of one that is there already.

        Args:
            shard: one of :attr:`shards`.
            features: ``(n, E)`` or ``(n, k, E)``, float32 or float16, on any device; n may be 0.
            kept: which videos of the shard the n are, counted from its start, rising; the others could not be read.

        Raises:
            ValueError: arguments that don't match.
        """
        if features.dim() not in (2, 3) or features.dtype not in DTYPES:
            raise ValueError(
                "features must be (n, E) or (n, k, E), float32 or float16, "
                f"got {features.dtype} of shape {tuple(features.shape)}"
            )
        kept = list(kept)
        if len(kept) != len(features) or kept != sorted({*kept} & {*range(shard.stop - shard.start)}):
            raise ValueError(
                f"kept must be {len(features)} rising numbers from 0 to {shard.stop - shard.start - 1}, got {kept}"
            )
        self._agree()
        videos = [_plain(self.videos[shard.start + n]) for n in kept]
        told = {KEY: json.dumps(self._header(shard) | {"kept": kept, "kept_videos": videos})}
        data = safetensors.torch.save({"features": features.detach().cpu().contiguous()}, told)
        atomic.replace(self._path(shard), lambda file: file.write_bytes(data))

    def load(self) -> Features:
        """All features.

        Raises:
            UsageError: also if shards are missing, or their features differ in width or type.
        """
        self._agree()
        videos: list[Video] = []
        parts: list[Tensor] = []
        first: Path | None = None
        for shard in self.shards:
            read = self._read(shard, data=True)
            if read is None:
                missing = len(self.pending())
                raise UsageError(f"{self.folder} lacks {missing} of {len(self.shards)} shards: run --index again")
            kept, features = read
            if not kept:
                continue
            first = first or self._path(shard)
            if parts and (parts[0].shape[1:], parts[0].dtype) != (features.shape[1:], features.dtype):
                raise UsageError(
                    f"{first} and {self._path(shard).name} hold features of different widths or types, "
                    f"{_kind(parts[0])} and {_kind(features)}: remove the folder and run --index again"
                )
            videos += [self.videos[shard.start + n] for n in kept]
            parts.append(features)
        return Features(tuple(videos), torch.cat(parts) if parts else torch.zeros(0, 0), self.fingerprint)

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} can't be read ({error}); give another folder or remove it") from error
        return found if isinstance(found, dict) else {}

    def _agree(self) -> None:
        """Of two processes that began different stores in one folder at once, the one that came first learns of it."""
        self._must_be_ours(self.folder / MANIFEST, self._manifest(), self._identity)

    def _must_be_ours(self, path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing:
            raise UsageError(
                f"{self.folder} holds features of another model or corpus: {path.name} differs in "
                f"{', '.join(differing)}; give another folder or remove it"
            )

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"features-{shard.number:05d}-of-{len(self.shards):05d}.safetensors"

    def _header(self, shard: Shard) -> dict[str, Any]:
        return self._identity | {"start": shard.start, "stop": shard.stop}

    def _read(self, shard: Shard, data: bool = False) -> tuple[list[int], Tensor] | None:
        """Which videos a shard holds and, if asked for, the features; None if it isn't there or isn't whole."""
        path = self._path(shard)
        try:
            with safetensors.safe_open(path, "pt") as file:  # compares the length of the file with what its header says
                told = json.loads((file.metadata() or {}).get(KEY, "{}"))
                features = file.get_tensor("features") if data else torch.empty(0)
        except (FileNotFoundError, safetensors.SafetensorError):
            return None
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror or error}") from error
        self._must_be_ours(path, told, self._header(shard))
        return told["kept"], features


def _plain(video: Video) -> list[Any]:
    return [video.id, video.path, None if video.span is None else list(video.span)]


def _kind(features: Tensor) -> str:
    return f"{features.dtype} {tuple(features.shape[1:])}".removeprefix("torch.")
