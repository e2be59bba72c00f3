# SPDX-License-Identifier: Apache-2.0
"""The towers and blocks of STOP, DGL and CLIP4Clip as they are published, on our operators, and their trial."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..patching.guards import has_hooks_or_forward, has_no_data
from ..patching.subclass import PatchedModule
from ..patching.trial import check_blocks_match
from ..tome.schedule import Step, plan_layers
from .blocks import VideoTokens, run_block
from .state import VideoMergeState
from .towers import VideoTower
from .weights import WeightReadingBlock, part_classes


class VideoBlock(WeightReadingBlock):
    """A block that takes a ``blocks.VideoTokens``; called as before it does as before."""

    def forward(self, x, *args, **options):
        if isinstance(x, VideoTokens):
            return run_block(self, x, *args, **options)  # type: ignore[arg-type]
        if args and isinstance(args[0], Step):
            raise TypeError(
                f"{type(self).__name__} got {type(x).__name__} instead of VideoTokens: a hook made for upstream's "
                "tuples has changed the output of the previous block; let it change VideoTokens.x, or "
                "remove_tome_patch() first"
            )
        return super().forward(x, *args, **options)  # type: ignore[misc]


class PromptedTower(PatchedModule):
    """The visual tower of STOP and DGL, whose ``forward_deep_prompt`` runs the blocks one by one."""

    def forward_deep_prompt(self, x: Tensor, unified_visual_prompt: Tensor) -> Tensor:
        """Map ``x (G + (1 + P + n)·T, B, D)``, tokens of all frames side by side → ``(G + T, B, D)``: the global
        prompts and the class token of each frame, which is all that ``encode_image`` reads."""
        tome: VideoMergeState = self.tome  # type: ignore[attr-defined]
        shared, frames = self.num_tokens, self.video_frames  # type: ignore[attr-defined]
        batch, width = x.shape[1:]
        prompts = shared  # upstream has one number for both
        if tome.schedule.idle:
            tome.record_no_merge(batch, prompts)
            return super().forward_deep_prompt(x, unified_visual_prompt)  # type: ignore[misc]
        tokens = tome.schedule.tokens_in
        if x.shape[0] - shared != frames * tokens:
            given, rest = divmod(x.shape[0] - shared, tokens)
            raise ValueError(
                f"the model is made for videos of {frames} frames (max_frames) of {tokens} tokens, but got "
                f"{'tokens that are no whole number of such frames' if rest else f'{given} frames'}: give videos of "
                f"{frames} frames of the model's size"
            )
        rows = x[shared:].unflatten(0, (-1, frames)).permute(2, 1, 0, 3)  # (B, T, 1 + P + n, D)
        own = torch.cat([rows[:, :, :1], rows[:, :, 1 + prompts :]], 2).flatten(0, 1)
        deep = unified_visual_prompt.to(x.dtype).unflatten(2, (-1, prompts))  # (layers, B, T or 1, P, D)
        deep = deep.expand(-1, batch, frames, -1, width)
        stream = tome.run(self.transformer.resblocks, VideoTokens(own, x[:shared].transpose(0, 1)), deep)  # type: ignore
        classes = stream.x.reshape(batch, frames, width)
        return torch.cat([stream.prompts, classes], 1).transpose(0, 1)  # type: ignore[list-item]


class SequenceTransformer(PatchedModule):
    """The block stack of CLIP4Clip's visual tower, ``(L, B·T, D)`` in and out."""

    def forward(self, x: Tensor, video_frame: int = -1, **options) -> Tensor:
        tome: VideoMergeState = self.tome  # type: ignore[attr-defined]
        if tome.schedule.idle:
            tome.record_no_merge(x.shape[1], 0)
            return super().forward(x, video_frame, **options)  # type: ignore[misc]
        if has_hooks_or_forward(self.resblocks):  # type: ignore[attr-defined]
            raise RuntimeError(
                f"resblocks of {type(self).__name__} have hooks or a forward of their own, which would not be called, "
                "since merging calls the blocks one by one: put them on the blocks, or remove_tome_patch() first"
            )
        clips = bool(tome.config.merge_layers)
        if clips and video_frame > 0 and video_frame != tome.schedule.frames:
            raise ValueError(
                f"video_frame is {video_frame}, but the model was patched to join the frames of videos of "
                f"{tome.schedule.frames} frames: patch again with frames={video_frame}"
            )
        stream = tome.run(self.resblocks, VideoTokens(x.transpose(0, 1)), return_all_tokens=not clips)  # type: ignore[attr-defined]
        # joined frames have no rows of their own but the class tokens, the only ones that the model reads
        out = stream.x.reshape(x.shape[1], 1, -1) if clips else stream.x
        return out.transpose(0, 1)


_TRIED = 3  # frames of a video


def check_blocks(tower: VideoTower, blocks: dict[int, nn.Module]) -> None:
    """Try out each block on two videos, ``(G + L·T, B, D)`` or ``(L, B·T, D)``, as upstream calls it and our way.

    Raises:
        TypeError, ValueError: see ``check_blocks_match``.
    """
    shared, frames, length = tower.prompts, _TRIED, tower.prompts + 4  # as many global prompts as frame prompts
    prompted = tower.kind == "prompted"

    def theirs(block: nn.Module, x: Tensor) -> Tensor:
        return block.forward((x, frames, True) if prompted else (x, frames))[0]

    def ours(block: nn.Module, x: Tensor) -> Tensor:
        block.tome_classes = part_classes(block)  # type: ignore[assignment]
        if not prompted:
            step = plan_layers(0, 1, length).steps[0]
            return run_block(block, VideoTokens(x.transpose(0, 1)), step)[0].x.transpose(0, 1)
        step = plan_layers(0, 1, length, frames, 1 + shared).steps[0]
        rows = x[shared:].unflatten(0, (-1, frames)).permute(2, 1, 0, 3).flatten(0, 1)  # (B·T, L, D)
        stream, _ = run_block(block, VideoTokens(rows, x[:shared].transpose(0, 1)), step, inline_prompts=shared)
        rows = stream.x.unflatten(0, (-1, frames)).permute(2, 1, 0, 3).flatten(0, 1)  # (L·T, B, D)
        return torch.cat([stream.prompts.transpose(0, 1), rows])  # type: ignore[union-attr]

    shape = (shared + length * frames, 2, tower.width) if prompted else (length, 2 * frames, tower.width)
    check_blocks_match(blocks, shape, theirs, ours)


class _Scale(nn.Module):
    """In the place of a block: multiplies."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, given):
        return given[0] * self.factor, *given[1:]


@torch.no_grad()
def check_runner(tower: VideoTower) -> None:
    """Refuse a tower whose own loop does more to global prompts and class tokens than to call one block after another.

    Raises:
        ValueError: it does.
    """
    weight = tower.around[-2].positional_embedding
    if has_no_data(weight):
        return
    factors = [1 + 0.125 * (layer + 1) for layer in range(len(tower.blocks))]
    stack = tower.around[-1]
    blocks = _with_children(stack.resblocks, dict(zip(stack.resblocks._modules, map(_Scale, factors), strict=True)))
    transformer = _with_children(stack, {"resblocks": blocks})
    rng, prompts, frames = torch.Generator().manual_seed(0), tower.prompts, _TRIED
    try:
        if tower.kind == "prompted":
            frames = tower.frames or 1
            x = torch.randn(prompts + tower.tokens * frames, 2, tower.width, generator=rng, device="cpu").to(weight)
            deep = x.new_zeros(len(factors), 2, frames * prompts, tower.width)
            runner = _with_children(tower.runner, {"transformer": transformer})
            got, read = runner.forward_deep_prompt(x, deep), prompts + frames  # global prompts and class tokens
        else:
            x = torch.randn(tower.tokens, 2 * frames, tower.width, generator=rng, device="cpu").to(weight)
            got, read = transformer.forward(x, frames), len(x)
    except (AttributeError, KeyError):  # it looks into its blocks
        return
    want = x[:read] * math.prod(factors)
    if got[:read].shape != want.shape or not torch.allclose(got[:read].float(), want.float(), rtol=0.05, atol=0.05):
        raise ValueError(
            f"{type(tower.runner).__name__} does more than call its blocks one after the other, which merging would "
            "skip: tokens can't be merged in it"
        )


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> Any:
    """Return a shallow copy of a module with other children under these names."""
    twin: Any = copy.copy(module)
    twin.__dict__["_modules"] = module._modules | children
    return twin
