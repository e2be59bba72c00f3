# SPDX-License-Identifier: Apache-2.0
"""torch.nn.MultiheadAttention over merged tokens: what open_clip's, torchvision's and torch's own blocks have in
common."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .block import Ask, Attention, Block, attend
from .tokens import Tokens
from .towers import is_a, overrides

_HOME = "torch.nn.modules.activation"


def check(block: Any, attn: Any) -> None:
    """Raise what keeps a block's attention from counting merged tokens by their sizes.

    Raises:
        TypeError: it is no ``nn.MultiheadAttention``, or one that was changed.
        ValueError: one with a setting that adds keys, or keys of another width.
    """
    what = f"{type(block).__name__} with the attention {type(attn).__name__}"
    if not is_a(attn, _HOME, "MultiheadAttention") or overrides(attn, _HOME, "forward"):
        raise TypeError(
            f"don't know how to merge tokens in {what}: known is torch.nn.MultiheadAttention; patch before another "
            "library replaces it"
        )
    for setting, given, allowed in (
        ("kdim or vdim", attn.in_proj_weight is None, "that of the tokens"),
        ("add_bias_kv", attn.bias_k is not None, "False"),
        ("add_zero_attn", attn.add_zero_attn, "False"),
    ):
        if given:
            raise ValueError(f"tokens can't be merged in {what} with its {setting}: build it with {allowed}")


class Multihead(Attention):
    """``nn.MultiheadAttention``, which takes :class:`.block.Ask` for an ``attn_mask``."""

    def forward(self, query, *args, **options):
        """``query (N, T, D)``, or ``(T, N, D)`` without ``batch_first``; with ``Ask`` it is key and value too."""
        ask = options.get("attn_mask")
        if not isinstance(ask, Ask):
            return super().forward(query, *args, **options)  # type: ignore[misc]
        attn: Any = self
        q, k, v = heads(attn, query if attn.batch_first else query.transpose(0, 1))
        out = attend(q, k, v, ask.size, dropout=attn.dropout if attn.training else 0.0)
        ask.keys = k
        # its weights, since torch doesn't call out_proj either
        out = F.linear(out, attn.out_proj.weight, attn.out_proj.bias)
        return (out if attn.batch_first else out.transpose(0, 1)), None


def attention(block: Block, attn: Any, x: Tensor, tokens: Tokens, batch_first: bool = True) -> tuple[Tensor, Tensor]:
    """What a block's attention makes of ``x (N, T, D)``, and the keys ``(N, H, T, d)``."""
    ask = Ask(block, attn, tokens)
    x = x if batch_first else x.transpose(0, 1)
    out = attn(x, x, x, need_weights=False, attn_mask=ask)[0]
    return (out if batch_first else out.transpose(0, 1)), ask.take(block, attn)


def heads(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, each ``(N, H, T, d)``, of an in-projection whose weights are packed into one."""
    packed = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    return packed.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
