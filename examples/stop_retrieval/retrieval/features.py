# SPDX-License-Identifier: Apache-2.0
"""Features of a corpus of videos, in shards that any number of processes write and that outlast their death."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from . import atomic, sealed
from .corpus import Video
from .errors import UsageError

FORMAT = 2
MANIFEST = "manifest.json"
DTYPES = (torch.float32, torch.float16)
_AGAIN = "remove it and run --index again"


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of a store, as its manifest has it."""

    format: int
    fingerprint: str
    corpus: str
    shard_size: Annotated[int, msgspec.Meta(ge=1)]


class _Header(Identity, frozen=True, forbid_unknown_fields=True):
    """The metadata of a shard."""

    start: int
    stop: int
    kept: list[int]
    kept_videos: list[tuple[str, str, tuple[float, float] | None]]


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
        fingerprint: of the model, see ``fingerprint``.
    """

    videos: tuple[Video, ...]
    tensor: Tensor
    fingerprint: str = ""


def fingerprint(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Return what tells features of one model from those of another: 64 hexadecimal digits, the same in every process.

    Args:
        state: the weights, in any order and on any device; copied to the CPU one by one.
        settings: what else the features depend on; anything that JSON can hold, in any order.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(state):
        sealed.update(digest, name, state[name])
    return digest.hexdigest()


def weights_of(model: nn.Module) -> str:
    """Return what tells the weights of a model from others, see ``fingerprint``."""
    return fingerprint(model.state_dict(), {})


class FeatureStore:
    """Features of one corpus by one model in a folder.

    A shard is a safetensors file of ``features`` whose metadata names the videos they belong to. It is written whole or
    not at all, by whichever process; what is there is never computed again. That goes for videos that could not be
    read, too: to try them again, remove the folder. A shard that breaks off, or whose header can't be read, counts as
    not there; one that is whole and holds something else than was written is damaged, which somebody should know of,
    and is refused.

    Args:
        folder: made if it isn't there.
        videos: the corpus. It is told from others by ids, paths and spans, not by what is in the files.
        fingerprint: of the model.
        shard_size: videos in a shard. A store that is there keeps the size it began with.

    Raises:
        UsageError: the folder can't be written to, it holds features of another model or corpus, or a file in it is
            damaged. So do all methods that touch the folder.
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
        wanted = Identity(FORMAT, fingerprint, corpus, shard_size)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder} can't be made: {error.strerror or error}; give another folder") from error
        atomic.sweep(self.folder)
        if not (self.folder / MANIFEST).exists():
            sealed.write_json(self.folder / MANIFEST, msgspec.to_builtins(wanted))
        self.shard_size = self._manifest().shard_size
        self._identity = msgspec.structs.replace(wanted, shard_size=self.shard_size)
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
            shard: one of ``shards``.
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
        if not _belong(features, kept, shard):
            raise ValueError(
                f"kept must be {len(features)} rising numbers from 0 to {shard.stop - shard.start - 1}, got {kept}"
            )
        self._agree()
        videos = [_plain(self.videos[shard.start + n]) for n in kept]
        told = self._header(shard) | {"kept": kept, "kept_videos": videos}
        data = sealed.pack({"features": features.cpu()}, told)
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
            read = self._read(shard)
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

    def _manifest(self) -> Identity:
        path = self.folder / MANIFEST
        try:
            return sealed.read_json(path, Identity)
        except sealed.Damaged as error:
            raise UsageError(f"{path} {error}; give another folder or remove this one") from error
        except OSError as error:
            raise UsageError(
                f"{path} can't be read: {error.strerror or error}; give another folder or remove this one"
            ) from error

    def _agree(self) -> None:
        """Of two processes that began different stores in one folder at once, the one that came first learns of it."""
        self._must_be_ours(MANIFEST, msgspec.to_builtins(self._manifest()), msgspec.to_builtins(self._identity))

    def _must_be_ours(self, name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differing = [field for field in wanted if found[field] != wanted[field]]
        if differing:
            raise UsageError(
                f"{self.folder} holds features of another model or corpus: {name} differs in "
                f"{', '.join(differing)}; give another folder or remove it"
            )

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"features-{shard.number:05d}-of-{len(self.shards):05d}.safetensors"

    def _header(self, shard: Shard) -> dict[str, Any]:
        return msgspec.to_builtins(self._identity) | {"start": shard.start, "stop": shard.stop}

    def _read(self, shard: Shard) -> tuple[list[int], Tensor] | None:
        """Which videos a shard holds and their features; None if it isn't there or isn't whole."""
        path = self._path(shard)
        try:
            tensors, told = sealed.unpack(path, _Header)
        except (FileNotFoundError, sealed.NotWhole):
            return None
        except sealed.Damaged as error:
            raise UsageError(f"{path} {error}; {_AGAIN}") from error
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror or error}; {_AGAIN}") from error
        self._must_be_ours(path.name, msgspec.to_builtins(told), self._header(shard))
        features = tensors.get("features")
        if len(tensors) != 1 or features is None or features.dim() not in (2, 3):
            raise UsageError(f"{path} holds other tensors than features; {_AGAIN}")
        if not _belong(features, told.kept, shard):
            raise UsageError(f"{path} holds {len(features)} features of the videos {told.kept[:9]}; {_AGAIN}")
        return told.kept, features


def _belong(features: Tensor, kept: list[int], shard: Shard) -> bool:
    """Return whether ``kept`` names a video of the shard for each of the features, in their order."""
    return len(kept) == len(features) and kept == sorted({*kept} & {*range(shard.stop - shard.start)})


def _plain(video: Video) -> list[Any]:
    return [video.id, video.path, None if video.span is None else list(video.span)]


def _kind(features: Tensor) -> str:
    return f"{features.dtype} {tuple(features.shape[1:])}".removeprefix("torch.")
