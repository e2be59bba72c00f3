# SPDX-License-Identifier: Apache-2.0
"""Pickles, which are programs, interpreted without running anything: the standard library tells the opcodes apart, and
here those that write down numbers, texts and containers are understood. What a pickle names is not looked up."""

from __future__ import annotations

import codecs
import io
import pickletools
from typing import IO, Any, NamedTuple, NoReturn

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_PYTHON2 = {"SHORT_BINSTRING", "BINSTRING"}  # UTF-8, read as Latin-1
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ATOMS = (str, int, float, bytes, bool, type(None))


class Forbidden(ValueError):
    """The name of something that a pickle asks for and that its interpreter has no meaning for."""


class Name(NamedTuple):
    """A class or function that a pickle names, as "module name"."""

    name: str


class Interpreter:
    """The stack, marks and memo of one pickle. What it names, calls and makes is refused, but for what a subclass gives
    a meaning.

    Args:
        data: the pickle, of any protocol, or a file that is positioned before it, and after it in the end.
    """

    def __init__(self, data: bytes | bytearray | IO[bytes]):
        # read() gives no more than there is, whatever length it is asked for
        self._file = io.BytesIO(data) if isinstance(data, bytes | bytearray) else data
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Return the value of the pickle.

        Raises:
            Forbidden: it holds something else than plain data and what the subclass knows.
            ValueError, IndexError, KeyError, TypeError: it is damaged, or no pickle.
        """
        file = self._file
        while code := file.read(1):
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                raise ValueError(f"byte {code!r} at {file.tell() - 1} is not an opcode")
            if opcode.name == "STRING":  # whose reader in pickletools knows ASCII alone
                self._stack.append(_quoted(file.readline()))
                continue
            argument = opcode.arg.reader(file) if opcode.arg else None
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it is truncated")

    # -- what subclasses give a meaning -------------------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        """Return whether "module name" may be named at all."""
        return False

    def call(self, name: str, arguments: tuple) -> Any:
        """Return what a function gives."""
        _refuse(f"a call of {_shown(name)}")

    def make(self, name: str, arguments: tuple) -> Any:
        """Return a new object of a class."""
        _refuse(f"an object of {_shown(name)}")

    def build(self, target: Any, state: Any) -> None:
        """Give an object its state."""
        _refuse(f"a state for a {type(target).__name__}")

    def outside(self, saved: Any) -> Any:
        """Return what lies outside of the pickle."""
        _refuse("the opcode BINPERSID")

    # -- opcodes ------------------------------------------------------------------------------------------------------

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _TEXTS or name in _NUMBERS or name in _BYTES:
            stack.append(argument)
        elif name in _GET:
            stack.append(self._memo[argument])
        elif name in _PUT:
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name == "MARK":
            self._marks.append(len(stack))
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
        elif name in _TUPLES:
            if len(stack) < _TUPLES[name]:
                raise IndexError("its stack is empty")
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "DICT":
            items = self._since_mark()
            stack.append({})
            self._update(items)
        elif name in _PYTHON2:
            stack.append(argument.encode("latin-1").decode())
        elif name == "ADDITEMS":
            self._add(self._since_mark())
        elif name == "FROZENSET":
            stack.append(frozenset(atoms(self._since_mark())))
        elif name == "POP":
            stack.pop()
        else:
            self._more(name, argument)

    def _more(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, Name) or type(arguments) is not tuple:
                _refuse("a call of something that is not a function")
            stack.append((self.call if name == "REDUCE" else self.make)(called.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self.outside(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            _refuse(f"the opcode {name}")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError("it appends to something that is not a list")
        self._stack[-1].extend(values)

    def _update(self, items: list[Any]) -> None:
        keys = atoms(items[::2])
        if type(self._stack[-1]) is not dict:
            raise TypeError("it sets items of something that is not a dictionary")
        self._stack[-1].update(zip(keys, items[1::2], strict=True))

    def _add(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not set:
            raise TypeError("it adds to something that is not a set")
        self._stack[-1].update(atoms(values))

    def _name(self, argument: str | None) -> None:
        if argument is None:  # the two are on the stack
            parts = [self._stack.pop(), self._stack.pop()]
            if not all(type(part) is str for part in parts):
                raise TypeError("a name in it is not a string")
            argument = f"{parts[1]} {parts[0]}"
        if not self.knows(argument):
            _refuse(_shown(argument))
        self._stack.append(Name(argument))


def atoms(values: list[Any]) -> list[Any]:
    """Return keys or members as they are, but no containers: the hash of tuples in tuples goes as deep as they do, and
    ends the process."""
    for value in values:
        if type(value) not in _ATOMS:
            _refuse(f"a key of type {type(value).__name__}")
    return values


def _refuse(what: str) -> NoReturn:
    raise Forbidden(what)


def _shown(name: str) -> str:
    return name.replace(" ", ".", 1)


def _quoted(line: bytes) -> str:
    """Return the argument of STRING, which Python 2 wrote: a quoted literal of bytes, which are UTF-8."""
    text = line.rstrip(b"\n")
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string in it has no quotes")
    return codecs.escape_decode(text[1:-1])[0].decode()


def bounded(value: Any, values: int, letters: int) -> None:
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
            raise ValueError("it refers to the same parts too often")
