# SPDX-License-Identifier: Apache-2.0
"""DINOv2 with trained weights, merged in several ways: what bench/fidelity.py compares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import stoptome_kernels as stk
import torch
from stoptome_kernels.tome.schedule import Schedule
from torch import Tensor, nn

from ..baselines.matching import MERGE, METHODS, SIZES_OFF, matching
from ..trained import dinov2
from . import patch

CONSTANT = {f"r={r}": stk.ToMeConfig(r) for r in (4, 8, 13, 16, 20)}
SCHEDULES: dict[str, stk.ToMeConfig] = {
    **CONSTANT,
    **{f"r={r} {words}": stk.ToMeConfig((r, inflection))
       for words, inflection in (("falling", -1.0), ("rising", 1.0)) for r in (8, 13, 16)},
    "r=16 rising by half": stk.ToMeConfig((16, 0.5)),
    "r=20 from layer 5": stk.ToMeConfig([0] * 4 + [20] * 8),
    "r=26 from layer 4": stk.ToMeConfig([0] * 3 + [26] * 9),
}  # fmt: skip
ONE_LAYER = 32  # tokens, where one layer alone merges
FRAMES = 12
CLIPS: dict[str, stk.ToMeConfig] = {
    **{f"r={r}": stk.ToMeConfig(r) for r in (8, 16, 20)},
    **{f"pairs joined in layer {layer + 1}, none merged": stk.ToMeConfig(
        [0], merge_layers=(layer,), merge_frame_nums=(2,), merge_token_proportions=(0, 0)) for layer in (3, 6, 9)},
    # an embedding that nobody has trained is zero, so that accuracy is the same without
    **{f"preset {name}": stk.ToMeConfig(**vars(stk.ToMeConfig.preset(name)) | {"frame_pos": 0})
       for name in ("accuracy", "memory")},
}  # fmt: skip


def one_layer(layer: int) -> stk.ToMeConfig:
    """Return settings by which one layer alone merges; the first is 0."""
    return stk.ToMeConfig([0] * layer + [ONE_LAYER])


@dataclass(frozen=True)
class Merged:
    """A model with merging, and the choice of what it merges.

    Attributes:
        model: shares its weights with the model that it was made of.
        config: its settings.
        choose: context in which it runs.
        schedule: tokens after each layer, and the ideal speed-up.
    """

    model: nn.Module
    config: stk.ToMeConfig
    choose: Callable[[], AbstractContextManager[None]]
    schedule: Schedule

    def run(self, call: Callable[[nn.Module, Tensor], Tensor], pictures: Tensor, batch: int) -> Tensor:
        """Return what a call gives of pictures, so many at a time, on the CPU in float32."""
        with self.choose():
            return run(self.model, call, pictures, batch)


@torch.no_grad()
def run(model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], pictures: Tensor, batch: int) -> Tensor:
    """Return what a call gives of a model and pictures, so many at a time, on the CPU in float32."""
    weight = next(model.parameters())
    return torch.cat([call(model, part.to(weight)).float().cpu() for part in pictures.split(batch)])


def merged(model: nn.Module, config: stk.ToMeConfig, method: str = MERGE, **options: Any) -> Merged:
    """Return a model with merging.

    Args:
        model: an unpatched model, which stays so.
        config: settings; of ``SIZES_OFF`` without proportional attention.
        method: one of ``METHODS``.
        **options: of ``apply_tome_patch``.
    """
    given = stk.ToMeConfig(**vars(config) | {"prop_attn": method != SIZES_OFF})
    twin = patch(share(model), given, **options)
    schedule = stk.describe(twin).schedule
    assert schedule is not None
    return Merged(twin, given, partial(matching, METHODS[method](0)), schedule)


def share(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model with weights of a dtype."""
    return copy.deepcopy(model).to(dtype)


def tokens(model: Any, pictures: Tensor) -> Tensor:
    """Return all tokens of pictures, class token first, ``(N, 257, 384)``, by timm's or transformers' model."""
    if hasattr(model, "forward_features"):
        return model.forward_features(pictures)
    return model(pictures).last_hidden_state


def class_token(model: Any, pictures: Tensor) -> Tensor:
    """Return the class token of pictures ``(N, 384)``, as a user would call timm's or transformers' model."""
    features = model(pictures)
    return features if isinstance(features, Tensor) else features.pooler_output


def film_frames(tower: nn.Module, frames: Tensor) -> Tensor:
    """Return the class token of each frame ``(N, 384)`` of whole clips."""
    return tower(frames, FRAMES)


MODELS: dict[str, Callable[[dinov2.Weights], nn.Module]] = {
    "timm": dinov2.timm_model,
    "transformers": dinov2.transformers_model,
}
