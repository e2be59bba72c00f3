# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: the vision towers of CLIP, SigLIP and SigLIP2, ViT, DINOv2 (with registers too) and
VideoMAE, alone or inside whole models.

Every original token has a row again after the last layer, and after every layer while hidden states are recorded:
heads, poolers, backbones and multimodal models read grids, and their number of tokens is a promise to the caller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patching.subclass import PatchedModule
from .block import AttentionMixin, BlockMixin, KeyRequest, proportional_attention
from .guards import reject_masks
from .interface import NAME
from .recording import encoder_mixin, is_recorded, remove_stale_recorders
from .tokens import PADDING, Tokens, unmerge_tokens
from .towers import VitTower, class_path, exactly_one, find_submodules, require_version

_LEAST = (5, 0)


class Recorded(NamedTuple):
    """The output of a layer while hidden states are recorded: the recorder takes the first of a tuple.

    Attributes:
        dense: ``(N, T, D)``, a row for each original token.
        tokens: tokens that the next layer works on.
        made: the same memory, which nobody wraps or replaces.
        version: version of ``made``, which counts in-place changes.
    """

    dense: Tensor
    tokens: Tokens
    made: Tensor
    version: int

    @classmethod
    def of(cls, tokens: Tokens) -> Recorded:
        """Return what a layer gives of these tokens."""
        dense = unmerge_tokens(tokens)
        if torch.compiler.is_compiling():
            return cls(dense, tokens, dense, 0)  # what is counted is not known there
        if dense.is_inference():  # of which torch counts nothing
            with torch.inference_mode(False):
                dense = dense.clone()
        elif dense is tokens.x:
            dense = dense.view_as(dense)
        return cls(dense, tokens, dense.detach(), dense._version)

    def untouched(self) -> Tokens:
        """Return the tokens.

        Raises:
            RuntimeError: somebody changed the hidden states, which the next layer doesn't work on.
        """
        if torch.compiler.is_compiling():
            return self.tokens
        if self.dense.data_ptr() != self.made.data_ptr() or self.made._version != self.version:
            raise RuntimeError(
                "a hook changed the recorded hidden states of a layer, which the next layer does not read, since it "
                "works on merged tokens: change tokens.x (of Tokens, without output_hidden_states), or "
                "remove_tome_patch() first"
            )
        return self.tokens


class _HfBlock(BlockMixin):
    """A pre-norm layer.

    Attributes:
        tome_names: the names of its attention and its two norms.
    """

    tome_names: tuple[str, str, str]

    def forward(self, x: Any, *args, **options):
        given = super().forward(x.untouched() if isinstance(x, Recorded) else x, *args, **options)
        if isinstance(given, Tokens) and _wants_all(self, options):
            return Recorded.of(given)
        return given

    def tome_forward(self, tokens: Tokens, attention_mask: Any = None, **options) -> Tokens:
        attn, norm1, norm2 = (getattr(self, name) for name in self.tome_names)
        _check_call(self, attn, attention_mask, options)
        request = KeyRequest(self, attn, tokens)
        residual = self.tome_attend(attn, norm1(tokens.x), attention_mask=request, **options)
        keys = request.take(self, attn)
        merged, normed = self.tome.merge(tokens, self.tome_branch(1, residual), keys, norm2)
        return merged.but(x=self.tome_mlp(merged.x, normed))  # type: ignore[arg-type]

    def tome_attend(self, attn: nn.Module, x: Tensor, **options) -> Tensor:
        """Return what the attention gives, called as this class calls it."""
        given = attn(x, **options)
        return given[0] if isinstance(given, tuple) else given

    def tome_branch(self, index: int, x: Tensor) -> Tensor:
        """Change the first (attention) or second branch (MLP) before it is added."""
        return x

    def tome_mlp(self, x: Tensor, normed: Tensor) -> Tensor:
        """Return ``x`` with the second branch added."""
        block: Any = self
        return x + self.tome_branch(2, block.mlp(normed))


class _ClipBlock(_HfBlock):
    """``CLIPEncoderLayer``, ``SiglipEncoderLayer``."""

    tome_names = ("self_attn", "layer_norm1", "layer_norm2")

    def tome_attend(self, attn: nn.Module, x: Tensor, **options) -> Tensor:
        return attn(hidden_states=x, **options)[0]

    def tome_example_inputs(self, tokens: int) -> tuple[tuple, dict]:
        return (None,), {}  # the mask has no default


class _Siglip2Block(_ClipBlock):
    """``Siglip2EncoderLayer``, for images of any shape, padded to one number of patches.

    No query attends to padding, and it has no weight where it is merged with other tokens. It is set to zero before
    the first layer that merges, and so stays the same in all layers, whatever was in it: tokens of padding match one
    another better than anything else, and go first as far as they find one another (half of them a layer).
    """

    def tome_forward(self, tokens: Tokens, attention_mask: Any = None, **options) -> Tokens:
        if isinstance(attention_mask, Tensor):
            if tokens.size is None:
                real = _unmasked_keys(self, attention_mask, tokens.x)
                size = torch.full_like(real, PADDING, dtype=torch.float32).masked_fill(real, 1.0)
                x = tokens.x.masked_fill(~real[..., None], 0.0)
                tokens = tokens.but(x=x, size=size, padded=True)
            attention_mask = None  # it speaks of the original tokens; from here on the sizes know
        return super().tome_forward(tokens, attention_mask, **options)


class _ViTBlock(_HfBlock):
    """``ViTLayer``."""

    tome_names = ("attention", "layernorm_before", "layernorm_after")

    def tome_branch(self, index: int, x: Tensor) -> Tensor:
        block: Any = self
        return block.dropout(x)


class _VideoMAEBlock(_HfBlock):
    """``VideoMAELayer``, and ``ViTLayer`` as it was: modules whose names end in Output have the dropout inside."""

    tome_names = ("attention", "layernorm_before", "layernorm_after")

    def tome_mlp(self, x: Tensor, normed: Tensor) -> Tensor:
        block: Any = self
        return block.output(block.intermediate(normed), x)


class _Dinov2Block(_HfBlock):
    """``Dinov2Layer``, ``Dinov2WithRegistersLayer``."""

    tome_names = ("attention", "norm1", "norm2")

    def tome_branch(self, index: int, x: Tensor) -> Tensor:
        block: Any = self
        return block.drop_path(getattr(block, f"layer_scale{index}")(x))


class _QkvModule(AttentionMixin):
    """The module that projects to queries, keys and values, which takes ``block.KeyRequest`` for an
    ``attention_mask``.

    Attributes:
        tome_implementation: the name of the attention implementation that it was tried out with.
    """

    tome_mask = "attention_mask"
    tome_implementation: str | None

    def tome_settle(self) -> None:
        self.tome_implementation = _implementation(self)

    def tome_undo(self) -> None:
        self.__dict__.pop("tome_implementation", None)

    def tome_attend(self, request: KeyRequest, hidden_states: Tensor, *args, **options):
        """Attend, with ``hidden_states (N, T, D)``."""
        attn: Any = self
        if (name := _implementation(attn)) not in (*_IMPLEMENTATIONS, attn.tome_implementation):
            raise ValueError(
                f"{type(attn).__name__} got the attention implementation {name!r} after it was patched, which may "
                "compute something else: set it before the patch (remove_tome_patch, set_attn_implementation, "
                "apply_tome_patch)"
            )
        causal = options.get("is_causal") or getattr(attn, "is_causal", False)
        reject_masks(attn, is_causal=causal, head_mask=options.get("head_mask"))
        heads = _first(attn, "num_heads", "num_attention_heads")
        projections = _first(attn, "q_proj", "query"), _first(attn, "k_proj", "key"), _first(attn, "v_proj", "value")
        biases = (getattr(attn, name, None) for name in ("q_bias", "k_bias", "v_bias"))  # VideoMAE's before 5.6
        projected = (
            projection(hidden_states) if bias is None else projection(hidden_states) + bias
            for projection, bias in zip(projections, biases, strict=True)
        )
        q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in projected)
        request.keys = k
        dropout = _first(attn, "dropout", "attention_dropout", "dropout_prob") if attn.training else 0.0
        out = proportional_attention(q, k, v, request.size, _first(attn, "scale", "scaling"), dropout)
        output = getattr(attn, "out_proj", None) or getattr(attn, "o_proj", None)  # None: it is outside
        return (out if output is None else output(out)), None


def _implementation(attn: Any) -> str | None:
    return attn.config._attn_implementation


# The library's own and ours, which all compute the same.
_IMPLEMENTATIONS = (
    NAME,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    None,
)


class _AttentionModule(AttentionMixin):
    """The attention that holds another, and the projection of its output."""

    tome_mask = "attention_mask"

    def tome_attend(self, request: KeyRequest, hidden_states: Tensor, *args, **options):
        """Attend, with ``hidden_states (N, T, D)``."""
        attn: Any = self
        return attn.output(attn.attention(hidden_states, attention_mask=request, **options)[0], hidden_states)


class _Family(NamedTuple):
    """Classes of one of the library's modules.

    Attributes:
        towers: classes that run the layers, or hold the encoder that does.
        layer: the only kind of layer that is known.
        mixin: class that a layer is patched with.
        classes: leading class tokens, before registers.
    """

    towers: tuple[str, ...]
    layer: str
    mixin: type[_HfBlock]
    classes: int


_FAMILIES = {
    "clip": _Family(("CLIPVisionModel", "CLIPVisionTransformer"), "CLIPEncoderLayer", _ClipBlock, 1),
    "siglip": _Family(("SiglipVisionModel", "SiglipVisionTransformer"), "SiglipEncoderLayer", _ClipBlock, 0),
    "siglip2": _Family(("Siglip2VisionModel", "Siglip2VisionTransformer"), "Siglip2EncoderLayer", _Siglip2Block, 0),
    "vit": _Family(("ViTModel",), "ViTLayer", _ViTBlock, 1),
    "dinov2": _Family(("Dinov2Model", "Dinov2Backbone"), "Dinov2Layer", _Dinov2Block, 1),
    "dinov2_with_registers": _Family(
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), "Dinov2WithRegistersLayer", _Dinov2Block, 1
    ),
    "videomae": _Family(("VideoMAEModel",), "VideoMAELayer", _VideoMAEBlock, 0),
}


def find(model: nn.Module) -> VitTower | None:
    """Return transformers' vision tower in a model."""
    found = {name: list(find_submodules(model, _home(name), *family.towers)) for name, family in _FAMILIES.items()}
    paths = [path for some in found.values() for path in some]
    if not paths:
        _refuse_others(model)
        return None
    path = exactly_one(paths)
    tower: Any = path[-1]
    if not hasattr(tower, "encoder") and hasattr(tower, "vision_model"):  # before 5.6 the tower is one deeper
        tower = tower.vision_model
        path = (*path, tower)
    require_version("transformers", _LEAST, tower)
    remove_stale_recorders(tower)
    name = next(name for name, some in found.items() if some)
    runner = getattr(tower, "encoder", tower)
    blocks = tuple(_first(runner, "layers", "layer"))
    embeddings = tower.embeddings
    patches = getattr(embeddings, "patch_embeddings", embeddings).num_patches
    protected = _FAMILIES[name].classes + getattr(tower.config, "num_register_tokens", 0)
    mixins = tuple(_mixin(block, name) for block in blocks)
    attentions = tuple(
        _attentions(getattr(block, mixin.tome_names[0])) for block, mixin in zip(blocks, mixins, strict=True)
    )
    around = path if runner is tower else (*path, runner)
    runner_mixin = encoder_mixin(issubclass(_FAMILIES[name].mixin, _Dinov2Block))
    return VitTower(
        runner, blocks, mixins, protected, True, tower.config.hidden_size, protected + patches, runner_mixin,
        around=around, attentions=attentions,
    )  # fmt: skip


def _home(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


def _refuse_others(model: nn.Module) -> None:
    """Name the models of transformers in which there is none of these towers."""
    kind = type(model)
    if kind.__module__.startswith("transformers.models."):
        towers = ", ".join(tower for family in _FAMILIES.values() for tower in family.towers)
        raise TypeError(
            f"can't merge tokens in transformers' {kind.__name__}: supported are {towers}, and models that contain one"
        )


def _mixin(block: Any, name: str) -> type[_HfBlock]:
    if isinstance(block, PatchedModule):
        return block.tome_parts[0]
    family = _FAMILIES[name]
    if class_path(block) != (_home(name), family.layer):
        raise TypeError(
            f"can't merge tokens in {type(block).__name__} of {type(block).__module__}: supported is transformers' "
            f"{family.layer}; patch before another library replaces it"
        )
    mixin = _VideoMAEBlock if hasattr(block, "intermediate") else family.mixin
    for attn in _parts(getattr(block, mixin.tome_names[0])):
        if class_path(attn)[0] != _home(name):
            raise TypeError(
                f"can't merge tokens in {type(block).__name__} with the attention {type(attn).__name__}: supported is "
                "transformers' own; patch before another library replaces it"
            )
    return mixin


def _attentions(attn: nn.Module) -> tuple[tuple[Any, type], ...]:
    """Return the modules that are a layer's attention, and what each is patched with."""
    attn, inner = _parts(attn)
    return ((attn, _QkvModule),) if inner is attn else ((attn, _AttentionModule), (inner, _QkvModule))


def _wants_all(block: Any, options: dict) -> bool:
    """Return whether the caller wants the hidden states of all layers.

    Raises:
        RuntimeError: it can't be told in the backward, when a checkpointed layer is run again.
    """
    if options.get("output_hidden_states"):
        return True
    if not is_recorded(block, "hidden_states"):
        return False
    if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(block).__name__} is checkpointed while hidden_states are recorded: pass output_hidden_states=True "
            "as an argument and not by the config; where the model does not pass it on (VideoMAE, and ViT before "
            "transformers 5.4), turn checkpointing off"
        )
    return True


def _check_call(block: Any, attn: Any, attention_mask: Any, options: dict) -> None:
    """Raise if a layer is asked for something that merged tokens don't have.

    Raises:
        ValueError: a mask, or attention weights.
    """
    if isinstance(attention_mask, Tensor) and torch.compiler.is_compiling():
        # while a graph is made, the library can't look whether anything is masked, and makes a mask even of None
        full = _seen(attention_mask).all()
        torch._assert_async(full, "a mask is not supported while tokens are merged: call the model without it")
    elif attention_mask is None or isinstance(attention_mask, Tensor):
        reject_masks(block, attention_mask=attention_mask, head_mask=options.get("head_mask"))
    else:
        raise ValueError(
            f"{type(block).__name__} got a {type(attention_mask).__name__} as mask from its attention implementation, "
            "which is not supported while tokens are merged: call model.set_attn_implementation('sdpa') first"
        )
    reject_masks(block, is_causal=options.get("is_causal"))
    if options.get("output_attentions") or any(is_recorded(module, "attentions") for module in _parts(attn)):
        raise ValueError(
            f"{type(block).__name__} is asked for attention weights, which are not computed while tokens are merged: "
            "call the model without output_attentions, or remove_tome_patch() first"
        )


def _seen(mask: Tensor) -> Tensor:
    """Return where a query sees a key, by a mask in either form: True, or 0 to be added."""
    return mask if mask.dtype == torch.bool else mask == 0


def _unmasked_keys(block: Any, mask: Tensor, x: Tensor) -> Tensor:
    """Return ``(N, T)`` bool, the tokens that a layer's mask ``(N, 1, T, T)`` (True, or 0, where a query sees a key)
    leaves.

    Raises:
        TypeError, ValueError: it is no mask of these tokens.
        RuntimeError: it masks other keys for one query than for another, or does something else than masking.
    """
    batch, count, _ = x.shape
    shape = tuple(mask.shape)
    if (
        len(shape) != 4
        or shape[0] not in (1, batch)
        or shape[1] != 1
        or shape[2] not in (1, count)
        or shape[3] != count
    ):
        raise ValueError(
            f"{type(block).__name__} got an attention_mask of shape {shape} for {batch} × {count} tokens, need "
            f"({batch}, 1, {count}, {count}) or ({batch}, 1, 1, {count}), as the model makes it of a mask of padding"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{type(block).__name__} got an attention_mask of {mask.dtype}, need bool or floating point")
    seen = _seen(mask)
    known = seen == seen[:, :, :1]
    if mask.dtype != torch.bool:
        known = known & (seen | (mask <= torch.finfo(mask.dtype).min))
    # not a ValueError: whether it is so is known on the device alone, and nobody waits for the device here
    torch._assert_async(known.all(), "attention_mask can only mark padding patches while tokens are merged")
    return seen[:, 0, 0].expand(batch, count)


def _parts(attn: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return an attention module, and what is in it, or itself, where some have the projection of the output outside of
    the rest."""
    inner: Any = getattr(attn, "attention", attn)
    return attn, inner


def _first(module: Any, *names: str) -> Any:
    """Return the first of these attributes that there is: the library has several names for the same."""
    return getattr(module, next(name for name in names if hasattr(module, name)))
