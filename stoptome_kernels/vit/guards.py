# SPDX-License-Identifier: Apache-2.0
"""Refusals of what a hook, a caller or a replaced method asks of a patched block."""

from __future__ import annotations

from typing import Any

_TAKE_OFF = "remove that, or remove_tome_patch() first"


def reject_other_arguments(attn: Any, args: tuple, options: dict) -> None:
    """Raise if somebody, a hook say, asks more of an attention than its block does.

    Raises:
        ValueError: with the argument's name.
    """
    if args:
        raise ValueError(f"{type(attn).__name__} got {len(args)} more arguments than its block passes: {_TAKE_OFF}")
    _refuse(attn, options, f"which is not supported while tokens are merged: {_TAKE_OFF}")


def reject_replaced_method(block: Any, method: str) -> None:
    """Raise if a method of a block's class, which merging has its own code for, was replaced on the block itself.

    Raises:
        RuntimeError: it was.
    """
    if method in block.__dict__:
        raise RuntimeError(
            f"{type(block).__name__} has a {method} of its own, which would have no effect while tokens are merged: "
            f"{_TAKE_OFF}"
        )


def reject_masks(block: Any, **given) -> None:
    """Raise if a mask is given: mask positions do not exist after merging.

    Raises:
        ValueError: one of these arguments is given.
    """
    way_out = "call the model without it, or remove_tome_patch() first"
    _refuse(block, given, f"which is not supported while tokens are merged: {way_out}")


def _refuse(module: Any, given: dict, why: str) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{type(module).__name__} got {name}, {why}")
