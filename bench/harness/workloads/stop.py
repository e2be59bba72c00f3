# SPDX-License-Identifier: Apache-2.0
"""STOP's visual tower with merging, upstream's way of computing it, and merging in eager operations put into that."""

from __future__ import annotations

import argparse
import copy

import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel
from stoptome_kernels.tome.schedule import Schedule
from stoptome_kernels.video.blocks import VideoTokens, run_block
from torch import Tensor

from .. import shapes
from ..baselines import stop as upstream
from . import Side, casting

SETTINGS = {
    "r=0": stk.ToMeConfig(0),
    "r=2": stk.ToMeConfig(2),
    "r=4": stk.ToMeConfig(4),
    "r=8": stk.ToMeConfig(8),
    "accuracy": stk.ToMeConfig.preset("accuracy"),
    "memory": stk.ToMeConfig.preset("memory"),
}  # the presets training, inference and prototyping are r = 2, 4, 8
PROMPTS = ("package", "upstream", "upstream, channels last")  # by fft_conv3d, by conv3d, by the same in NDHWC


def model_config(args: argparse.Namespace, temporal_prompt: str) -> StopConfig:
    return StopConfig(
        temporal_prompt=temporal_prompt, layers=args.layers, prompt_layers=12, text_layers=1, vocab_size=64
    )


def readers(hidden: Tensor, config: StopConfig) -> Tensor:
    """Return global prompts and class tokens of upstream's output, all that encode_image reads."""
    shared = config.global_prompts
    classes = hidden[:, shared:].unflatten(1, (-1, config.frames))[:, 0]
    return torch.cat([hidden[:, :shared], classes], 1)


def tokens_first(frames: Tensor, prompts: Tensor, shared: Tensor) -> Tensor:
    """Return upstream's layout ``(G + L·T, B, D)`` of frames ``(B·T, 1 + n, D)``, their first prompts ``(B, T, P, D)``
    and the global ones ``(1, G, D)``."""
    rows = frames.unflatten(0, prompts.shape[:2])
    own = torch.cat([rows[:, :, :1], prompts, rows[:, :, 1:]], 2).transpose(1, 2).flatten(1, 2)
    return torch.cat([shared.expand(len(own), -1, -1), own], 1).transpose(0, 1)


def prepare(args: argparse.Namespace, temporal_prompt: str) -> tuple[StopModel, Tensor]:
    """Return a model of random weights, and videos panned and zoomed over a photograph."""
    torch.manual_seed(0)
    config = model_config(args, temporal_prompt)
    model = StopModel(config).to(args.device).eval()
    with torch.no_grad():  # patches as different from each other as a trained embedding leaves them
        model.visual.conv1.weight.mul_(4)
    video = shapes.frames(args.videos * config.frames, config.frames, config.image_size, args.device, 0)
    return model, video.unflatten(0, (args.videos, config.frames))


def sides(model: StopModel, video: Tensor, scope: str, args: argparse.Namespace) -> list[Side]:
    """Return everything that is measured of a scope."""
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
            peer = _with_weights(model, kind, args)
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
    """Return the parameters of the blocks and, if there is one, of the temporal prompt."""
    parts = [visual.transformer, *([visual.TemporalPrompt] if hasattr(visual, "TemporalPrompt") else [])]
    return tuple(parameter for part in parts for parameter in part.parameters())


def _with_weights(model: StopModel, block: type, args: argparse.Namespace) -> upstream.StopTower:
    """Return upstream's tower with the weights of a model."""
    c = model.config
    peer = upstream.StopTower(c.width, c.layers, c.patches, c.frames, c.global_prompts, c.lora, block).to(args.device)
    peer.load_state_dict({k: v for k, v in model.visual.state_dict().items() if k in peer.state_dict()})
    return peer


def _temporal_prompts(model: StopModel, video: Tensor, schedule: Schedule, args: argparse.Namespace, impl: str) -> Side:
    """Return the dynamic prompts alone, added to the pixels and to the layers' own; upstream's by conv3d."""
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
    """Return upstream's whole tower: its blocks, and its temporal prompts by conv3d, step by step."""
    visual, c, cast = copy.deepcopy(model.visual), model.config, casting(args)
    peer = _with_weights(model, upstream.StopBlock, args)
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
    """Return a block in the middle of the stack, as the tower runs it without merging."""
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
    """Return the same on upstream's layout, tokens first."""
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
