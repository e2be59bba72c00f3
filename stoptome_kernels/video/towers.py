# SPDX-License-Identifier: Apache-2.0
"""Finding the visual tower of a model by what it is made of, and the reasons why one can't be patched."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import nn

from ..patching.guards import (
    calls_only_class_forward,
    check_method_not_replaced,
    check_unsharded,
    warn_of_shared_blocks,
)

_KNOWN = {"attn", "ln_1", "ln_2", "mlp", "LoRA"}
_WRAPPERS = ("module", "_orig_mod", "clip", "visual")  # DistributedDataParallel, torch.compile, CLIP4Clip, CLIP


class VideoTower(NamedTuple):
    """A visual tower whose tokens can be merged.

    Attributes:
        kind: ``own`` (``StopModel``), ``prompted`` (upstream's STOP and DGL), ``sequence`` (CLIP4Clip, CLIP),
            ``tempme``.
        runner: the module that calls the blocks.
        blocks: blocks from first to last.
        around: all modules from the model down to the runner.
        tokens: number of tokens of a frame: class token, prompts, patches.
        protected: class token and prompts of a frame.
        frames: number of frames of a video; None where the model does not say.
        width: embedding dimension.
    """

    kind: str
    runner: Any
    blocks: tuple[Any, ...]
    around: tuple[Any, ...]
    tokens: int
    protected: int
    frames: int | None
    width: int

    @property
    def prompts(self) -> int:
        """Prompts of a frame."""
        return self.protected - 1


def find_tower(model: nn.Module) -> VideoTower:
    """Return the visual tower of a model.

    Args:
        model: the whole model, its CLIP, or the tower; perhaps wrapped by DistributedDataParallel or torch.compile.

    Raises:
        TypeError: no nn.Module, or none whose structure is known.
        ValueError: a structure that is known, with prompts that can't be told from patches.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tower: Any = model
    around, frames = [tower], _frames_of_video(tower)
    for _ in range(8):  # wrappers inside wrappers
        inner = next((tower._modules[name] for name in _WRAPPERS if tower._modules.get(name) is not None), None)
        if inner is None:
            break
        tower = inner
        around.append(tower)
        frames = frames or _frames_of_video(tower)
    transformer = getattr(tower, "transformer", None)
    blocks = getattr(transformer, "resblocks", None)
    position: Any = getattr(tower, "positional_embedding", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks) or getattr(position, "ndim", 0) != 2:
        raise TypeError(
            f"can't merge tokens in {type(model).__name__}: it has no visual tower with transformer.resblocks and "
            "positional_embedding; supported are StopModel, the CLIP of STOP, DGL, CLIP4Clip and TempMe, and vision "
            "transformers of timm, open_clip, transformers and torchvision; of a model with a "
            "torch.nn.TransformerEncoder pass the encoder itself"
        )
    patches, width = position.shape[0] - 1, position.shape[1]
    around.append(transformer)
    if hasattr(tower, "reset_merging"):
        kind, prompts, frames = "own", tower.config.frame_prompts, tower.config.frames
    elif callable(getattr(tower, "forward_deep_prompt", None)):
        for name in ("num_tokens", "video_frames"):
            if not hasattr(getattr(tower, name, None), "__index__"):
                raise ValueError(
                    f"{type(tower).__name__} has forward_deep_prompt, as STOP and DGL have, but no int {name}, "
                    "without which prompts can't be distinguished from patches: set it"
                )
        kind, prompts, frames = "prompted", int(tower.num_tokens), int(tower.video_frames)
    elif hasattr(getattr(blocks[0], "attn", None), "TVPt_LoRA_a"):
        kind, prompts = "tempme", 0
        # all frames come to the first layer that joins any
        frames = frames or next((e.shape[1] for e in map(tempme_embedding, blocks) if e is not None), None)
    else:
        kind, prompts = "sequence", 0
    runner = transformer if kind in ("sequence", "tempme") else tower
    tokens = 1 + prompts + patches
    return VideoTower(kind, runner, tuple(blocks), tuple(around), tokens, 1 + prompts, frames, width)


def tempme_embedding(block: Any) -> Any:
    """Return TempMe's learnt embedding of the items that a block joins, ``(1, items, 1, D)``; None if it has none."""
    return getattr(block, "TVPt_Video_Positional_embedding", None)


def _frames_of_video(model: Any) -> int | None:
    configs = (getattr(model, name, None) for name in ("task_config", "config"))
    for owner, name in ((model, "video_frames"), *((config, "max_frames") for config in configs)):
        value: Any = getattr(owner, name, None)
        if hasattr(value, "__index__") and not isinstance(value, bool) and value > 0:
            return operator.index(value)
    return None


def check_tower(tower: VideoTower) -> None:
    """Raise what keeps a tower from being patched.

    Raises:
        TypeError, ValueError: a block computes something else than what ``blocks.run_block`` does.
        RuntimeError: sharded already, or a module's forward was replaced.
    """
    check_unsharded(*tower.around, *tower.blocks)
    names = {"own": (), "prompted": ("forward_deep_prompt",)}.get(tower.kind, ("forward",))
    for module, own in ((tower.runner, names), *((block, ("forward",)) for block in tower.blocks)):
        check_method_not_replaced(module, *own)
    for block in tower.blocks:
        _check_block(block, tower.kind)
    warn_of_shared_blocks(tower.around[0], tower.blocks)


def _check_block(block: Any, kind: str) -> None:
    what = type(block).__name__
    parts = set(block._modules)
    if not {"attn", "ln_1", "ln_2", "mlp"} <= parts or parts - _KNOWN:
        raise TypeError(
            f"can't merge tokens in {what}: its parts are {', '.join(sorted(parts))}, but supported are CLIP's blocks "
            "with attn, ln_1, ln_2, mlp and optionally LoRA"
        )
    if kind == "tempme":
        _check_low_rank(block.attn, what)
    else:
        _check_attention(block.attn, what)
    for name in ("ln_1", "ln_2"):
        if not isinstance(getattr(block, name), nn.LayerNorm):
            raise TypeError(f"{what}.{name} must be a torch.nn.LayerNorm, got {getattr(block, name)}")
    if not calls_only_class_forward(block.attn) or not calls_only_class_forward(block.attn.out_proj):
        raise ValueError(
            f"{what}.attn has hooks or a forward of its own, which would have no effect, since its weights are read "
            "instead of calling it: remove that (hooks of torch.nn.utils.prune by prune.remove) before patching"
        )
    if getattr(block, "attn_mask", None) is not None:
        raise ValueError(f"{what} has an attention mask; patch the visual tower, whose blocks have none")


def _check_attention(attn: Any, what: str) -> None:
    if not isinstance(attn, nn.MultiheadAttention) or attn.in_proj_weight is None:
        raise TypeError(
            f"{what}.attn must be a torch.nn.MultiheadAttention with one in_proj_weight, got {type(attn).__name__} of "
            f"{type(attn).__module__}: remove adapters, or merge them into the weights, before patching"
        )
    for setting, right in (("batch_first", False), ("dropout", 0.0), ("bias_k", None), ("add_zero_attn", False)):
        if getattr(attn, setting) != right:
            raise ValueError(f"{what}.attn has {setting}={getattr(attn, setting)}, but only {right} is supported")


def _check_low_rank(attn: Any, what: str) -> None:
    """Check TempMe's attention: CLIP's projection, and two narrow matrices whose product is added to its weight."""
    shapes = {name: tuple(weight.shape) for name, weight in attn.named_parameters()}
    width, rank = shapes.get("out_proj.weight", (0,))[0], shapes.get("TVPt_LoRA_a", (0,))[0]
    right = {
        "in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,), "out_proj.weight": (width, width),
        "out_proj.bias": (width,), "TVPt_LoRA_a": (rank, width), "TVPt_LoRA_b": (3 * width, rank),
    }  # fmt: skip
    if shapes != right or set(attn._modules) != {"out_proj"}:
        raise TypeError(
            f"{what}.attn must be TempMe's attention, which has the parameters {', '.join(right)} and no others, got "
            f"{type(attn).__name__} with {', '.join(f'{name} {shape}' for name, shape in shapes.items())}: remove "
            "adapters, or merge them into the weights, before patching"
        )
    heads, d = getattr(attn, "num_heads", 0), getattr(attn, "head_dim", 0)
    if heads * d != width:
        raise TypeError(f"{what}.attn has num_heads={heads} and head_dim={d}, whose product must be its width {width}")
    for setting, usual in (("scaling", d**-0.5), ("dropout", 0.0)):
        if getattr(attn, setting, usual) != usual:
            raise ValueError(f"{what}.attn has {setting}={getattr(attn, setting)}, but only {usual:.4g} is supported")
