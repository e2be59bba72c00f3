# SPDX-License-Identifier: Apache-2.0
"""Files that carry the SHA-256 of what they hold: one bit that flips is found when they are read.

A digest tells damage, not intent: whoever writes a file can write its digest too. That is why everything that is read
is held against a schema as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import atomic, strict

DIGEST = "sha256"
# all metadata under one key: safetensors writes several in random order, and equal files should be equal bytes
KEY = "stop_retrieval"
_DTYPES = {"F32": torch.float32, "F16": torch.float16}
T = TypeVar("T")


class Damaged(ValueError):
    """An error that says in one line, without the file's name, what is wrong with its content."""


class NotWhole(Damaged):
    """A file that breaks off, or that is none of its kind."""


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write an object as JSON, whole or not at all; see ``atomic.replace``."""
    data = (json.dumps({DIGEST: _digest(value), **value}, indent=1) + "\n").encode()
    atomic.replace(path, lambda file: file.write_bytes(data))


def read_json(path: str | os.PathLike[str], schema: type[T]) -> T:
    """Return what ``write_json`` wrote, as a ``schema`` of msgspec.

    Raises:
        Damaged: it is something else.
        OSError: it can't be read.
    """
    try:
        value = strict.loads(Path(path).read_bytes())
    except ValueError as error:
        raise Damaged(str(error)) from error
    return _checked(value, schema)


def pack(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> bytes:
    """Return a safetensors file of tensors on the CPU and of what is told about them."""
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    sealed = {DIGEST: _digest(told, tensors), **told}
    return safetensors.torch.save(tensors, {KEY: json.dumps(sealed)})


def unpack(path: str | os.PathLike[str], schema: type[T]) -> tuple[dict[str, Tensor], T]:
    """Return what ``pack`` made.

    Raises:
        NotWhole: it breaks off or is no safetensors file.
        Damaged: it holds something else than what was written.
        OSError: it can't be read.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:  # compares the length of the file with what its header says
            told = (file.metadata() or {}).get(KEY)
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, no dict
            if told is None or not set(kinds.values()) <= _DTYPES.keys():
                raise Damaged("is no file of this program")
            tensors = {name: file.get_tensor(name) for name in kinds}
    except safetensors.SafetensorError as error:
        raise NotWhole(f"is not whole: {error}") from error
    try:
        value = strict.loads(told)
    except ValueError as error:
        raise Damaged(str(error)) from error
    return tensors, _checked(value, schema, tensors)


def _checked(value: Any, schema: type[T], tensors: Mapping[str, Tensor] | None = None) -> T:
    """Return ``value`` without its digest, which must be right, as a ``schema``."""
    if not isinstance(value, dict) or DIGEST not in value:
        raise Damaged(f"has no {DIGEST} of its content: it is damaged, or not of this version of the program")
    digest = value.pop(DIGEST)
    try:
        right = digest == _digest(value, tensors)
    except RecursionError:  # the writer goes less deep than the reader
        right = False
    if not right:
        raise Damaged(f"is damaged: its content has another {DIGEST} than when it was written")
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise Damaged(f"is not of this version of the program: {error}") from error


def _digest(value: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors or {}):
        update(digest, name, (tensors or {})[name])
    return digest.hexdigest()


def update(digest: Any, name: str, value: Tensor) -> None:
    """Add a tensor to a digest of hashlib's: name, dtype, shape and bytes."""
    value = value.detach().cpu()
    digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
