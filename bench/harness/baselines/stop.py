# SPDX-License-Identifier: Apache-2.0
"""How upstream's STOP computes its visual tower, in our own words: what bench/stop.py measures against, and a stand-in
on which the tests try the patch. Tokens come first, ``(L, B, D)``, and keys are put together frame by frame in a Python
loop, as they are there; nothing is faster or slower than it is there on purpose.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from . import operators


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class StopBlock(nn.Module):
    """A block of STOP's (and, without ``lora``, DGL's) visual tower: takes and gives ``(x, frames, visual)``."""

    def __init__(self, width: int, heads: int, prompts: int, lora: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = LayerNorm(width)
        self.attn_mask = None
        self.visual_prompt_length = prompts
        if lora:
            self.LoRA = nn.Sequential(nn.Linear(width, 32), nn.PReLU(), nn.Linear(32, width))

    def attend(self, x: Tensor, frames: int) -> Tensor:
        """Residual attention: frames over themselves and the prompts, prompts over everything."""
        count, batch, width = self.visual_prompt_length, x.shape[1], x.shape[2]
        prompts = self.ln_1(x[:count])
        own = self.ln_1(x[count:].reshape(-1, batch * frames, width))
        keys = torch.zeros(count + own.shape[0], batch * frames, width, device=x.device, dtype=own.dtype)
        for first in range(0, batch * frames, batch):
            keys[:, first : first + batch] = torch.cat([prompts, own[:, first : first + batch]])
        inside = self.attn(own, keys, keys, need_weights=False)[0].reshape(-1, batch, width)
        everything = torch.cat([prompts, own.reshape(-1, batch, width)])
        over = self.attn(prompts, everything, everything, need_weights=False)[0]
        return x + torch.cat([over, inside])

    def feed_forward(self, x: Tensor) -> Tensor:
        out = x + self.mlp(self.ln_2(x))
        return out + 0.1 * self.LoRA(x) if hasattr(self, "LoRA") else out

    def forward(self, given: tuple[Tensor, int, bool]) -> tuple[Tensor, int, bool]:
        x, frames, visual = given
        return self.feed_forward(self.attend(x, frames)), frames, visual


class MergingStopBlock(StopBlock):
    """The same with token merging in eager operations between attention and MLP, as users write it today.

    Compares tokens by the mean over heads of their keys, for which it projects the frames' tokens once more: upstream's
    attention is a module that doesn't give its keys away. Sizes enter attention as a float mask.
    """

    r = 0
    size: Tensor | None = None  # (B·T, L, 1), set by the tower before each block

    def masked(self, q: Tensor, k: Tensor, weights: Tensor | None) -> Tensor:
        mask = None if weights is None else weights.log().to(q.dtype)  # (N, keys)
        if mask is not None:
            mask = mask[:, None, None].expand(-1, self.attn.num_heads, q.shape[0], -1).flatten(0, 1)
        return self.attn(q, k, k, need_weights=False, attn_mask=mask)[0]

    def forward(self, given: tuple[Tensor, int, bool]) -> tuple[Tensor, int, bool]:
        x, frames, visual = given
        count, batch, width = self.visual_prompt_length, x.shape[1], x.shape[2]
        if not self.r:
            return super().forward(given)
        prompts = self.ln_1(x[:count])
        own = self.ln_1(x[count:].reshape(-1, batch * frames, width))
        keys = torch.zeros(count + own.shape[0], batch * frames, width, device=x.device, dtype=own.dtype)
        for first in range(0, batch * frames, batch):
            keys[:, first : first + batch] = torch.cat([prompts, own[:, first : first + batch]])
        everything = torch.cat([prompts, own.reshape(-1, batch, width)])
        column = x.new_ones(batch * frames, own.shape[0], 1) if self.size is None else self.size
        in_frame = over_video = None
        if self.size is not None:
            sizes = column.squeeze(2)  # (T·B, L)
            in_frame = torch.cat([sizes.new_ones(len(sizes), count), sizes], 1)
            tokens_first = sizes.t().reshape(-1, batch).t()  # (B, L·T)
            over_video = torch.cat([sizes.new_ones(batch, count), tokens_first], 1)
        inside = self.masked(own, keys, in_frame)
        over = self.masked(prompts, everything, over_video)
        rows = (x[count:].reshape(-1, batch * frames, width) + inside).transpose(0, 1)  # (T·B, L, D)
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        metric = nn.functional.linear(own, weight[width : 2 * width], bias[width : 2 * width]).transpose(0, 1)
        metric = metric.detach().unflatten(2, (self.attn.num_heads, -1)).mean(2)
        plan = operators.eager_match(metric, self.r, 1 + count)
        rows, self.size = operators.eager_merge(rows, plan, column, 1 + count)
        x = torch.cat([x[:count] + over, rows.transpose(0, 1).reshape(-1, batch, width)])
        return self.feed_forward(x), frames, visual


class StopTower(nn.Module):
    """The visual tower of STOP and DGL behind the patches: deep prompts and blocks."""

    def __init__(self, width, layers, patches, frames, prompts, lora=True, block=StopBlock):
        super().__init__()
        self.num_tokens, self.video_frames = prompts, frames
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(patches + 1, width))
        self.class_embedding = nn.Parameter(0.1 * torch.randn(width))
        self.prompt_embeddings = nn.Parameter(0.1 * torch.randn(1, prompts, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.layers = layers
        self.transformer.resblocks = nn.Sequential(
            *[block(width, width // 64 if width >= 64 else 2, prompts, lora) for _ in range(layers)]
        )

    def first(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """``(B·T, n, D)`` embedded patches and the first layer's prompts ``(B, T·P, D)`` → ``(G + L·T, B, D)``."""
        count, frames = self.num_tokens, self.video_frames
        batch, width = patches.shape[0] // frames, patches.shape[2]
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.positional_embedding
        x = self.ln_pre(x).view(batch, frames, -1, width)
        own = prompts.reshape(batch, frames, count, width)
        rows = torch.cat([x[:, :, :1], own, x[:, :, 1:]], 2).transpose(1, 2).reshape(batch, -1, width)
        return torch.cat([self.prompt_embeddings.expand(batch, -1, -1), rows], 1).transpose(0, 1)

    def forward_deep_prompt(self, x: Tensor, unified_visual_prompt: Tensor) -> Tensor:
        count, frames, batch, width = self.num_tokens, self.video_frames, x.shape[1], x.shape[2]
        size = None
        for layer, block in enumerate(self.transformer.resblocks):
            if layer:
                own = unified_visual_prompt[layer].reshape(batch, frames, count, width).permute(2, 1, 0, 3)
                rows = x[count:].reshape(-1, frames, batch, width)
                rows = torch.cat([rows[:1], own, rows[1 + count :]]).reshape(-1, batch, width)
                x = torch.cat([x[:count], rows])
            if isinstance(block, MergingStopBlock):
                block.size = size
            x = block((x, frames, True))[0]
            if isinstance(block, MergingStopBlock):
                size, block.size = block.size, None
        return x

    def forward(self, patches: Tensor, unified_visual_prompt: Tensor) -> Tensor:
        """Embedded patches → the hidden state as ``encode_image`` reads it, ``(B, G + L·T, D)``."""
        x = self.first(patches, unified_visual_prompt[0])
        return self.ln_post(self.forward_deep_prompt(x, unified_visual_prompt).transpose(0, 1))
