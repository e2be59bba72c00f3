# SPDX-License-Identifier: Apache-2.0
"""The model that is trained: STOP's two towers, their weights, and the loss over all processes' batches."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from stoptome_kernels.normalization import CLIP
from stoptome_kernels.stop import StopConfig, StopModel
from stoptome_kernels.stop import checkpoint as weights
from torch import Tensor, nn

from . import recipes
from .errors import UsageError
from .flags import TINY, WEIGHTS
from .parallel import gather
from .terminal import counted

# what STOP adds to CLIP: parameters with one of these in their name learn at lr, all others at lr · coef_lr
ADDED = (
    "PromptTransformer", "unified_prompt_mlp", "unified_prompt_embedding", "prompt_embeddings",
    "visual_prompt_embedding", "prefix_text_prompt_proj_layer", "postfix_text_prompt_proj_layer",
    "TemporalPrompt", "LoRA", "tome_frame_embedding",
)  # fmt: skip
# fields of StopConfig and the flags that set them
FLAGS = {
    "frames": "max_frames", "max_words": "max_words", "visual_output": "visual_output_type",
    "global_prompts": "global_visual_prompt_length", "frame_prompts": "local_each_frame_prompt_length",
    "text_prompts": "text_prompt_length", "lora": "lora", "temporal_prompt": "temporal_prompt",
    "shared_latent_space": "shared_latent_space", "activation": "activation",
}  # fmt: skip
# fields of StopConfig of CLIP's models by name, where they differ from its defaults
SIZES: dict[str, dict[str, int]] = {
    "ViT-B/32": {},
    "ViT-B/16": {"patch_size": 16},
    "ViT-L/14": {"patch_size": 14, "width": 1024, "layers": 24, "embed_dim": 768, "text_width": 768, "text_heads": 12},
}
SCALE = (0.1, math.log(100))  # logit_scale is kept between these, as in CLIP and STOP


class Retrieval(nn.Module):
    """The towers under STOP's name ``clip``, so that a state_dict has STOP's names."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, clip: StopModel, precision: str = "fp32"):
        super().__init__()
        self.clip = clip
        self.precision = precision
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in CLIP)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, ids: Tensor, video: Tensor, mask: Tensor) -> Tensor:
        """Symmetric cross-entropy of the batches of all processes, in each of them the same.

        Args:
            ids: ``(B, W)`` tokens of the captions.
            video: ``(B, T, 3, H, W)`` uint8, one for each caption.
            mask: ``(B, T)`` bool, which frames are no repetition of the last one.
        """
        text, seen = gather(self.encode_text(ids)), gather(self.encode_video(video, mask))
        logits = self.clip.similarity(text, seen)
        own = torch.arange(logits.shape[0], device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2

    def encode_text(self, ids: Tensor) -> Tensor:
        """``(B, W) → (B, E)`` float32, of length 1."""
        with self._casting(ids.device):
            text = self.clip.encode_text(ids)
        return F.normalize(text.float(), dim=-1)

    def encode_video(self, video: Tensor, mask: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` uint8, ``(B, T)`` → ``(B, E)`` float32, of length 1.

        The mask is used where features of single frames are averaged here (``global-local-feature``, the global prompt
        counting as one frame); in all other outputs the tower has averaged before, with repeated frames, as STOP's.
        """
        pixels = (video.to(self.mean.dtype) / 255 - self.mean) / self.deviation
        with self._casting(video.device):
            seen = self.clip.encode_video(pixels)
        seen = F.normalize(seen.float(), dim=-1)
        if seen.dim() == 2:
            return seen
        counted = torch.ones_like(seen[..., :1])
        if seen.shape[1] > 1:
            counted[:, 1:] = mask[..., None].to(seen.dtype)
        return F.normalize((seen * counted).sum(1), dim=-1)

    def clamp(self) -> None:
        """Keep ``logit_scale`` in its range; to be called after each step."""
        with torch.no_grad():
            self.clip.logit_scale.clamp_(*SCALE)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, what FSDP shards one by one."""
        return [*self.clip.visual.transformer.resblocks, *self.clip.transformer.resblocks]

    def unsharded(self) -> list[nn.Parameter]:
        """Parameters of no dimension, which FSDP can't shard. Every process computes the loss of all batches, so that
        their gradient is the same everywhere."""
        return [p for p in self.parameters() if p.dim() == 0]

    def _casting(self, device: torch.device) -> AbstractContextManager:
        if self.precision == "fp32":
            return nullcontext()
        half = self.precision == "amp" and device.type == "cuda"
        return torch.autocast(device.type, torch.float16 if half else torch.bfloat16)


def build(
    args: argparse.Namespace, tome: stk.ToMeConfig, weights_from: str | None = None
) -> tuple[Retrieval, list[str]]:
    """The model of a run and what there is to say about its weights.

    Args:
        args: complete settings.
        tome: token merging.
        weights_from: a checkpoint, in place of CLIP's weights.

    Raises:
        UsageError: no such weights, weights of another size, or settings that fit no model or each other.
    """
    given = {name: getattr(args, flag) for name, flag in FLAGS.items() if getattr(args, flag) is not None}
    notes: list[str] = []
    try:
        if weights_from is None and args.pretrained_clip_name == TINY:
            model = StopModel(StopConfig(**recipes.MODEL | given))
            with torch.no_grad():
                model.visual.positional_embedding.mul_(recipes.POSITIONS)
            stk.apply_tome_patch(model, config=tome)
        elif weights_from is None and args.random_weights:
            model = StopModel(StopConfig(**SIZES[args.pretrained_clip_name] | given))
            stk.apply_tome_patch(model, config=tome)
        else:
            model, notes = _load(weights_from or _clip_file(args), given, tome)
    except (TypeError, ValueError) as error:
        raise UsageError(_by_flags(str(error))) from error
    if args.random_weights and args.pretrained_clip_name != TINY:
        notes.append("RANDOM WEIGHTS: --random_weights began this model from nothing, all results of it mean nothing")
    model.requires_grad_(True)
    if args.freeze_clip:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(added in name for added in ADDED))
    if args.do_train and args.temperature_new > 1 and (weights_from is None or "temperature_new" in args.given):
        nn.init.constant_(model.logit_scale, args.temperature_new)
    model.visual.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.visual.compile()
        model.encode_text = torch.compile(model.encode_text)  # type: ignore[method-assign]
    return Retrieval(model, args.precision), notes


def _by_flags(message: str) -> str:
    """An error of StopConfig's in one line, with the names of flags in place of its own."""
    for name, flag in FLAGS.items():
        message = re.sub(rf"\b{name}\b(?=[ =])", f"--{flag}", message)
    return " ".join(message.split())


def _clip_file(args: argparse.Namespace) -> str:
    name = WEIGHTS[args.pretrained_clip_name]
    path = Path(args.pretrained_dir).expanduser() / name
    if not path.is_file():
        raise UsageError(
            f"no weights of CLIP at {path}: put OpenAI's {name} into --pretrained_dir (docs/retrieval.md, Weights, has "
            f"its address), or begin from nothing, with --random_weights or the small --pretrained_clip_name {TINY}"
        )
    return os.fspath(path)


def _load(path: str, given: dict, tome: stk.ToMeConfig) -> tuple[StopModel, list[str]]:
    """A model of the sizes that the weights have, with those that they don't tell as given."""
    try:
        state = weights.read_state_dict(path)
    except (ValueError, FileNotFoundError) as error:  # these name the file
        raise UsageError(" ".join(str(error).split())) from error
    # of a table of prompts for texts and frames, the weights tell only how many rows it has
    rows = {
        name: given[name] for name in ("text_prompts", "frame_prompts") if "unified_prompt_embedding.weight" in state
    }
    try:
        rows = weights.with_settings_beside(path, state, rows | {k: v for k, v in given.items() if k == "activation"})
    except ValueError as error:
        raise UsageError(f"{path}: {_by_flags(str(error))}") from error
    try:
        told = weights.infer_config(state, **rows)
    except weights.ActivationUnknown as error:
        raise UsageError(f"{path}: {_by_flags(str(error))}") from error
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:  # tensors of shapes that no CLIP has
        raise UsageError(
            f"{path} holds no weights of CLIP or STOP: {_by_flags(str(error))}; give other ones"
        ) from error
    plain = "visual.prompt_embeddings" not in state
    changes = rows | given
    if not plain:
        # what the weights tell must be what the flags say; where all frames share their prompts they tell no number
        untold = ["visual_output", "max_words", *(["frames"] if told.shared_latent_space == "linear" else [])]
        changes = rows | {name: given[name] for name in untold}
        for name, flag in FLAGS.items():
            if name in given.keys() - changes.keys() and getattr(told, name) != given[name]:
                raise UsageError(
                    f"{path} was made with --{flag} {getattr(told, name)}, not {given[name]}: give that, or other "
                    "weights"
                )
    if given["max_words"] > told.context_length:
        raise UsageError(
            f"--max_words {given['max_words']} is more than the {told.context_length} tokens that {path} was made for"
        )
    try:
        model = StopModel(weights.infer_config(state, **changes))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {_by_flags(str(error))}") from error
    stk.apply_tome_patch(model, config=tome)
    try:
        loaded = model.load_clip(state, model.config.activation)
    except (ValueError, RuntimeError) as error:
        # torch says of values that can't be copied whose they are; too little memory is no fault of theirs
        theirs = "While copying the parameter named" in str(error) and "can't allocate memory" not in str(error)
        if isinstance(error, RuntimeError) and not theirs:
            raise
        raise UsageError(f"{path} doesn't fit: {' '.join(str(error).split())[:400]}") from error
    notes = [f"weights from {path}"]
    if loaded.missing:
        notes.append(f"begin at random: {counted(len(loaded.missing), 'parameter')}, such as {loaded.missing[0]}")
    if loaded.left_over:
        notes.append(
            f"without use here: {counted(len(loaded.left_over), 'tensor')} of the file, such as {loaded.left_over[0]}"
        )
    return model, notes


def parameter_groups(model: nn.Module, lr: float, coef_lr: float, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: what STOP adds learns at ``lr``, CLIP's own at ``lr · coef_lr``; vectors and scalars
    (biases, LayerNorms) have no weight decay. Frozen parameters are in none."""
    # scalars by themselves: under FSDP they are whole, and fused updates don't mix whole and sharded parameters
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = any(added in name for added in ADDED), min(parameter.dim(), 2)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[added, dim], "lr": lr * (1 if added else coef_lr), "weight_decay": weight_decay * (dim == 2)}
        for added, dim in sorted(groups)
    ]


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
