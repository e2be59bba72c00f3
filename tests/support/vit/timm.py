# SPDX-License-Identifier: Apache-2.0
"""timm's models as cases; see ``support.vit``."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from stoptome_kernels.vit.towers import installed_below
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from support.vit import Case, Slow

SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}


def images(batch: int) -> tuple:
    return (torch.randn(batch, 3, 32, 32),)


def dynamic(**options) -> VisionTransformer:
    """Return a model for images of any size, in eval mode."""
    return VisionTransformer(**SIZE, dynamic_img_size=True, **options).eval()


def attended(block: Any, x: Tensor, slow: Slow, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what the block's attention gives, with the sizes as its mask, and the keys before any rotation."""
    plain, given = F.scaled_dot_product_attention, []

    def weighted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **options) -> Tensor:
        given.append(k)
        return plain(q, k, v, slow.bias, **options)

    # each merged token is where the one is that received the others: the last odd one, or the only one
    options = {} if rope is None else {"rope": rope_of(block, slow, rope)}
    with mock.patch.object(F, "scaled_dot_product_attention", weighted):  # a mask can't be given before timm 1.0.16
        block.attn(x)
        return block.attn(x, **options), given[0]


def rope_of(block: Any, slow: Slow, rope: Tensor) -> Tensor:
    rows = slow.place[:, slow.protected :] - slow.protected
    if rope.dim() == 3:  # (H, patches, 2d), a block's own
        return torch.stack([rope[:, row] for row in rows])
    return torch.stack([rope[row] for row in rows])[:, None]


class Placed(Slow):
    """Which original token each merged one has its place from."""

    def __init__(self, x: Tensor, protected: int):
        super().__init__(x, protected)
        self.place = torch.arange(x.shape[1]).repeat(x.shape[0], 1)

    def merge(self, x: Tensor, keys: Tensor, r: int) -> Tensor:
        before, place = self.source, self.place
        out = super().merge(x, keys, r)
        joins = (self.source[:, :, None] * before[:, None]).sum(3) > 0  # (N, T' − r, T')
        rows = []
        for item in range(len(joins)):
            row = []
            for members in joins[item]:
                tokens = members.nonzero()[:, 0].tolist()
                row.append(tokens[0] if len(tokens) == 1 else next(t for t in tokens if t % 2 == 1))
            rows.append(place[item, torch.tensor(row)])
        self.place = torch.stack(rows)
        return out


def slow(model: Any, inputs: tuple, rates: tuple[int, ...]) -> Tensor:
    x, rope = model.patch_embed(*inputs), None
    if isinstance(model, Eva):
        x, rope = model._pos_embed(x)
    else:
        x = model._pos_embed(x)
    x = getattr(model, "norm_pre", nn.Identity())(x)
    state, mixed = Placed(x, model.num_prefix_tokens), getattr(model, "rope_mixed", False)
    for index, (block, r) in enumerate(zip(model.blocks, rates, strict=True)):
        own = rope[index] if rope is not None and mixed else rope
        post = isinstance(block, (ResPostBlock, EvaBlockPostNorm))
        out, keys = attended(block, x if post else block.norm1(x), state, own)
        out = block.norm1(out) if post else scaled(block, 1, out)
        x = state.merge(x + out, keys, r)
        x = x + (block.norm2(block.mlp(x)) if post else scaled(block, 2, block.mlp(block.norm2(x))))
    x = model.norm(x)
    if getattr(model, "attn_pool", None) is None and model.global_pool == "avg":  # a mean in which tokens count
        first = 0 if getattr(model, "pool_include_prefix", False) else state.protected
        weight = state.size[:, first:, None]
        pooled = (x[:, first:] * weight).sum(1) / weight.sum(1)
        return model.head(model.head_drop(model.fc_norm(pooled)))
    if model.global_pool == "token" and not hasattr(model, "dist_token"):
        return model.head(model.fc_norm(x[:, 0]))
    return model.forward_head(state.spread(x))


def scaled(block: Any, branch: int, x: Tensor) -> Tensor:
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(x)
    gamma = getattr(block, f"gamma_{branch}")
    return x if gamma is None else gamma * x


def takes(kind: type[nn.Module], **options) -> bool:
    """Return whether the installed timm knows these settings of a model."""
    known = {name for base in kind.__mro__[:2] for name in inspect.signature(base.__init__).parameters}
    return known >= options.keys()


def case(name: str, protected: int, kind=VisionTransformer, compiled: bool = False, **options) -> Case:
    make, tokens = partial(kind, **SIZE | options), 64 + protected
    return Case(
        f"timm-{name}",
        make,
        images,
        lambda model: list(model.blocks),
        protected,
        slow,
        tokens=tokens,
        compiled=compiled,
    )


EVA = {"kind": Eva, "use_rot_pos_emb": True}
REGISTERS = {} if installed_below("timm", (1, 0, 17)) else {"num_reg_tokens": 4}  # Eva's own forward failed with them
CASES = [
    case("vit", 1),
    case("registers", 5, reg_tokens=4, init_values=0.1, qk_norm=True),
    case("distilled", 2, VisionTransformerDistilled),
    case("avg", 1, compiled=True, global_pool="avg", scale_attn_norm=True, pre_norm=True),
    case("avg-prefix", 1, global_pool="avg", fc_norm=False, pool_include_prefix=True),
    case("avgmax", 1, global_pool="avgmax"),
    case("map", 0, compiled=True, class_token=False, global_pool="map"),
    case("res-post", 1, compiled=True, block_fn=ResPostBlock, init_values=0.5),
    case("deit3", 1, no_embed_class=True, init_values=1e-2),
    case("eva", 1 + len(REGISTERS) * 4, init_values=0.1, **REGISTERS, **EVA),
    case("eva02", 1, compiled=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, rope_rotate_half=True, **EVA),
    case("eva-mixed", 1, rope_type="mixed", qkv_bias=False, attn_type="rope", **EVA),
    case(
        "dinov3", 5, compiled=True, num_reg_tokens=4, rope_type="dinov3", attn_type="rope", global_pool="token", **EVA
    ),
    case("eva-gqa", 1, attn_type="rope", qkv_fused=False, num_kv_heads=1, **EVA),
    case("eva-post", 1, use_post_norm=True, **EVA),
]  # fmt: skip
CASES = [
    each
    for each in CASES
    if takes(each.make.func, **each.make.keywords)
    and not (each.name == "timm-avgmax" and installed_below("timm", (1, 0, 7)))
]
