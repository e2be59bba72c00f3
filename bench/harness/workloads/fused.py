# SPDX-License-Identifier: Apache-2.0
"""merge_norm and attention, and the same in several operators, and without merging."""

from __future__ import annotations

from collections.abc import Callable

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import HEAD_DIM, Inputs
from ..verify import WrongResult

SHAPES = ("stop-b32-train", "stop-b32-video-r2", "vit-b16-r16", "clip-b16")
FRAMES, PREFIX = 12, 4  # STOP's global prompts are shared by the frames of a video
DIRECTIONS = ("forward", "forward+backward")
Side = tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]  # a call, and what its results are differentiated by
Sides = dict[str, Side]


def norm_sides(i: Inputs) -> Sides:
    """Return merge_norm, the same in three operators, and the add and LayerNorm of a block that merges nothing."""
    plan = stk.match(i.metric, *i.args)
    x, residual = i.x.detach().requires_grad_(), (i.x.flip(0) * 0.5).requires_grad_()
    weight, bias = (torch.rand(i.x.shape[2], device=i.x.device).requires_grad_() for _ in range(2))
    affine = (weight.to(x.dtype), bias.to(x.dtype)) if x.dtype != torch.float32 else (weight, bias)
    leaves = [x, residual, weight, bias]

    def ours(backend: str = "auto"):
        return stk.merge_norm(x, residual, plan, i.size, weight, bias, backend=backend)[:2]

    def separate():
        y, _ = stk.merge(x + residual, plan, i.size)
        return y, F.layer_norm(y, y.shape[-1:], *affine)

    def plain():
        h = x + residual
        return h, F.layer_norm(h, h.shape[-1:], *affine)

    return {
        "reference": (lambda: ours("reference"), leaves),
        "merge_norm": (ours, leaves),
        "add, merge, layer_norm": (separate, leaves),
        "add + layer_norm": (plain, leaves),
    }


def attention_sides(i: Inputs) -> Sides:
    """Return attention with sizes and a shared prefix; the same with both put together in PyTorch; plain attention."""
    n, tokens, heads = i.x.shape[0], i.shape.tokens, i.shape.heads
    packed = torch.randn(n, tokens, 3, heads, HEAD_DIM, device=i.x.device).to(i.x.dtype).requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    share = FRAMES if n % FRAMES == 0 else 1
    prefix = torch.randn(n // share, PREFIX, 2, heads, HEAD_DIM, device=i.x.device).to(i.x.dtype).requires_grad_()
    prefix_k, prefix_v = (part.transpose(1, 2) for part in prefix.unbind(2))

    def ours(backend: str = "auto"):
        return (stk.attention(q, k, v, i.size, prefix_k, prefix_v, backend=backend),)

    def sizes_alone():
        return (stk.attention(q, k, v, i.size),)

    def together():
        keys, values = (
            torch.cat([p.repeat_interleave(share, 0), part], 2) for p, part in ((prefix_k, k), (prefix_v, v))
        )
        mask = F.pad(i.size.log(), (PREFIX, 0))[:, None, None].to(q.dtype)
        return (F.scaled_dot_product_attention(q, keys, values, attn_mask=mask),)

    return {
        "reference": (lambda: ours("reference"), [packed, prefix]),
        "attention": (ours, [packed, prefix]),
        "attention, sizes alone": (sizes_alone, [packed]),
        "concatenated, mask": (together, [packed, prefix]),
        "sdpa, no sizes": (lambda: (F.scaled_dot_product_attention(q, k, v),), [packed]),
    }


def compare(name: str, side: Side, right: Side, dtype: torch.dtype) -> None:
    """Compare outputs and gradients with those of the reference, element by element.

    Raises:
        WrongResult: one is further off than rounding explains.
    """
    found = []
    for call, leaves in (right, side):
        out = call()
        grads = torch.autograd.grad(sum(t.float().sin().sum() for t in out), leaves)
        found.append([t.detach().double() for t in (*out, *grads)])
    unit = torch.finfo(dtype).eps / 2
    for index, (want, got) in enumerate(zip(*found, strict=True)):
        error, scale = (got - want).abs().max().item(), want.abs().max().item()
        # a sum over all rows (gradients of weight and bias) or over the keys may lose some bits more
        if not error <= 64 * unit * scale:
            raise WrongResult(f"{name}: result {index} is off by {error:.3g} of {scale:.3g}")


def timed(call: Callable, leaves: list[Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":

        def run() -> object:
            with torch.no_grad():
                return call()

        return run
    grads = [torch.ones_like(t) for t in call()]
    return lambda: torch.autograd.grad(call(), leaves, grads)
