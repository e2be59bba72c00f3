# SPDX-License-Identifier: Apache-2.0
"""What the blocks of all vision transformers have in common: the mixins that libraries' blocks are patched with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import attention
from ..tome.swap import Patched
from .tokens import Layer, Merging, Tokens


class Block(Patched):
    """A block that takes and gives :class:`.tokens.Tokens` between the first and the last block of its tower.

    Where nothing is merged yet, and nothing is to be, the block's own forward runs. A library's mixin says by
    ``tome_run`` what its blocks compute, and by ``tome_sample`` what they want beside tokens.
    """

    tome: Layer

    def forward(self, x: Any, *args, **options):
        layer = self.tome
        tokens = layer.start(x)
        if tokens.size is None and not layer.merging.rates[layer.index]:
            out = super().forward(tokens.x, *args, **options)  # type: ignore[misc]
            if layer.merging.idle and not layer.merging.config.trace_source:
                return out
            return layer.finish(tokens.but(x=out))
        return layer.finish(self.tome_run(tokens, *args, **options))

    def tome_run(self, tokens: Tokens, *args, **options) -> Tokens:
        """The block's work on merged tokens: attention, merging, MLP."""
        raise NotImplementedError

    def tome_sample(self, tokens: int) -> tuple[tuple, dict]:
        """Arguments beside ``tokens`` tokens with which the block can be tried out."""
        return (), {}


class Reader(Patched):
    """A tower whose intermediate layers can be read, as timm's and open_clip's can."""

    tome: Merging

    def tome_checkpoints(self) -> bool:
        """Whether the tower checkpoints its blocks."""
        raise NotImplementedError

    def forward_intermediates(self, *args, **options):
        """As before: every layer's tokens stand for themselves on the grid."""
        if not self.tome.idle and self.tome_checkpoints() and torch.is_grad_enabled():
            raise RuntimeError(
                "forward_intermediates of merged tokens can't be computed a second time for their gradients: "
                "set_grad_checkpointing(False), or call it under torch.no_grad()"
            )
        self.tome.every = True
        try:
            return super().forward_intermediates(*args, **options)  # type: ignore[misc]
        finally:
            self.tome.every = False

    def prune_intermediate_layers(self, *args, **options):
        """Would leave the patch with blocks that are not there."""
        raise RuntimeError("take the patch out (remove_tome_patch), prune the layers, and patch again")


def sizes(block: Block, tokens: Tokens) -> Tensor | None:
    """What keys count in the block's attention, padding nothing; None: one each."""
    size = tokens.size
    proportional = block.tome.merging.config.prop_attn
    if size is not None and tokens.padded:
        return (size if proportional else torch.ones_like(size)).masked_fill(size < 1, 0.0)
    return size if proportional else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Proportional attention ``(N, H, T, d) → (N, T, H·d)``; with dropout of the weights by torch's own function."""
    if dropout:
        mask = None if size is None else size.log()[:, None, None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    else:
        out = attention(q, k, v, size, scale=scale)
    return out.transpose(1, 2).flatten(2)


def no_mask(block: Any, **given) -> None:
    """Merged tokens have no places that a mask could speak of.

    Raises:
        ValueError: one of these arguments is given.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{type(block).__name__} got {name}, which says something of tokens that are merged: call the model "
                "without it, or take the patch out (remove_tome_patch)"
            )
