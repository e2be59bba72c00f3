# SPDX-License-Identifier: Apache-2.0
"""Reading what torch.save and torch.jit.save write, without running anything that the file holds.

Both write a zip archive: ``data.pkl``, a pickle of the values, and beside it each tensor's memory with a CRC-32 that
torch.load doesn't compare. A pickle is a program, and so is what torch.jit.load reads: the first goes through
``torch.load(weights_only=True)``, the second is interpreted here, by the few instructions that tensors take.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MAGIC = b"PK\x03\x04"
_CHUNK = 1 << 20
_FOLDER = 0x10  # of MS-DOS's attributes, which zip files have
_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip


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
            return torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            _verify(archive, os.path.getsize(path))
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
            return _tensors(archive) if scripted else torch.load(path, "cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what the parsers of zip and pickle raise of damaged bytes is not limited
        raise ValueError(
            f"{path} can't be read as weights ({_reason(error)}); give a whole file that torch.save or torch.jit.save "
            "wrote, of the state_dict and not of the model"
        ) from error


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
    if not any(record.CRC for record in records):
        return  # written without checksums
    for record in records:
        with archive.open(record) as data:
            while data.read(_CHUNK):  # zipfile compares at the end
                pass


# -- TorchScript ------------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """A class or function that the pickle names, which is neither looked up nor imported."""

    name: str


class _Storage(NamedTuple):
    """The memory of tensors, by the record that holds it."""

    values: Tensor


class _Object:
    """An object of a TorchScript class: its attributes, without its methods."""

    def __init__(self) -> None:
        self.attributes: dict = {}


def _tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Return the parameters and buffers of the module in a TorchScript archive, by their names in its state_dict."""
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages: dict[str, _Storage] = {}

    def storage(saved: Any) -> _Storage:
        kind, name, key, _device, _count = saved
        if kind != "storage" or not isinstance(key, str):
            raise ValueError("it names memory in an unknown way")
        if key not in storages:
            dtype = _DTYPES[name.name.removeprefix("torch ").removesuffix("Storage")]
            data = bytearray(archive.read(f"{root}data/{key}"))
            storages[key] = _Storage(torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype))
        return storages[key]

    found: dict[str, Tensor] = {}
    module = _unpickled(archive.read(f"{root}data.pkl"), storage)
    left, seen = [("", module)], set()
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


def _unpickled(data: bytes, storage: Callable[[Any], _Storage]) -> Any:
    """Return the value of a pickle that TorchScript wrote; any other is refused.

    Nothing is looked up, imported or called but what is below: opcodes are told apart by the standard library, which
    doesn't execute them.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    value: Any

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for opcode, value, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(value)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                item = stack.pop()
                stack[-2][stack.pop()] = item
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_Name(value))
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "NEWOBJ":
                _arguments, kind = stack.pop(), stack.pop()
                if not isinstance(kind, _Name) or not kind.name.startswith("__torch__"):
                    raise ValueError(f"it asks for {_name(kind)}")
                stack.append(_Object())
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Object):
                    raise ValueError("it changes what is no object of TorchScript")
                if isinstance(
                    state, dict
                ):  # a class with a __setstate__ of its own may take anything, and is left empty
                    stack[-1].attributes = state
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_called(function, arguments))
            case name:
                raise ValueError(f"its pickle holds {name}, which TorchScript doesn't write")
    raise ValueError("its pickle has no end")


def _called(function: Any, arguments: Any) -> Any:
    """Return what TorchScript means by a function applied to arguments."""
    match function, arguments:
        case _Name("torch._utils _rebuild_tensor_v2"), (_Storage(values), offset, size, stride, _, *_):
            return _view(values, offset, size, stride)
        case _Name("torch._utils _rebuild_parameter"), (Tensor() as value, *_):
            return value
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name(name), (value, *_) if name.startswith("torch.jit._pickle "):
            return value  # a list or a dictionary, and the type that TorchScript knows it by
    raise ValueError(f"it asks for {_name(function)}")


def _name(asked: Any) -> str:
    return asked.name.replace(" ", ".") if isinstance(asked, _Name) else f"a {type(asked).__name__} as a function"


def _view(values: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has no valid shape")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) > len(values) or (0 not in size and last >= len(values)):
        raise ValueError("a tensor is longer than its data")
    return values.as_strided(size, stride, offset)
