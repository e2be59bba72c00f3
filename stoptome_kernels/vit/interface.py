# SPDX-License-Identifier: Apache-2.0
"""Attention by sizes under a name in Hugging Face transformers, for users' own models that merge tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api import attention
from ..layout import log_size_bias
from .towers import installed_below

NAME = "stk_tome"
# Arguments that change what is computed, which "sdpa" leaves out: transformers keeps models that give them from it, but
# not from a name that it doesn't know.
_REFUSED = ("softcap", "s_aux", "sinks", "block_indices")


def register_attention() -> str:
    """Register proportional attention with transformers, as ``attn_implementation="stk_tome"``.

    A model with that name computes what it does with ``sdpa``, masks included, until its attentions are called with
    ``tome_size (N, T)`` float32, the number of tokens that each key represents: given to the model, it reaches them
    through ``**kwargs`` where the model's layers pass these on. Layers that merge pass their own.

    Returns:
        The name, ``"stk_tome"``. To register it again changes nothing.

    Raises:
        ImportError: transformers 5.0 or later is not installed.

    With ``tome_size``, attention is ``stk.attention``; with an attention mask or dropout too, torch's own function with
    the sizes in the mask. Causal attention without a mask, a bias of positions, and sizes of another shape than the
    keys' raise a ValueError; so do, with sizes or without, capped scores and attention sinks.

    Source: Bolya et al., ICLR 2023, section 3, "Tracking Token Size" (proportional attention).
    """
    if installed_below("transformers", (5, 0)):
        raise ImportError("register_attention needs transformers 5.0 or later: pip install -U 'transformers>=5.0'")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    # without one of its own, a name that transformers doesn't know gets no masks: padding would be attended to
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    return NAME


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    tome_size: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' ``sdpa_attention_forward`` does, by sizes if there are any.

    Args:
        module: attention that asks.
        query: ``(N, H, Tq, d)``.
        key: ``(N, Hk, T, d)``; H is a multiple of Hk.
        value: ``(N, Hk, T, d)``.
        attention_mask: ``(N or 1, H or 1, Tq or 1, T)``, True where a query sees a key, or added to scores; or None.
        scaling: factor of the products; ``1 / sqrt(d)`` if None.
        dropout: probability with which weights are dropped.
        is_causal: whether queries see no later keys where there is no mask; as the module says if None.
        tome_size: ``(N, T)`` float32, number of tokens that each key represents; None means all ones.
        options: whatever else the model passes on.

    Returns:
        ``(N, Tq, H, d)``, contiguous, and None in place of the weights.

    Raises:
        ValueError: an option or a combination that is not supported; the message names it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in _REFUSED if tome_size is None else (*_REFUSED, "position_bias"):
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} attends with {name}, which attn_implementation={NAME!r} does not support"
                + (": take 'eager'" if tome_size is None else " with tome_size")
            )
    if tome_size is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    if tuple(tome_size.shape) != (key.shape[0], key.shape[2]) or tome_size.dtype != torch.float32:
        raise ValueError(
            f"tome_size must be float32 of shape (N, T) = {(key.shape[0], key.shape[2])}, the keys of "
            f"{type(module).__name__}, got {tome_size.dtype} of shape {tuple(tome_size.shape)}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None and query.shape[2] != 1:
        raise ValueError(
            f"{type(module).__name__} is causal, which is not supported with tome_size: merged tokens have no order; "
            "call it with is_causal=False, or with a mask"
        )
    share = query.shape[1] // key.shape[1]
    if share != 1:
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    if attention_mask is None and not dropout:
        return attention(query, key, value, tome_size, scale=scaling).transpose(1, 2), None
    bias: Any = log_size_bias(tome_size, key)
    if attention_mask is not None:
        seen = attention_mask.dtype == torch.bool
        bias = torch.where(attention_mask, bias, -torch.inf) if seen else bias + attention_mask
    # the fused kernels for GPUs take a mask in q's dtype alone
    bias = bias if query.device.type == "cpu" else bias.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
