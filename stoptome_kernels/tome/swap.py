# SPDX-License-Identifier: Apache-2.0
"""Giving a module that is there already another ``forward``, and taking it away again.

A patched module gets a subclass of its own class, so that parameters, names, isinstance, deepcopy, pickle and
torch.save stay as they were.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Patched:
    """First of the bases of a patched class; what it does not define is the original's."""

    tome_parts: tuple[type, type]  # the mixin and the original class

    def __reduce_ex__(self, protocol):
        # the class was made at run time: pickle and deepcopy make it again from the two that can be imported
        return restore, self.tome_parts, self.__getstate__()  # type: ignore[attr-defined]


def restore(mixin: type, original: type):
    """An empty module of the patched class, for pickle."""
    return object.__new__(_subclass(mixin, original))


@cache
def _subclass(mixin: type, original: type) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "tome_parts": (mixin, original)})


def original(module: Any) -> type:
    """A module's class before it was patched."""
    if isinstance(module, Patched):
        return module.tome_parts[1]
    # fully_shard, too, gives a module a subclass of its own class; that it came too early is said later, by its name
    return next(
        kind for kind in type(module).__mro__ if not any(base.__name__ == "FSDPModule" for base in kind.__mro__)
    )


def swap(module: nn.Module, mixin: type) -> None:
    """Give a module the mixin's methods; one that is patched already stays as it is."""
    if not isinstance(module, Patched):
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]


def check_unswap(module: Any) -> None:
    """Raise what keeps a module from getting its class back.

    Raises:
        RuntimeError: somebody gave it another class after the patch.
    """
    if isinstance(module, Patched) and type(module) is not _subclass(*module.tome_parts):
        raise RuntimeError(
            f"{type(module).__name__} was given another class after it was patched (by fully_shard or a "
            "parametrization, say): undo that first"
        )


def unswap(module: Any) -> None:
    """Give a patched module its own class back, and take from it what the patch added."""
    if isinstance(module, Patched):
        module.__class__ = module.tome_parts[1]
        module.__dict__.pop("tome", None)
