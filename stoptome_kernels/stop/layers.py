# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks with CLIP's parameter names, and the parts they are made of."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from ..video.blocks import BlockPlans, VideoTokens, feed_forward, run_block
from ..video.blocks import project_qkv as projections
from ..video.weights import check_attention, layer_norm


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32, in its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(self, input)


class QuickGELU(nn.Module):
    """``x·σ(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Block(nn.Module):
    """The parameters of a pre-norm block: ``ln_1, attn, ln_2, mlp`` and, with ``lora``, STOP's low-rank branch."""

    tome_classes = (nn.MultiheadAttention, LayerNorm, QuickGELU)  # whose weights may be read, or that are fused

    def __init__(self, width: int, heads: int, lora: bool = False, activation: str = "quick_gelu"):
        super().__init__()
        gelu = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        # holds the parameters under CLIP's names; what it computes is done by fused attention
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=gelu, c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = LayerNorm(width)
        if lora:
            self.LoRA = nn.Sequential(nn.Linear(width, 32), nn.PReLU(), nn.Linear(32, width))


class VisualBlock(Block):
    """A block of the visual tower, see ``stoptome_kernels.video.blocks.run_block``."""

    def forward(self, stream: VideoTokens, step, **options) -> tuple[VideoTokens, BlockPlans]:
        return run_block(self, stream, step, **options)


class TextBlock(Block):
    """A block with plain self-attention, causal or not, on ``(N, L, D)``."""

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        check_attention(self)
        q, k, v = projections(self.attn, self.ln_1(x), 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        return feed_forward(self, x, self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks under CLIP's name ``resblocks``."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.resblocks = nn.Sequential(*blocks)
