# SPDX-License-Identifier: Apache-2.0
"""Giving a module that is there already another ``forward``, and taking it away again.

A patched module gets a subclass of its own class, so that parameters, names, isinstance, deepcopy, pickle and
torch.save stay as they were.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from .guards import instance_forward


class PatchedModule:
    """First of the bases of a patched class; what it does not define is the original's."""

    tome_parts: tuple[type, type]  # the mixin and the original class
    tome: Any

    def __reduce_ex__(self, protocol):
        # the class was made at run time: pickle and deepcopy make it again from the two that can be imported
        return rebuild, self.tome_parts, self.__getstate__()  # type: ignore[attr-defined]

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script can't compile {type(self).__name__} while it merges tokens: use torch.export, "
            "torch.compile or torch.jit.trace, or remove_tome_patch() first"
        )

    def tome_undo(self) -> None:
        """Take away what the patch put on the module besides its class and ``tome``."""


def rebuild(mixin: type, original: type):
    """Return an empty module of the patched class, for pickle."""
    return object.__new__(_subclass(mixin, original))


@cache
def _subclass(mixin: type, original: type) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    methods = {
        name: _with_signature(getattr(mixin, name), getattr(original, name))
        for name in dir(mixin)
        if name[0] != "_"
        and inspect.isfunction(getattr(mixin, name))
        and inspect.isfunction(getattr(original, name, None))
    }
    return type(original.__name__, (mixin, original), {**names, **methods, "tome_parts": (mixin, original)})


def _with_signature(method: FunctionType, like: FunctionType) -> FunctionType:
    """Return a copy of a mixin's method with the signature of the one that it stands for, which torch.export and others
    ask for."""
    new = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    new.__kwdefaults__, new.__qualname__, new.__module__ = method.__kwdefaults__, method.__qualname__, method.__module__
    new.__doc__ = method.__doc__ or like.__doc__
    new.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return new


def original_class(module: Any) -> type:
    """Return a module's class before it was patched."""
    if isinstance(module, PatchedModule):
        return module.tome_parts[1]
    # fully_shard, too, gives a module a subclass of its own class; that it came too early is said later, by its name
    return next(
        kind for kind in type(module).__mro__ if not any(base.__name__ == "FSDPModule" for base in kind.__mro__)
    )


def patch_class(module: nn.Module, mixin: type) -> None:
    """Give a module the mixin's methods; one that is patched already stays as it is."""
    if not isinstance(module, PatchedModule):
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]


def patched_modules(root: nn.Module) -> list[Any]:
    """Return all patched modules in a module, itself included, wherever wrappers have put them."""
    return [module for module in root.modules() if isinstance(module, PatchedModule)]


def check_can_unpatch(module: Any) -> None:
    """Raise what keeps a patched module from getting its class back.

    Raises:
        RuntimeError: somebody gave it another class, or another forward, after the patch.
    """
    name = type(module).__name__
    if type(module) is not _subclass(*module.tome_parts):
        raise RuntimeError(
            f"{name} was given another class after it was patched (for example by fully_shard or a parametrization): "
            "undo that first"
        )
    if instance_forward(module) is not None:
        raise RuntimeError(
            f"{name} was given a forward of its own after it was patched, which calls the patched one: remove it first "
            "(accelerate: accelerate.hooks.remove_hook_from_module(model, recurse=True))"
        )


def unpatch_class(module: Any) -> None:
    """Give a patched module its own class back, and take from it what the patch added."""
    if isinstance(module, PatchedModule):
        module.tome_undo()
        module.__class__ = module.tome_parts[1]
        module.__dict__.pop("tome", None)
