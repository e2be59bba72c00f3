# SPDX-License-Identifier: Apache-2.0
"""torchvision's VisionTransformer (``vit_b_16`` and its like)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..patching.subclass import Patched
from . import multihead
from .block import Block, Watching
from .tokens import Tokens
from .towers import Vit, name_of, overrides, the_only, within

_HOME = "torchvision.models.vision_transformer"


class _EncoderBlock(Block):
    """``EncoderBlock``, pre-norm."""

    def tome_run(self, tokens: Tokens) -> Tokens:
        block: Any = self
        residual, keys = multihead.attention(block, block.self_attention, block.ln_1(tokens.x), tokens)
        merged, normed = block.tome.merge(tokens, block.dropout(residual), keys, block.ln_2)
        return merged.but(x=merged.x + block.mlp(normed))


class _Tower(Watching):
    """The tower: a forward of somebody else's may read more than the class token."""

    tome_watched = ("forward", "encoder")

    def forward(self, x):
        encoder: Any = self.encoder  # type: ignore[attr-defined]
        self.tome_check(encoder.layers)
        if "forward" in encoder.__dict__ and not self.tome.dense:  # put there since the patch
            self.tome.dense = True
        return super().forward(x)  # type: ignore[misc]

    def tome_reads_all(self) -> bool:
        return _reads_all(self)


def _reads_all(tower: Any) -> bool:
    return overrides(tower, _HOME, "forward") or overrides(tower.encoder, _HOME, "forward")


def find(model: nn.Module) -> Vit | None:
    """torchvision's vision transformer in a model.

    Raises:
        TypeError, ValueError: one with a part with which its tokens can't be merged; another model of torchvision's.
    """
    paths = list(within(model, _HOME, "VisionTransformer"))
    if not paths:
        if type(model).__module__.startswith("torchvision.models."):
            raise TypeError(
                f"can't merge tokens in torchvision's {type(model).__name__}: supported is VisionTransformer (vit_b_16 "
                "and similar)"
            )
        return None
    path = the_only(paths)
    tower: Any = path[-1]
    blocks = tuple(tower.encoder.layers)
    for block in blocks:
        if isinstance(block, Patched):
            continue
        if name_of(block) != (_HOME, "EncoderBlock"):
            raise TypeError(
                f"can't merge tokens in torchvision's VisionTransformer with {type(block).__name__} as a block: "
                "supported is EncoderBlock; patch before another library replaces it"
            )
        multihead.check(block, block.self_attention)
    return Vit(
        tower, blocks, (_EncoderBlock,) * len(blocks), 1, _reads_all(tower), tower.hidden_dim, tower.seq_length, _Tower,
        around=path,
        attentions=tuple(((block.self_attention, multihead.Multihead),) for block in blocks),
    )  # fmt: skip
