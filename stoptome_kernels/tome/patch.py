# SPDX-License-Identifier: Apache-2.0
"""Token merging put into a model that is there already, and taken out again.

A model is recognised by what it is made of, not by where it was imported from. Its tower and blocks get a subclass of
their own class, so that parameters, names, isinstance, deepcopy, pickle and torch.save stay as they were; everything
that a forward carries travels through its arguments, so that checkpointing and several forwards before a backward are
exact.
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
    """Merge tokens in the visual tower of a model, from its next forward on.

    Args:
        model: a ``StopModel``; upstream's STOP, DGL or CLIP4Clip (``CLIP4Clip``, ``CLIP`` or the visual tower),
            or TempMe's (``VTRModel`` or its ``clip``), recognised by structure; a vision transformer of timm, open_clip
            or torchvision, or a model that holds one; a ``nn.TransformerEncoder`` or ``nn.TransformerEncoderLayer``
            itself. Perhaps inside DistributedDataParallel or torch.compile.
        tome_r: tokens merged from every frame in every layer: an int (0, the default: off), a list with one int a
            layer, or a pair (tuple) ``(r, inflection)``.
        trace_source: keep the source map for ``tome_trace``.
        prop_attn: attention counts a merged key as often as the tokens it stands for (the default, but for a TempMe
            that was made with ``tome_propattn`` off).
        merge_layers, merge_frame_nums, merge_token_proportions: clip merging, see ``ToMeConfig``.
        frame_pos: 1 adds a learnt embedding to each merge layer: TempMe's own, elsewhere new parameters
            ``tome_frame_embedding``, zero at the start: make the optimizer afterwards.
        config: all of these as one value, in place of them.
        frames: of a video, where the model doesn't say: CLIP4Clip's CLIP or tower alone, TempMe's ``clip``.
        unmerge: behind its last block a library's vision transformer gives every original token a row again, that of
            the token it is part of; always so where the model itself reads more than class tokens there.
        protected: leading tokens that are never merged, where the model doesn't say how many there are:
            ``nn.TransformerEncoder`` and its layer, by default 1, which keeps a class token apart and does no harm if
            there is none. Of all others it can only be what they say.

    Returns:
        The model itself, changed in place. Patching again changes the settings.

    Raises:
        TypeError, ValueError: a model or setting with which tokens can't be merged; the message says what to do.
        RuntimeError: patched too late (after ``fully_shard``), or where another library has put its own forward.

    A block of upstream's is tried on random tokens first, and refused if it computes something else than CLIP's does.
    With ``tome_r=0`` the model computes what it computed before, bit for bit. Class tokens, prompts and the text tower
    are never touched; ``encode_image`` gives the same shapes. Hooks on blocks see ``stream.Stream``
    (TempMe's: ``tempme.Course``).

    TempMe's model merges by its own schedule, as it was published, unless one of ``tome_r``, ``merge_layers``,
    ``merge_frame_nums``, ``merge_token_proportions``, ``frame_pos`` or ``config`` is given: then by these alone. It may
    have TempMe's own patch or none: ``tome_patch(self.clip, ...)`` in its constructor may be this very function.
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
            raise ValueError(f"frames is for models of videos, {type(model).__name__} is one of images: leave it out")
        vit.apply(found, settings, unmerge, protected)
        return _said(model, found.runner)
    tower = find_tower(model)
    check_tower(tower)
    if unmerge:
        raise ValueError("unmerge is for the vision transformers of other libraries: STOP reads class tokens alone")
    if protected is not None and protected != tower.protected:
        raise ValueError(
            f"protected is {protected!r}, but a frame of {type(model).__name__} has {tower.protected} tokens that must "
            "not be merged (class token, prompts): leave it out"
        )
    if frames is not None:
        frames = checks.count(frames, "frames", "frames of a video", least=1)
    if frames not in (None, tower.frames) and tower.kind != "sequence" and tower.frames is not None:
        raise ValueError(f"frames is {frames}, but the model is made for videos of {tower.frames}; leave it out")
    clips, video = bool(settings.merge_layers), frames or tower.frames or 1
    if clips and not (frames or tower.frames):
        raise ValueError("merge_layers joins frames, but this model doesn't say how many a video has: give frames=…")

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
    """Take token merging out of a model again: classes, attributes and parameters are as before the patch.

    Whatever wraps the model or its blocks by now stays as it is. All patches inside the model are taken out.

    Returns:
        The model itself. A model that was never patched is left alone.

    Raises:
        RuntimeError: a module was given another class or forward since (by ``fully_shard``, accelerate); then nothing
            is changed.
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
    """The source map of a patched model's last forward: which token every original token ended in.

    Raises:
        RuntimeError: the model is not patched, keeps no trace, or has not run yet.
        ValueError: several towers in it are patched.
    """
    merging = _merging(model)
    if merging is None:
        raise RuntimeError("the model is not patched: apply_tome_patch(model, tome_r=…, trace_source=True) first")
    return merging.trace()


def is_patched(model: nn.Module) -> bool:
    """Whether a tower of the model, or the model itself, was given to ``apply_tome_patch`` (``tome_r=0``
    included)."""
    return bool(_mergings(model))


def describe(model: nn.Module) -> Description:
    """Describe what a model merges: tokens behind each layer, asked for and carried out, and the ideal speed-up.

    Returns:
        ``print()`` shows it as a table; ``.line`` is one line for a log, ``.schedule`` holds the numbers.

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
        raise ValueError(f"{len(found)} towers of {type(model).__name__} are patched: give them one by one")
    return found[0] if found else None


def apply_from_config(model: nn.Module, task_config: object) -> nn.Module:
    """Patch a model by its ``task_config``: a namespace, a mapping, any object with STOP's flags as attributes, see
    ``add_tome_args``, or TempMe's.

    Made to be the last line of a model's constructor: it does nothing at ``tome_r`` 0. Without any of the flags it does
    nothing either, with a warning, which names what is like one of them: a flag may be misspelt.
    """
    config = ToMeConfig.from_args(task_config)
    if lacks := nothing_said(task_config):
        warn(
            f"{type(model).__name__} is left as it is: task_config ({type(task_config).__name__}) {lacks}; "
            "tome_r=0 says that nothing is to be merged"
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
