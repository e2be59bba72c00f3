#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure merge_norm and attention against what a block does without merging: residual add + LayerNorm, and plain SDPA.

Both are to cost no more than that, though they merge and weigh tokens. Results are compared with the reference first; a
wrong one ends the run with status 1. Without arguments: on the GPU if there is one, else on the CPU, in a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import cli, measure, shapes
from harness.verify import WrongResult

SHAPES = ("stop-b32-train", "stop-b32-video-r2", "vit-b16-r16", "clip-b16")
FRAMES, PREFIX = 12, 4  # STOP's global prompts are shared by the frames of a video
DIRECTIONS = ("forward", "forward+backward")
BASES = {"merge_norm": "add + layer_norm", "attention": "sdpa, no sizes"}
Sides = dict[str, tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]]


def norm_sides(i: shapes.Inputs) -> Sides:
    """merge_norm, the same in three operators, and the add and LayerNorm of a block that merges nothing."""
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


def attention_sides(i: shapes.Inputs) -> Sides:
    """Attention with sizes and a shared prefix; the same with both put together in PyTorch; plain attention."""
    n, tokens, heads = i.x.shape[0], i.shape.tokens, i.shape.heads
    packed = torch.randn(n, tokens, 3, heads, shapes.HEAD_DIM, device=i.x.device).to(i.x.dtype).requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    share = FRAMES if n % FRAMES == 0 else 1
    prefix = (
        torch.randn(n // share, PREFIX, 2, heads, shapes.HEAD_DIM, device=i.x.device).to(i.x.dtype).requires_grad_()
    )
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


def check(op: str, sides: Sides, dtype: str) -> None:
    """Ours against the reference, forward and gradients, element by element."""
    found = []
    for name in ("reference", op):
        call, leaves = sides[name]
        out = call()
        grads = torch.autograd.grad(sum(t.float().sin().sum() for t in out), leaves)
        found.append([t.detach().double() for t in (*out, *grads)])
    unit = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for index, (want, got) in enumerate(zip(*found, strict=True)):
        error, scale = (got - want).abs().max().item(), want.abs().max().item()
        # a sum over all rows (gradients of weight and bias) or over the keys may lose some bits more
        if not error <= 64 * unit * scale:
            raise WrongResult(f"{op}: result {index} is off by {error:.3g} of {scale:.3g}")


def timed(call: Callable, leaves: list[Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":

        def run() -> object:
            with torch.no_grad():
                return call()

        return run
    grads = [torch.ones_like(t) for t in call()]
    return lambda: torch.autograd.grad(call(), leaves, grads)


def rows_of(shape: shapes.Shape, args: argparse.Namespace) -> list[dict]:
    inputs = shapes.make(shape, args.device, getattr(torch, args.dtype))
    rows = []
    for op, make in (("merge_norm", norm_sides), ("attention", attention_sides)):
        sides = make(inputs)
        check(op, sides, args.dtype)
        del sides["reference"]
        for direction in DIRECTIONS:
            calls = {name: [timed(*side, direction)] for name, side in sides.items()}
            times = measure.measure(calls, args.device, args.seconds, set())
            base = measure.percentile(times[BASES[op]]["samples"], 0.5)
            for name, found in times.items():
                p20, p50, p80 = (round(measure.percentile(found["samples"], k), 3) for k in (0.2, 0.5, 0.8))
                rows.append(
                    {
                        **{"shape": shape.name, "n": shape.n(args.device), "tokens": shape.tokens, "r": shape.r},
                        **{"dtype": args.dtype, "op": op, "direction": direction, "impl": name},
                        **{"p20_us": p20, "p50_us": p50, "p80_us": p80, "runs": len(found["samples"])},
                        **{"wall_us": found.get("wall_us"), "against": BASES[op], "times_base": round(p50 / base, 4)},
                    }
                )
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'shape':17} {'op':10} {'direction':16} {'impl':24} {'µs':>10}  of what it is compared with"]
    for r in rows:
        ratio = f"{r['times_base']:.2f}× {r['against']}" if r["impl"] != r["against"] else ""
        lines.append(f"{r['shape']:17} {r['op']:10} {r['direction']:16} {r['impl']:24} {r['p50_us']:10.1f}  {ratio}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    cli.add_options(p)
    add(
        "--shapes",
        type=cli.one_of("shape", SHAPES),
        default=list(SHAPES),
        metavar="NAME,NAME",
        help=", ".join(SHAPES),
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add(
        "--seconds",
        type=cli.positive(float),
        default=2.0,
        metavar="S",
        help="for each shape, op and direction (default: 2)",
    )
    return cli.measure_shapes(p.parse_args(argv), rows_of, table)


if __name__ == "__main__":
    sys.exit(main())
