# SPDX-License-Identifier: Apache-2.0
"""Token merging put into a model that is there already, and taken out again.

A model is recognised by what it is made of, not by where it was imported from. Its tower and blocks get a subclass of
their own class, so that parameters, names, isinstance, deepcopy, pickle and torch.save stay as they were; everything
that a forward carries travels through its arguments, so that checkpointing and several forwards before a backward are
exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from .config import ToMeConfig
from .merging import Merging
from .schedule import Rate, plan_layers
from .stream import Stream, run_block
from .towers import Tower, find_tower
from .trace import Trace


class _Patched:
    """First of the bases of a patched class; what it does not define is the original's."""

    def __reduce_ex__(self, protocol):
        # the class was made at run time: pickle and deepcopy make it again from the two that can be imported
        mixin, original = type(self).__bases__
        return _restore, (mixin, original), self.__getstate__()  # type: ignore[attr-defined]


def _restore(mixin: type, original: type):
    return object.__new__(_subclass(mixin, original))


@cache
def _subclass(mixin: type, original: type) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), names)


class _Block(_Patched):
    """A block that takes a :class:`.stream.Stream`; called as before it does as before."""

    def forward(self, x, *args, **options):
        if isinstance(x, Stream):
            return run_block(self, x, *args, **options)  # type: ignore[arg-type]
        return super().forward(x, *args, **options)  # type: ignore[misc]


class _PromptedTower(_Patched):
    """The visual tower of STOP and DGL, whose ``forward_deep_prompt`` runs the blocks one by one."""

    def forward_deep_prompt(self, x: Tensor, unified_visual_prompt: Tensor) -> Tensor:
        """``x (G + (1 + P + n)·T, B, D)``, tokens of all frames side by side → ``(G + T, B, D)``: the global prompts
        and the class token of each frame, which is all that ``encode_image`` reads."""
        tome: Merging = self.tome  # type: ignore[attr-defined]
        if tome.config.off and not tome.config.trace_source:
            return super().forward_deep_prompt(x, unified_visual_prompt)  # type: ignore[misc]
        shared, frames = self.num_tokens, self.video_frames  # type: ignore[attr-defined]
        batch, width = x.shape[1:]
        prompts = shared  # upstream has one number for both
        rows = x[shared:].unflatten(0, (-1, frames)).permute(2, 1, 0, 3)  # (B, T, 1 + P + n, D)
        own = torch.cat([rows[:, :, :1], rows[:, :, 1 + prompts :]], 2).flatten(0, 1)
        deep = unified_visual_prompt.to(x.dtype).unflatten(2, (-1, prompts))  # (layers, B, T or 1, P, D)
        deep = deep.expand(-1, batch, frames, -1, width)
        stream = tome.run(self.transformer.resblocks, Stream(own, x[:shared].transpose(0, 1)), deep)  # type: ignore
        classes = stream.x.reshape(batch, frames, width)
        return torch.cat([stream.prompts, classes], 1).transpose(0, 1)  # type: ignore[list-item]


class _Transformer(_Patched):
    """The block stack of CLIP4Clip's visual tower, ``(L, B·T, D)`` in and out."""

    def forward(self, x: Tensor, *args, **options) -> Tensor:
        tome: Merging = self.tome  # type: ignore[attr-defined]
        if tome.config.off and not tome.config.trace_source:
            return super().forward(x, *args, **options)  # type: ignore[misc]
        clips = bool(tome.config.merge_layers)
        stream = tome.run(self.resblocks, Stream(x.transpose(0, 1)), whole=not clips)  # type: ignore[attr-defined]
        # joined frames have no rows of their own but the class tokens, the only ones that the model reads
        out = stream.x.reshape(x.shape[1], 1, -1) if clips else stream.x
        return out.transpose(0, 1)


_MIXINS: dict[str, type] = {"prompted": _PromptedTower, "sequence": _Transformer}


def apply_tome_patch(
    model: nn.Module,
    tome_r: Rate = 0,
    trace_source: bool = False,
    prop_attn: bool = True,
    merge_layers: Iterable[int] = (),
    merge_frame_nums: Iterable[int] = (),
    merge_token_proportions: Iterable[float] = (),
    frame_pos: int = 0,
    *,
    config: ToMeConfig | None = None,
    frames: int | None = None,
) -> nn.Module:
    """Merge tokens in the visual tower of a model, from its next forward on.

    Args:
        model: a :class:`StopModel`; upstream's STOP, DGL or CLIP4Clip (``CLIP4Clip``, ``CLIP`` or the visual tower),
            recognised by structure. Perhaps inside DistributedDataParallel or torch.compile.
        tome_r: tokens merged from every frame in every layer: an int (0: off), a list with one int a layer, or a pair
            (tuple) ``(r, inflection)``.
        trace_source: keep the source map for :func:`tome_trace`.
        prop_attn: attention counts a merged key as often as the tokens it stands for.
        merge_layers, merge_frame_nums, merge_token_proportions: clip merging, see :class:`ToMeConfig`.
        frame_pos: 1 adds a learnt embedding to each merge layer (new parameters ``tome_frame_embedding``, zero at the
            start: make the optimizer afterwards).
        config: all of these as one value, in place of them.
        frames: of a video, where the model doesn't say (CLIP4Clip's tower alone) and clips are merged.

    Returns:
        The model itself, changed in place. Patching again changes the settings.

    Raises:
        TypeError, ValueError: a model or setting with which tokens can't be merged; the message says what to do.
        RuntimeError: patched too late (after ``fully_shard``), or where another library has put its own forward.

    With ``tome_r=0`` the model computes what it computed before, bit for bit. Class tokens, prompts and the text tower
    are never touched; output shapes stay as they were.
    """
    if config is None:
        config = ToMeConfig(
            tome_r, trace_source, prop_attn, tuple(merge_layers), tuple(merge_frame_nums),
            tuple(merge_token_proportions), frame_pos,
        )  # fmt: skip
    elif not isinstance(config, ToMeConfig):
        raise TypeError(f"config must be a ToMeConfig, got {type(config).__name__}")
    tower = find_tower(model, frames)
    clips = bool(config.merge_layers)
    if clips and tower.frames is None:
        raise ValueError("merge_layers joins frames, but this model doesn't say how many a video has: give frames=…")
    schedule = plan_layers(
        config.tome_r, len(tower.blocks), tower.tokens,
        # the frames of a plain sequence of images have nothing to do with each other until they are joined
        (tower.frames or 1) if clips or tower.kind != "sequence" else 1,
        tower.protected, merge_layers=config.merge_layers, merge_frame_nums=config.merge_frame_nums,
        merge_token_proportions=config.merge_token_proportions, width=tower.width,
    )  # fmt: skip
    if tower.kind in _MIXINS:
        _swap(tower.runner, _MIXINS[tower.kind])
        for block in tower.blocks:
            _swap(block, _Block)
    _set_embeddings(
        tower, [step.items * step.join if step.join > 1 else 0 for step in schedule.steps], config.frame_pos
    )
    tower.runner.tome = Merging(config, schedule)
    return model


def remove_tome_patch(model: nn.Module) -> nn.Module:
    """Take token merging out of a model again: classes, attributes and parameters are as before the patch.

    Returns:
        The model itself. A model that was never patched is left alone.
    """
    tower = find_tower(model, None)
    _set_embeddings(tower, [0] * len(tower.blocks), 0)
    if tower.kind not in _MIXINS:
        tower.runner.reset_merging()
        return model
    for module in (tower.runner, *tower.blocks):
        if isinstance(module, _Patched):
            module.__class__ = type(module).__bases__[1]
            module.__dict__.pop("tome", None)
    return model


def tome_trace(model: nn.Module) -> Trace:
    """The source map of a patched model's last forward: which token every original token ended in.

    Raises:
        RuntimeError: the model is not patched, keeps no trace, or has not run yet.
    """
    runner = find_tower(model, None).runner
    if "tome" not in runner.__dict__:
        raise RuntimeError("the model is not patched: apply_tome_patch(model, tome_r=…, trace_source=True) first")
    return runner.tome.trace()


def apply_from_config(model: nn.Module, task_config: object) -> nn.Module:
    """Patch a model by its ``task_config`` (any object with STOP's flags as attributes, see :func:`add_tome_args`).

    Made to be the last line of a model's constructor: without flags, or with ``tome_r = 0`` and no clip merging, the
    model is left alone.
    """
    config = ToMeConfig.from_args(task_config)
    return model if config.off else apply_tome_patch(model, config=config)


def _swap(module: nn.Module, mixin: type) -> None:
    if not isinstance(module, _Patched):
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]


def _set_embeddings(tower: Tower, rows: list[int], wanted: int) -> None:
    """Give each block that joins items its embedding, keeping one that fits, and take it from all others."""
    for block, count in zip(tower.blocks, rows, strict=True):
        have = block._parameters.get("tome_frame_embedding")
        if not (wanted and count):
            if have is not None:
                del block.tome_frame_embedding
        elif have is None or have.shape[1] != count:
            like = block.ln_1.weight
            block.tome_frame_embedding = nn.Parameter(like.new_zeros(1, count, 1, tower.width))
