# SPDX-License-Identifier: Apache-2.0
"""Patching an existing model with token merging, and removing the patch.

A model is recognised by its structure, not by where it was imported from. Its tower and blocks get a subclass of their
own class, so that parameters, names, isinstance, deepcopy, pickle and torch.save work as before. All state of a forward
travels through its arguments, so that checkpointing and several forwards before a backward are exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence, Sized
from dataclasses import fields, replace
from typing import Any

from torch import nn

from .. import checks, vit
from . import tempme, upstream
from .config import ToMeConfig, nothing_said
from .merging import Merging
from .report import Description, family_of, logger, warn, warn_capped
from .schedule import Rate, Schedule
from .swap import Patched, check_unswap, patched, swap, unswap
from .towers import Tower, check_tower, find_tower
from .trace import Trace
from .weights import known_classes

# what becomes of the module that calls the blocks, and of a block
_MIXINS: dict[str, tuple[type, type]] = {
    "prompted": (upstream.PromptedTower, upstream.StreamBlock),
    "sequence": (upstream.SequenceTransformer, upstream.StreamBlock),
    "tempme": (tempme.TempMeTransformer, tempme.TempMeBlock),
}


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

    Returns:
        The model itself, changed in place. Patching again changes the settings.

    Raises:
        TypeError, ValueError: an unsupported model or setting; the message says what to do.
        RuntimeError: the patch comes too late (after ``fully_shard``), or another library has replaced a forward.

    Copies of the blocks are tried on random tokens first; a block is refused if it computes something else than its
    class is known for. With ``tome_r=0`` the model computes the same as before, bit for bit. Class tokens, prompts and
    the text tower are never merged; ``encode_image`` returns the same shapes. Forward hooks on the blocks of video
    models see ``stream.Stream`` (TempMe: ``tempme.Course``), on those of image models ``vit.tokens.Tokens``.

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
    found = vit.find(_module(model))
    if found is not None:
        if frames is not None:
            raise ValueError(
                f"frames is for STOP, DGL, CLIP4Clip and TempMe, not for {type(model).__name__}: leave it out"
            )
        vit.apply(found, settings, unmerge, protected)
        return _said(model, found.runner)
    tower = find_tower(model)
    check_tower(tower)
    if unmerge:
        raise ValueError(
            "unmerge is not for STOP, DGL, CLIP4Clip and TempMe, which read class tokens alone: leave it out"
        )
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
        tempme.clip_of(tower)
        if own_prop_attn:
            settings = replace(settings, prop_attn=tempme.own_prop_attn(tower))
        joined = tempme.missing_embeddings(tower, joined) if settings.frame_pos else joined
    _check_embeddings(tower, joined, settings.frame_pos)
    if tower.kind in _MIXINS:
        fresh = {index: block for index, block in enumerate(tower.blocks) if not isinstance(block, Patched)}
        if tower.kind == "tempme":
            tempme.try_out(tower, fresh)
        else:
            upstream.try_out(tower, fresh)
            if not isinstance(tower.runner, Patched):
                upstream.try_runner(tower)
        for_runner, for_block = _MIXINS[tower.kind]
        swap(tower.runner, for_runner)
        for block in fresh.values():
            swap(block, for_block)
            block.tome_classes = known_classes(block)
        for block, step in zip(tower.blocks, chosen.steps, strict=True):
            block.tome_step = step if tower.kind != "tempme" or scheduled else None
    _set_embeddings(tower.blocks, joined if settings.frame_pos else [0] * len(joined))
    family = family_of(tower.runner)
    if tower.kind == "tempme":
        tempme.put(tower, settings, chosen if scheduled else None, frames or tower.frames, family)
    else:
        tower.runner.tome = Merging(settings, chosen, schedule(video), family, tower.protected)
    if tower.kind != "tempme" or scheduled:
        warn_capped(tower.runner.tome.asked, chosen, settings.merge_token_proportions)
    return _said(model, tower.runner)


def _said(model: nn.Module, runner: nn.Module) -> nn.Module:
    """Log what was patched just now, whatever else in the model is."""
    merging = _held(runner)
    if merging is not None and logger.isEnabledFor(logging.INFO):
        logger.info("%s", merging.describe(_name(model)).line)
    return model


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _is_given(value: object) -> bool:
    """Whether an argument says something: an empty sequence doesn't, an array of NumPy's does."""
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
    modules = patched(_module(model))
    vit.tidy(model)
    for module in modules:
        check_unswap(module)
    tempme.take(model)
    for module in model.modules():
        if hasattr(module, "reset_merging"):
            own: Any = module
            _set_embeddings(own.transformer.resblocks, [0] * len(own.transformer.resblocks))
            own.reset_merging()
        elif isinstance(module.__dict__.get("tome"), (vit.Merging, Merging)):  # a runner that kept its class
            del module.tome
    for module in modules:
        unswap(module)
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
    """The class of a model, not of DistributedDataParallel's or torch.compile's wrapper around it."""
    wrapped = next((model._modules[name] for name in ("module", "_orig_mod") if [*model._modules] == [name]), None)
    return type(model).__name__ if wrapped is None else _name(wrapped)


def _held(module: nn.Module) -> Any:
    """Return the settings and schedule that a module holds; None without, and for what others call ``tome``."""
    tome = module.__dict__.get("tome")
    tome = getattr(tome, "merging", tome)  # of a block
    return tome if isinstance(tome, (vit.Merging, Merging)) and tome.family else None


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
    if lacks := nothing_said(task_config):
        warn(
            f"{type(model).__name__} is not patched: task_config ({type(task_config).__name__}) {lacks}; set tome_r=0 "
            "to merge nothing without this warning"
        )
    return model if config.off else apply_tome_patch(model, config=config)


def _check_embeddings(tower: Tower, rows: list[int], wanted: int) -> None:
    """A parameter that comes or goes after the wrapping would not be kept the same in all processes."""
    parallel = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in tower.around)
    changes = any(
        (_embedding(block) is None) == bool(wanted and n) for block, n in zip(tower.blocks, rows, strict=True)
    )
    if parallel and changes:
        raise RuntimeError("frame_pos adds or removes parameters: patch first, then wrap in DistributedDataParallel")


def _embedding(block: nn.Module) -> nn.Parameter | None:
    return block._parameters.get("tome_frame_embedding")


def _set_embeddings(blocks: Sequence[Any], rows: Sequence[int]) -> None:
    """Give each block that joins items its embedding, keeping one that fits, and take it from all others."""
    for block, count in zip(blocks, rows, strict=True):
        have = _embedding(block)
        if not count:
            if have is not None:
                del block.tome_frame_embedding
        elif have is None or have.shape[1] != count:
            like = block.attn.in_proj_weight
            block.tome_frame_embedding = nn.Parameter(like.new_zeros(1, count, 1, like.shape[1]))
