# SPDX-License-Identifier: Apache-2.0
"""Patching an existing model with token merging, and removing the patch.

A model is recognised by its structure, not by where it was imported from. Its tower and blocks get a subclass of their
own class, so that parameters, names, isinstance, deepcopy, pickle and torch.save work as before. All state of a forward
travels through its arguments, so that checkpointing and several forwards before a backward are exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sized
from dataclasses import fields
from typing import Any

from torch import nn

from . import video, vit
from .patching.subclass import check_can_unpatch, patched_modules, unpatch_class
from .tome.config import ToMeConfig, describe_missing_flags
from .tome.report import Description, logger, warn
from .tome.schedule import Rate
from .tome.trace import Trace


def apply_tome_patch(
    model: nn.Module,
    tome_r: Rate | None = None,
    trace_source: bool = False,
    prop_attn: bool | None = None,
    merge_layers: Iterable[int] = (),
    merge_frame_nums: Iterable[int] = (),
    merge_token_proportions: Iterable[float] = (),
    frame_pos: int = 0,
    *,
    config: ToMeConfig | None = None,
    frames: int | None = None,
    unmerge: bool = False,
    protected: int | None = None,
    fast_prompts: bool = True,
) -> nn.Module:
    """Patch a model in place, so that its visual tower merges tokens from the next forward on.

    Args:
        model: a ``StopModel``; upstream's STOP, DGL or CLIP4Clip (``CLIP4Clip``, ``CLIP`` or the visual tower), or
            TempMe's model (``VTRModel`` or its ``clip``), recognised by structure; a vision transformer of timm,
            open_clip, transformers or torchvision, or a model that contains one; a ``nn.TransformerEncoder`` or
            ``nn.TransformerEncoderLayer`` itself. May be wrapped by DistributedDataParallel or torch.compile.
        tome_r: number of tokens to merge from every frame in every layer: an int (0, the default: off), a list with one
            int per layer, or a pair (tuple) ``(r, inflection)``.
        trace_source: whether to keep the source map for ``tome_trace``.
        prop_attn: proportional attention: a merged key counts as often as the number of tokens that it represents. On
            by default, except for a TempMe model that was made with ``tome_propattn`` off.
        merge_layers: layers of clip merging, see ``ToMeConfig``.
        merge_frame_nums: number of frames joined in each of them, see ``ToMeConfig``.
        merge_token_proportions: per cent of the tokens merged between and within frames, see ``ToMeConfig``.
        frame_pos: 1 adds a learnable embedding to each merge layer: TempMe's own, elsewhere new parameters
            ``tome_frame_embedding``, initialised to zero; create the optimizer after the patch.
        config: all of these settings as one value, instead of them.
        frames: number of frames of a video, where the model doesn't define it: CLIP4Clip's CLIP or tower alone,
            TempMe's ``clip``.
        unmerge: whether a library's vision transformer outputs one row per original token after its last block, the row
            of the token it was merged into. Always so where the model itself reads more than the class token.
        protected: number of leading tokens that are never merged, for ``nn.TransformerEncoder`` and its layer alone;
            the default 1 protects a class token and is harmless without one. Other models define the number
            themselves; then only the same number is allowed.
        fast_prompts: whether the large convolutions of upstream's temporal prompts (``group2-2``) run in the frequency
            domain while tokens are merged, see ``fft_conv3d``, which has no second derivative; of a ``StopModel`` its
            ``StopConfig`` says it, and other models have no such prompts.

    Returns:
        The model itself, changed in place. Patching again changes the settings.

    Raises:
        TypeError, ValueError: an unsupported model or setting; the message says what to do.
        RuntimeError: the patch comes too late (after ``fully_shard``), or another library has replaced a forward.

    Copies of the blocks are tried on random tokens first; a block is refused if it computes something else than its
    class is known for. With ``tome_r=0`` the model computes the same as before, bit for bit. Class tokens, prompts and
    the text tower are never merged; ``encode_image`` returns the same shapes. Forward hooks on the blocks of video
    models see ``video.blocks.VideoTokens`` (TempMe: ``video.tempme.TempMeTokens``), on those of image models
    ``vit.tokens.Tokens``.

    TempMe's model merges by its own published schedule unless one of ``tome_r``, ``merge_layers``,
    ``merge_frame_nums``, ``merge_token_proportions``, ``frame_pos`` or ``config`` is given, which then replace it. The
    model may have TempMe's own patch or none: this function can take the place of ``tome_patch(self.clip, ...)`` in its
    constructor.
    """
    scheduled = (
        config is not None
        or tome_r is not None
        or any(map(_is_given, (merge_layers, merge_frame_nums, merge_token_proportions)))
        or frame_pos != 0
    )
    own_prop_attn = config is None and prop_attn is None
    settings = _settings(
        config, tome_r=0 if tome_r is None else tome_r, trace_source=trace_source,
        prop_attn=True if prop_attn is None else prop_attn, merge_layers=merge_layers,
        merge_frame_nums=merge_frame_nums, merge_token_proportions=merge_token_proportions, frame_pos=frame_pos,
    )  # fmt: skip
    if not isinstance(fast_prompts, bool):
        raise TypeError(f"fast_prompts must be a bool, got {type(fast_prompts).__name__}")
    found = vit.find(_module(model))
    if found is not None and not fast_prompts:
        raise ValueError(f"fast_prompts is for upstream's STOP, not for {type(model).__name__}: leave it out")
    if found is None:
        runner = video.apply(model, settings, scheduled, own_prop_attn, frames, unmerge, protected, fast_prompts)
    elif frames is None:
        runner = vit.apply(found, settings, unmerge, protected)
    else:
        raise ValueError(f"frames is for STOP, DGL, CLIP4Clip and TempMe, not for {type(model).__name__}: leave it out")
    merging = _held(runner)
    if merging is not None and logger.isEnabledFor(logging.INFO):
        logger.info("%s", merging.describe(_name(model)).line)
    return model


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _is_given(value: object) -> bool:
    """Return whether an argument says something: an empty sequence doesn't, an array of NumPy's does."""
    return not (isinstance(value, Sized) and len(value) == 0)


def _settings(config: ToMeConfig | None, **settings) -> ToMeConfig:
    if config is None:
        return ToMeConfig(**settings)
    if not isinstance(config, ToMeConfig):
        raise TypeError(f"config must be a ToMeConfig, got {type(config).__name__}")
    defaults = {field.name: field.default for field in fields(ToMeConfig)}
    given = [name for name, value in settings.items() if value is not defaults[name] and _is_given(value)]
    if given:
        raise ValueError(f"give either config or {', '.join(given)}, not both")
    return config


def remove_tome_patch(model: nn.Module) -> nn.Module:
    """Remove token merging from a model: classes, attributes and parameters are as before the patch.

    All patches inside the model are removed. Wrappers of the model or its blocks stay.

    Args:
        model: a patched model, or a module that contains one. An unpatched model is not changed.

    Returns:
        The model itself.

    Raises:
        RuntimeError: a module was given another class or forward after the patch (by ``fully_shard``, accelerate); then
            nothing is changed.
    """
    modules = patched_modules(_module(model))
    vit.remove_stale_recorders(model)
    for module in modules:
        check_can_unpatch(module)
    video.remove_additions(model)
    for module in model.modules():
        kept = not hasattr(module, "reset_merging") and module.__dict__.get("tome")
        if isinstance(kept, (vit.VitMergeState, video.VideoMergeState)):  # of a runner that kept its class
            del module.tome
    for module in modules:
        unpatch_class(module)
    return model


def tome_trace(model: nn.Module) -> Trace:
    """Return the source map of a patched model's last forward: the token that every original token was merged into.

    Raises:
        RuntimeError: the model is not patched, keeps no trace, or has not run yet.
        ValueError: several towers in it are patched.
    """
    merging = _merging(model)
    if merging is None:
        raise RuntimeError("the model is not patched: apply_tome_patch(model, tome_r=…, trace_source=True) first")
    return merging.trace()


def is_patched(model: nn.Module) -> bool:
    """Return whether the model, or a tower in it, was given to ``apply_tome_patch`` (``tome_r=0`` included)."""
    return bool(_mergings(model))


def describe(model: nn.Module) -> Description:
    """Describe what a model merges: requested and actual tokens after each layer, and the ideal speed-up.

    Returns:
        A description; ``print()`` shows it as a table, ``.line`` is one line for a log, ``.schedule`` has the numbers.

    Raises:
        ValueError: several towers in the model are patched: describe them one by one.
    """
    merging = _merging(model)
    return Description(_name(model)) if merging is None else merging.describe(_name(model))


def _name(model: nn.Module) -> str:
    """Return the class of a model, not of DistributedDataParallel's or torch.compile's wrapper around it."""
    wrapped = next((model._modules[name] for name in ("module", "_orig_mod") if [*model._modules] == [name]), None)
    return type(model).__name__ if wrapped is None else _name(wrapped)


def _held(module: nn.Module) -> Any:
    """Return the settings and schedule that a module holds; None without, and for what others call ``tome``."""
    tome = module.__dict__.get("tome")
    tome = getattr(tome, "merging", tome)  # of a block
    return tome if isinstance(tome, (vit.VitMergeState, video.VideoMergeState)) and tome.family else None


def _mergings(model: nn.Module) -> list[Any]:
    found = (_held(module) for module in _module(model).modules())
    return list({id(merging): merging for merging in found if merging is not None}.values())


def _merging(model: nn.Module) -> Any:
    found = _mergings(model)
    if len(found) > 1:
        raise ValueError(f"{len(found)} towers of {type(model).__name__} are patched: pass them one by one")
    return found[0] if found else None


def apply_from_config(model: nn.Module, task_config: object) -> nn.Module:
    """Patch a model by the flags in its ``task_config``; do nothing at ``tome_r`` 0.

    Intended as the last line of a model's constructor. Without any of the flags the model is not changed and a warning
    is given, which names similar attributes: a flag may be misspelt.

    Args:
        model: as in ``apply_tome_patch``.
        task_config: a namespace, a mapping, or any object with STOP's flags as attributes (see ``add_tome_args``), or
            TempMe's.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError, RuntimeError: as ``apply_tome_patch``.
    """
    config = ToMeConfig.from_args(task_config)
    if lacks := describe_missing_flags(task_config):
        warn(
            f"{type(model).__name__} is not patched: task_config ({type(task_config).__name__}) {lacks}; set tome_r=0 "
            "to merge nothing without this warning"
        )
    return model if config.off else apply_tome_patch(model, config=config)
