# SPDX-License-Identifier: Apache-2.0
"""open_clip's VisionTransformer, alone or as the image side of CLIP, CustomTextCLIP and CoCa; towers that are models of
timm are timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..patching.subclass import PatchedModule, original_class
from . import multihead
from .block import AttentionMixin, BlockMixin, IntermediatesMixin, KeyRequest, Substitute, attend_like_library, reading
from .guards import reject_masks, reject_replaced_method
from .tokens import Tokens
from .towers import (
    VitTower,
    check_own_method,
    class_path,
    exactly_one,
    find_submodules,
    has_overridden_method,
    require_version,
)

_HOME = "open_clip.transformer"
_LEAST = (3, 0)


class _ResidualBlock(BlockMixin):
    """``ResidualAttentionBlock``, around torch's attention."""

    def tome_forward(
        self, tokens: Tokens, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tokens:
        block: Any = self
        reject_masks(block, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        reject_replaced_method(block, "attention")
        residual, keys = multihead.call_attention(block, block.attn, block.ln_1(tokens.x), tokens)
        return _rest(block, tokens, block.ls_1(residual), keys)


class _CustomBlock(BlockMixin):
    """``CustomResidualAttentionBlock``, around open_clip's own attention."""

    def tome_forward(self, tokens: Tokens, attn_mask: Tensor | None = None) -> Tokens:
        block: Any = self
        reject_masks(block, attn_mask=attn_mask)
        residual, keys = _attention(block, block.ln_1(tokens.x), tokens)
        return _rest(block, tokens, block.ls_1(block.ln_attn(residual)), keys)


def _rest(block: Any, tokens: Tokens, residual: Tensor, keys: Tensor) -> Tokens:
    merged, normed = block.tome.merge(tokens, residual, keys, block.ln_2)
    return merged.but(x=merged.x + block.ls_2(block.mlp(normed)))


def _attention(block: Any, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    request = KeyRequest(block, block.attn, tokens)
    return block.attn(x, attn_mask=request), request.take(block, block.attn)


class _Attention(AttentionMixin):
    """open_clip's own ``Attention``, which takes ``block.KeyRequest`` for an ``attn_mask``."""

    def tome_attend(self, request: KeyRequest, x: Tensor):
        """Attend, with ``x (N, T, D)``."""
        attn: Any = self
        q, k, v = multihead.packed_qkv(attn, x)
        q, k = attn.ln_q(q), attn.ln_k(k)
        request.keys = k
        if attn.head_scale is not None:
            v = v * attn.head_scale  # of what a head gives; attention is linear in v
        out = attend_like_library(attn, attn.use_fsdpa, q, k, v, request.size)
        return attn.out_drop(attn.out_proj(attn.ln_inner(out)))


class _Tower(IntermediatesMixin):
    """The tower: what reads its tokens has to know that there are fewer."""

    tome_watched = ("pool_type", "attn_pool", "output_tokens", "forward", "_pool", "_global_pool")

    def forward(self, x: Tensor):
        self.tome_check_unchanged(self.transformer.resblocks)  # type: ignore[attr-defined]
        return super().forward(x)  # type: ignore[misc]

    def tome_needs_dense_output(self) -> bool:
        return _needs_dense_output(self)

    def tome_is_checkpointing(self) -> bool:
        return self.transformer.grad_checkpointing  # type: ignore[attr-defined]

    def tome_forward_intermediates(self, *args, **options):
        self.tome_check_unchanged(self.transformer.resblocks)  # type: ignore[attr-defined]
        check_own_method(self, "open_clip", "forward_intermediates")
        tower: Any = Substitute(self, "transformer", _Blocks(self.transformer))  # type: ignore[arg-type, attr-defined]
        return original_class(self).forward_intermediates(tower, *args, **options)  # type: ignore[attr-defined]


class _Blocks(Substitute):
    """``Transformer`` while its layers are read."""

    def __init__(self, transformer: Any):
        super().__init__(transformer, "resblocks", reading(transformer.resblocks))

    def forward_intermediates(self, *args, **options):
        check_own_method(self._module, "open_clip", "forward_intermediates")
        return type(self._module).forward_intermediates(self, *args, **options)  # type: ignore[attr-defined]


_KINDS: dict[type, type] = {_ResidualBlock: multihead.MultiheadMixin, _CustomBlock: _Attention}


def find(model: nn.Module) -> VitTower | None:
    """Return open_clip's vision transformer in a model.

    Raises:
        TypeError, ValueError: one with a part with which its tokens can't be merged; another model of open_clip's.
        ImportError: of an open_clip too old.
    """
    paths = list(find_submodules(model, _HOME, "VisionTransformer"))
    if not paths:
        _refuse_others(model)
        return None
    path = exactly_one(paths)
    tower: Any = path[-1]
    require_version("open_clip_torch", _LEAST, tower)
    transformer = tower.transformer
    if not transformer.batch_first:
        raise ValueError(f"{type(transformer).__name__} has batch_first=False; build it with batch_first=True")
    blocks = tuple(transformer.resblocks)
    mixins = tuple(_mixin(block) for block in blocks)
    return VitTower(
        tower, blocks, mixins, 1, _needs_dense_output(tower), transformer.width,
        len(tower.positional_embedding), _Tower, around=(*path, transformer),
        attentions=tuple(((block.attn, _KINDS[mixin]),) for block, mixin in zip(blocks, mixins, strict=True)),
    )  # fmt: skip


def _refuse_others(model: Any) -> None:
    """Name the models of open_clip that have no vision transformer."""
    home, name = class_path(model)
    if home.startswith("open_clip."):
        visual = getattr(model, "visual", model)
        visual = getattr(visual, "trunk", visual)
        inside = "" if visual is model else f" with a {type(visual).__name__} as its image tower"
        raise TypeError(
            f"can't merge tokens in open_clip's {name}{inside}: supported are its VisionTransformer, and timm's "
            "VisionTransformer and Eva"
        )


def _needs_dense_output(tower: Any) -> bool:
    """Return whether more than the class token is read of what the last block gives; a class derived from the tower's
    may."""
    return _returns_patch_tokens(tower) or has_overridden_method(tower, _HOME, "forward", "_pool", "_global_pool")


def _returns_patch_tokens(tower: Any) -> bool:
    """Return whether the tower gives all tokens to its pool or its caller."""
    return tower.pool_type != "tok" or tower.attn_pool is not None or tower.output_tokens


def _mixin(block: Any) -> type[BlockMixin]:
    if isinstance(block, PatchedModule):
        return block.tome_parts[0]
    home, name = class_path(block)
    what = f"open_clip's {name}"
    if home == _HOME and name == "ResidualAttentionBlock":
        if hasattr(block, "ln_1_kv"):
            raise TypeError(f"can't merge tokens in {what} with cross attention (ln_1_kv): build it without")
        multihead.check_supported(block, block.attn)
        return _ResidualBlock
    if home != _HOME or name != "CustomResidualAttentionBlock" or class_path(block.attn) != (_HOME, "Attention"):
        raise TypeError(
            f"can't merge tokens in {what} with the attention {type(block.attn).__name__}: supported are "
            "ResidualAttentionBlock with torch.nn.MultiheadAttention and CustomResidualAttentionBlock with Attention; "
            "patch before another library replaces it"
        )
    if block.attn.logit_scale is not None:
        raise ValueError(
            f"can't merge tokens in {what} with scaled_cosine_attn, with which open_clip's own forward fails: build it "
            "without, for example with qk_norm"
        )
    return _CustomBlock
