# SPDX-License-Identifier: Apache-2.0
"""Putting token merging into a vision transformer of another library, and taking it out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..tome.config import ToMeConfig
from ..tome.schedule import parse_r
from ..tome.swap import Patched, check_unswap, swap, unswap
from ..tome.towers import check_free, check_unsharded, off_by
from ..tome.trace import Trace
from .block import Block
from .tokens import Layer, Merging, Tokens
from .towers import Vit


def apply(vit: Vit, config: ToMeConfig, unmerge: bool, protected: int | None = None) -> None:
    """Patch the blocks.

    Args:
        vit: what to patch; patched already, it gets the new settings.
        config: the settings, without clip merging.
        unmerge: give all tokens back behind the last block, whoever reads them.
        protected: leading tokens that are never merged, where the model doesn't say; None for its own or the guess.

    Raises:
        ValueError: settings that don't fit the model, or a block that computes something else than its class says.
        RuntimeError: patched too late.
    """
    if config.merge_layers:
        raise ValueError(
            "merge_layers joins the frames of a video, which images don't have: leave it out (it is for STOP, DGL, "
            "CLIP4Clip and TempMe)"
        )
    vit = _protecting(vit, protected)
    if len(set(map(id, vit.blocks))) < len(vit.blocks):
        raise ValueError(f"{type(vit.runner).__name__} runs the same block several times, as one module: copy it")
    rates = parse_r(config.tome_r, len(vit.blocks))
    if vit.tokens is not None and any(rates) and vit.tokens - vit.protected < 2:
        raise ValueError(
            f"an image has {vit.tokens} tokens of which {vit.protected} are protected: none are left to merge; use "
            "tome_r=0"
        )
    check_unsharded(*vit.around, *vit.blocks)
    for block in vit.blocks:
        check_free(block, "forward")
    if hasattr(vit.runner_mixin, "forward"):
        check_free(vit.runner, "forward")
    fresh = [module for module in (vit.runner, *vit.blocks) if not isinstance(module, Patched)]
    merging = Merging(config, rates, vit.protected, unmerge or vit.dense, vit.positions, unmerge)
    try:
        for block, mixin in zip(vit.blocks, vit.mixins, strict=True):
            swap(block, mixin)
        if fresh:
            _probe(vit)
    except Exception:
        for module in fresh:
            unswap(module)
        raise
    if vit.runner_mixin is not None:
        swap(vit.runner, vit.runner_mixin)
    _place(vit, merging)


def _protecting(vit: Vit, protected: int | None) -> Vit:
    if protected is None:
        return vit
    if isinstance(protected, bool) or not isinstance(protected, int) or protected < 0:
        raise ValueError(f"protected must be an int of 0 or more (leading tokens), got {protected!r}")
    if not vit.guess and protected != vit.protected:
        raise ValueError(
            f"protected is {protected}, but {type(vit.runner).__name__} says itself that it has {vit.protected} "
            "leading tokens (class token, registers) that must not be merged: leave it out"
        )
    return replace(vit, protected=protected)


def _place(vit: Vit, merging: Merging) -> None:
    vit.runner.tome = merging  # type: ignore[assignment]
    for index, block in enumerate(vit.blocks):
        block.tome = Layer(merging, index)


def remove(vit: Vit) -> None:
    """Take the patch out: classes and attributes are as before."""
    for module in (vit.runner, *vit.blocks):
        check_unswap(module)
    for module in (vit.runner, *vit.blocks):
        unswap(module)
    vit.runner.__dict__.pop("tome", None)


def trace(vit: Vit) -> Trace:
    """The source map of the last forward.

    Raises:
        RuntimeError: the model is not patched, keeps no trace, or has not run yet.
    """
    layer: Layer | None = vit.blocks[0].__dict__.get("tome")
    if layer is None:
        raise RuntimeError("the model is not patched: apply_tome_patch(model, tome_r=…, trace_source=True) first")
    return layer.merging.trace()


def _probe(vit: Vit) -> None:
    """Send random tokens through each block's own forward and through ours, and refuse a block that computes something
    else than its library's did when this was written.

    Raises:
        ValueError: the results differ by more than rounding.
    """
    merging = Merging(ToMeConfig(), (0,) * len(vit.blocks), vit.protected, False, vit.positions)
    for index, block in enumerate(vit.blocks):
        weight = next(p for p in block.parameters() if p.is_floating_point())
        if weight.device.type == "meta":
            return
        rng = torch.Generator().manual_seed(index)  # the program's own random numbers stay as they are
        tokens = vit.protected + 6
        x = torch.randn(2, tokens, vit.width, generator=rng).to(weight)
        args, options = block.tome_sample(tokens)
        block.tome = Layer(merging, index)
        # by the weights' dtype, whatever the caller's autocast
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), _evaluating(block):
            try:
                want = super(Block, block).forward(x, *args, **options)
            except RuntimeError:
                return  # float16 weights on a CPU outside of autocast: nothing to compare with
            want = want[0] if isinstance(want, tuple) else want
            try:
                got = block.tome_run(Tokens(x, x.new_ones(x.shape[:2], dtype=torch.float32)), *args, **options).x
            except AttributeError as error:
                raise TypeError(
                    f"block {index}, a {type(block).__name__}, is not made of what its class is made of in the "
                    f"versions that are known ({error}): another version of its library may do"
                ) from error
        gap = off_by(got, want, weight.dtype)
        if gap is not None:
            raise ValueError(
                f"block {index}, a {type(block).__name__}, computes something else than its class does in the versions "
                f"that are known (off by {gap:.2g} on random tokens): tokens can't be merged in it"
            )


@contextmanager
def _evaluating(block: Any) -> Iterator[None]:
    """Without dropout, for a moment."""
    modes = [(module, module.training) for module in block.modules()]
    try:
        block.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
