# SPDX-License-Identifier: Apache-2.0
"""The state of a patched vision transformer: settings of the tower, and the merging in each of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..api import match, match_merge_norm, merge
from ..patching.guards import may_read_weights
from ..plan import MergePlan
from ..reference import cap_r, match_sets
from ..tome.config import ToMeConfig
from ..tome.report import Description, warn_capped
from ..tome.schedule import Schedule, plan_layers
from ..tome.trace import Trace, is_torch_exporting
from .tokens import ALONE, Tokens, unmerge_tokens

# Whose forward is torch's layer_norm and nothing else; their weights may be read in its place.
_LAYER_NORMS = {
    ("torch.nn.modules.normalization", "LayerNorm"),
    ("timm.layers.norm", "LayerNorm"),
    ("open_clip.transformer", "LayerNorm"),
}


_REENTRANT = (
    "a block got a plain tuple, or tokens without a gradient, instead of merged tokens (Tokens). Checkpointing with "
    "use_reentrant=True causes this, since it gives no gradients to tensors inside a tuple: use use_reentrant=False; "
    "for inference run the whole model under torch.no_grad(). A hook that changes Tokens must return tokens.but(x=…). "
    "Or remove_tome_patch() first"
)


class TowerInfo(NamedTuple):
    """The tokens of a tower.

    Attributes:
        family: class and library of the tower, for a reader.
        protected: leading tokens that are never merged: class token, registers.
        width: embedding dimension.
        tokens: number of tokens of an image; None if that is not known before it comes.
        needs_positions: whether attention asks where tokens come from (rotary embeddings).
    """

    family: str
    protected: int
    width: int
    tokens: int | None = None
    needs_positions: bool = False


class VitMergeState:
    """The settings of a tower. Nothing of a forward is kept in it but the trace, if one was asked for.

    Attributes:
        config: the settings.
        rates: tokens to merge in each block.
        shape: what the tower's tokens are like.
        dense_output: whether the last block gives every original token a row again.
        user_unmerge: whether the user wants ``dense_output``, whatever the model reads.
    """

    def __init__(
        self,
        config: ToMeConfig,
        rates: tuple[int, ...],
        shape: TowerInfo,
        dense_output: bool,
        user_unmerge: bool = False,
    ):
        self.config, self.rates, self.shape, self.dense_output, self.user_unmerge = (
            config,
            rates,
            shape,
            dense_output,
            user_unmerge,
        )
        self._last: tuple[Tensor, ...] | None = None
        self._warned = False

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": None}  # a copy of the model has run nothing yet

    @property
    def protected(self) -> int:
        """Leading tokens that are never merged."""
        return self.shape.protected

    @property
    def idle(self) -> bool:
        """Nothing is merged anywhere."""
        return not any(self.rates)

    @property
    def passes_tokens(self) -> bool:
        """Blocks give ``Tokens`` to one another."""
        return self.config.trace_source or not self.idle

    def schedule(self, tokens: int) -> Schedule:
        """Return what is carried out on images of so many tokens."""
        return plan_layers(list(self.rates), len(self.rates), tokens, 1, self.protected, width=self.shape.width)

    @property
    def family(self) -> str:
        """Class and library of the tower."""
        return self.shape.family

    def describe(self, model: str) -> Description:
        """Return a description of what is merged in a model of this name."""
        tokens = self.shape.tokens
        given = (
            "a row for each original token"
            if self.dense_output or self.idle
            else "the tokens that are left (sizes: tome_trace)"
        )
        return Description(
            model, self.family, self.config, self.protected, self.rates,
            None if tokens is None else self.schedule(tokens), given,
        )  # fmt: skip

    def warn(self, tokens: int) -> None:
        """Say, once, if fewer tokens are merged than was asked for."""
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warn_capped(self.rates, self.schedule(tokens))

    def record_trace(self, layers: tuple[Tensor, ...]) -> None:
        """Remember the trace of a forward."""
        if not is_torch_exporting():
            self._last = layers

    def trace(self) -> Trace:
        """Return the source map of the last forward.

        Raises:
            RuntimeError: none is kept, or nothing has run yet.
        """
        if not self.config.trace_source:
            raise RuntimeError("no trace was kept: patch with trace_source=True")
        if self._last is None:
            raise RuntimeError("nothing to trace yet: run the model on an image first")
        layers = tuple(source[:, None].int() for source in self._last)
        left, tokens = self._last[0].shape[1], []
        for rate in self.rates:
            left -= cap_r(rate, left, self.protected)
            tokens.append(left)
        return Trace(layers, tuple(tokens), (1,) * len(layers), self.protected)


@dataclass(frozen=True)
class VitBlockContext:
    """A block's place in its tower.

    Attributes:
        merging: what the tower is to merge.
        index: number of the block, from 0.
    """

    merging: VitMergeState
    index: int

    @property
    def is_last(self) -> bool:
        """No block follows."""
        return self.index == len(self.merging.rates) - 1

    def unpack_input(self, x: Any) -> Tokens:
        """Return what a block was given, as tokens.

        Raises:
            RuntimeError: a plain tensor after the first block, or tokens from a reentrant checkpoint.
            TypeError: no tensor.
        """
        if isinstance(x, Tokens):
            if x.x.requires_grad and not torch.is_grad_enabled():  # a reentrant checkpoint's first pass
                raise RuntimeError(_REENTRANT)
            return x
        if isinstance(x, tuple):  # what a reentrant checkpoint makes of them
            raise RuntimeError(_REENTRANT)
        if not isinstance(x, Tensor) and self.merging.passes_tokens:
            fx = "torch.fx can't trace merging, use torch.export, torch.compile or torch.jit.trace"
            raise TypeError(
                f"block {self.index} got {type(x).__name__} instead of a tensor: "
                f"{fx if type(x).__name__ == 'Proxy' else 'a hook that changes Tokens must return tokens.but(x=…)'}; "
                "or remove_tome_patch() first"
            )
        if self.index and self.merging.passes_tokens:
            raise RuntimeError(
                f"block {self.index} got a plain tensor instead of the previous block's merged tokens (Tokens), so "
                f"their sizes are lost: {ALONE}"
            )
        return Tokens(x)

    def merge(
        self, tokens: Tokens, residual: Tensor, keys: Tensor, norm: nn.Module | None
    ) -> tuple[Tokens, Tensor | None]:
        """Add what attention computed, merge by the keys, and normalise.

        Args:
            tokens: before the block's attention.
            residual: ``(N, T', D)``, what attention adds to them.
            keys: ``(N, H, T', d)`` or ``(N, T', d)``, what tokens are compared by.
            norm: module that follows in the block; None for nothing.

        Returns:
            The merged tokens, and ``norm`` of them (None without).
        """
        x, size, source, position, layers, padded, kept = tokens
        merging = self.merging
        r = cap_r(merging.rates[self.index], x.shape[1], merging.protected)
        if r < merging.rates[self.index]:
            merging.warn(x.shape[1] if source is None else source.shape[1])
        if r == 0:
            x = x + residual
            return tokens.but(x=x), None if norm is None else norm(x)
        normed = None
        if norm is not None and _is_layer_norm(norm):
            affine: Any = (norm.weight, norm.bias, norm.eps)
            plan, x, normed, size = match_merge_norm(keys, r, merging.protected, x, residual, size, affine)
        else:
            plan = match(keys, r, merging.protected)
            x, size = merge(x + residual, plan, size)
            normed = None if norm is None else norm(x)
        dest = plan.dest.long()
        if merging.shape.needs_positions:
            position = _follow_positions(position, plan)
        source = dest if source is None else dest.gather(1, source)
        return Tokens(x, size, source, position, layers, padded, kept), normed

    def pack_output(self, tokens: Tokens) -> Tokens | Tensor:
        """Return what the block gives: tokens to the next block, a tensor to whoever follows the last."""
        merging = self.merging
        if merging.config.trace_source:
            source = tokens.source
            if source is None:
                source = torch.arange(tokens.x.shape[1], device=tokens.x.device).repeat(tokens.x.shape[0], 1)
            tokens = tokens.but(layers=(*tokens.layers, source))
            if self.is_last:
                merging.record_trace(tokens.layers)
        if tokens.kept or not self.is_last:
            return tokens
        return unmerge_tokens(tokens) if merging.dense_output else tokens.x


def _follow_positions(position: Tensor | None, plan: MergePlan) -> Tensor:
    """Return where merged tokens are: where the one was into which the others were merged."""
    _, odd = match_sets(plan.tokens_in, plan.protected)
    receive = torch.arange(plan.tokens_in, device=plan.dest.device)[odd]  # the last outputs, in this order
    alone = plan.members.gather(1, plan.offsets[:, : plan.tokens_out - len(receive)].long()).long()
    kept = torch.cat([alone, receive.expand(alone.shape[0], -1)], 1)
    return kept if position is None else position.gather(1, kept)


def _is_layer_norm(norm: Any) -> bool:
    """Return whether a norm's weights may be read: its call is torch's layer_norm of them, and nothing else."""
    kind = type(norm)
    known = (kind.__module__, kind.__qualname__) in _LAYER_NORMS and not getattr(norm, "_fast_norm", False)
    # the class's forward may have been replaced, too
    return (
        known
        and kind.forward.__module__ == kind.__module__
        and len(norm.normalized_shape) == 1
        and may_read_weights(norm)
    )
