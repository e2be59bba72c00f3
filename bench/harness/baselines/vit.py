# SPDX-License-Identifier: Apache-2.0
"""Token merging in the blocks of timm, open_clip and transformers as PyTorch users write it today: eager operations,
scaled_dot_product_attention with the sizes as its mask, the sizes in an object that all blocks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import eager_both


@dataclass(frozen=True)
class Parts:
    """The parts of a library's block, each a function of the block."""

    norm1: Callable[[Any], Callable]
    heads: Callable[[Any, Tensor], tuple[Tensor, ...]]  # q, k, v, each (N, H, T, d)
    project: Callable[[Any, Tensor], Tensor]
    norm2: Callable[[Any], Callable]
    mlp: Callable[[Any, Tensor], Tensor]


def _packed(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _apart(x: Tensor, heads: int, *layers: Callable) -> tuple[Tensor, ...]:
    return tuple(layer(x).unflatten(2, (heads, -1)).transpose(1, 2) for layer in layers)


TIMM = Parts(
    lambda b: b.norm1,
    lambda b, x: _packed(b.attn.qkv(x), b.attn.num_heads),
    lambda b, x: b.attn.proj(x),
    lambda b: b.norm2,
    lambda b, x: b.mlp(x),
)
OPEN_CLIP = Parts(
    lambda b: b.ln_1,
    lambda b, x: _packed(F.linear(x, b.attn.in_proj_weight, b.attn.in_proj_bias), b.attn.num_heads),
    lambda b, x: b.attn.out_proj(x),
    lambda b: b.ln_2,
    lambda b, x: b.mlp(x),
)
CLIP = Parts(
    lambda b: b.layer_norm1,
    lambda b, x: _apart(x, b.self_attn.num_heads, b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj),
    lambda b, x: b.self_attn.out_proj(x),
    lambda b: b.layer_norm2,
    lambda b, x: b.mlp(x),
)
VIDEOMAE = Parts(
    lambda b: b.layernorm_before,
    lambda b, x: _apart(x, b.attention.attention.num_attention_heads, *_three(b.attention.attention)),
    lambda b, x: b.attention.output.dense(x),
    lambda b: b.layernorm_after,
    lambda b, x: b.output.dense(b.intermediate(x)),
)


def _three(attention: Any) -> tuple[Any, Any, Any]:
    return attention.query, attention.key, attention.value


class Shared:
    """The state that all blocks of a model share: the sizes ``(N, T, 1)`` of the last block's tokens."""

    size: Tensor | None = None


def merge_eagerly(blocks: list, parts: Parts, r: int, protected: int, mean: bool) -> None:
    """Make each block of a model merge r tokens.

    Args:
        blocks: pre-norm blocks, first to last.
        parts: what they are made of.
        r: tokens merged in each.
        protected: leading tokens that are never merged.
        mean: the model averages over all tokens behind the last block: let them count by their sizes there.
    """
    shared = Shared()

    def forward(self: Any, x: Tensor, *_, **__) -> Tensor:
        first, last = self is blocks[0], self is blocks[-1]
        size = torch.ones_like(x[..., :1]) if first else shared.size
        q, k, v = parts.heads(self, parts.norm1(self)(x))
        mask = None if first else size.log()[:, None, None, :, 0].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + parts.project(self, out)
        x, size = eager_both(k.detach().mean(1), x, size, min(r, (x.shape[1] - protected) // 2), protected)
        shared.size = None if last else size
        x = x + parts.mlp(self, parts.norm2(self)(x))
        return x * (size / size.mean(1, keepdim=True)) if last and mean else x

    for block in blocks:
        block.forward = MethodType(forward, block)
