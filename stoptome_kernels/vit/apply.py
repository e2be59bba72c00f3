# SPDX-License-Identifier: Apache-2.0
"""Putting token merging into a vision transformer of another library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..patching.guards import check_method_not_replaced, check_unsharded, warn_of_shared_blocks
from ..patching.subclass import PatchedModule, patch_class, unpatch_class
from ..patching.trial import check_blocks_match
from ..tome.config import ToMeConfig
from ..tome.report import family_of
from ..tome.schedule import parse_r
from .block import AttentionMixin, BlockMixin
from .recording import RecordingEncoder
from .state import TowerInfo, VitBlockContext, VitMergeState
from .tokens import Tokens
from .towers import VitTower


def apply(vit: VitTower, config: ToMeConfig, unmerge: bool, protected: int | None = None) -> nn.Module:
    """Patch the blocks of a vision transformer.

    Args:
        vit: vision transformer to patch; patched already, it gets the new settings.
        config: the settings, without clip merging.
        unmerge: whether all tokens come back after the last block, whoever reads them.
        protected: leading tokens that are never merged, where the model doesn't say; None for its own or the guess.

    Returns:
        The module that calls the blocks.

    Raises:
        ValueError: settings that don't fit the model, or a block that computes something else than its class says.
        RuntimeError: patched too late.
    """
    if config.merge_layers:
        raise ValueError(
            f"merge_layers is for STOP, DGL, CLIP4Clip and TempMe, not for {type(vit.runner).__name__}, which has no "
            "frames to join: leave it out"
        )
    vit = _with_protected(vit, protected)
    if len(set(map(id, vit.blocks))) < len(vit.blocks):
        raise ValueError(f"{type(vit.runner).__name__} runs the same block several times: make copies (copy.deepcopy)")
    rates = parse_r(config.tome_r, len(vit.blocks))
    if vit.tokens is not None and any(rates) and vit.tokens - vit.protected < 2:
        raise ValueError(
            f"an image has {vit.tokens} tokens, of which {vit.protected} are protected: too few to merge any; use "
            "tome_r=0"
        )
    check_unsharded(*vit.around, *vit.blocks)
    before = vit.runner.__dict__.get("tome")
    before = getattr(before, "merging", before)  # of a layer alone, which runs itself
    if any(isinstance(block, PatchedModule) and block.tome.merging is not before for block in vit.blocks):
        raise ValueError(
            f"blocks of {type(vit.runner).__name__} belong to another model, which is already patched, or are copies "
            "of its blocks: remove_tome_patch() from the blocks and patch again, or patch a copy of the model "
            "(copy.deepcopy)"
        )
    warn_of_shared_blocks(vit.around[0], vit.blocks)
    fresh = {index: block for index, block in enumerate(vit.blocks) if not isinstance(block, PatchedModule)}
    parts = [(block, vit.mixins[index]) for index, block in fresh.items()]
    parts += [part for index in fresh for part in vit.attentions[index]]
    for module, _ in parts:
        check_method_not_replaced(module, "forward")
    if vit.runner_mixin is not None and issubclass(vit.runner_mixin, RecordingEncoder):  # which needs its forward
        check_method_not_replaced(vit.runner, "forward")
    try:
        for module, mixin in parts:
            patch_class(module, mixin)
            if isinstance(module, AttentionMixin):
                module.tome_settle()
        _check_blocks(vit, fresh)
    except BaseException:  # Ctrl-C, too
        for module, _ in parts:
            unpatch_class(module)
        raise
    if vit.runner_mixin is not None:
        patch_class(vit.runner, vit.runner_mixin)
    shape = _shape(vit)
    merging = VitMergeState(config, rates, shape, unmerge or vit.dense_output, unmerge)
    vit.runner.tome = merging  # type: ignore[assignment]
    for index, block in enumerate(vit.blocks):
        block.tome = VitBlockContext(merging, index)
    if shape.tokens is not None:
        merging.warn(shape.tokens)
    return vit.runner


def _with_protected(vit: VitTower, protected: int | None) -> VitTower:
    if protected is None:
        return vit
    protected = checks.count(protected, "protected", "leading tokens")
    if not vit.protected_is_default and protected != vit.protected:
        raise ValueError(
            f"protected is {protected}, but {type(vit.runner).__name__} defines {vit.protected} leading tokens (class "
            "token, registers) that must not be merged: leave it out"
        )
    return replace(vit, protected=protected)


def _shape(vit: VitTower) -> TowerInfo:
    return TowerInfo(family_of(vit.runner), vit.protected, vit.width, vit.tokens, vit.needs_positions)


def _check_blocks(vit: VitTower, blocks: dict[int, Any]) -> None:
    """Refuse a block that computes something else than its library's did when this was written.

    Raises:
        TypeError, ValueError: see ``check_blocks_match``.
    """
    nothing = VitMergeState(ToMeConfig(), (0,) * len(vit.blocks), _shape(vit), False)

    def theirs(block: BlockMixin, x: Tensor) -> Tensor:
        args, options = block.tome_example_inputs(x.shape[1])
        given = super(BlockMixin, block).forward(x, *args, **options)  # type: ignore[misc]
        return given[0] if isinstance(given, tuple) else given

    def ours(block: BlockMixin, x: Tensor) -> Tensor:
        args, options = block.tome_example_inputs(x.shape[1])
        block.tome = VitBlockContext(nothing, 0)
        return block.tome_forward(Tokens(x, x.new_ones(x.shape[:2]).float()), *args, **options).x

    check_blocks_match(blocks, (2, vit.protected + 6, vit.width), theirs, ours)
