# SPDX-License-Identifier: Apache-2.0
"""Common base of all patched image models: the mixins of blocks, attentions and towers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api import attention
from ..patching.guards import calls_only_class_forward
from ..patching.subclass import PatchedModule
from .state import VitBlockContext, VitMergeState
from .tokens import Tokens, unmerge_tokens


class BlockMixin(PatchedModule):
    """A block that takes and gives ``tokens.Tokens`` between the first and the last block of its tower.

    Where nothing is merged yet, and nothing is to be, the block's own forward runs. A library's mixin says by
    ``tome_forward`` what its blocks compute, and by ``tome_example_inputs`` what they want besides tokens. All parts
    are called as the block's own forward calls them, its attention with ``KeyRequest`` in place of a mask; only a norm
    that is nothing but a LayerNorm is fused with the merge before it.
    """

    tome: VitBlockContext

    def forward(self, x: Any, *args, **options):
        layer = self.tome
        tokens = layer.unpack_input(x)
        if tokens.size is None and not layer.merging.rates[layer.index]:
            out = super().forward(tokens.x, *args, **options)  # type: ignore[misc]
            return layer.pack_output(tokens.but(x=out)) if layer.merging.passes_tokens else out
        return layer.pack_output(self.tome_forward(tokens, *args, **options))

    def tome_forward(self, tokens: Tokens, *args, **options) -> Tokens:
        """Do the block's work on merged tokens: attention, merging, MLP."""
        raise NotImplementedError

    def tome_example_inputs(self, tokens: int) -> tuple[tuple, dict]:
        """Return arguments besides ``tokens`` tokens with which the block can be tried out."""
        return (), {}

    def extra_repr(self) -> str:
        """Describe the module, with what the block merges."""
        own, layer = super().extra_repr(), self.__dict__.get("tome")  # type: ignore[misc]
        merges = "" if layer is None else f"tome_r={layer.merging.rates[layer.index]}"
        return ", ".join(part for part in (own, merges) if part)


class KeyRequest:
    """Request of a block to its attention, passed instead of a mask; the attention returns its keys in it.

    Attributes:
        size: ``(N, T)``, key weights for proportional attention (0 for padding); None means all ones.
        keys: ``(N, H, T, d)``, keys by which tokens are compared; None before the attention has run.
    """

    def __init__(self, block: BlockMixin, attn: Any, tokens: Tokens):
        if not isinstance(attn, AttentionMixin) and not torch.compiler.is_compiling():
            _check_wrapped(block, attn)
        self.size = key_weights(block, tokens)
        self.keys: Tensor | None = None

    def take(self, block: BlockMixin, attn: Any) -> Tensor:
        """Return the keys and drop them, since a checkpoint may keep this object alive.

        Args:
            block: block that made the request.
            attn: its attention.

        Raises:
            RuntimeError: the attention has set no keys.
        """
        keys, self.keys = self.keys, None
        if keys is None:
            raise RuntimeError(
                f"{type(attn).__name__} in {type(block).__name__} did not run the patched attention, or did not pass "
                "its mask on to it, so there are no keys to compare tokens by: remove it, or remove_tome_patch() first"
            )
        return keys


class AttentionMixin(PatchedModule):
    """A block's attention. Called with ``KeyRequest`` it attends by sizes and tells its keys; else it does as before.

    Attributes:
        tome_mask: the argument that ``KeyRequest`` stands in for.
    """

    tome_mask = "attn_mask"

    def forward(self, *args, **options):
        if not isinstance(options.get(self.tome_mask), KeyRequest):
            return super().forward(*args, **options)  # type: ignore[misc]
        return self.tome_attend(options.pop(self.tome_mask), *args, **options)

    def tome_attend(self, request: KeyRequest, *args, **options):
        """Attend by sizes, and give the keys to ``request``."""
        raise NotImplementedError

    def tome_settle(self) -> None:
        """Note what the module was like when it was tried out."""


def _check_wrapped(block: BlockMixin, attn: Any) -> None:
    """Raise if a module that took the place of a block's attention does not hold the attention that was patched.

    Raises:
        TypeError: it doesn't.
    """
    if not any(isinstance(module, AttentionMixin) for module in attn.modules()):
        raise TypeError(
            f"the attention of {type(block).__name__} was replaced by a {type(attn).__name__} after the model was "
            "patched: remove_tome_patch() first, then replace the attention and patch again"
        )


class TowerMixin(PatchedModule):
    """A tower that says when it begins to read more of its last block's tokens, or fewer, than it did at the patch.

    Attributes:
        tome_watched: the settings and methods by which it does.
    """

    tome: VitMergeState
    tome_watched: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        merging = self.__dict__.get("tome")
        if merging is not None and name in self.tome_watched:
            merging.dense_output = merging.user_unmerge or self.tome_needs_dense_output()

    def tome_needs_dense_output(self) -> bool:
        """Return whether the tower, or its caller, reads more than the class token of what its last block gives."""
        raise NotImplementedError

    def tome_check_unchanged(self, blocks: Any, protected: int | None = None) -> None:
        """Raise if the tower has other blocks, or other leading tokens, than it was patched with.

        Raises:
            RuntimeError: it has.
        """
        now, then = (len(blocks), protected), (len(self.tome.rates), self.tome.protected)
        if now[0] != then[0] or protected not in (None, then[1]):
            raise RuntimeError(
                f"{type(self).__name__} has {now[0]} blocks and {then[1] if protected is None else protected} leading "
                f"tokens, but was patched with {then[0]} and {then[1]}: patch again (apply_tome_patch), or "
                "remove_tome_patch() first"
            )


class IntermediatesMixin(TowerMixin):
    """A tower whose intermediate layers can be read, as timm's and open_clip's can."""

    def tome_is_checkpointing(self) -> bool:
        """Return whether the tower checkpoints its blocks."""
        raise NotImplementedError

    def tome_forward_intermediates(self, *args, **options):
        """Run the class's own forward_intermediates with ``reading`` in place of the blocks."""
        raise NotImplementedError

    def forward_intermediates(self, *args, **options):
        """Return the intermediates as before: every layer's tokens stand for themselves on the grid."""
        if not self.tome.passes_tokens:
            return super().forward_intermediates(*args, **options)  # type: ignore[misc]
        if self.tome_is_checkpointing() and torch.is_grad_enabled():
            raise RuntimeError(
                "forward_intermediates of merged tokens does not work with checkpointing: "
                "set_grad_checkpointing(False), or call it under torch.no_grad()"
            )
        return self.tome_forward_intermediates(*args, **options)

    def prune_intermediate_layers(self, *args, **options):
        """Refuse: the patch would be left with blocks that are not there."""
        raise RuntimeError(
            "prune_intermediate_layers does not work on a patched model: remove_tome_patch() first, prune, patch again"
        )


class Substitute:
    """A module with something else under one of its names, for one call of one of its methods.

    Nothing is put on the module itself, so that other threads see nothing of it.
    """

    def __init__(self, module: nn.Module, name: str, value: Any):
        self._module = module
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def reading(blocks: Iterable[Any]) -> list[Callable]:
    """Return the blocks of a patched tower as a loop over plain tensors calls them: each gives every token a row.

    Merged tokens go from one to the next outside of the loop; what goes through the blocks, their hooks and wrappers
    are ``tokens.Tokens`` all the same.
    """
    carried = _Carried()

    def one(block: Any) -> Callable:
        def call(x: Tensor, *args, **options) -> Tensor:
            if carried.tokens is not None and x is not carried.dense:
                raise RuntimeError(
                    f"the input of a {type(block).__name__} was changed between blocks while intermediate layers are "
                    "read, which is not supported for merged tokens: remove_tome_patch() first"
                )
            given = Tokens(x, kept=True) if carried.tokens is None else carried.tokens
            carried.tokens = block(given, *args, **options)
            dense = unmerge_tokens(carried.tokens)
            carried.dense = dense.view_as(dense) if dense is carried.tokens.x else dense
            return carried.dense

        return call

    return [one(block) for block in blocks]


class _Carried:
    """The output of the last block: tokens, and the tensor that was made of them."""

    def __init__(self):
        self.tokens: Tokens | None = None
        self.dense: Tensor | None = None


def key_weights(block: BlockMixin, tokens: Tokens) -> Tensor | None:
    """Return the key weights for the block's attention (0 for padding); None means all ones."""
    size = tokens.size
    proportional = block.tome.merging.config.prop_attn
    if size is not None and tokens.padded:
        return (size if proportional else torch.ones_like(size)).masked_fill(size < 1, 0.0)
    return size if proportional else None


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute proportional attention ``(N, H, T, d) → (N, T, H·d)``; with dropout of the weights by torch's own
    function."""
    if dropout:
        mask = None if size is None else size.log()[:, None, None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    else:
        out = attention(q, k, v, size, scale=scale)
    return out.transpose(1, 2).flatten(2)


def attend_like_library(attn: Any, fused: bool, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    """Attend ``(N, H, T, d) → (N, T, H·d)`` as an attention of timm's or open_clip's does: fused, with the
    probability of its ``attn_drop``; or with its ``scale``, and ``attn_drop`` called on weights ``(N, H, T, T)``."""
    if fused:
        return proportional_attention(q, k, v, size, dropout=attn.attn_drop.p if attn.training else 0.0)
    if is_identity(attn.attn_drop):
        return proportional_attention(q, k, v, size, attn.scale)
    weights = (q * attn.scale) @ k.mT
    if size is not None:
        weights = weights + size.log()[:, None, None].to(weights.dtype)
    return (attn.attn_drop(weights.softmax(-1)) @ v).transpose(1, 2).flatten(2)


# As they are when this package is imported: who replaces one for all modules wants it to be called.
_FORWARDS = {kind: kind.forward for kind in (nn.Identity, nn.Dropout)}
_CALL = nn.Module.__call__


def is_identity(module: Any) -> bool:
    """Return whether calling a module does nothing: it is an Identity, or dropout that drops nothing, without hooks."""
    kind = type(module)
    if kind not in _FORWARDS or (kind is nn.Dropout and module.training and module.p):
        return False
    return kind.forward is _FORWARDS[kind] and nn.Module.__call__ is _CALL and calls_only_class_forward(module)


def call_unless_identity(module: Any, x: Tensor) -> Tensor:
    """Return ``module(x)``; a call that does nothing takes a tenth of what matching and merging do, and there are eight
    of them in a block."""
    return x if is_identity(module) else module(x)
