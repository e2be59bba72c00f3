# SPDX-License-Identifier: Apache-2.0
"""Plain data out of a pickle, none of which is run: the standard library tells the opcodes apart, and here those that
write down numbers, texts and containers are understood. All others are refused, whatever they would do."""

from __future__ import annotations

import codecs
import io
import pickletools
from typing import Any, NamedTuple

# of what a pickle calls, those that make containers; Python 2 wrote sets, and it names its modules in its own way
_CALLED = {
    "builtins set": set, "builtins frozenset": frozenset, "__builtin__ set": set, "__builtin__ frozenset": frozenset,
    "collections OrderedDict": dict, "collections defaultdict": dict,
}  # fmt: skip
_NAMES = {f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "str", "int")}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_PYTHON2 = {"SHORT_BINSTRING", "BINSTRING"}  # UTF-8, read as Latin-1
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_ATOMS = (str, int, float, bytes, bool, type(None))
# how many values and how many letters may come of a byte of the file, references followed
VALUES, LETTERS = 4, 64


class Forbidden(Exception):
    """The name of something that a pickle asks for, and that is no plain data."""


class _Name(NamedTuple):
    """A class or function that a pickle names, as "module name"."""

    name: str


def load(data: bytes) -> Any:
    """Return the numbers, texts, lists, tuples, dictionaries and sets in a pickle of any protocol.

    Raises:
        Forbidden: it holds something else.
        ValueError, IndexError, KeyError, TypeError: it is damaged, or no pickle.
    """
    value = _Machine(data).run()
    _bounded(value, VALUES * len(data), LETTERS * len(data))
    return value


class _Machine:
    """The stack, marks and memo of one pickle."""

    def __init__(self, data: bytes):
        self.data, self.left = data, len(data)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        file = io.BytesIO(self.data)  # its read() gives no more than there is, whatever length it is asked for
        while code := file.read(1):
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                raise ValueError(f"byte {code!r} at {file.tell() - 1} is no opcode")
            if opcode.name == "STRING":  # whose reader in pickletools knows ASCII alone
                self.stack.append(_quoted(file.readline()))
                continue
            argument = opcode.arg.reader(file) if opcode.arg else None
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it breaks off")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _TEXTS or name in _NUMBERS or name in _BYTES:
            stack.append(argument)
        elif name in _GET:
            stack.append(self.memo[argument])
        elif name in _PUT:
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name == "APPEND":
            self._extend([stack.pop()])
        elif name == "APPENDS":
            self._extend(self._since_mark())
        elif name == "SETITEM":
            item = stack.pop()
            self._update([stack.pop(), item])
        elif name == "SETITEMS":
            self._update(self._since_mark())
        elif name == "LIST":
            stack.append(self._since_mark())
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise IndexError("its stack is empty")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "DICT":
            items = self._since_mark()
            stack.append({})
            self._update(items)
        elif name in _PYTHON2:
            stack.append(argument.encode("latin-1").decode())
        elif name == "ADDITEMS":
            self._add(self._since_mark())
        elif name == "FROZENSET":
            stack.append(frozenset(_atoms(self._since_mark())))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name == "REDUCE":
            self._call()
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Forbidden(f"the opcode {name}")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("what it appends to is no list")
        self.stack[-1].extend(values)

    def _update(self, items: list[Any]) -> None:
        keys = _atoms(items[::2])  # the hash of tuples in tuples goes as deep as they do, and ends the process
        if type(self.stack[-1]) is not dict:
            raise TypeError("what it sets items of is no dictionary")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    def _add(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise TypeError("what it adds to is no set")
        self.stack[-1].update(_atoms(values))

    def _name(self, argument: str | None) -> None:
        if argument is None:  # the two are on the stack
            parts = [self.stack.pop(), self.stack.pop()]
            if not all(type(part) is str for part in parts):
                raise TypeError("a name in it is no text")
            argument = f"{parts[1]} {parts[0]}"
        if argument not in _CALLED and argument not in _NAMES:
            raise Forbidden(argument.replace(" ", ".", 1))
        self.stack.append(_Name(argument))

    def _call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        kind = _CALLED.get(called.name) if isinstance(called, _Name) else None
        if kind is None or type(arguments) is not tuple:
            raise Forbidden(
                f"a call of {called.name.replace(' ', '.') if isinstance(called, _Name) else 'no function'}"
            )
        if called.name.endswith("defaultdict"):
            arguments = ()  # what it makes of keys that aren't there
        items = arguments[0] if arguments else ()
        if type(items) not in (list, tuple):
            raise TypeError("a container in it is made of something else than a list")
        self.left -= len(items)  # which may be the same list each time
        if self.left < 0:
            raise ValueError("it makes containers of the same list over and over")
        if kind is not dict:
            self.stack.append(kind(_atoms([*items])))
            return
        self.stack.append({})
        for pair in items:  # as Python 2 has it
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise TypeError("a dictionary in it is not made of pairs")
            self._update([*pair])


def _atoms(values: list[Any]) -> list[Any]:
    for value in values:
        if type(value) not in _ATOMS:
            raise Forbidden(f"a key of type {type(value).__name__}")
    return values


def _quoted(line: bytes) -> str:
    """The argument of STRING, which Python 2 wrote: a quoted literal of bytes, which are UTF-8."""
    text = line.rstrip(b"\n")
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string in it has no quotes")
    return codecs.escape_decode(text[1:-1])[0].decode()


def _bounded(value: Any, values: int, letters: int) -> None:
    """Raise ValueError where a value, each reference to one of its parts counted anew, is larger than this."""
    left = [value]
    while left:
        value = left.pop()
        values -= 1
        if isinstance(value, str | bytes):
            letters -= len(value)
        elif isinstance(value, dict):
            left += value.keys()
            left += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
        if values < len(left) or letters < 0:
            raise ValueError("it refers to the same parts over and over")
