#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure STOP's visual tower (ViT-B/32, 12 frames) with token merging: time, memory, and the share of the ideal.

Against upstream's way of computing it without merging, and against merging in eager operations put into that; with
STOP proper's prompts (scopes `proper`, `prompts`) only if asked, since upstream's take half a minute to train. Every
result is compared with the plain reference's before it is timed; a wrong one ends the run with status 1. Without
arguments: on the GPU if there is one, else on the CPU with a smaller batch, in about ten minutes; --quick: in one.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel
from stoptome_kernels.tome.schedule import Schedule
from stoptome_kernels.video.blocks import VideoTokens, run_block
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from charts.stop import GUIDE, table
from harness import cli, measure, shapes
from harness.baselines import stop as upstream
from harness.rows import environment, rows_file, write_rows
from harness.verify import WrongResult

SETTINGS = {
    "r=0": stk.ToMeConfig(0),
    "r=2": stk.ToMeConfig(2),
    "r=4": stk.ToMeConfig(4),
    "r=8": stk.ToMeConfig(8),
    "accuracy": stk.ToMeConfig.preset("accuracy"),
    "memory": stk.ToMeConfig.preset("memory"),
}  # the presets training, inference and prototyping are r = 2, 4, 8
DIRECTIONS = ("inference", "training")
SCOPES = ("block", "blocks", "tower", "proper", "prompts")
OPS = {"proper": "tower, group2-2", "prompts": "prompts of group2-2"}  # others: as the scope
PROMPTS = ("package", "upstream", "upstream, channels last")  # by fft_conv3d, by conv3d, by the same in NDHWC


@dataclass(frozen=True)
class Side:
    """One implementation at one setting: ``call()`` runs it and gives what its readers read."""

    impl: str
    setting: str
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    schedule: Schedule

    def train(self) -> object:
        return torch.autograd.grad(self.call().float().square().sum(), self.leaves, allow_unused=True)

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.call()


def model_config(args: argparse.Namespace, temporal_prompt: str) -> StopConfig:
    return StopConfig(
        temporal_prompt=temporal_prompt, layers=args.layers, prompt_layers=12, text_layers=1, vocab_size=64
    )


def readers(hidden: Tensor, config: StopConfig) -> Tensor:
    """Global prompts and class tokens of upstream's output, all that encode_image reads."""
    shared = config.global_prompts
    classes = hidden[:, shared:].unflatten(1, (-1, config.frames))[:, 0]
    return torch.cat([hidden[:, :shared], classes], 1)


def casting(args: argparse.Namespace):
    return torch.autocast(args.device, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()


def tokens_first(frames: Tensor, prompts: Tensor, shared: Tensor) -> Tensor:
    """Upstream's layout ``(G + L·T, B, D)`` of frames ``(B·T, 1 + n, D)``, their first prompts ``(B, T, P, D)`` and the
    global ones ``(1, G, D)``."""
    rows = frames.unflatten(0, prompts.shape[:2])
    own = torch.cat([rows[:, :, :1], prompts, rows[:, :, 1:]], 2).transpose(1, 2).flatten(1, 2)
    return torch.cat([shared.expand(len(own), -1, -1), own], 1).transpose(0, 1)


def prepare(args: argparse.Namespace, temporal_prompt: str) -> tuple[StopModel, Tensor]:
    """A model of random weights, and videos panned and zoomed over a photograph."""
    torch.manual_seed(0)
    config = model_config(args, temporal_prompt)
    model = StopModel(config).to(args.device).eval()
    with torch.no_grad():  # patches as different from each other as a trained embedding leaves them
        model.visual.conv1.weight.mul_(4)
    video = shapes.frames(args.videos * config.frames, config.frames, config.image_size, args.device, 0)
    return model, video.unflatten(0, (args.videos, config.frames))


def sides(model: StopModel, video: Tensor, scope: str, args: argparse.Namespace) -> list[Side]:
    """Everything that is measured of a scope."""
    tower, c, cast = model.visual, model.config, casting(args)
    unmerged = SETTINGS["r=0"].schedule(c.layers, 5 + c.patches, c.frames, 5, c.width)
    if scope == "prompts":
        return [_temporal_prompts(model, video, unmerged, args, impl) for impl in PROMPTS]
    with torch.no_grad():
        embedded = tower._embed(video.flatten(0, 1))
        deep = model.encode_prompts()[1].expand(-1, args.videos, c.frames, -1, -1).contiguous()
    frames, prompts = embedded.requires_grad_(), deep.requires_grad_()
    found = []
    if scope == "block":
        return [make(model, frames, prompts[0], unmerged, args) for make in (_own_block, _upstream_block)]
    for name in args.settings:
        config = SETTINGS[name]
        schedule = config.schedule(c.layers, 5 + c.patches, c.frames, 5, c.width)
        patched = StopModel(c).to(args.device).eval()
        patched.load_state_dict(model.state_dict())
        stk.apply_tome_patch(patched, config=config)
        visual = patched.visual

        def blocks(visual=visual) -> Tensor:
            with cast:
                shared = visual.prompt_embeddings.expand(args.videos, -1, -1)
                stream = visual.tome.run(visual.transformer.resblocks, VideoTokens(frames, shared), prompts)
                return visual.ln_post(torch.cat([stream.prompts, stream.x.reshape(args.videos, c.frames, -1)], 1))

        def whole(visual=visual) -> Tensor:
            with cast:
                return visual(video, prompts)

        own = _learnt(visual)
        found.append(Side("package", name, blocks if scope == "blocks" else whole, (prompts, *own), schedule))
    if scope in ("tower", "proper"):
        found.append(_upstream_tower(model, video, prompts, unmerged, args))
    if scope == "blocks":
        for name in args.settings:
            if SETTINGS[name].merge_layers:
                continue
            r = SETTINGS[name].tome_r
            kind = upstream.MergingStopBlock if r else upstream.StopBlock
            peer = upstream.StopTower(c.width, c.layers, c.patches, c.frames, c.global_prompts, c.lora, kind)
            peer.to(args.device).load_state_dict(
                {k: v for k, v in tower.state_dict().items() if k in peer.state_dict()}
            )
            for block in peer.transformer.resblocks:
                block.r = r

            def run(peer=peer) -> Tensor:
                with cast:
                    x = tokens_first(frames, prompts[0], peer.prompt_embeddings)
                    hidden = peer.forward_deep_prompt(x, prompts.flatten(2, 3)).transpose(0, 1)
                    return readers(peer.ln_post(hidden), c)

            own = tuple(peer.transformer.parameters())
            schedule = next(side.schedule for side in found if side.setting == name)
            found.append(Side("eager" if r else "upstream", name, run, (prompts, *own), schedule))
    return found


def _learnt(visual: torch.nn.Module) -> tuple[Tensor, ...]:
    """The parameters of the blocks and, if there is one, of the temporal prompt."""
    parts = [visual.transformer, *([visual.TemporalPrompt] if hasattr(visual, "TemporalPrompt") else [])]
    return tuple(parameter for part in parts for parameter in part.parameters())


def _temporal_prompts(model: StopModel, video: Tensor, schedule: Schedule, args: argparse.Namespace, impl: str) -> Side:
    """The dynamic prompts alone, added to the pixels and to the layers' own; upstream's by conv3d."""
    visual, cast = copy.deepcopy(model.visual), casting(args)
    net = visual.TemporalPrompt
    net.fast = impl == "package"
    if impl.endswith("channels last"):
        net.to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        tokens = visual._embed(video.flatten(0, 1)).unflatten(0, video.shape[:2])
    tokens.requires_grad_()

    def run() -> Tensor:
        with cast:
            frames, salient = net(video)
            between = net.between_frames(tokens, salient)
        return torch.cat([frames.flatten(2).mean(1), between.flatten(1)], 1)

    return Side(impl, "r=0", run, (tokens, *net.parameters()), schedule)


def _upstream_tower(
    model: StopModel, video: Tensor, prompts: Tensor, schedule: Schedule, args: argparse.Namespace
) -> Side:
    """Upstream's whole tower: its blocks, and its temporal prompts by conv3d, step by step."""
    visual, c, cast = copy.deepcopy(model.visual), model.config, casting(args)
    peer = upstream.StopTower(c.width, c.layers, c.patches, c.frames, c.global_prompts, c.lora).to(args.device)
    peer.load_state_dict({k: v for k, v in visual.state_dict().items() if k in peer.state_dict()})
    visual.transformer = peer.transformer
    proper = c.temporal_prompt == "group2-2"
    if proper:
        visual.TemporalPrompt.fast = False

    def run() -> Tensor:
        with cast:
            frames, deep = video, prompts
            if proper:
                frames, salient = visual.TemporalPrompt(video)
            x = visual._embed(frames.flatten(0, 1))
            if proper:
                between = visual.TemporalPrompt.between_frames(x.unflatten(0, video.shape[:2]), salient)
                deep = deep + between.unflatten(1, (c.frames, -1))
            x = tokens_first(x, deep[0], visual.prompt_embeddings)
            hidden = peer.forward_deep_prompt(x, deep.flatten(2, 3)).transpose(0, 1)
            return visual.ln_post(readers(hidden, c)) @ visual.proj

    return Side("upstream", "r=0", run, (prompts, *_learnt(visual)), schedule)


def _own_block(model: StopModel, frames: Tensor, prompts: Tensor, schedule: Schedule, args: argparse.Namespace) -> Side:
    """A block in the middle of the stack, as the tower runs it without merging."""
    block, c, cast = model.visual.transformer.resblocks[0], model.config, casting(args)

    def run() -> Tensor:
        with cast:
            shared = model.visual.prompt_embeddings.expand(args.videos, -1, -1)
            x = frames if torch.is_grad_enabled() else frames.detach()
            stream, _ = run_block(block, VideoTokens(x, shared), schedule.steps[0], frame_prompts=prompts)
            rows = stream.x.unflatten(0, (args.videos, c.frames))
            return torch.cat([stream.prompts, rows.flatten(1, 2)], 1)

    return Side("package", "r=0", run, (frames, prompts, *block.parameters()), schedule)


def _upstream_block(
    model: StopModel, frames: Tensor, prompts: Tensor, schedule: Schedule, args: argparse.Namespace
) -> Side:
    """The same on upstream's layout, tokens first."""
    c, cast = model.config, casting(args)
    block = upstream.StopBlock(c.width, c.width // 64, c.global_prompts, c.lora).to(args.device)
    block.load_state_dict(model.visual.transformer.resblocks[0].state_dict())
    x = tokens_first(frames, prompts, model.visual.prompt_embeddings).detach().contiguous().requires_grad_()

    def run() -> Tensor:
        with cast:
            hidden = block((x, c.frames, True))[0].transpose(0, 1)
        tokens = hidden[:, c.global_prompts :].unflatten(1, (-1, c.frames)).transpose(1, 2)
        kept = torch.cat([tokens[:, :, :1], tokens[:, :, 1 + c.frame_prompts :]], 2).flatten(1, 2)
        return torch.cat([hidden[:, : c.global_prompts], kept], 1)

    return Side("upstream", "r=0", run, (x, *block.parameters()), schedule)


def check(found: list[Side], dtype: str) -> None:
    """Implementations of one setting agree: to rounding without merging; with it a pair of tokens that are equally
    similar to rounding may be merged otherwise, so the direction of every output row is compared."""
    least = 0.9999 if dtype == "float32" else 0.98
    right: dict[str, Tensor] = {}
    for side in found:
        if side.setting not in right:  # the package's first: here by its plain reference
            chosen = os.environ.get("STOPTOME_BACKEND")
            os.environ["STOPTOME_BACKEND"] = "reference"
            right[side.setting] = side.infer().float()
            os.environ.pop("STOPTOME_BACKEND") if chosen is None else os.environ.update(STOPTOME_BACKEND=chosen)
        got = side.infer().float()
        cosine = torch.cosine_similarity(got, right[side.setting], dim=-1).min().item()
        if not (got.isfinite().all() and cosine >= least):
            raise WrongResult(f"{side.impl} at {side.setting}: a row's cosine with the reference's is {cosine:.6f}")


# -- memory -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def memory(side: Side, direction: str, device: str) -> dict[str, int | None]:
    """Bytes of one call beyond weights and inputs."""
    run = side.train if direction == "training" else side.infer
    if device == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "saved_bytes": None, "largest_bytes": None}
    own = {leaf.untyped_storage()._cdata for leaf in side.leaves}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    if direction == "training":
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = side.call()
        del result
    with LiveBytes() as live:
        run()
    return {"peak_bytes": live.peak, "saved_bytes": sum(saved.values()) or None, "largest_bytes": live.largest}


# -- rows -------------------------------------------------------------------------------------------------------------


def rows_of(found: list[Side], scope: str, direction: str, args: argparse.Namespace) -> list[dict]:
    used = {id(side): memory(side, direction, args.device) for side in found}
    calls = {f"{side.impl} {side.setting}": [side.train if direction == "training" else side.infer] for side in found}
    times = measure.measure(calls, args.device, args.seconds, set())
    middle = {name: measure.percentile(t["samples"], 0.5) for name, t in times.items()}
    rows = []
    for side in found:
        samples, t = times[f"{side.impl} {side.setting}"]["samples"], middle[f"{side.impl} {side.setting}"]
        same = "package" if side.impl == "package" else "upstream"  # eager merging at r = 0 is upstream's block
        zero = next(s for s in found if s.impl == same and s.setting == "r=0")
        gain, ideal = middle[f"{same} r=0"] / t, side.schedule.speedup
        bytes_used, before = used[id(side)], used[id(zero)]
        other = next((s for s in found if s.impl == "upstream" and s.setting == "r=0"), None)
        theirs = used[id(other)] if other else None
        which = "saved_bytes" if bytes_used["saved_bytes"] else "peak_bytes"
        rows.append(
            {
                **{"shape": side.setting, "n": args.videos, "frames": 12, "op": OPS.get(scope, scope)},
                "direction": direction,
                **{"dtype": args.dtype, "impl": side.impl},
                **{"tokens": side.schedule.tokens, "items": side.schedule.items},
                **{f"p{k}_us": round(measure.percentile(samples, k / 100), 1) for k in (20, 50, 80)},
                "runs": len(samples),
                "speedup_vs_r0": round(gain, 4),
                "speedup_ideal": round(ideal, 4),
                "eta": round(gain / ideal, 4),
                "speedup_vs_upstream": round(middle["upstream r=0"] / t, 4) if "upstream r=0" in middle else None,
                **bytes_used,
                "memory_vs_r0": round(bytes_used[which] / before[which], 4),
                "memory_vs_upstream": round(bytes_used[which] / theirs[which], 4) if theirs else None,
                "guide": GUIDE.get(side.setting),
            }
        )
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    cli.add_options(p)
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which schedules")
    add(
        "--scope",
        nargs="+",
        choices=SCOPES,
        default=list(SCOPES[:3]),
        help="one block, all blocks, the whole tower with DGL's prompts (default: these three), with STOP proper's, "
        "or STOP proper's prompts alone",
    )
    add("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    add("--videos", type=cli.positive(int), metavar="N", help="in a batch (default: 128 on a GPU, 4 on a CPU)")
    add("--layers", type=cli.positive(int), default=12, metavar="N", help="blocks (default: 12)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 (autocast) on a GPU, float32 on a CPU")
    add(
        "--seconds",
        type=cli.positive(float),
        default=20.0,
        metavar="S",
        help="for each scope and direction (default: 20)",
    )
    add("--quick", action="store_true", help="r = 0 and 4, all blocks, inference alone")
    args = p.parse_args(argv)
    cli.settle(args)
    args.videos = args.videos or (1 if args.dry else 128 if args.device == "cuda" else 4)
    if args.quick:
        args.settings, args.scope, args.direction = ["r=0", "r=4"], ["blocks"], ["inference"]
        args.seconds = min(args.seconds, 5.0)
    if "r=0" not in args.settings:
        args.settings = ["r=0", *args.settings]  # what everything is compared with
    if args.layers < 10 and {"accuracy", "memory"} & set(args.settings):
        p.error("argument --layers: the presets accuracy and memory join frames at layers 6 to 9; leave them out")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    where = environment(args.device, args.commit) | {"pages": args.pages}
    try:
        file = rows_file(args.json, where)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
    print(f"{args.videos} × 12 frames, {args.layers} layers, {args.dtype}")
    rows: list[dict] = []
    status = 0
    try:
        for scope in args.scope:
            model, video = prepare(args, "group2-2" if scope in ("proper", "prompts") else "DGL")
            found = sides(model, video, scope, args)
            check(found, args.dtype)
            for direction in args.direction:
                rows += [where | row for row in rows_of(found, scope, direction, args)]
                if file:
                    write_rows(file, rows)
            del found
    except WrongResult as error:
        print(f"error: wrong result, nothing more is timed: {error}", file=sys.stderr)
        status = 1
    except torch.OutOfMemoryError:
        print(f"error: not enough GPU memory for {args.videos} videos: use a smaller --videos", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped; what was measured so far:", file=sys.stderr)
        status = 130
    if rows:
        print(table(rows))
    if file and rows:
        print(f"rows: {file}")
    return status


if __name__ == "__main__":
    sys.exit(main())
