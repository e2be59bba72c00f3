# SPDX-License-Identifier: Apache-2.0
"""torch.nn.MultiheadAttention over merged tokens: what open_clip's, torchvision's and torch's own blocks have in
common."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..patching.guards import check_method_not_replaced
from .block import AttentionMixin, BlockMixin, KeyRequest, proportional_attention
from .guards import reject_other_arguments
from .tokens import Tokens
from .towers import has_overridden_method, is_instance_of

_HOME = "torch.nn.modules.activation"


def check_supported(block: Any, attn: Any) -> None:
    """Raise what keeps a block's attention from counting merged tokens by their sizes.

    Raises:
        TypeError: it is no ``nn.MultiheadAttention``, or one that was changed.
        ValueError: one with a setting that adds keys, or keys of another width.
        RuntimeError: one with a forward of its own.
    """
    check_method_not_replaced(attn, "forward")
    what = f"{type(block).__name__} with the attention {type(attn).__name__}"
    if not is_instance_of(attn, _HOME, "MultiheadAttention") or has_overridden_method(attn, _HOME, "forward"):
        raise TypeError(
            f"can't merge tokens in {what} of {type(attn).__module__}: supported is torch.nn.MultiheadAttention; patch "
            "before another library replaces it (PEFT: merge_and_unload)"
        )
    for setting, given, allowed in (
        ("kdim or vdim", attn.in_proj_weight is None, "both equal to embed_dim"),
        ("add_bias_kv", attn.bias_k is not None, "add_bias_kv=False"),
        ("add_zero_attn", attn.add_zero_attn, "add_zero_attn=False"),
    ):
        if given:
            raise ValueError(f"can't merge tokens in {what} with {setting} set: build it with {allowed}")


class MultiheadMixin(AttentionMixin):
    """``nn.MultiheadAttention``, which takes ``block.KeyRequest`` for an ``attn_mask``."""

    def tome_attend(self, request: KeyRequest, query: Tensor, *args, **options):
        """Attend: ``query (N, T, D)``, or ``(T, N, D)`` without ``batch_first``, is key and value too."""
        attn: Any = self
        inputs = {**dict(zip(("key", "value"), args, strict=False)), **options}
        key, value = (inputs.pop(name, None) for name in ("key", "value"))
        reject_other_arguments(self, args[2:], inputs)
        if attn.bias_k is not None or attn.add_zero_attn:
            raise ValueError(
                f"{type(self).__name__} was given additional keys after it was patched (bias_k, add_zero_attn): remove "
                "that, or remove_tome_patch() first"
            )
        given = (query,) if (key is None or key is query) and (value is None or value is query) else (query, key, value)
        q, k, v = packed_qkv(attn, *(x if attn.batch_first else x.transpose(0, 1) for x in given))
        out = proportional_attention(q, k, v, request.size, dropout=attn.dropout if attn.training else 0.0)
        request.keys = k
        # its weights, since torch doesn't call out_proj either
        out = F.linear(out, attn.out_proj.weight, attn.out_proj.bias)
        return (out if attn.batch_first else out.transpose(0, 1)), None


def call_attention(
    block: BlockMixin, attn: Any, x: Tensor, tokens: Tokens, batch_first: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what a block's attention makes of ``x (N, T, D)``, and the keys ``(N, H, T, d)``."""
    request = KeyRequest(block, attn, tokens)
    x = x if batch_first else x.transpose(0, 1)
    out = attn(x, x, x, need_weights=False, attn_mask=request)[0]
    return (out if batch_first else out.transpose(0, 1)), request.take(block, attn)


def packed_qkv(attn: Any, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return q, k, v, each ``(N, H, T, d)``, of an in-projection whose weights are packed into one: of x, or of x and
    two others where a hook has made keys and values of something else."""
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if not others:
        packed = F.linear(x, weight, bias)
        return packed.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    parts = zip((x, *others), weight.chunk(3), biases, strict=True)
    return tuple(F.linear(*part).unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
