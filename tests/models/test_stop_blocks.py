# SPDX-License-Identifier: Apache-2.0
"""Blocks of the visual stream against outputs of the public implementations (see golden/README.md)."""

import numpy as np
import pytest
import torch
from stoptome_kernels.stop.layers import VisualBlock
from stoptome_kernels.tome.schedule import plan_layers
from stoptome_kernels.video.blocks import VideoTokens, run_block, run_stack
from torch import nn

from support import GOLDEN


def arrays(file: str, prefix: str) -> dict:
    data = np.load(GOLDEN / file)
    return {name.removeprefix(prefix): torch.from_numpy(data[name]) for name in data.files if name.startswith(prefix)}


def weights_of(found: dict) -> dict:
    return {name.removeprefix("weights/"): value for name, value in found.items() if name.startswith("weights/")}


def idle(layers: int, tokens: int, frames: int, protected: int):
    return plan_layers(0, layers, tokens, frames, protected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", range(3))
def test_stop_block(case, apart, dtype):
    """One block of STOP, with frame prompts among the tokens and, as the towers run it, as keys and values alone."""
    found = arrays("stop_block_upstream.npz", f"{case}/")
    shared, frames, prompts, patches, batch, width, heads, lora = found["config"].tolist()
    block = VisualBlock(width, heads, bool(lora)).to(dtype)
    block.load_state_dict(weights_of(found))
    x, want = found["x"].to(dtype), found["y"].to(dtype)
    tokens = 1 + prompts + patches

    def rows(t):  # (G + L·T, B, D) -> (B·T, L, D)
        return t[shared:].view(tokens, frames, batch, width).permute(2, 1, 0, 3)

    own, want_rows = rows(x), rows(want)
    options: dict = {"inline_prompts": prompts}
    if apart:
        options = {"frame_prompts": own[:, :, 1 : 1 + prompts]}
        own, want_rows = (torch.cat([t[:, :, :1], t[:, :, 1 + prompts :]], 2) for t in (own, want_rows))
    stream = VideoTokens(own.flatten(0, 1), x[:shared].transpose(0, 1))
    step = idle(1, tokens, frames, 1 + prompts).steps[0]
    got, _ = run_block(block, stream, step, **options)
    scale = want.abs().max()
    assert (got.x - want_rows.flatten(0, 1)).abs().max() < 2e-6 * scale
    assert (got.prompts - want[:shared].transpose(0, 1)).abs().max() < 2e-6 * scale
    got, _ = run_block(block, stream, step, **options, class_tokens_only=True)
    assert (got.x[:, 0] - want_rows.flatten(0, 1)[:, 0]).abs().max() < 2e-6 * scale
    assert (got.prompts - want[:shared].transpose(0, 1)).abs().max() < 2e-6 * scale


class TempMeBlock(VisualBlock):
    """A block with TempMe's parameters: the low-rank update of q, k, v is added to the projection."""

    def __init__(self, width: int, heads: int, weights: dict):
        super().__init__(width, heads)
        weights = dict(weights)
        down, up = weights.pop("attn.TVPt_LoRA_a"), weights.pop("attn.TVPt_LoRA_b")
        embedding = weights.pop("TVPt_Video_Positional_embedding", None)
        weights["attn.in_proj_weight"] = weights["attn.in_proj_weight"] + up @ down
        self.load_state_dict(weights)
        self.tome_frame_embedding = None if embedding is None else nn.Parameter(embedding)


@pytest.mark.parametrize("tag", ["pos", "nopos"])
def test_tempme_stack(tag):
    """Clip merging, frame embeddings and proportional attention over four layers."""
    found = arrays("tempme_blocks_upstream.npz", f"{tag}/")
    batch, frames, patches, width, heads, r, layers, _ = found["config"].tolist()
    own = weights_of(found)
    blocks = []
    for i in range(layers):
        prefix = f"resblocks.{i}."
        blocks.append(TempMeBlock(width, heads, {k.removeprefix(prefix): v for k, v in own.items() if prefix in k}))
    at, numbers = (tuple(column.tolist()) for column in found["merge"].T)
    schedule = plan_layers(
        r, layers, 1 + patches, frames, 1, merge_layers=at, merge_frame_nums=numbers,
        merge_token_proportions=tuple(round(100 * p) for p in found["props"].tolist()), width=width,
    )  # fmt: skip
    assert [[batch * i, t] for i, t in zip(schedule.items, schedule.tokens, strict=True)] == found["counts"].tolist()
    stream, _ = run_stack(blocks, VideoTokens(found["x"]), schedule, return_all_tokens=True)
    assert torch.equal(stream.size, found["size"])
    assert (stream.x - found["y"]).abs().max() < 4e-6 * found["y"].abs().max()
