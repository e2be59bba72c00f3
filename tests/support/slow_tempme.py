# SPDX-License-Identifier: Apache-2.0
"""TempMe's published model in our own words: its parameter names, how its parts call each other, and, in the place of
its patch, token merging in eager operations. Stand-in for tests of the patch; golden vectors hold it to upstream."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.baselines import operators
from harness.baselines.stop import LayerNorm, QuickGELU


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, rank: int):
        super().__init__()
        self.num_heads, self.head_dim, self.lora_dim = heads, width // heads, rank
        self.scaling = self.head_dim**-0.5
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(0.1 * torch.randn(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.TVPt_LoRA_a = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.TVPt_LoRA_b = nn.Parameter(0.3 * torch.randn(3 * width, rank))

    def attend(self, packed: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what comes of q, k, v ``(N, L, 3·D)``, and the keys ``(N, H, L, d)``."""
        q, k, v = packed.unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = (q * self.scaling) @ k.transpose(2, 3)
        if size is not None:
            scores = scores + size.log()[:, None, None, :, 0]
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), k

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.attend(F.linear(x, self.in_proj_weight, self.in_proj_bias), None)[0], None


class Block(nn.Module):
    """As it is before TempMe's patch: it leaves its low-rank update out, and can't be called as the model calls it."""

    def __init__(self, width: int, heads: int, rank: int, frames: int = 0):
        super().__init__()
        self.attn = Attention(width, heads, rank)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = LayerNorm(width)
        self.attn_mask, self.n_head = None, heads
        if frames:
            self.TVPt_Video_Positional_embedding = nn.Parameter(0.3 * torch.randn(1, frames, 1, width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x))[0]
        return x + self.mlp(self.ln_2(x))


class MergingBlock(Block):
    """The same behind a patch that merges in eager operations; sizes and counts are kept in one dictionary."""

    def forward(self, x: Tensor, M_frame_num: int, M_token_num: list[int], frame_pos: int = 0) -> Tensor:
        info = self._tome_info
        if M_frame_num > 1:
            x = self.join(x, M_frame_num, M_token_num[0], frame_pos)
        normed = self.ln_1(x)
        low_rank = F.linear(F.linear(normed, self.attn.TVPt_LoRA_a), self.attn.TVPt_LoRA_b)
        packed = F.linear(normed, self.attn.in_proj_weight, self.attn.in_proj_bias) + low_rank
        out, k = self.attn.attend(packed, info["size"] if info["prop_attn"] else None)
        x = self.merge(x + out, k.detach(), M_token_num[-1], x + out)
        return x + self.mlp(self.ln_2(x))

    def join(self, x: Tensor, count: int, r: int, frame_pos: int) -> Tensor:
        info, classes = self._tome_info, self._tome_info["cls_num"]

        def together(rows: Tensor) -> Tensor:
            rows = rows.unflatten(0, (-1, count))
            return torch.cat([rows[:, :, :classes].flatten(1, 2), rows[:, :, classes:].flatten(1, 2)], 1)

        named = x
        if frame_pos:
            embedding = self.TVPt_Video_Positional_embedding
            named = (x.unflatten(0, (-1, embedding.shape[1])) + embedding).flatten(0, 1)
        if info["size"] is not None:
            info["size"] = together(info["size"])
        info["cls_num"], info["frame_num"] = classes * count, info["frame_num"] // count
        return self.merge(together(named), together(x).detach(), r, together(named))

    def merge(self, x: Tensor, metric: Tensor, r: int, like: Tensor) -> Tensor:
        info = self._tome_info
        r = min(r, (x.shape[1] - info["cls_num"]) // 2)
        if r:
            size = like.new_ones(*like.shape[:2], 1) if info["size"] is None else info["size"]
            plan = operators.eager_match(metric, r, info["cls_num"])
            x, info["size"] = operators.eager_merge(x, plan, size, info["cls_num"])
        info["token_num"] = x.shape[1]
        return x


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, rank: int, embeddings: dict[int, int]):
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(*[Block(width, heads, rank, embeddings.get(i, 0)) for i in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, side: int, patch: int, transformer: Transformer):
        super().__init__()
        width = transformer.width
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = transformer
        self.proj = nn.Parameter(torch.randn(width, width // 2) * width**-0.5)

    def embed(self, frames: Tensor) -> Tensor:
        """``(N, 3, H, W) → (N, 1 + n, D)``."""
        x = self.conv1(frames).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return self.ln_pre(x + self.positional_embedding)

    def forward(self, frames: Tensor) -> Tensor:
        return self.transformer(self.embed(frames).transpose(0, 1)).transpose(0, 1)


class Clip(nn.Module):
    def __init__(self, visual: Visual, text: Transformer):
        super().__init__()
        self.visual, self.transformer = visual, text


def merge_eagerly(clip: Clip, trace_source: bool = False, prop_attn: bool = True) -> None:
    """The call that stands where the model's constructor applies TempMe's patch."""
    clip._tome_info = {"size": None, "source": None, "trace_source": trace_source, "prop_attn": prop_attn}
    for block in clip.visual.transformer.resblocks:
        block.__class__ = MergingBlock
        block._tome_info = clip._tome_info


def settings(**changes) -> SimpleNamespace:
    """TempMe's flags, for a small model."""
    flags = {
        "tome_r": 2, "tome_tracesource": False, "tome_propattn": True, "merge_layer": "2-3", "merge_frame_num": "2-2",
        "merge_token_proportion": "30-10", "frame_pos": 1, "max_frames": 4, "lora_dim": 4,
    }  # fmt: skip
    return SimpleNamespace(**flags | changes)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split("-")]


class Model(nn.Module):
    """VTRModel without its text side and loss: ``get_video_feat`` calls the blocks and tells them what to do."""

    def __init__(self, config: SimpleNamespace, width=32, heads=4, layers=5, side=4, patch=4, apply=merge_eagerly):
        super().__init__()
        self.config, self.layers = config, layers
        self.tome_r, self.tome_propattn, self.frame_pos = config.tome_r, config.tome_propattn, config.frame_pos
        self.merge_layer = numbers(config.merge_layer)
        self.merge_token_proportion = [number / 100 for number in numbers(config.merge_token_proportion)]
        embeddings, frames = {}, config.max_frames
        for layer, count in zip(self.merge_layer, numbers(config.merge_frame_num), strict=True):
            embeddings[layer], frames = frames, frames // count
        tower = Transformer(width, layers, heads, config.lora_dim, embeddings if config.frame_pos else {})
        self.clip = Clip(Visual(side, patch, tower), Transformer(width, 1, heads, config.lora_dim, {}))
        self.frame_list, self.patch_list = [config.max_frames], [side**2 + 1]
        if apply is not None:
            apply(self.clip, trace_source=config.tome_tracesource, prop_attn=self.tome_propattn)

    def blocks(self, x: Tensor) -> Tensor:
        """All blocks on ``(B·T, 1 + n, D)``, by the model's own schedule."""
        info = self.clip._tome_info
        info.update(size=None, source=None, cls_num=1, frame_num=self.frame_list[0], token_num=self.patch_list[0])
        counts = numbers(self.config.merge_frame_num)
        between, within = self.merge_token_proportion
        for layer, block in enumerate(self.clip.visual.transformer.resblocks):
            free = info["token_num"] - info["cls_num"]
            if layer in self.merge_layer:
                count = counts.pop(0)
                inter = min(free * count // 2, int(info["token_num"] * count * between))
                intra = min((free * count - inter) // 2, int((info["token_num"] * count - inter) * within))
                x = block(x, M_frame_num=count, M_token_num=[inter, intra], frame_pos=self.frame_pos)
            elif layer < self.merge_layer[0]:
                x = block(x, M_frame_num=1, M_token_num=[self.tome_r])
            else:
                x = block(x, M_frame_num=1, M_token_num=[min(free // 2, int(info["token_num"] * within))])
        return x

    def get_video_feat(self, video: Tensor, video_mask: Tensor) -> Tensor:
        """``(B·T, 3, H, W)``, ``(B, T)`` → ``(B, E)``."""
        batch, frames = video_mask.shape
        x = self.blocks(self.clip.visual.embed(video))
        info = self.clip._tome_info
        x = x.view(batch, info["frame_num"], info["token_num"], -1)[:, :, : info["cls_num"]].flatten(1, 2)
        hidden = self.clip.visual.ln_post(x) @ self.clip.visual.proj
        assert hidden.shape[1] == frames
        hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        weights = video_mask.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
