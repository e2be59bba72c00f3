# SPDX-License-Identifier: Apache-2.0
"""Reading what torch.save, torch.jit.save and safetensors write, without running anything that the file holds.

Both write a zip archive: ``data.pkl``, a pickle of the values, and next to it each tensor's memory with a CRC-32.
Before version 1.6 torch.save wrote one pickle after another, then the memory. A pickle is a program, and so is what
torch.jit.load reads; here pickles are interpreted, by the few instructions that tensors take, and one parser alone sees
a file, so that what was checked is what is used.
"""

from __future__ import annotations

import codecs
import math
import os
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from .pickles import Forbidden, Interpreter, Name, bounded

_MAGIC = b"PK\x03\x04"
_LEGACY = 0x1950A86A20F9469CFC6C  # the first value of a file from before torch 1.6
_CHUNK = 1 << 20
# values and letters that a pickle may hold for each of its bytes, references followed
_VALUES, _LETTERS = 4, 64
_NAME, _DEPTH = 200, 100  # the longest name of a module, and how deep modules may lie in each other
_DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in (
        ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
        ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8),
        ("Byte", torch.uint8), ("Bool", torch.bool), ("ComplexFloat", torch.complex64),
        ("ComplexDouble", torch.complex128),
    )
}  # fmt: skip
_KNOWN = {
    *_DTYPES, "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size",
    "collections OrderedDict",
}  # fmt: skip


def load(path: str | os.PathLike, mmap: bool = False) -> Any:
    """Return what is in a file of torch.save, or the tensors of a TorchScript archive or of safetensors by name, on the
    CPU.

    Parameters come as tensors, ordered dictionaries as dictionaries. Whatever is read of an archive is compared with
    its checksum. Files from before torch 1.6 have none, nor do those that were written with
    ``torch.serialization.set_crc32_options(False)``, nor those of safetensors.

    Args:
        path: path of the file.
        mmap: tensors stay in the file until they are used, where it is an archive.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is of another kind, or holds more than dense tensors and plain values, or it is
            of safetensors, which isn't installed. The message is one line that begins with the path.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with open(path, "rb") as file:
            begin, length = file.read(9), os.path.getsize(path)
            if _of_safetensors(begin, length):
                return _safe(path)
            if begin[: len(_MAGIC)] != _MAGIC:
                file.seek(0)
                return _legacy(file, length)
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, path, mmap).load()
    except ImportError as error:
        raise ValueError(f"{path} is a file of safetensors, which isn't installed: pip install safetensors") from error
    except Exception as error:  # what the parsers of zip and pickle raise of damaged bytes is not limited
        what, way_out = _as_text(path) or (
            _reason(error),
            "give a complete file of torch.save or torch.jit.save, with the state_dict and not the model",
        )
        raise ValueError(f"{path} can't be read as weights ({what}); {way_out}") from error


def _of_safetensors(begin: bytes, length: int) -> bool:
    """Return whether a file that begins so is one of safetensors: the length of its header, and that, an object of
    JSON."""
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= length - 8


def _safe(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # the package does without

    return load_file(path)


def _as_text(path: str) -> tuple[str, str] | None:
    """Return what a file is that begins as text, and the way out; None for any other, and for one that can't be
    read."""
    try:
        with open(path, "rb") as file:
            begin = codecs.getincrementaldecoder("utf-8-sig")().decode(file.read(1024)).lstrip()
    except (OSError, UnicodeDecodeError):
        return None
    if not begin or not all(letter.isprintable() or letter.isspace() for letter in begin):
        return None
    if begin.startswith("version https://git-lfs"):
        return "it is git-lfs's pointer to a file, no weights", "fetch the file that it stands for by git lfs pull"
    if begin.lower().startswith(("<!doctype html", "<html", "<head", "<!--")):
        return "it is an HTML page, such as that of a login, no weights", "download the file of weights itself"
    return f"it is a text file, no weights: it begins {one_line(begin)[:40]!r}", "give a file of torch.save"


def _reason(error: Exception) -> str:
    """Return the sentence of an error that says what is wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = one_line(error).split(". ")[0][:200].rstrip(".")
    if isinstance(error, Forbidden):
        return f"it contains {text}, which is not allowed"
    return f"it has no key {text}" if isinstance(error, KeyError) else text or type(error).__name__


def one_line(said: object) -> str:
    """Return a message on one line, with a mark in place of what a terminal would obey: names in it are a file's."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(str(said).split())
    )


# -- pickles of tensors -----------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """The memory of tensors."""

    values: Tensor


class _Object:
    """An object of a TorchScript class: its attributes, without its methods."""

    def __init__(self) -> None:
        self.attributes: dict = {}


class _Tensors(Interpreter):
    """A pickle of tensors and plain values.

    Args:
        data: the pickle, or a file that stands before it.
        memory: gives the memory of a key, as a tensor of a dtype, for the number of elements that the pickle tells;
            asked once for each key.

    Attributes:
        storages: the memory by its keys.
    """

    def __init__(self, data: bytes | bytearray | IO[bytes], memory: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(data)
        self._memory = memory
        self.storages: dict[str, Tensor] = {}

    def knows(self, name: str) -> bool:
        return name in _KNOWN

    def call(self, name: str, arguments: tuple) -> Any:
        match name, arguments:
            case "torch._utils _rebuild_tensor_v2", (_Storage(values), offset, tuple(size), tuple(stride), *_):
                return _view(values, offset, size, stride)
            case "torch._utils _rebuild_parameter", (Tensor() as value, *_):
                return value
            case "torch Size", (tuple(size),):
                return size
            case "collections OrderedDict", ():
                return {}
        return super().call(name, arguments)

    def build(self, target: Any, state: Any) -> None:
        if type(target) is not dict:  # a state_dict's attribute _metadata means nothing here
            super().build(target, state)

    def outside(self, saved: Any) -> _Storage:
        match saved:
            case ("storage", Name(name), str(key), str(), int(count), *_) if name in _DTYPES:
                dtype = _DTYPES[name]
                if key not in self.storages:
                    self.storages[key] = self._memory(key, dtype, count)
                values = self.storages[key]
                if values.dtype != dtype or len(values) < count:
                    raise ValueError("a tensor's storage has another dtype or length")
                return _Storage(values)
        raise ValueError("it refers to a storage in an unknown way")


class _Script(_Tensors):
    """The pickle of a TorchScript archive, which holds objects of its classes too."""

    def knows(self, name: str) -> bool:
        return name.startswith(("__torch__ ", "__torch__.", "torch.jit._pickle ")) or super().knows(name)

    def make(self, name: str, arguments: tuple) -> Any:
        return _Object() if name.startswith("__torch__") else super().make(name, arguments)

    def build(self, target: Any, state: Any) -> None:
        if not isinstance(target, _Object):
            super().build(target, state)
        elif type(state) is dict:  # a class with a __setstate__ of its own may take anything, and is left empty
            target.attributes = state

    def call(self, name: str, arguments: tuple) -> Any:
        if name.startswith("torch.jit._pickle ") and arguments:
            return arguments[0]  # a list or a dictionary, and the type that TorchScript knows it by
        return super().call(name, arguments)


def _view(values: Tensor, offset: Any, size: tuple, stride: tuple) -> Tensor:
    """Return the tensor of a shape and strides in some memory."""
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has an invalid shape, stride or offset")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) > len(values) or (0 not in size and last >= len(values)):
        raise ValueError("a tensor is longer than its data")
    return values.as_strided(size, stride, values.storage_offset() + offset)


def _within(value: Any, length: int) -> Any:
    """Return a value that is no larger than a pickle of that length may hold."""
    bounded(value, _VALUES * length + 1000, _LETTERS * length + 1000)
    return value


# -- archives ---------------------------------------------------------------------------------------------------------


class _Archive:
    """A zip archive of torch.save or torch.jit.save."""

    def __init__(self, archive: zipfile.ZipFile, path: str, mmap: bool):
        self._archive, self._path = archive, path
        self._length = os.path.getsize(path)
        roots = [name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1:
            raise ValueError(f"it has {len(roots)} files data.pkl, need 1")
        self._root = roots[0]
        self._check()
        self._memory: Any = torch.UntypedStorage.from_file(path, False, self._length) if mmap else None

    def load(self) -> Any:
        """Return the values of an archive of torch.save, or the tensors of the module in one of TorchScript."""
        names, data = {*self._archive.namelist()}, self._read("data.pkl")
        if f"{self._root}byteorder" in names and self._read("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        if f"{self._root}constants.pkl" in names:
            return _of_module(_Script(data, self._storage).load())
        return _within(_Tensors(data, self._storage).load(), len(data))

    def _check(self) -> None:
        """Raise ValueError for records that torch doesn't write; the code of TorchScript is never read."""
        records = [r for r in self._archive.infolist() if not r.filename.startswith(f"{self._root}code/")]
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch never does")
        if sum(record.file_size for record in records) > self._length:
            raise ValueError("its records are longer than the file")
        if len({record.filename for record in records}) < len(records):
            raise ValueError("two of its records have the same name")
        if not any(record.CRC for record in records):  # written without checksums
            for record in records:
                record.CRC = None  # type: ignore[assignment]  # zipfile compares none, then

    def _read(self, name: str) -> bytearray:
        """Return a record, compared with its checksum."""
        record = self._archive.getinfo(self._root + name)
        data, at = bytearray(record.file_size), 0
        with self._archive.open(record) as file:
            while part := file.read(_CHUNK):  # zipfile compares at the end
                data[at : at + len(part)] = part
                at += len(part)
        if at != record.file_size:
            raise ValueError(f"{name} is truncated")
        return data

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return the memory of a key."""
        name = f"data/{key}"
        data = _numbers(self._read(name)) if self._memory is None else self._mapped(self._memory, name)
        if len(data) % dtype.itemsize:
            raise ValueError("a tensor's storage is not a whole number of elements")
        return (data.clone() if data.data_ptr() % dtype.itemsize else data).view(dtype)

    def _mapped(self, memory: torch.UntypedStorage, name: str) -> Tensor:
        """Return the bytes of a record where they lie in the file, compared with its checksum. They are storage of
        their own: what saves one of them saves no others."""
        record = self._archive.getinfo(self._root + name)
        with self._archive.open(record) as file:
            while file.read(_CHUNK):
                pass
        with open(self._path, "rb") as file:
            file.seek(record.header_offset + 26)
            name_length, extra = struct.unpack("<HH", file.read(4))
        begin = record.header_offset + 30 + name_length + extra
        piece = memory[begin : begin + record.file_size]
        return torch.empty(0, dtype=torch.uint8).set_(piece, 0, (record.file_size,), (1,))


def _numbers(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _of_module(module: Any) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module of TorchScript, by their names in its state_dict."""
    found: dict[str, Tensor] = {}
    left, seen = [("", 0, module)], set()
    while left:
        prefix, depth, module = left.pop()
        if not isinstance(module, _Object) or id(module) in seen:
            continue
        seen.add(id(module))
        for name in module.attributes:
            if type(name) is not str or len(name) > _NAME or depth > _DEPTH:
                raise ValueError("a module in it has an invalid name or is nested too deeply")
        inner = [(name, value) for name, value in module.attributes.items() if isinstance(value, _Object)]
        found |= {f"{prefix}{n}": value for n, value in module.attributes.items() if isinstance(value, Tensor)}
        left += [(f"{prefix}{name}.", depth + 1, value) for name, value in reversed(inner)]
    return found


# -- files from before torch 1.6 --------------------------------------------------------------------------------------


def _legacy(file: IO[bytes], length: int) -> Any:
    """Return the values of one pickle after another: a mark, two of no meaning here, the values, and the keys of
    their memory, which follows."""

    def blank(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if not 0 <= count * dtype.itemsize <= length:
            raise ValueError("a tensor is longer than the file")
        return _numbers(bytearray(count * dtype.itemsize)).view(dtype)

    if Interpreter(file).load() != _LEGACY:
        raise ValueError("it is not a file of torch.save")
    for _ in range(2):  # the version, and what the machine was like
        Interpreter(file).load()
    tensors = _Tensors(file, blank)
    value = _within(tensors.load(), length)
    keys = Interpreter(file).load()
    if type(keys) is not list or sorted(keys) != sorted(tensors.storages):
        raise ValueError("the storages of its tensors are incomplete")
    for key in keys:
        values = tensors.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        data = bytearray(file.read(values.nbytes))
        if (count, len(data)) != (len(values), values.nbytes):
            raise ValueError("it is truncated")
        if count:
            values.copy_(torch.frombuffer(data, dtype=values.dtype))
    return value
