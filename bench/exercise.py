#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run every operator once, forward and backward, at one shape: what profilers and sanitizers look at.

    ncu -k regex:norm_rows python bench/exercise.py --shape vit-b16-r16
    compute-sanitizer --tool memcheck python bench/exercise.py

Checks the results' finiteness alone: whether they are right is what the tests ask.
"""

from __future__ import annotations

import sys

import stoptome_kernels as stk
import torch

from harness import cli, shapes
from harness.workloads.fused import attention_sides, norm_sides


def run(inputs: shapes.Inputs) -> list[torch.Tensor]:
    """Return the outputs and gradients of match, merge in all modes, unmerge, then, merge_norm and attention."""
    plan = stk.match(inputs.metric, *inputs.args)
    found: list[torch.Tensor] = []
    for mode in ("mean", "sum", "max"):
        leaf = inputs.x.detach().requires_grad_()
        y, size = stk.merge(leaf, plan, inputs.size, mode)
        found += [y, size, *torch.autograd.grad(stk.unmerge(y, plan).sum(), leaf)]
    plan.then(stk.match(y.detach(), 1, plan.protected))
    for op, make in (("merge_norm", norm_sides), ("attention", attention_sides)):
        call, leaves = make(inputs)[op]
        outputs = call()
        found += [*outputs, *torch.autograd.grad(sum(t.float().square().sum() for t in outputs), leaves)]
    return found


def main(argv: list[str] | None = None) -> int:
    p = cli.bare_parser(__doc__)
    names = [name for name, shape in shapes.SHAPES.items() if shape.metric == "keys"]
    p.add_argument("--shape", choices=names, default="stop-b32-video-r2")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in the benchmarks")
    cli.add_dry(p)
    args = p.parse_args(argv)
    cli.choose_device(args)
    inputs = shapes.make(shapes.SHAPES[args.shape], args.device, getattr(torch, args.dtype))
    for _ in range(2):  # a profiler looks at the second, when everything is compiled
        found = run(inputs)
    if args.device == "cuda":
        torch.cuda.synchronize()
    wrong = sum(not t.isfinite().all() for t in found)
    print(f"{args.shape}, {args.dtype}: {len(found)} outputs and gradients, {wrong} not finite")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
