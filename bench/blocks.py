#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure where the time of a transformer block goes: attention, match, merge with its norm, MLP, each part by itself.

One pre-norm block without merging, with merging in eager PyTorch, and with this package's operators, in inference; all
parts alternate in one run. Outputs of the two that merge are compared in float32 first; a wrong one ends the run with
status 1. Without arguments: on the GPU if there is one, else on the CPU, in one minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from torch import Tensor

from charts.blocks import SIDES, table
from harness import cli, measure, shapes
from harness.baselines import operators
from harness.rows import percentiles
from harness.verify import WrongResult

SHAPES = tuple(name for name, shape in shapes.SHAPES.items() if shape.metric == "keys")
DEFAULT = ("stop-b32-video-r8", "vit-b16-r13")


@dataclass(frozen=True)
class Weights:
    """Linear layers and LayerNorm of a block of width D with an MLP of 4 D."""

    qkv: Tensor
    projection: Tensor
    up: Tensor
    down: Tensor
    norm: tuple[Tensor, Tensor]


def make_weights(inputs: shapes.Inputs) -> Weights:
    x, width, inner = inputs.x, inputs.shape.dim, inputs.shape.heads * shapes.HEAD_DIM
    rng = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=rng) / columns**0.5).to(x)

    return Weights(
        linear(3 * inner, width), linear(width, inner), linear(4 * width, width), linear(width, 4 * width),
        (torch.ones(width).to(x), torch.zeros(width).to(x)),
    )  # fmt: skip


def parts(inputs: shapes.Inputs, w: Weights, impl: str) -> dict[str, Callable[[], Any]]:
    """Return the parts of a block as calls, each on what the part before it gives."""
    x, size, column, heads = inputs.x, inputs.size, inputs.column, inputs.shape.heads

    def attention() -> tuple[Tensor, Tensor]:
        normed = F.layer_norm(x, x.shape[-1:], *w.norm)
        q, k, v = F.linear(normed, w.qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if impl == "package":
            mixed = stk.attention(q, k, v, size)
        else:
            bias = column.log().transpose(1, 2)[:, None] if impl == "eager" else None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return F.linear(mixed.transpose(1, 2).flatten(2), w.projection), k

    residual, keys = attention()
    match = {
        "eager": lambda: operators.eager_match(keys.mean(1), *inputs.args),
        "package": lambda: stk.match(keys, *inputs.args),
    }.get(impl)
    plan = match() if match else None

    def merge() -> tuple[Tensor, Tensor]:
        if impl == "package":
            return stk.merge_norm(x, residual, plan, size, *w.norm)[:2]
        h = x + residual
        if impl == "eager":
            h, _ = operators.eager_merge(h, plan, column, inputs.shape.protected)
        return h, F.layer_norm(h, h.shape[-1:], *w.norm)

    h, inside = merge()

    def mlp() -> Tensor:
        return h + F.linear(F.gelu(F.linear(inside, w.up)), w.down)

    calls = {"attention": attention, "match": match, "merge": merge, "MLP": mlp}
    return {name: call for name, call in calls.items() if call is not None}


def sides(shape: shapes.Shape, device: str, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the parts of each implementation's block."""
    inputs = shapes.make(shape, device, dtype)
    weights = make_weights(inputs)
    return {impl: parts(inputs, weights, impl) for impl in SIDES}


@torch.no_grad()
def rows_of(shape: shapes.Shape, args: argparse.Namespace) -> list[dict]:
    found = sides(shape, args.device, torch.float32)
    differ = check(found["eager"]["MLP"](), found["package"]["MLP"]())
    if args.dtype != "float32":
        found = sides(shape, args.device, getattr(torch, args.dtype))
    calls = {f"{impl}\n{part}": [call] for impl, own in found.items() for part, call in own.items()}
    del calls["eager\nMLP"]  # the same layers on as many tokens as the package's: timed once, for both
    times = measure.measure(calls, args.device, args.seconds, set())
    times["eager\nMLP"] = times["package\nMLP"]
    rows = []
    for impl, own in found.items():
        for part in own:
            rows.append({
                **shape.columns(args.device), "dtype": args.dtype, "op": part, "direction": "inference", "impl": impl,
                **percentiles(times[f"{impl}\n{part}"]["samples"]), "check_rows_that_differ": differ,
            })  # fmt: skip
    return rows


def check(eager: Tensor, package: Tensor) -> int:
    """Compare the outputs of the two blocks that merge, in float32; return how many rows differ.

    Raises:
        WrongResult: more than two per cent. Two similarities within rounding of each other may be decided either way.
    """
    error = (eager - package).abs().amax(-1) / package.abs().amax()
    differ = int((error >= 1e-3).sum())
    if not differ <= 0.02 * error.numel():
        raise WrongResult(f"{differ} of {error.numel()} rows differ between eager and package")
    return differ


def main(argv: list[str] | None = None) -> int:
    return cli.main_by_shape(
        argv, __doc__, rows_of, table, allowed=SHAPES, default=DEFAULT, seconds=30.0, each="each shape"
    )


if __name__ == "__main__":
    sys.exit(main())
