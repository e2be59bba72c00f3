# SPDX-License-Identifier: Apache-2.0
"""STOP's visual tower: from frames to the prompts and class tokens that stand for a video."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tome.config import ToMeConfig
from ..video.blocks import VideoTokens
from ..video.state import VideoMergeState
from .config import StopConfig
from .layers import LayerNorm, Transformer, VisualBlock
from .temporal import TemporalPrompt


class VisualTransformer(nn.Module):
    """CLIP's ViT over the frames of a video, with global prompts, frame prompts in each layer, and token merging.

    Attributes:
        gradient_checkpointing: keep only what stands between the blocks for backward, and compute the rest again.
    """

    def __init__(self, config: StopConfig):
        super().__init__()
        c = config
        scale = c.width**-0.5
        self.config = config
        self.gradient_checkpointing = False
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(c.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(c.patches + 1, c.width))
        self.ln_pre = LayerNorm(c.width)
        self.transformer = Transformer(
            [VisualBlock(c.width, c.width // 64, c.lora, c.activation) for _ in range(c.layers)]
        )
        self.ln_post = LayerNorm(c.width)
        self.proj = nn.Parameter(scale * torch.randn(c.width, c.embed_dim))
        self.prompt_embeddings = nn.Parameter(torch.empty(1, c.global_prompts, c.width))
        bound = (6 / (3 * c.patch_size**2 + c.width)) ** 0.5  # Xavier, as if the prompts were patches
        nn.init.uniform_(self.prompt_embeddings, -bound, bound)
        self.register_buffer("position_ids", torch.arange(c.patches + 1)[None])  # upstream's checkpoints hold it
        if c.temporal_prompt == "group2-2":
            self.TemporalPrompt = TemporalPrompt(c.fast_prompts, c.image_size // c.patch_size, c.width, c.frame_prompts)
        self.reset_merging()

    def forward(self, video: Tensor, deep_prompts: Tensor) -> Tensor:
        """Return the projected global prompts, then the class token of each frame: ``(B, G + T, E)``.

        Args:
            video: ``(B, T, 3, H, W)``, normalised as CLIP wants it.
            deep_prompts: ``(layers, B, T, P, D)``, or with 1 in place of B or T for all alike.
        """
        batch, frames = video.shape[:2]
        video = video.to(self.conv1.weight.dtype)
        salient = None
        if self.config.temporal_prompt == "group2-2":
            video, salient = self.TemporalPrompt(video)
        x = self._embed(video.flatten(0, 1))
        if salient is not None:
            between = self.TemporalPrompt.between_frames(x.unflatten(0, (batch, frames)), salient)
            deep_prompts = deep_prompts + between.unflatten(1, (frames, -1))
        deep_prompts = deep_prompts.to(x.dtype).expand(-1, batch, frames, -1, -1)
        prompts = self.prompt_embeddings.to(x.dtype).expand(batch, -1, -1)
        stream = self.tome.run(
            self.transformer.resblocks, VideoTokens(x, prompts), deep_prompts, checkpointing=self.gradient_checkpointing
        )  # fmt: skip
        assert stream.prompts is not None  # they went in
        seen = torch.cat([stream.prompts, stream.x.reshape(batch, frames, -1)], 1)
        return self.ln_post(seen) @ self.proj

    def reset_merging(self) -> None:
        """Merge nothing."""
        c, off = self.config, ToMeConfig()
        protected = 1 + c.frame_prompts
        self.tome = VideoMergeState(off, off.schedule(c.layers, protected + c.patches, c.frames, protected, c.width))

    def extra_repr(self) -> str:
        """Describe the module, with what is merged once that was asked for."""
        return self.tome.describe("visual").line if self.tome.family else ""

    def _embed(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W) → (N, 1 + n, D)``: class token and patches with their positions."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding.to(patches.dtype))
