# SPDX-License-Identifier: Apache-2.0
"""torch.nn.TransformerEncoder as cases; see ``support.vit``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.vit import Case, Slow


def make(norm: bool = False, heads: int = 4, **options) -> nn.TransformerEncoder:
    settings = {"dim_feedforward": 96, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(48, heads, **settings)
    fast = settings["batch_first"] and not settings.get("norm_first") and heads % 2 == 0 and settings.get("bias", True)
    return nn.TransformerEncoder(layer, 4, nn.LayerNorm(48) if norm else None, enable_nested_tensor=fast)


def masked(attn: nn.MultiheadAttention, x: Tensor, state: Slow) -> tuple[Tensor, Tensor]:
    """Return what ``nn.MultiheadAttention`` gives of ``(N, T, D)``, with the sizes as its padding mask, and the
    keys."""
    width = attn.embed_dim
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias[width : 2 * width]
    keys = F.linear(x, attn.in_proj_weight[width : 2 * width], bias).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    given = x if attn.batch_first else x.transpose(0, 1)
    out, _ = attn(given, given, given, need_weights=False, key_padding_mask=state.size.log())
    # contiguous, since dropout draws its numbers in the order of the memory
    return (out if attn.batch_first else out.transpose(0, 1)).contiguous(), keys


def layer(block: Any, x: Tensor, state: Slow, r: int) -> Tensor:
    """A layer of ``(N, T, D)``, r tokens merged behind its attention."""

    def mlp(x: Tensor) -> Tensor:
        return block.dropout2(block.linear2(block.dropout(block.activation(block.linear1(x)))))

    out, keys = masked(block.self_attn, block.norm1(x) if block.norm_first else x, state)
    x = state.merge(x + block.dropout1(out), keys, r)
    if block.norm_first:
        return x + mlp(block.norm2(x))
    x = block.norm1(x)
    return block.norm2(x + mlp(x))


def slow(model: Any, inputs: tuple, rates: tuple[int, ...], protected: int = 1) -> Tensor:
    batch_first = model.layers[0].self_attn.batch_first
    x = inputs[0] if batch_first else inputs[0].transpose(0, 1)
    state = Slow(x, protected)
    for block, r in zip(model.layers, rates, strict=True):
        x = layer(block, x, state, r)
    x = state.spread(x)
    x = x if model.norm is None else model.norm(x)
    return x if batch_first else x.transpose(0, 1)


def tokens(batch: int, batch_first: bool = True) -> tuple:
    x = torch.randn(batch, 65, 48)
    return (x if batch_first else x.transpose(0, 1),)


def case(name: str, compiled: bool = False, **options) -> Case:
    inputs = partial(tokens, batch_first=options.get("batch_first", True))
    return Case(
        f"torch-{name}", partial(make, **options), inputs, lambda model: list(model.layers), 1, slow, compiled=compiled
    )


CASES = [
    case("post-norm"),
    case("pre-norm", norm_first=True, activation="gelu", norm=True, bias=False),
    case("sequence-first", batch_first=False, norm=True),
    case("sequence-first-pre-norm", compiled=True, batch_first=False, norm_first=True, heads=3),
]
