# SPDX-License-Identifier: Apache-2.0
"""timm's VisionTransformer (with DeiT, DeiT-3, DINOv2, CLIP's and SigLIP's towers in it) and Eva (EVA, EVA-02, DINOv3,
PE and other models with rotary embeddings)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patching.subclass import PatchedModule, original_class
from .block import (
    AttentionMixin,
    BlockMixin,
    IntermediatesMixin,
    KeyRequest,
    Substitute,
    attend_like_library,
    call_unless_identity,
    reading,
)
from .guards import reject_masks, reject_other_arguments
from .tokens import Tokens
from .towers import (
    VitTower,
    check_own_method,
    exactly_one,
    find_submodules,
    installed_below,
    is_instance_of,
    require_version,
)

_VIT, _EVA = ("timm.models.vision_transformer", "VisionTransformer"), ("timm.models.eva", "Eva")
_LEAST = (1, 0)
_ROPE_BY_IMAGE = installed_below("timm", (1, 0, 17))  # what (·, patches, 2d) rotary embeddings are for; now by head
_ATTENTION = {
    ("timm.models.vision_transformer", "Attention"),  # where it was before timm 1.0.16
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.models.eva", "EvaAttention"),
}


class _PreNorm(BlockMixin):
    """``Block``."""

    tome_takes: tuple[str, ...] = ("attn_mask", "is_causal")  # besides tokens, in this order

    def tome_forward(self, tokens: Tokens, *args, rope: Tensor | None = None, **masks) -> Tokens:
        block: Any = self
        rope = _rope(block, args, rope, masks)
        residual, keys = _attention(block, block.norm1(tokens.x), tokens, rope)
        residual = call_unless_identity(block.drop_path1, _layer_scale(block, 1, residual))
        merged, normed = block.tome.merge(tokens, residual, keys, block.norm2)
        return merged.but(
            x=merged.x + call_unless_identity(block.drop_path2, _layer_scale(block, 2, block.mlp(normed)))
        )

    def tome_example_inputs(self, tokens: int) -> tuple[tuple, dict]:
        return _sample(self, tokens)


class _PostNorm(BlockMixin):
    """``ResPostBlock``: normalised after each branch."""

    tome_takes: tuple[str, ...] = ("attn_mask", "is_causal")

    def tome_forward(self, tokens: Tokens, *args, rope: Tensor | None = None, **masks) -> Tokens:
        block: Any = self
        rope = _rope(block, args, rope, masks)
        residual, keys = _attention(block, tokens.x, tokens, rope)
        merged, _ = block.tome.merge(tokens, call_unless_identity(block.drop_path1, block.norm1(residual)), keys, None)
        return merged.but(x=merged.x + call_unless_identity(block.drop_path2, block.norm2(block.mlp(merged.x))))

    def tome_example_inputs(self, tokens: int) -> tuple[tuple, dict]:
        return _sample(self, tokens)


class _EvaPreNorm(_PreNorm):
    """``EvaBlock``."""

    tome_takes = ("rope", "attn_mask", "is_causal")


class _EvaPostNorm(_PostNorm):
    """``EvaBlockPostNorm``."""

    tome_takes = ("rope", "attn_mask", "is_causal")


def _rope(block: Any, args: tuple, rope: Tensor | None, masks: dict) -> Tensor | None:
    """Return the embeddings that a block was given, by position or by name.

    Raises:
        ValueError: a mask.
    """
    for name, value in zip(block.tome_takes, args, strict=False):
        if name == "rope":
            rope = value
        else:
            masks[name] = value
    reject_masks(block, **masks)
    return rope


class _Attention(AttentionMixin):
    """``Attention``, ``AttentionRope``, ``EvaAttention``, which take ``block.KeyRequest`` for an ``attn_mask``."""

    def tome_attend(self, request: KeyRequest, x: Tensor, *args, rope: Tensor | None = None, **options):
        """Attend, with ``x (N, T, D)``, and ``rope``, the rows of the tokens' places."""
        attn: Any = self
        reject_other_arguments(self, args, options)
        gate = getattr(attn, "gate", None)
        q, k, v = _heads(attn, x)
        if hasattr(attn, "q_norm"):  # Eva's has them since timm 1.0.15
            q, k = call_unless_identity(attn.q_norm, q), call_unless_identity(attn.k_norm, k)
        request.keys = k  # before any rotation: tokens are compared by what they show, not by where they are
        if rope is not None:
            q, k = (_rotated(attn, part, rope).type_as(v) for part in (q, k))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = attend_like_library(attn, attn.fused_attn, q, k, v, request.size)
        if hasattr(attn, "norm"):
            out = call_unless_identity(attn.norm, out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return call_unless_identity(attn.proj_drop, attn.proj(out))


_BLOCKS: dict[tuple[str, str], type[BlockMixin]] = {
    ("timm.models.vision_transformer", "Block"): _PreNorm,
    ("timm.models.vision_transformer", "ResPostBlock"): _PostNorm,
    ("timm.models.eva", "EvaBlock"): _EvaPreNorm,
    ("timm.models.eva", "EvaBlockPostNorm"): _EvaPostNorm,
}


_READERS = ("forward", "forward_features", "pool", "forward_head")  # Eva's pool: since 1.0.16


class _Model(IntermediatesMixin):
    """The model: what reads its tokens has to know that there are fewer."""

    tome_watched = ("global_pool", "attn_pool", *_READERS)

    def pool(self, x: Tensor, pool_type: str | None = None):
        if pool_type not in (None, "", "token", self.global_pool) and not self.tome.dense_output:  # type: ignore[attr-defined]
            raise ValueError(
                f"pool_type={pool_type!r} weights all tokens equally, but they represent different numbers of patches: "
                "patch with unmerge=True"
            )
        return super().pool(x, pool_type)  # type: ignore[misc]

    def forward_features(self, *args, **options):
        self.tome_check_unchanged(self.blocks, self.num_prefix_tokens)  # type: ignore[attr-defined]
        return super().forward_features(*args, **options)  # type: ignore[misc]

    def tome_needs_dense_output(self) -> bool:
        return _needs_dense_output(self)

    def tome_is_checkpointing(self) -> bool:
        return self.grad_checkpointing  # type: ignore[attr-defined]

    def tome_forward_intermediates(self, *args, **options):
        self.tome_check_unchanged(self.blocks, self.num_prefix_tokens)  # type: ignore[attr-defined]
        check_own_method(self, "timm", "forward_intermediates")
        model: Any = Substitute(self, "blocks", reading(self.blocks))  # type: ignore[arg-type, attr-defined]
        return original_class(self).forward_intermediates(model, *args, **options)  # type: ignore[attr-defined]


def find(model: nn.Module) -> VitTower | None:
    """Return timm's vision transformer in a model."""
    paths = [path for home in (_VIT, _EVA) for path in find_submodules(model, *home)]
    if not paths:
        _refuse_others(model)
        return None
    path = exactly_one(paths)
    tower: Any = path[-1]
    require_version("timm", _LEAST, tower)
    mixins = tuple(_mixin(block) for block in tower.blocks)
    attentions = tuple(((block.attn, _Attention),) for block in tower.blocks)
    patches = tower.patch_embed.num_patches
    dynamic = getattr(tower, "dynamic_img_size", False) or patches is None
    return VitTower(
        tower, tuple(tower.blocks), mixins, tower.num_prefix_tokens, _needs_dense_output(tower), tower.embed_dim,
        None if dynamic else tower.num_prefix_tokens + patches, _Model, is_instance_of(tower, *_EVA), path,
        attentions=attentions,
    )  # fmt: skip


def _refuse_others(model: nn.Module) -> None:
    """Name the models of timm that look like vision transformers and aren't this one."""
    kind = type(model)
    if kind.__module__.startswith("timm.models.") and kind.__module__ != "timm.models._features":
        raise TypeError(
            f"can't merge tokens in timm's {kind.__name__}: supported are VisionTransformer and Eva, and models that "
            "contain one"
        )


def _needs_dense_output(tower: Any) -> bool:
    """Return whether more than the class token of the tower's output is read: by the pool, by the caller, or perhaps by
    a method of somebody else's."""
    kind = original_class(tower)
    foreign = any(not getattr(kind, name).__module__.startswith("timm.") for name in _READERS if hasattr(kind, name))
    foreign = foreign or any(name in tower.__dict__ for name in _READERS)
    return foreign or tower.global_pool != "token" or getattr(tower, "attn_pool", None) is not None


def _mixin(block: Any) -> type[BlockMixin]:
    if isinstance(block, PatchedModule):
        return block.tome_parts[0]
    kind = original_class(block)
    mixin = _BLOCKS.get((kind.__module__, kind.__qualname__))
    if mixin is None:
        raise TypeError(
            f"can't merge tokens in timm's {kind.__name__}: supported are "
            f"{', '.join(name for _, name in _BLOCKS)}; build the model with one of these (block_fn=…), and patch "
            "before another library wraps them"
        )
    attn = type(block.attn)
    if (attn.__module__, attn.__qualname__) not in _ATTENTION:
        raise TypeError(
            f"can't merge tokens in {kind.__name__} with the attention {attn.__name__}: supported are "
            f"{', '.join(sorted({name for _, name in _ATTENTION}))}; patch before another library replaces it"
        )
    return mixin


def _attention(block: Any, x: Tensor, tokens: Tokens, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what the attention module makes of ``x``, and the keys."""
    request = KeyRequest(block, block.attn, tokens)
    options = {} if rope is None else {"rope": _rope_rows(rope, tokens.position, block.tome.merging.protected)}
    return block.attn(x, attn_mask=request, **options), request.take(block, block.attn)


def _rotated(attn: Any, part: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    first, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    options = {"half": half} if half else {}  # timm before 1.0.20 knows no other way
    return torch.cat([part[:, :, :first], apply_rot_embed_cat(part[:, :, first:], rope, **options)], 2)


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return q, k, v, each ``(N, H, T, d)``."""
    if attn.qkv is None:
        parts = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
        return tuple(
            part.unflatten(2, (-1, attn.q_proj.out_features // attn.num_heads)).transpose(1, 2) for part in parts
        )
    if getattr(attn, "q_bias", None) is None:
        packed = attn.qkv(x)
    else:  # Eva's: there is no bias for the keys
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        packed = attn.qkv(x) + bias if getattr(attn, "qkv_bias_separate", False) else F.linear(x, attn.qkv.weight, bias)
    n, tokens, width = packed.shape  # unflatten is Python
    return packed.reshape(n, tokens, 3, attn.num_heads, width // (3 * attn.num_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def _rope_rows(rope: Tensor, position: Tensor | None, prefix: int) -> Tensor:
    """Return the rows of ``([N,] [H,] patches, 2d)`` rotary embeddings that belong to the tokens."""
    if _ROPE_BY_IMAGE and rope.dim() == 3:  # some patches of each image were dropped
        rope = rope[:, None]
    if position is None:
        return rope
    place = position[:, prefix:] - prefix  # (N, T')
    if rope.dim() == 4:  # of each image its own patches
        return rope.gather(2, place[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))
    if rope.dim() == 3:
        return rope[:, place].transpose(0, 1)
    return rope[place][:, None]


def _layer_scale(block: Any, branch: int, x: Tensor) -> Tensor:
    """Apply LayerScale, under either of its names."""
    module = getattr(block, f"ls{branch}", None)
    if module is not None:
        return call_unless_identity(module, x)
    gamma = getattr(block, f"gamma_{branch}", None)
    return x if gamma is None else x * gamma


def _sample(block: Any, tokens: int) -> tuple[tuple, dict]:
    if not hasattr(block.attn, "num_prefix_tokens"):
        return (), {}
    weight = next(block.parameters())
    angle = torch.arange(tokens - block.attn.num_prefix_tokens, device=weight.device)[:, None].to(weight)
    d = (block.attn.qkv.out_features // 3 if block.attn.qkv is not None else block.attn.q_proj.out_features) // (
        block.attn.num_heads
    )
    angle = angle.expand(-1, d)
    return (), {"rope": torch.cat([angle.sin(), angle.cos()], 1)}
