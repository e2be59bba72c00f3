#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Count what whole models launch on a GPU, without one: kernels by name, variants compiled, and operations of torch.

The driver of harness/no_gpu.py stands under Triton, for sm_90; one video or one image, in bfloat16 by autocast("cpu"),
the stand-in for autocast("cuda"). Matrix products of torch are not computed, their results are zeros: nothing that is
counted depends on a value. No GPU is used, even where there is one. It takes a minute, the first time with compiling.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import stoptome_kernels as stk
import torch
from torch import Tensor, nn

from charts.launches import listed
from harness import cli, no_gpu
from harness.rows import ROOT, environment, save_rows, version_of
from harness.workloads import DIRECTIONS, Side, models, stop

FOLDER = ROOT / "bench/results/launches"
STOP = "STOP ViT-B/32, 12 frames"
SETTINGS = ("r=0", "r=2", "r=8", "memory")  # of bench/stop.py; memory joins frames
VITS = (("ViT-B/16", 13), ("CLIP ViT-B/32 (open_clip)", 13))  # of bench/models.py, and r


@dataclass(frozen=True)
class Model:
    """A patched model."""

    name: str  # and its merging
    call: Callable[[int], Tensor]  # runs it on so many videos or images
    blocks: list[nn.Module]  # of its tower
    built: nn.Module


# -- counting ---------------------------------------------------------------------------------------------------------


@cache
def launches_something(name: str) -> bool:
    """Return whether an operation of torch runs a kernel on a GPU: not if it makes a view, memory without a value, or
    no tensor."""
    packet = getattr(torch.ops.aten, name)
    if name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "lift_fresh"):
        return False
    if name in ("to", "contiguous", "reshape", "flatten"):  # seen whole inside of operators; there they copy
        return True
    returns = [value for overload in packet.overloads() for value in getattr(packet, overload)._schema.returns]
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    return not views and any("Tensor" in str(value.type) for value in returns)


class Operations(no_gpu.WithoutProducts):
    """The operations of torch that run under it, by name, those inside the package's operators left out; products are
    not computed."""

    def __init__(self, gpu: no_gpu.Gpu):
        super().__init__()
        self.gpu, self.names = gpu, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            return func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if no_gpu.waits(func, args):
            self.gpu.waits.append(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


def count(gpu: no_gpu.Gpu, model: Model, n: int, direction: str) -> tuple[no_gpu.Gpu, list[str], list[list[str]]]:
    """Run a model once: what reached the driver, torch's operations, and the kernels of each block's forward."""
    gpu.clear()
    gpu.results = False
    blocks: list[list[str]] = []
    handles = []
    for block in model.blocks:
        handles.append(block.register_forward_pre_hook(lambda *_: blocks.append([len(gpu.launches)])))
        handles.append(block.register_forward_hook(lambda *_: blocks[-1].append(len(gpu.launches))))
    try:
        with Operations(gpu) as outside, torch.autocast("cpu", torch.bfloat16):
            Side("package", model.name, lambda: model.call(n), tuple(model.built.parameters())).run(direction)()
    finally:
        gpu.results = True
        for handle in handles:
            handle.remove()
    return gpu, [*outside.names, *gpu.operations], [gpu.launches[slice(*ends)] for ends in blocks]


# -- models -----------------------------------------------------------------------------------------------------------


def stop_models(layers: int = 12) -> list[Model]:
    """STOP with each of the settings; one module, patched when its turn has come."""
    from stoptome_kernels.stop import StopModel

    config = stop.model_config(SimpleNamespace(layers=layers), "DGL")
    built = StopModel(config)

    def call(n: int, setting: str) -> Tensor:
        stk.apply_tome_patch(built, config=stop.SETTINGS[setting])
        return built.encode_video(torch.zeros(n, config.frames, 3, config.image_size, config.image_size))

    blocks = list(built.visual.transformer.resblocks)
    return [Model(f"{STOP}, {name}", lambda n, name=name: call(n, name), blocks, built) for name in SETTINGS]


def vit_models(layers: int = 12) -> list[Model]:
    """The vision transformers whose libraries are installed."""
    found = []
    for name, r in VITS:
        kind = models.MODELS[name]
        if not models.installed(kind.library):
            print(f"{name}: {kind.library} is not installed, left out", file=sys.stderr)
            continue
        built: Any = kind.make(layers).eval()
        stk.apply_tome_patch(built, r)

        def call(n: int, kind=kind, built=built) -> Tensor:
            return kind.answer(built(torch.zeros(n, *kind.shape)))

        found.append(Model(f"{name}, r={r}", call, kind.blocks(built), built))
    return found


def rows_of(gpu: no_gpu.Gpu, model: Model) -> list[dict]:
    """Both directions of a model, each as in a process that has compiled nothing."""
    rows = []
    for direction in DIRECTIONS:
        gpu.forget()
        seen, operations, blocks = count(gpu, model, 1, direction)
        row = {
            **{"model": model.name, "n": 1, "dtype": "bfloat16", "direction": direction},
            **{"launches": len(seen.launches), "kernels": dict(Counter(seen.launches))},
            **{"compiled": len(seen.variants), "variants": dict(Counter(seen.variants))},
            "operations": sum(map(launches_something, operations)),
            "allocations": sum(name.startswith(("empty", "new_empty")) for name in gpu.operations),
            "waits": list(seen.waits),
            "blocks": blocks,
        }
        seen, _, _ = count(gpu, model, 2, direction)
        row["compiled_for_two"] = len(seen.variants)
        rows.append(row)
    return rows


def all_rows(gpu: no_gpu.Gpu) -> list[dict]:
    """The rows of every model, one model at a time in memory."""
    return [row for make in (stop_models, vit_models) for model in make() for row in rows_of(gpu, model)]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.bare_parser(__doc__)
    name = f"triton-{version_of('triton')}.json"
    p.add_argument(
        "--json", type=Path, metavar="FILE", nargs="?", const=FOLDER / name,
        help=f"write rows to FILE, or into a folder (default: {(FOLDER / name).relative_to(ROOT)})",
    )  # fmt: skip
    cli.add_commit(p)
    args = p.parse_args(argv)
    if args.json and args.json.is_dir():
        args.json = args.json / name
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    gpu = no_gpu.install()
    torch.set_num_threads(1)  # next to nothing is computed
    where = environment("cpu", args.commit)
    kept = {key: where[key] for key in ("torch", "triton", "python", "package", "commit", "dirty", "date")}
    rows = [kept | row for row in all_rows(gpu)]
    for row in rows:
        print(f"{row['model']}, {row['direction']}: {row['launches']} kernels ({listed(row['kernels'])}), "
              f"{row['compiled']} compiled, {row['operations']} other operations")  # fmt: skip
    if args.json:
        save_rows(args.json, rows)
        print(f"rows: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
