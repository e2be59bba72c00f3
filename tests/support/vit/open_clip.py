# SPDX-License-Identifier: Apache-2.0
"""open_clip's models as cases; see ``support.vit``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from support.vit import Case, Slow, recorded
from support.vit import timm as timm_cases
from support.vit.torchvision import masked

SIZE = {"image_size": 32, "patch_size": 4, "width": 48, "layers": 4}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}
CAPTIONS = TEXT | {"width": 24, "embed_cls": True, "output_tokens": True}
CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}


def attended(block: Any, x: Tensor, state: Slow) -> tuple[Tensor, Tensor]:
    """Return what the block's attention gives, with the sizes as its mask, and the keys."""
    if isinstance(block.attn, nn.MultiheadAttention):
        return masked(block.attn, x, state)
    mask = state.bias.expand(-1, block.attn.num_heads, x.shape[1], -1)
    out, keys = recorded(block.attn.ln_k, lambda: block.attn(x, attn_mask=mask.flatten(0, 1)))
    return block.ln_attn(out), keys


def merged(tower: Any, inputs: tuple, rates: tuple[int, ...]) -> tuple[Tensor, Slow]:
    """Return the tokens that the tower's blocks give, before its last norm and its pooling."""
    x = tower._embeds(*inputs)
    state = Slow(x, 1)
    for block, r in zip(tower.transformer.resblocks, rates, strict=True):
        out, keys = attended(block, block.ln_1(x), state)
        x = state.merge(x + block.ls_1(out), keys, r)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, state


def slow(tower: Any, inputs: tuple, rates: tuple[int, ...]) -> Any:
    """Return what the tower gives."""
    x, state = merged(tower, inputs, rates)
    if tower.pool_type == "avg" and tower.attn_pool is None and not tower.output_tokens:  # a mean in which tokens count
        x = x if tower.final_ln_after_pool else tower.ln_post(x)
        weight = state.size[:, 1:, None]
        x = (x[:, 1:] * weight).sum(1) / weight.sum(1)
        return (tower.ln_post(x) if tower.final_ln_after_pool else x) @ tower.proj
    pooled, tokens = tower._pool(state.spread(x))
    pooled = pooled @ tower.proj
    return (pooled, tokens) if tower.output_tokens else pooled


def slow_image(model: Any, inputs: tuple, rates: tuple[int, ...]) -> Tensor:
    return F.normalize(slow(model.visual, inputs, rates), dim=-1)


def slow_both(model: Any, inputs: tuple, rates: tuple[int, ...]) -> Tensor:
    return both(slow(model, inputs, rates))


def slow_caption(model: Any, inputs: tuple, rates: tuple[int, ...]) -> Tensor:
    features, tokens = slow(model.visual, inputs, rates)
    return both((F.normalize(features, dim=-1), tokens))


def slow_trunk(model: Any, inputs: tuple, rates: tuple[int, ...]) -> Tensor:
    trunk = model.visual.trunk
    return F.normalize(model.visual.head(timm_cases.slow(trunk, inputs, rates)), dim=-1)


def both(result: Any) -> Tensor:
    """Features and tokens as one tensor."""
    features, tokens = result.values() if isinstance(result, dict) else result
    return torch.cat([features.flatten(1), tokens.flatten(1)], 1)


def tower(name: str, answer: Callable[[Any], Tensor] | None = None, compiled: bool = False, **options) -> Case:
    make = partial(VisionTransformer, **SIZE | {"heads": 4, "mlp_ratio": 2.0, "output_dim": 24} | options)
    answer, reference = (lambda result: result, slow) if answer is None else (answer, slow_both)
    return Case(f"open_clip-{name}", make, timm_cases.images, resblocks, 1, reference, answer, compiled=compiled)


def clip(name: str, kind: Any = open_clip.CLIP, reference=slow_image, compiled: bool = False, **vision) -> Case:
    make = partial(kind, 24, SIZE | {"head_width": 12} | vision, TEXT)
    return Case(
        f"open_clip-{name}", make, timm_cases.images, lambda model: resblocks(model.visual), 1, reference,
        lambda result: result[0], compiled=compiled,
    )  # fmt: skip


def coca() -> Any:
    vision = SIZE | {"head_width": 12, "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2}
    return open_clip.CoCa(24, TEXT | {"width": 24}, CAPTIONS, vision | {"output_tokens": True})


def resblocks(model: Any) -> list:
    return list(model.transformer.resblocks)


CASES = [
    clip("clip", compiled=True),
    clip("custom-text", open_clip.CustomTextCLIP, ls_init_value=0.5, qk_norm=True),
    Case("open_clip-coca", coca, timm_cases.images, lambda model: resblocks(model.visual), 1, slow_caption, both),
    tower("vit", ls_init_value=0.5, final_ln_after_pool=True, no_ln_pre=True),
    tower("custom", compiled=True, **CUSTOM),
    tower("avg", pool_type="avg"),
    tower("avg-ln", pool_type="avg", final_ln_after_pool=True),
    tower("tokens", both, output_tokens=True),
    tower("none", pool_type="none"),
    tower("attentional", attentional_pool=True, attn_pooler_queries=6, attn_pooler_heads=2),
    tower("cascade", output_dim=48, attentional_pool="cascade", attn_pooler_queries=6, attn_pooler_heads=2),
]  # fmt: skip
if timm.is_model("test_vit"):  # since timm 1.0.8
    case = clip("timm", reference=slow_trunk, timm_model_name="test_vit", timm_pool="token")
    CASES.append(
        replace(
            case, tokens=101, inputs=lambda batch: (torch.randn(batch, 3, 160, 160),),
            blocks=lambda model: list(model.visual.trunk.blocks),
        )
    )  # fmt: skip
