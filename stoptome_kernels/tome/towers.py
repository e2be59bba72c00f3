# SPDX-License-Identifier: Apache-2.0
"""Finding the visual tower of a model by what it is made of, and the reasons why one can't be patched."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

_KNOWN = {"attn", "ln_1", "ln_2", "mlp", "LoRA"}


class Tower(NamedTuple):
    """A visual tower whose tokens can be merged.

    Attributes:
        kind: ``own`` (:class:`StopModel`), ``prompted`` (upstream's STOP and DGL), ``sequence`` (CLIP4Clip, CLIP).
        runner: the module that calls the blocks.
        blocks: from first to last.
        tokens: of a frame: class token, prompts, patches.
        protected: class token and prompts of a frame.
        frames: of a video; None where the model does not say.
        width: of a token.
    """

    kind: str
    runner: Any
    blocks: tuple[Any, ...]
    tokens: int
    protected: int
    frames: int | None
    width: int


def find_tower(model: nn.Module, frames: int | None) -> Tower:
    """The visual tower of a model.

    Args:
        model: the whole model, its CLIP, or the tower; perhaps wrapped by DistributedDataParallel or torch.compile.
        frames: of a video, if the caller knows.

    Raises:
        TypeError: no nn.Module, or none whose structure is known.
        ValueError: a structure that is known, with a setting that can't be merged.
        RuntimeError: sharded already, or a module's forward was replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    whole = model
    inner: Any = None
    said = frames
    for _ in range(8):  # wrappers inside wrappers
        said = said or _frames(model)
        inner = next(
            (model._modules[name] for name in ("module", "_orig_mod", "clip", "visual") if model._modules.get(name)),
            None,
        )
        if inner is None:
            break
        model = inner
    said = said or _frames(model)
    tower: Any = model
    transformer = getattr(model, "transformer", None)
    blocks = getattr(transformer, "resblocks", None)
    position: Any = getattr(model, "positional_embedding", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks) or getattr(position, "ndim", 0) != 2:
        raise TypeError(
            f"don't know how to merge tokens in {type(whole).__name__}: no visual tower with transformer.resblocks and "
            "positional_embedding was found in it; known are StopModel, and STOP's, DGL's and CLIP4Clip's CLIP"
        )
    patches, width = position.shape[0] - 1, position.shape[1]
    for block in blocks:
        _check_block(block)
    if hasattr(model, "reset_merging"):
        prompts = tower.config.frame_prompts
        return Tower("own", tower, tuple(blocks), 1 + prompts + patches, 1 + prompts, tower.config.frames, width)
    if callable(getattr(model, "forward_deep_prompt", None)):
        for name in ("num_tokens", "video_frames"):
            if not isinstance(getattr(model, name, None), int):
                raise ValueError(
                    f"{type(model).__name__} has forward_deep_prompt, as STOP and DGL have, but no int {name}: "
                    "its prompts can't be told from its patches"
                )
        _check_forward(model, "forward_deep_prompt")
        prompts = tower.num_tokens
        return Tower("prompted", tower, tuple(blocks), 1 + prompts + patches, 1 + prompts, tower.video_frames, width)
    _check_forward(transformer, "forward")
    return Tower("sequence", transformer, tuple(blocks), 1 + patches, 1, said, width)


def _frames(model: Any) -> int | None:
    config = getattr(model, "task_config", None)
    for owner, name in ((model, "video_frames"), (config, "max_frames")):
        value = getattr(owner, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _check_forward(module: Any, name: str) -> None:
    if name in module.__dict__:
        raise RuntimeError(
            f"{type(module).__name__} has a {name} of its own, which another library (accelerate?) put there and which "
            "would hide the patch: patch first, then hand the model to that library"
        )
    if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        raise RuntimeError(f"{type(module).__name__} was sharded already: patch first, then call fully_shard")


def _check_block(block: Any) -> None:
    """Refuse a block that computes something else than what :func:`.stream.run_block` does."""
    what = type(block).__name__
    _check_forward(block, "forward")
    parts = set(block._modules)
    if not {"attn", "ln_1", "ln_2", "mlp"} <= parts or parts - _KNOWN:
        raise TypeError(
            f"don't know how to merge tokens in {what}: its parts are {', '.join(sorted(parts))}; a block of CLIP's "
            "has attn, ln_1, ln_2, mlp and perhaps LoRA"
        )
    attn, mlp = block.attn, block.mlp
    if not isinstance(attn, nn.MultiheadAttention) or attn.in_proj_weight is None:
        raise TypeError(f"{what}.attn must be a torch.nn.MultiheadAttention with one in_proj_weight, got {attn}")
    for setting, right in (("batch_first", False), ("dropout", 0.0), ("bias_k", None), ("add_zero_attn", False)):
        if getattr(attn, setting) != right:
            raise ValueError(
                f"{what}.attn has {setting}={getattr(attn, setting)}; merging is made for {setting}={right}"
            )
    if not all(hasattr(mlp, name) for name in ("c_fc", "gelu", "c_proj")):
        raise TypeError(f"{what}.mlp must have c_fc, gelu and c_proj, as in CLIP, got {mlp}")
    if getattr(block, "attn_mask", None) is not None:
        raise ValueError(
            f"{what} has an attention mask; only the visual tower's blocks, which have none, can be merged"
        )
