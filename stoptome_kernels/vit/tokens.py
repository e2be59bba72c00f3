# SPDX-License-Identifier: Apache-2.0
"""Tokens of a batch of images as they travel from block to block; padding among them counts next to nothing."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..api import unmerge
from ..onnx import group_tokens
from ..plan import MergePlan

# The weight of a padding token in averages: nothing next to a real token, while an average of padding alone exists; the
# sum of many is still far below 1, by which padding is told.
PADDING = 2.0**-100


# Of blocks that are not called one after the other, from the first to the last.
ALONE = (
    "call the whole model, read intermediate layers by forward_intermediates or output_hidden_states where available, "
    "or remove_tome_patch() first"
)


_NOT_A_TENSOR = f"merged tokens (Tokens) are a tuple that blocks of a patched model pass on, not a tensor: {ALONE}"


def _not_a_tensor(what: str) -> NoReturn:
    raise TypeError(f"{what} got merged tokens (Tokens): {_NOT_A_TENSOR}")


class Tokens(NamedTuple):
    """Merged tokens, the output of a block of a patched image model and the input of the next one.

    A tuple without hidden state, so that checkpointing and several forwards before a backward are exact. It is not a
    tensor: functions, operators and indexing that expect one raise a TypeError.

    Attributes:
        x: ``(N, T', D)``, the tokens.
        size: ``(N, T')`` float32, number of original tokens that each token represents (``PADDING`` for each padding
            token); None if nothing was merged yet and there is no padding.
        source: ``(N, T)`` int64, the token that each original token is part of now; None if nothing was merged yet.
        position: ``(N, T')`` int64, the original token whose position each token has (the destination of its merge),
            carried where attention needs positions; None if nothing was merged yet.
        layers: ``source`` after each layer, if a trace is kept.
        padded: whether there may be padding tokens.
        kept: whether the last block outputs Tokens, too, since all layers are read.
    """

    x: Tensor
    size: Tensor | None = None
    source: Tensor | None = None
    position: Tensor | None = None
    layers: tuple[Tensor, ...] = ()
    padded: bool = False
    kept: bool = False

    # Whoever takes them for a tensor is told so, in place of "tuple indices must be integers".

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> NoReturn:
        _not_a_tensor(getattr(function, "__name__", str(function)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) or index is None or index is ...:
            _not_a_tensor("indexing")
        return tuple.__getitem__(self, index)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Tokens have no attribute {name}: {_NOT_A_TENSOR}")

    def but(self, **changes: Any) -> Tokens:
        """Return a copy with other fields, as ``_replace`` does, which torch 2.6 can't trace.

        Args:
            changes: new values of fields by name.
        """
        return Tokens(**{**dict(zip(Tokens._fields, self)), **changes})  # noqa: B905, strict costs as much as the rest


def _arithmetic(tokens: Tokens, other: Any) -> NoReturn:
    _not_a_tensor("arithmetic")


for _name in ("add", "sub", "mul", "truediv", "matmul"):
    setattr(Tokens, f"__{_name}__", _arithmetic)
    setattr(Tokens, f"__r{_name}__", _arithmetic)


def unmerge_tokens(tokens: Tokens) -> Tensor:
    """Give every original token the row of the token that it is part of: ``(N, T, D)``."""
    if tokens.source is None:
        return tokens.x
    nowhere = torch.zeros_like(tokens.source, dtype=torch.bool)
    members, offsets = group_tokens(tokens.source, nowhere, tokens.x.shape[1])
    return unmerge(tokens.x, MergePlan(tokens.source.int(), members, offsets, 0))
