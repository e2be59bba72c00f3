# SPDX-License-Identifier: Apache-2.0
"""A vision transformer inside a model, whichever library it is from, and questions about its modules and versions."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..patching.subclass import original_class


@dataclass(frozen=True)
class VitTower:
    """A vision transformer whose tokens can be merged.

    Attributes:
        runner: the module that calls the blocks.
        blocks: blocks from first to last.
        mixins: class that each block is patched with.
        protected: leading tokens that are never merged: class token, registers.
        dense_output: whether the output must keep one row per original token.
        width: embedding dimension.
        tokens: number of tokens of an image; None if that is not known before it comes.
        runner_mixin: class that the runner is patched with; None for none.
        needs_positions: whether attention asks where tokens come from (rotary embeddings).
        around: the modules from the model down to the runner.
        protected_is_default: whether ``protected`` is a guess, since the model does not say; the user may.
        attentions: for each block its attention modules, each with the class that it is patched with.
    """

    runner: nn.Module
    blocks: tuple[Any, ...]
    mixins: tuple[type, ...]
    protected: int
    dense_output: bool
    width: int
    tokens: int | None = None
    runner_mixin: type | None = None
    needs_positions: bool = False
    around: tuple[nn.Module, ...] = ()
    protected_is_default: bool = False
    attentions: tuple[tuple[tuple[Any, type], ...], ...] = ()


def is_instance_of(module: Any, home: str, *names: str) -> bool:
    """Return whether a module's class, or one that it is derived from, is ``home.name``; patched or not. Nothing is
    imported for it."""
    return any(kind.__module__ == home and kind.__name__ in names for kind in type(module).__mro__)


def class_path(module: Any) -> tuple[str, str]:
    """Return the home and the name of a module's class before it was patched."""
    kind = original_class(module)
    return kind.__module__, kind.__qualname__


def has_overridden_method(module: Any, home: str, *methods: str) -> bool:
    """Return whether some of these methods are not those of the library's ``home``, but of a class derived from it, or
    put on the module itself."""
    kind = original_class(module)
    return any(name in module.__dict__ or getattr(kind, name).__module__ != home for name in methods)


def check_own_method(module: Any, library: str, method: str) -> None:
    """Raise if a method is not the library's own, whose code is known.

    Raises:
        RuntimeError: it belongs to somebody's class, or was put on the module.
    """
    kind = original_class(module)
    if getattr(kind, method).__module__.split(".")[0] != library:
        raise RuntimeError(
            f"{kind.__name__} has a {method} of its own, which is not supported while tokens are merged: "
            "remove_tome_patch() first"
        )


def find_submodules(model: nn.Module, home: str, *names: str) -> Iterator[tuple[nn.Module, ...]]:
    """Return the paths from a model down to each module of these classes in it, outermost first."""

    def walk(module: nn.Module, path: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, ...]]:
        path = (*path, module)
        if is_instance_of(module, home, *names):
            yield path
        else:
            for child in module.children():
                yield from walk(child, path)

    return walk(model, ())


def exactly_one(paths: list[tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
    """Return the only path to a tower.

    Raises:
        ValueError: there are several.
    """
    if len(paths) > 1:
        names = ", ".join(type(path[-1]).__name__ for path in paths)
        raise ValueError(f"model has {len(paths)} vision transformers ({names}): patch them one by one")
    return paths[0]


def installed_below(package: str, version: tuple[int, ...]) -> bool:
    """Return whether the installed version of a library is from before ``version``; False if none is installed."""
    try:
        have = (importlib.metadata.version(package) or "").split(".")[: len(version)]  # None of a broken install
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(re.match(r"\d*", part)[0] or 0) for part in have) < version  # type: ignore[index]


def require_version(package: str, least: tuple[int, ...], module: Any) -> None:
    """Raise if a library is too old.

    Raises:
        ImportError: it is; the message names the class that was found, both versions and the way out.
    """
    if installed_below(package, least):
        have, want = importlib.metadata.version(package), ".".join(map(str, least))
        raise ImportError(
            f"merging tokens in {type(module).__name__} needs {package} {want} or later, found {have}: "
            f"pip install -U '{package}>={want}'"
        )
