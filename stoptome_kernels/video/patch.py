# SPDX-License-Identifier: Apache-2.0
"""Putting token merging into a video model's visual tower, and taking it out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .. import checks
from ..patching.subclass import PatchedModule, patch_class
from ..tome.config import ToMeConfig
from ..tome.report import family_of, warn_capped
from ..tome.schedule import Schedule
from . import convolutions, tempme, upstream
from .state import VideoMergeState
from .towers import VideoTower, check_tower, find_tower
from .weights import part_classes

# what becomes of the module that calls the blocks, and of a block
_MIXINS: dict[str, tuple[type, type]] = {
    "prompted": (upstream.PromptedTower, upstream.VideoBlock),
    "sequence": (upstream.SequenceTransformer, upstream.VideoBlock),
    "tempme": (tempme.TempMeTransformer, tempme.TempMeBlock),
}


def apply(
    model: nn.Module,
    settings: ToMeConfig,
    scheduled: bool,
    own_prop_attn: bool,
    frames: int | None,
    unmerge: bool,
    protected: int | None,
    fast_prompts: bool = True,
) -> nn.Module:
    """Patch the visual tower of a model.

    Args:
        model: the model, its CLIP, or the tower.
        settings: settings of token merging.
        scheduled: whether the user asked for a schedule; TempMe's model merges by its own otherwise.
        own_prop_attn: whether TempMe's model decides on proportional attention.
        frames: number of frames of a video, where the model doesn't define it.
        unmerge: refused, since these models read class tokens alone.
        protected: number of leading tokens that are never merged; only the model's own number is allowed.
        fast_prompts: whether the convolutions of STOP's temporal prompts run in the frequency domain.

    Returns:
        The module that calls the blocks.

    Raises:
        TypeError, ValueError, RuntimeError: see ``apply_tome_patch``.
    """
    tower = find_tower(model)
    check_tower(tower)
    if unmerge:
        raise ValueError(
            "unmerge is not for STOP, DGL, CLIP4Clip and TempMe, which read class tokens alone: leave it out"
        )
    if tower.kind == "prompted":
        convolutions.check_convolutions(tower)
    elif not fast_prompts:
        own = ": make this one of StopConfig(fast_prompts=False)" if tower.kind == "own" else ": leave it out"
        raise ValueError(f"fast_prompts is for upstream's STOP{own}")
    if protected is not None and protected != tower.protected:
        raise ValueError(
            f"protected is {protected!r}, but a frame of {type(model).__name__} has {tower.protected} tokens that must "
            "not be merged (class token, prompts): leave it out"
        )
    if frames is not None:
        frames = checks.count(frames, "frames", "frames of a video", least=1)
    if frames not in (None, tower.frames) and tower.kind != "sequence" and tower.frames is not None:
        raise ValueError(f"frames is {frames}, but the model is made for videos of {tower.frames} frames; leave it out")
    clips, video = bool(settings.merge_layers), frames or tower.frames or 1
    if clips and not (frames or tower.frames):
        raise ValueError(
            "merge_layers joins frames, but this model does not define the number of frames of a video: give frames=…"
        )

    def schedule(count: int) -> Schedule:
        return settings.schedule(len(tower.blocks), tower.tokens, count, tower.protected, tower.width)

    # the frames of a plain sequence of images have nothing to do with each other until they are joined
    chosen = schedule(video if clips or tower.kind != "sequence" else 1)
    joined = [step.items * step.join if step.join > 1 else 0 for step in chosen.steps]
    if tower.kind == "tempme":
        tempme.find_clip(tower)
        if own_prop_attn:
            settings = replace(settings, prop_attn=tempme.model_prop_attn(tower))
        joined = tempme.missing_embeddings(tower, joined) if settings.frame_pos else joined
    _check_frame_embeddings(tower, joined, settings.frame_pos)
    if tower.kind in _MIXINS:
        fresh = {index: block for index, block in enumerate(tower.blocks) if not isinstance(block, PatchedModule)}
        if tower.kind == "tempme":
            tempme.check_blocks(tower, fresh)
        else:
            upstream.check_blocks(tower, fresh)
            if not isinstance(tower.runner, PatchedModule):
                upstream.check_runner(tower)
        for_runner, for_block = _MIXINS[tower.kind]
        patch_class(tower.runner, for_runner)
        for block in fresh.values():
            patch_class(block, for_block)
            block.tome_classes = part_classes(block)
        for block, step in zip(tower.blocks, chosen.steps, strict=True):
            block.tome_step = step if tower.kind != "tempme" or scheduled else None
    if tower.kind == "prompted":
        convolutions.set_fast(tower, fast_prompts and not chosen.idle)
    _set_frame_embeddings(tower.blocks, joined if settings.frame_pos else [0] * len(joined))
    family = family_of(tower.runner)
    if tower.kind == "tempme":
        tempme.install(tower, settings, chosen if scheduled else None, frames or tower.frames, family)
    else:
        tower.runner.tome = VideoMergeState(settings, chosen, schedule(video), family, tower.protected)
    if tower.kind != "tempme" or scheduled:
        warn_capped(tower.runner.tome.asked, chosen, settings.merge_token_proportions)
    return tower.runner


def remove_additions(model: nn.Module) -> None:
    """Take from a model what its patch put on modules besides their classes: TempMe's schedule, frame embeddings, and
    the settings of a tower of ours, which has a class of its own."""
    tempme.uninstall(model)
    for module in model.modules():
        if hasattr(module, "reset_merging"):
            own: Any = module
            _set_frame_embeddings(own.transformer.resblocks, [0] * len(own.transformer.resblocks))
            own.reset_merging()


def _check_frame_embeddings(tower: VideoTower, rows: list[int], wanted: int) -> None:
    """Raise if a parameter comes or goes after DistributedDataParallel, which would not keep it the same everywhere."""
    parallel = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in tower.around)
    changes = any(
        (_frame_embedding(block) is None) == bool(wanted and n) for block, n in zip(tower.blocks, rows, strict=True)
    )
    if parallel and changes:
        raise RuntimeError("frame_pos adds or removes parameters: patch first, then wrap in DistributedDataParallel")


def _frame_embedding(block: nn.Module) -> nn.Parameter | None:
    return block._parameters.get("tome_frame_embedding")


def _set_frame_embeddings(blocks: Sequence[Any], rows: Sequence[int]) -> None:
    """Give each block that joins items its embedding, keeping one that fits, and take it from all others."""
    for block, count in zip(blocks, rows, strict=True):
        have = _frame_embedding(block)
        if not count:
            if have is not None:
                del block.tome_frame_embedding
        elif have is None or have.shape[1] != count:
            like = block.attn.in_proj_weight
            block.tome_frame_embedding = nn.Parameter(like.new_zeros(1, count, 1, like.shape[1]))
