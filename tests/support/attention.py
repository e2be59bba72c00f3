# SPDX-License-Identifier: Apache-2.0
"""Inputs of attention, what eager code and exact arithmetic make of them, and how near a backend must come."""

import math

import stoptome_kernels as stk
import torch

from support.helpers import assert_as_exact_as_eager


def packed(n, tokens, heads, channels, dtype, device):
    """q, k and v as a linear layer leaves them: views of (N, T, 3, H, d)."""
    qkv = torch.randn(n, tokens, 3, heads, channels, device=device).to(dtype)
    return [qkv[:, :, part].transpose(1, 2) for part in range(3)]


def make(queries, tokens, ahead, channels, device, dtype=torch.float32, n=4, m=2, heads=2, sized=True):
    q = packed(n, queries, heads, channels, dtype, device)[0]
    _, k, v = packed(n, tokens, heads, channels, dtype, device)
    size = torch.randint(1, 30, (n, tokens)).float().to(device) if sized else None
    prefix = torch.randn(2, m, heads, ahead, channels, device=device).to(dtype)
    return q, k, v, size, *(prefix if ahead else (None, None))


def joined(k, v, size, prefix_k, prefix_v, items):
    """Keys, values and sizes with the prefix in front."""
    if prefix_k is not None:
        share = items // prefix_k.shape[0]
        k, v = (torch.cat([p.repeat_interleave(share, 0), x], 2) for p, x in ((prefix_k, k), (prefix_v, v)))
        size = None if size is None else torch.nn.functional.pad(size, (prefix_k.shape[2], 0), value=1.0)
    return k, v, size


def eager(q, k, v, size=None, prefix_k=None, prefix_v=None, scale=None):
    """Return what users write, in q's own dtype: torch's own function with the sizes as a mask."""
    k, v, size = joined(k, v, size, prefix_k, prefix_v, q.shape[0])
    mask = None if size is None else size.log()[:, None, None].to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def exactly(q, k, v, size=None, prefix_k=None, prefix_v=None, scale=None):
    """The definition, in float64."""
    k, v, size = joined(k, v, size, prefix_k, prefix_v, q.shape[0])
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if size is not None:
        scores = scores + size.double().log()[:, None, None]
    return scores.softmax(-1) @ v


def leaves(arguments, dtype=None):
    """Copies that gather gradients, with the strides of the originals; sizes are left as they are."""
    return [
        x if x is None or x.dim() == 2 else x.detach().clone(memory_format=torch.preserve_format).to(dtype or x.dtype)
        .requires_grad_() for x in arguments
    ]  # fmt: skip


def assert_close(ours, theirs, exact, terms=0.0):
    """As exact as eager; in float64, than which nothing is more exact, up to the order of sums."""
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_exact_as_eager(ours, theirs, exact, terms)


def assert_exact(arguments, backend, scale=None, call=stk.attention):
    """Values and gradients are as near to float64 as those of torch's own function in the same dtype."""
    ours, theirs, exact = leaves(arguments), leaves(arguments), leaves(arguments, torch.float64)
    outs = [call(*ours, scale, backend), eager(*theirs, scale), exactly(*exact, scale)]
    q = ours[0]
    assert outs[0].shape == q.shape
    assert outs[0].dtype == q.dtype
    assert outs[0].transpose(1, 2).is_contiguous()
    grad = torch.randn_like(outs[2]).to(q.dtype)
    for out in outs:
        out.backward(grad.to(out.dtype))
    assert_close(*outs, terms=largest(*arguments[2::3]))  # a mean of values
    if q.dtype == torch.float64:
        for x, y in zip(ours, exact, strict=True):
            if x is not None and x.requires_grad:
                assert_close(x.grad, y.grad, y.grad)
        return
    # dq and dk come from differences of numbers of this size, which may cancel: for a single key they are 0
    term = grad.double().norm(dim=-1).max().item() * largest(*arguments[2::3]) * abs(scale or q.shape[-1] ** -0.5)
    # dv is a sum of weights, made again from the scores and their log-sum: a weight is as wrong as its score is large
    weighted = scores_and_weights(arguments, scale, grad)
    terms = [term * largest(*arguments[1::3]), term * largest(q), weighted, 0.0, term * largest(q), weighted]
    for x, y, z, term in zip(ours, theirs, exact, terms, strict=True):
        if x is not None and x.requires_grad:
            assert x.grad.dtype == x.dtype
            assert_as_exact_as_eager(x.grad, y.grad, z.grad, term)


def scores_and_weights(arguments, scale, grad):
    """The largest score (in base 2, as kernels keep it) times the largest sum of weights over what they weigh."""
    q, k, v, size, *prefix = (x if x is None else x.detach().double() for x in arguments)
    k, _, size = joined(k, v, size, *prefix, q.shape[0])
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if size is not None:
        scores = scores + size.log()[:, None, None]
    return scores.abs().max().item() / math.log(2) * (scores.softmax(-1).mT @ grad.double().abs()).max().item()


def largest(*rows):
    """The length of the longest of all rows."""
    return max(x.detach().double().norm(dim=-1).max().item() for x in rows if x is not None and x.numel())
