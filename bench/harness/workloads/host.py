# SPDX-License-Identifier: Apache-2.0
"""Calls on tensors so small that computing takes next to nothing: every public op, and blocks of STOP and of timm."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from stoptome_kernels.reference import AttentionInputs
from torch import Tensor

from .models import installed

BASE = "F.layer_norm"
SIZED, VIT, UNPATCHED = "attention, sizes and prefix", "timm ViT block, r = 2", "timm ViT block, unpatched"
ITEMS, TOKENS, PROTECTED, R, WIDTH, HEADS, PREFIX = 2, 9, 1, 2, 32, 2, 2
Call = Callable[[], object]
Sides = dict[tuple[str, str], Call]  # by op and direction


class Inputs(NamedTuple):
    """Inputs of all ops, two items of nine tokens, which want gradients or don't."""

    packed: Tensor  # of which q, k and v are views
    ahead: Tensor  # of which the prefix is
    attention: AttentionInputs
    metric: Tensor
    x: Tensor
    residual: Tensor
    merged: Tensor
    norm: tuple[Tensor, Tensor]  # weight and bias, float32
    affine: tuple[Tensor, Tensor]  # the same in x's dtype
    size: Tensor
    plan: stk.MergePlan
    following: stk.MergePlan


def inputs(dtype: torch.dtype, grad: bool) -> Inputs:
    """Return random inputs; all that has a gradient wants it if ``grad``."""

    def wanted(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)

    packed = wanted(ITEMS, TOKENS, 3, HEADS, WIDTH // HEADS)
    ahead = wanted(ITEMS, PREFIX, 2, HEADS, WIDTH // HEADS)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    ahead_k, ahead_v = (part.transpose(1, 2) for part in ahead.unbind(2))
    metric = k.detach()
    x, residual, merged = (wanted(ITEMS, n, WIDTH) for n in (TOKENS, TOKENS, TOKENS - R))
    weight, bias = (wanted(WIDTH, dtype=torch.float32) for _ in range(2))
    size = torch.ones(ITEMS, TOKENS)
    plan = stk.match(metric, R, PROTECTED, "reference")
    following = stk.match(metric[:, :, : TOKENS - R], R, PROTECTED, "reference")
    attention = AttentionInputs(q, k, v, size, ahead_k, ahead_v)
    affine = (wanted(WIDTH), wanted(WIDTH))
    return Inputs(
        packed, ahead, attention, metric, x, residual, merged, (weight, bias), affine, size, plan, following
    )  # fmt: skip


def op_calls(i: Inputs) -> dict[str, tuple[Call, list[Tensor]]]:
    """Return a call of every public op, and what it has gradients of."""
    packed, ahead, (q, k, v, size, ahead_k, ahead_v, _), metric, x, residual, merged, (weight, bias), affine, *_ = i
    plan, following = i.plan, i.following
    return {
        BASE: (lambda: F.layer_norm(x, (WIDTH,), *affine), [x, *affine]),
        "match": (lambda: stk.match(metric, R, PROTECTED), []),
        "merge": (lambda: stk.merge(x, plan, size), [x]),
        "unmerge": (lambda: stk.unmerge(merged, plan), [merged]),
        "merge_norm": (
            lambda: stk.merge_norm(x, residual, plan, size, weight, bias), [x, residual, weight, bias]
        ),
        SIZED: (lambda: stk.attention(q, k, v, size, ahead_k, ahead_v), [packed, ahead]),
        "attention, plain": (lambda: stk.attention(q, k, v), [packed]),
        "MergePlan.then": (lambda: plan.then(following), []),
    }  # fmt: skip


def op_sides(plain: Inputs, differentiable: Inputs) -> Sides:
    """Return every public op in all directions that it has."""
    found: Sides = {}
    without = op_calls(plain)
    for op, (call, leaves) in op_calls(differentiable).items():
        found |= _directions(op, without[op][0], call, leaves) if leaves else {(op, "forward"): without[op][0]}
    return found


def _directions(op: str, plain: Call, call: Call, leaves: list[Tensor]) -> Sides:
    """Return an op without gradients, one with what autograd notes, and its backward alone."""
    out = call()
    graph = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor) and t.requires_grad]
    grads = [torch.ones_like(t) for t in graph]

    def backward() -> object:
        return torch.autograd.grad(graph, leaves, grads, retain_graph=True)

    return {(op, "forward"): plain, (op, "with gradient"): call, (op, "backward"): backward}


# -- blocks -----------------------------------------------------------------------------------------------------------


def _block_directions(op: str, call: Call, leaves: list[Tensor]) -> Sides:
    """Return the same of a block, whose parameters want gradients: without them under no_grad, as it is run."""

    def plain() -> object:
        with torch.no_grad():
            return call()

    return _directions(op, plain, call, leaves)


def stop_block(cast: Callable, r: int) -> Sides:
    """Return a STOP block in the middle of its stack, one video of 12 frames, narrow."""
    from stoptome_kernels.stop import StopConfig, StopModel
    from stoptome_kernels.tome.schedule import plan_layers
    from stoptome_kernels.video.blocks import VideoTokens, run_block

    config = StopConfig(
        temporal_prompt="DGL", layers=1, prompt_layers=1, text_layers=1, vocab_size=64, width=64, image_size=96
    )
    block = StopModel(config).visual.transformer.resblocks[0]
    step = plan_layers(r, 1, 5 + config.patches, config.frames, 5, width=64).steps[0]
    x = torch.randn(config.frames, 1 + config.patches, 64).requires_grad_()
    shared, own = torch.randn(1, 4, 64), torch.randn(1, config.frames, 4, 64)

    def call() -> tuple[Tensor, Tensor]:
        with cast():
            grown = x if torch.is_grad_enabled() else x.detach()
            stream, _ = run_block(block, VideoTokens(grown, shared), step, frame_prompts=own)
        return stream.x, stream.prompts

    return _block_directions(f"STOP block, r = {r}", call, [x, *block.parameters()])


def vit_blocks(cast: Callable) -> Sides:
    """Return the second block of timm's vision transformer, whose tokens have sizes, as narrow as can be, and the same
    block unpatched; nothing if there is no timm."""
    if not installed("timm"):
        print("timm is not installed, its block is left out", file=sys.stderr)
        return {}
    from timm.models.vision_transformer import VisionTransformer

    plain = VisionTransformer(img_size=64, embed_dim=16, depth=3, num_heads=1, num_classes=0).eval()
    patched = copy.deepcopy(plain)
    image = torch.randn(1, 3, 64, 64)
    # the launch path that is timed gives no results
    with patch.dict(os.environ, STOPTOME_BACKEND="reference"), torch.no_grad(), cast():
        stk.apply_tome_patch(patched, 2)  # which compares results
        tokens, x = (_given(built, image) for built in (patched, plain))
    merged, whole = tokens.x.clone().requires_grad_(), x.clone().requires_grad_()
    with_merging, without = patched.blocks[1], plain.blocks[1]

    def call() -> Tensor:
        with cast():
            return with_merging(tokens._replace(x=merged if torch.is_grad_enabled() else merged.detach())).x

    def call_unpatched() -> Tensor:
        with cast():
            return without(whole if torch.is_grad_enabled() else whole.detach())

    return {
        **_block_directions(UNPATCHED, call_unpatched, [whole, *without.parameters()]),
        **_block_directions(VIT, call, [merged, *with_merging.parameters()]),
    }


def _given(built: torch.nn.Module, image: Tensor):
    """Return what the second block of a vision transformer is given."""
    given: list = []
    handle = built.blocks[1].register_forward_pre_hook(lambda _, args: given.extend(args))
    built(image)
    handle.remove()
    return given[0]


def block_sides(backend: str) -> Sides:
    """Return all blocks: in float32 on a CPU, under autocast to bfloat16 as a GPU's user has them."""
    cast = nullcontext if backend == "native" else partial(torch.autocast, "cpu", torch.bfloat16)
    return {**stop_block(cast, 2), **vit_blocks(cast)}
