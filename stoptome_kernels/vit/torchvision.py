# SPDX-License-Identifier: Apache-2.0
"""torchvision's VisionTransformer (``vit_b_16`` and its like)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..patching.subclass import PatchedModule
from . import multihead
from .block import BlockMixin, TowerMixin
from .tokens import Tokens
from .towers import VitTower, class_path, exactly_one, find_submodules, has_overridden_method

_HOME = "torchvision.models.vision_transformer"


class _EncoderBlock(BlockMixin):
    """``EncoderBlock``, pre-norm."""

    def tome_forward(self, tokens: Tokens) -> Tokens:
        block: Any = self
        residual, keys = multihead.call_attention(block, block.self_attention, block.ln_1(tokens.x), tokens)
        merged, normed = block.tome.merge(tokens, block.dropout(residual), keys, block.ln_2)
        return merged.but(x=merged.x + block.mlp(normed))


class _Tower(TowerMixin):
    """The tower: a forward of somebody else's may read more than the class token."""

    tome_watched = ("forward", "encoder")

    def forward(self, x):
        encoder: Any = self.encoder  # type: ignore[attr-defined]
        self.tome_check_unchanged(encoder.layers)
        if "forward" in encoder.__dict__ and not self.tome.dense_output:  # put there since the patch
            self.tome.dense_output = True
        return super().forward(x)  # type: ignore[misc]

    def tome_needs_dense_output(self) -> bool:
        return _needs_dense_output(self)


def _needs_dense_output(tower: Any) -> bool:
    return has_overridden_method(tower, _HOME, "forward") or has_overridden_method(tower.encoder, _HOME, "forward")


def find(model: nn.Module) -> VitTower | None:
    """Return torchvision's vision transformer in a model.

    Raises:
        TypeError, ValueError: one with a part with which its tokens can't be merged; another model of torchvision's.
    """
    paths = list(find_submodules(model, _HOME, "VisionTransformer"))
    if not paths:
        if type(model).__module__.startswith("torchvision.models."):
            raise TypeError(
                f"can't merge tokens in torchvision's {type(model).__name__}: supported is VisionTransformer (vit_b_16 "
                "and similar)"
            )
        return None
    path = exactly_one(paths)
    tower: Any = path[-1]
    blocks = tuple(tower.encoder.layers)
    for block in blocks:
        if isinstance(block, PatchedModule):
            continue
        if class_path(block) != (_HOME, "EncoderBlock"):
            raise TypeError(
                f"can't merge tokens in torchvision's VisionTransformer with {type(block).__name__} as a block: "
                "supported is EncoderBlock; patch before another library replaces it"
            )
        multihead.check_supported(block, block.self_attention)
    return VitTower(
        tower, blocks, (_EncoderBlock,) * len(blocks), 1, _needs_dense_output(tower), tower.hidden_dim,
        tower.seq_length, _Tower, around=path,
        attentions=tuple(((block.self_attention, multihead.MultiheadMixin),) for block in blocks),
    )  # fmt: skip
