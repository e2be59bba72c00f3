# SPDX-License-Identifier: Apache-2.0
"""Reading what torch.save and torch.jit.save write, without running anything that the file holds.

Both write a zip archive: ``data.pkl``, a pickle of the values, and beside it each tensor's memory with a CRC-32 that
torch.load doesn't compare. A pickle is a program, and so is what torch.jit.load reads: the first goes through
``torch.load(weights_only=True)``, the second is interpreted here, by the few instructions that tensors take.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from .pickles import Interpreter, Name, depth

_MAGIC = b"PK\x03\x04"
_CHUNK = 1 << 20
_FOLDER = 0x10  # of MS-DOS's attributes, which zip files have
_DEEPEST = 100  # in each other; what torch.save writes of a training has less than ten
_DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in (
        ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
        ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8),
        ("Byte", torch.uint8), ("Bool", torch.bool),
    )
}  # fmt: skip
_KNOWN = {*_DTYPES, "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"}


def load(path: str | os.PathLike, mmap: bool = False) -> Any:
    """Return what is in a file of torch.save, or the tensors of a TorchScript archive by their names, on the CPU.

    An archive whose checksums don't match is refused. Files of torch.save before 1.6, and those written with
    ``torch.serialization.set_crc32_options(False)``, have no checksums.

    Args:
        path: of the file.
        mmap: tensors stay in the file until they are used; for torch.save's zip archives alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is of another kind, or asks for more than tensors and plain values. The message
            is one line that begins with the path.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with open(path, "rb") as file:
            packed = file.read(len(_MAGIC)) == _MAGIC or zipfile.is_zipfile(file)
        if not packed:
            with open(path, "rb") as file:
                for _ in range(5):  # which torch.save wrote one behind the other before version 1.6
                    _shallow(file)
            return torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            _verify(archive, os.path.getsize(path))
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _tensors(archive)
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as file:
                        _shallow(file)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what the parsers of zip and pickle raise of damaged bytes is not limited
        raise ValueError(
            f"{path} can't be read as weights ({_reason(error)}); give a whole file that torch.save or torch.jit.save "
            "wrote, of the state_dict and not of the model"
        ) from error


def _shallow(file: IO[bytes]) -> None:
    """Raise ValueError for a pickle that nests so deep that its keys' hashes would end the process."""
    found = depth(file)
    if found > _DEEPEST:
        raise ValueError(f"its values lie {found} deep in each other")


def _reason(error: Exception) -> str:
    """Return the sentence of an error that says what is wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)  # torch gives much advice before it
    return " ".join(text.split()).split(". ")[0][:200].rstrip(".") or type(error).__name__


# -- checksums --------------------------------------------------------------------------------------------------------


def _verify(archive: zipfile.ZipFile, length: int) -> None:
    """Compare every record that is read with its checksum; raise ValueError or zipfile's errors."""
    records = [record for record in archive.infolist() if "/code/" not in record.filename]
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, which torch doesn't do")
    if any(record.is_dir() or record.external_attr & _FOLDER for record in records):
        raise ValueError("one of its records is a folder")  # torch would take it for empty and leave its tensor unread
    if sum(record.file_size for record in records) > length:
        raise ValueError("its records are longer than the file")
    if len({record.filename for record in records}) < len(records):
        raise ValueError("two of its records have one name")
    if not any(record.CRC for record in records):  # written without checksums
        for record in records:
            record.CRC = None  # type: ignore[assignment]  # zipfile compares none, then
    for record in records:
        with archive.open(record) as data:
            while data.read(_CHUNK):  # zipfile compares at the end
                pass


# -- TorchScript ------------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """The memory of tensors, one record of the archive."""

    values: Tensor


class _Object:
    """An object of a TorchScript class: its attributes, without its methods."""

    def __init__(self) -> None:
        self.attributes: dict = {}


class _Script(Interpreter):
    """The pickle of a TorchScript archive: objects of its classes, and tensors.

    Args:
        archive: that holds it.
        root: of the names in it.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.read(f"{root}data.pkl"))
        self._archive, self._root = archive, root
        self._storages: dict[str, _Storage] = {}

    def knows(self, name: str) -> bool:
        return name.startswith(("__torch__ ", "__torch__.", "torch.jit._pickle ")) or name in _KNOWN

    def make(self, name: str, arguments: tuple) -> Any:
        return _Object() if name.startswith("__torch__") else super().make(name, arguments)

    def build(self, target: Any, state: Any) -> None:
        if not isinstance(target, _Object):
            super().build(target, state)
        if isinstance(state, dict):  # a class with a __setstate__ of its own may take anything, and is left empty
            target.attributes = state

    def call(self, name: str, arguments: tuple) -> Any:
        match name, arguments:
            case "torch._utils _rebuild_tensor_v2", (_Storage(values), offset, size, stride, _, *_):
                return _view(values, offset, size, stride)
            case "torch._utils _rebuild_parameter", (Tensor() as value, *_):
                return value
            case "collections OrderedDict", ():
                return {}
            case _, (value, *_) if name.startswith("torch.jit._pickle "):
                return value  # a list or a dictionary, and the type that TorchScript knows it by
        return super().call(name, arguments)

    def outside(self, saved: Any) -> _Storage:
        kind, name, key, _device, _count = saved
        if kind != "storage" or not isinstance(key, str) or not isinstance(name, Name):
            raise ValueError("it names memory in an unknown way")
        if key not in self._storages:
            dtype = _DTYPES[name.name]
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[key] = _Storage(values)
        return self._storages[key]


def _tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Return the parameters and buffers of the module in a TorchScript archive, by their names in its state_dict."""
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    found: dict[str, Tensor] = {}
    left, seen = [("", _Script(archive, root).load())], set()
    while left:
        prefix, module = left.pop()
        if not isinstance(module, _Object) or id(module) in seen:
            continue
        seen.add(id(module))
        for name, value in module.attributes.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
        left += [(f"{prefix}{name}.", value) for name, value in reversed(module.attributes.items())]
    return found


def _view(values: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has no valid shape")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) > len(values) or (0 not in size and last >= len(values)):
        raise ValueError("a tensor is longer than its data")
    return values.as_strided(size, stride, offset)
