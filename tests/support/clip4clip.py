# SPDX-License-Identifier: Apache-2.0
"""How CLIP4Clip computes its visual tower, in our own words: a stand-in on which the patch is tried."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.baselines.stop import LayerNorm, StopBlock


class Clip4ClipBlock(StopBlock):
    """A block of CLIP4Clip's visual tower: takes and gives ``(x, frames)``."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, 0, lora=False)

    def forward(self, given: tuple[Tensor, int]) -> tuple[Tensor, int]:
        x, frames = given
        normed = self.ln_1(x)
        return self.feed_forward(x + self.attn(normed, normed, normed, need_weights=False)[0]), frames


class Clip4ClipTransformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(*[Clip4ClipBlock(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor, video_frame: int = -1) -> Tensor:
        return self.resblocks((x, video_frame))[0]


class Clip4ClipTower(nn.Module):
    """CLIP4Clip's visual tower behind the patches."""

    def __init__(self, width: int, layers: int, patches: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(patches + 1, width))
        self.class_embedding = nn.Parameter(0.1 * torch.randn(width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Clip4ClipTransformer(width, layers, max(1, width // 64))

    def forward(self, patches: Tensor, video_frame: int = -1) -> Tensor:
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).transpose(0, 1), video_frame=video_frame)
        return x.transpose(0, 1)
