# SPDX-License-Identifier: Apache-2.0
"""Plain data out of a pickle of captions, of which nothing is run, in bounds of what such a file may hold."""

from __future__ import annotations

from typing import Any

from stoptome_kernels.stop.pickles import Forbidden, Interpreter, atoms, bounded

__all__ = ["Forbidden", "load"]

# of what a pickle calls, those that make containers; Python 2 wrote sets, and it names its modules in its own way
_CALLED = {
    "builtins set": set, "builtins frozenset": frozenset, "__builtin__ set": set, "__builtin__ frozenset": frozenset,
    "collections OrderedDict": dict, "collections defaultdict": dict,
}  # fmt: skip
_NAMES = {f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "str", "int")}
# how many values and how many letters may come of a byte of the file, references followed
VALUES, LETTERS = 4, 64


def load(data: bytes) -> Any:
    """Return the numbers, texts, lists, tuples, dictionaries and sets in a pickle of any protocol.

    Raises:
        Forbidden: it holds something else.
        ValueError, IndexError, KeyError, TypeError: it is damaged, or no pickle.
    """
    value = _Containers(data).load()
    bounded(value, VALUES * len(data), LETTERS * len(data))
    return value


class _Containers(Interpreter):
    """A pickle in which containers may be made by calls."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._left = len(data)

    def knows(self, name: str) -> bool:
        return name in _CALLED or name in _NAMES

    def call(self, name: str, arguments: tuple) -> Any:
        if name not in _CALLED:
            return super().call(name, arguments)
        if name.endswith("defaultdict"):
            arguments = ()  # what it makes of keys that aren't there
        items = arguments[0] if arguments else ()
        if type(items) not in (list, tuple):
            raise TypeError("a container in it is made of something else than a list")
        self._left -= len(items)  # which may be the same list each time
        if self._left < 0:
            raise ValueError("it makes containers of the same list over and over")
        if _CALLED[name] is not dict:
            return _CALLED[name](atoms([*items]))
        if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in items):  # as Python 2 has it
            raise TypeError("a dictionary in it is not made of pairs")
        return dict(zip(atoms([key for key, _ in items]), [value for _, value in items], strict=True))
