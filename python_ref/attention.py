# SPDX-License-Identifier: Apache-2.0
"""Proportional attention (ToMe, "Tracking Token Size") with a prefix of keys that items share, and its gradient.

Scaled dot-product attention is from Vaswani et al., *Attention Is All You Need* (NeurIPS 2017, arXiv 1706.03762).
All arithmetic is in float64: no wider type is needed to be accurate in the narrower ones, and neither autocast nor the
tf32 switch reaches it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionInputs(NamedTuple):
    """The arguments of attention.

    Attributes:
        q: ``(N, H, Tq, d)`` floating.
        k, v: ``(N, H, T, d)`` floating.
        size: ``(N, T)`` float32, how many tokens each key stands for; None for all ones.
        prefix_k, prefix_v: ``(M, H, G, d)``, M dividing N, or None.
        scale: factor of the products; None for ``1 / sqrt(d)``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    size: Tensor | None = None
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None
    scale: float | None = None


def scale_of(inputs: AttentionInputs) -> float:
    """Return the factor of the products."""
    return inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale


def prefix_length(inputs: AttentionInputs) -> int:
    """Return the number of keys in the prefix."""
    return 0 if inputs.prefix_k is None else inputs.prefix_k.shape[2]


def _shared(prefix: Tensor, items: int) -> Tensor:
    """Repeat ``(M, H, G, d)`` to ``(N, H, G, d)``: item n has the prefix n // (N / M)."""
    return prefix.unsqueeze(1).expand(-1, items // max(1, prefix.shape[0]), -1, -1, -1).flatten(0, 1)


def _joined(prefix: Tensor | None, x: Tensor) -> Tensor:
    """Return the keys or values of an item: those of its prefix stand in front. Float64."""
    return x.double() if prefix is None else torch.cat([_shared(prefix.double(), x.shape[0]), x.double()], 2)


def _scores(inputs: AttentionInputs) -> Tensor:
    """Return ``scale · q kᵀ + log size``, ``(N, H, Tq, G + T)``: a key of size s counts s times, those of the prefix
    once."""
    keys = _joined(inputs.prefix_k, inputs.k)
    scores = scale_of(inputs) * (inputs.q.double() @ keys.transpose(-1, -2))
    if inputs.size is not None:
        bias = torch.nn.functional.pad(inputs.size.double().log(), (prefix_length(inputs), 0))
        scores = scores + bias[:, None, None]
    return scores


def _softmax(scores: Tensor) -> Tensor:
    """Return probabilities; 0 where there is no key of a size above 0 to attend to."""
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _heads_last(x: Tensor) -> Tensor:
    """Return the same values with the heads of a token next to each other in memory, as the next projection reads
    them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale · q kᵀ + log size) v``.

    Returns:
        out ``(N, H, Tq, d)`` in q's dtype, and the logarithm of the softmax's sum ``(N, H, Tq)``, float32 (float64 for
        float64). Differentiable as often as torch's own operations are.
    """
    dtype = inputs.q.dtype
    scores = _scores(inputs)
    out = _softmax(scores) @ _joined(inputs.prefix_v, inputs.v)
    lse = scores.logsumexp(-1).to(torch.promote_types(dtype, torch.float32))
    return _heads_last(out.to(dtype)), lse


def attention_backward(
    grad: Tensor, inputs: AttentionInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of ``attention`` for the gradient ``grad (N, H, Tq, d)`` of its output.

    Returns:
        (dq, dk, dv, dprefix_k, dprefix_v), each of its tensor's shape and dtype; None for no prefix.
    """
    q, k, v, _, prefix_k, prefix_v, _ = inputs
    keys, values, grad = _joined(prefix_k, k), _joined(prefix_v, v), grad.double()
    p = _softmax(_scores(inputs))
    dp = grad @ values.transpose(-1, -2)
    ds = scale_of(inputs) * p * (dp - (p * dp).sum(-1, keepdim=True))
    dq, dkeys, dvalues = ds @ keys, ds.transpose(-1, -2) @ q.double(), p.transpose(-1, -2) @ grad
    ahead = prefix_length(inputs)
    dq, dk, dv = (_heads_last(x.to(q.dtype)) for x in (dq, dkeys[:, :, ahead:], dvalues[:, :, ahead:]))
    if prefix_k is None:
        return dq, dk, dv, None, None
    dprefix = (x[:, :, :ahead].unflatten(0, (prefix_k.shape[0], -1)).sum(1).to(q.dtype) for x in (dkeys, dvalues))
    return dq, dk, dv, *dprefix
