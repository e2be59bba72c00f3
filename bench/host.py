#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure the host's time of each op and of a patched block as a multiple of F.layer_norm's in the same run.

Tensors are so small that computing takes next to nothing. --backend native: the CPU's kernels; triton: Triton's launch
path on the CPU, over a driver that launches nothing (harness/no_gpu.py), as an upper bound of what a GPU's host spends
without the launch itself; both, the default: one after the other, each in a process of its own. In two minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from torch import Tensor

from charts.host import BACKENDS, verdict
from harness import cli, measure, no_gpu
from harness.rows import ROOT, percentiles, version_of
from harness.workloads.models import installed

FOLDER = ROOT / "bench/results/host"
BASE = "F.layer_norm"
# at most so many times F.layer_norm's
TARGETS = {
    ("match", "forward"): 6, ("merge", "forward"): 6, ("merge_norm", "forward"): 8,
    ("attention, sizes and prefix", "forward"): 8,
    ("merge", "with gradient"): 12, ("merge_norm", "with gradient"): 16,
}  # fmt: skip
ITEMS, TOKENS, PROTECTED, R, WIDTH, HEADS, PREFIX = 2, 9, 1, 2, 32, 2, 2
Sides = dict[tuple[str, str], Callable[[], object]]  # by op and direction


def directions(op: str, plain: Callable[[], object], call: Callable[[], object], leaves: list[Tensor]) -> Sides:
    """An op without gradients, one with what autograd notes, and its backward alone."""
    out = call()
    graph = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor) and t.requires_grad]
    grads = [torch.ones_like(t) for t in graph]

    def backward() -> object:
        return torch.autograd.grad(graph, leaves, grads, retain_graph=True)

    return {(op, "forward"): plain, (op, "with gradient"): call, (op, "backward"): backward}


def block_directions(op: str, call: Callable[[], object], leaves: list[Tensor]) -> Sides:
    """The same of a block, whose parameters want gradients: without them under no_grad, as it is run."""

    def plain() -> object:
        with torch.no_grad():
            return call()

    return directions(op, plain, call, leaves)


def op_calls(dtype: torch.dtype, grad: bool) -> dict[str, tuple[Callable[[], object], list[Tensor]]]:
    """Every public op with its inputs, two items of nine tokens, which want gradients or don't."""

    def wanted(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)

    packed = wanted(ITEMS, TOKENS, 3, HEADS, WIDTH // HEADS)
    ahead = wanted(ITEMS, PREFIX, 2, HEADS, WIDTH // HEADS)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    ahead_k, ahead_v = (part.transpose(1, 2) for part in ahead.unbind(2))
    keys = k.detach()
    x, residual, merged = (wanted(ITEMS, n, WIDTH) for n in (TOKENS, TOKENS, TOKENS - R))
    weight, bias = (wanted(WIDTH, dtype=torch.float32) for _ in range(2))
    affine = [wanted(WIDTH), wanted(WIDTH)]
    size = torch.ones(ITEMS, TOKENS)
    plan = stk.match(keys, R, PROTECTED, "reference")
    following = stk.match(keys[:, :, : TOKENS - R], R, PROTECTED, "reference")
    return {
        BASE: (lambda: F.layer_norm(x, (WIDTH,), *affine), [x, *affine]),
        "match": (lambda: stk.match(keys, R, PROTECTED), []),
        "merge": (lambda: stk.merge(x, plan, size), [x]),
        "unmerge": (lambda: stk.unmerge(merged, plan), [merged]),
        "merge_norm": (
            lambda: stk.merge_norm(x, residual, plan, size, weight, bias), [x, residual, weight, bias]
        ),
        "attention, sizes and prefix": (lambda: stk.attention(q, k, v, size, ahead_k, ahead_v), [packed, ahead]),
        "attention, plain": (lambda: stk.attention(q, k, v), [packed]),
        "MergePlan.then": (lambda: plan.then(following), []),
    }  # fmt: skip


def op_sides(dtype: torch.dtype) -> Sides:
    """Every public op in all directions that it has."""
    found: Sides = {}
    plain, differentiable = op_calls(dtype, False), op_calls(dtype, True)
    for op, (call, leaves) in differentiable.items():
        found |= directions(op, plain[op][0], call, leaves) if leaves else {(op, "forward"): plain[op][0]}
    return found


def stop_block(cast: Callable, r: int) -> Sides:
    """A STOP block in the middle of its stack, one video of 12 frames, narrow."""
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

    return block_directions(f"STOP block, r = {r}", call, [x, *block.parameters()])


def vit_block(cast: Callable, r: int) -> Sides:
    """The second block of timm's vision transformer, whose tokens have sizes, narrow; nothing if there is no timm."""
    if not installed("timm"):
        print("timm is not installed, its block is left out", file=sys.stderr)
        return {}
    from timm.models.vision_transformer import VisionTransformer

    built = VisionTransformer(img_size=64, embed_dim=64, depth=3, num_heads=1, num_classes=0).eval()
    given: list = []
    # the launch path that is timed gives no results
    with patch.dict(os.environ, STOPTOME_BACKEND="reference"), torch.no_grad(), cast():
        stk.apply_tome_patch(built, r)  # which compares results
        handle = built.blocks[1].register_forward_pre_hook(lambda _, args: given.extend(args))
        built(torch.randn(1, 3, 64, 64))
        handle.remove()
    (tokens,) = given
    leaf = tokens.x.clone().requires_grad_()

    def call() -> Tensor:
        with cast():
            return built.blocks[1](tokens._replace(x=leaf if torch.is_grad_enabled() else leaf.detach())).x

    return block_directions(f"timm ViT block, r = {r}", call, [leaf, *built.blocks[1].parameters()])


def sides(backend: str) -> Sides:
    """All that is measured, on the backend that ``auto`` takes: float32 on a CPU, bfloat16 as a GPU's user has it."""
    torch.manual_seed(0)
    if backend == "native":
        return {**op_sides(torch.float32), **stop_block(nullcontext, 2), **vit_block(nullcontext, 2)}
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    return {**op_sides(torch.bfloat16), **stop_block(cast, 2), **vit_block(cast, 2)}


def _again(call: Callable[[], object], times: int) -> None:
    """One sample: so many calls that the first, which finds the caches as another op left them, weighs little."""
    for _ in range(times):
        call()


def rows_of(backend: str, seconds: float) -> list[dict]:
    found = sides(backend)
    often = {key: 3 if "block" in key[0] else 20 for key in found}
    calls = {"\n".join(key): [partial(_again, call, often[key])] for key, call in found.items()}
    # of this thread alone, which does all the work: what else the machine runs doesn't count
    times = measure.measure(calls, "cpu", seconds, set(), time.thread_time_ns)
    base = measure.percentile(times[f"{BASE}\nforward"]["samples"], 0.5) / often[BASE, "forward"]
    rows = []
    for op, way in found:
        samples = [sample / often[op, way] for sample in times[f"{op}\n{way}"]["samples"]]
        own = percentiles(samples)
        target, ratio = TARGETS.get((op, way)), own["p50_us"] / base
        rows.append(
            {
                **{"shape": "tiny", "n": ITEMS, "dtype": "float32" if backend == "native" else "bfloat16"},
                **{"op": op, "direction": way, "impl": backend},
                **own,
                "base_us": round(base, 3),
                **{"times_layer_norm": round(ratio, 2), "target": target},
                "met": None if target is None else ratio <= target,
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text, in columns."""
    return "\n".join(
        f"{r['impl']:7} {r['op']:28} {r['direction']:14} {r['p50_us']:9.1f} µs {r['times_layer_norm']:7.1f}×  "
        + verdict(r).replace("*", "")
        for r in rows
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.bare_parser(__doc__)
    add = p.add_argument
    add(
        "--json", type=Path, metavar="FILE", nargs="?", const=FOLDER,
        help="add the rows to FILE; in a folder: to one named by device and backend (default: bench/results/host)",
    )  # fmt: skip
    add("--backend", choices=(*BACKENDS, "both"), default="both")
    cli.add_seconds(p, 45.0, "each backend")
    cli.add_commit(p)
    return p.parse_args(argv)


def batches(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Measure one backend."""
    yield rows_of(args.backend, args.seconds)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.backend == "both":
        return next((status for backend in BACKENDS if (status := _in_a_process(backend, args))), 0)
    torch.set_num_threads(1)  # a pool of threads has its own host's time
    args.device, args.pages = "cpu", None
    release = ""
    if args.backend == "triton":
        no_gpu.install(results=False)
        release = ".".join(version_of("triton").split(".")[:2])
    heading = "{device}, torch {torch}, Triton {triton}"
    return cli.main(args, batches(args), table, heading, suffix=f"-{args.backend}{release}")


def _in_a_process(backend: str, args: argparse.Namespace) -> int:
    """Measure one backend: a process has either the CPU's kernels or the driver that launches nothing."""
    options = ["--backend", backend, "--seconds", str(args.seconds)]
    options += ["--json", str(args.json)] if args.json else []
    options += ["--commit", args.commit] if args.commit else []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, __file__, *options], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
