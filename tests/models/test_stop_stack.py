# SPDX-License-Identifier: Apache-2.0
"""The visual stream through a stack of blocks against a slow reference, for every kind of schedule, in float64."""

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.stop.layers import VisualBlock
from stoptome_kernels.tome.schedule import plan_layers
from stoptome_kernels.video import blocks as stream
from stoptome_kernels.video.blocks import VideoTokens, run_stack
from stoptome_kernels.video.state import VideoMergeState
from torch import nn

from support import slow_stop

SCHEDULES = {
    "off": {"tome_r": 0},
    "r 2": {"tome_r": 2},
    "all at once": {"tome_r": [20]},
    "list": {"tome_r": [0, 3, 0, 1]},
    "falling": {"tome_r": (3, -1)},
    "clips": {"tome_r": 1, "merge_layers": (1, 2), "merge_frame_nums": (2, 3), "merge_token_proportions": (20, 10)},
    "one clip at once": {
        "tome_r": 2, "merge_layers": (0,), "merge_frame_nums": (6,), "merge_token_proportions": (30, 5),
    },
    "clips at the end": {
        "tome_r": 2, "merge_layers": (3,), "merge_frame_nums": (2,), "merge_token_proportions": (10, 20),
    },
    "joined, not merged": {
        "tome_r": [0], "merge_layers": (1,), "merge_frame_nums": (2,), "merge_token_proportions": (0, 0),
    },
}  # fmt: skip
BATCH, FRAMES, PATCHES, WIDTH, LAYERS = 2, 6, 12, 64, 4


def example(prompts: int, lora: bool = True):
    torch.manual_seed(3)
    blocks = nn.ModuleList(VisualBlock(WIDTH, 2, lora) for _ in range(LAYERS)).double()
    frames = torch.randn(BATCH * FRAMES, 1 + PATCHES, WIDTH, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(BATCH, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    deep = torch.randn(LAYERS, BATCH, FRAMES, prompts, WIDTH, dtype=torch.float64, requires_grad=True)
    return blocks, frames, shared, deep


def schedule_of(settings: dict, prompts: int):
    return plan_layers(layers=LAYERS, tokens=1 + prompts + PATCHES, frames=FRAMES, protected=1 + prompts, **settings)


def gradients(outputs, leaves):
    torch.manual_seed(5)
    total = sum((out * torch.randn_like(out)).sum() for out in outputs)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def compare(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() <= 1e-9 * (1 + other.abs().max())


@pytest.mark.parametrize("prompts", [4, 3, 1])
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_and_gradients(name, prop_attn, prompts):
    """Everything that leaves the tower, and every gradient: of tokens, prompts of each layer, weights, embeddings."""
    blocks, frames, shared, deep = example(prompts, lora=prompts == 4)
    schedule = schedule_of(SCHEDULES[name], prompts)
    embeddings = {}
    for layer, step in enumerate(schedule.steps):
        if step.join > 1:
            rows = torch.randn(1, step.items * step.join, 1, WIDTH, dtype=torch.float64)
            embeddings[layer] = blocks[layer].tome_frame_embedding = nn.Parameter(rows)
    parameters = list(blocks.parameters())
    leaves = [frames, shared, deep, *parameters]

    stream, _ = run_stack(blocks, VideoTokens(frames, shared), schedule, prop_attn=prop_attn, frame_prompts=deep)
    classes = stream.x.reshape(BATCH, FRAMES, WIDTH)
    ours = (stream.prompts, classes)
    videos = frames.view(BATCH, FRAMES, 1 + PATCHES, WIDTH)
    each = [
        slow_stop.tower(blocks, videos[b], shared[b], deep[:, b], schedule, prop_attn, embeddings) for b in range(BATCH)
    ]
    theirs = tuple(torch.stack([found[i] for found in each]) for i in range(2))
    compare(ours, theirs)
    # in_proj's rows for the queries of tokens whose output nobody reads get no gradient, or zeros: None is a zero here
    compare(
        *([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
          for found in (gradients(ours, leaves), gradients(theirs, leaves)))
    )  # fmt: skip


@pytest.mark.parametrize("prompts", [4, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_trace_and_sizes(name, prompts):
    """The trace says of every original token where it is; counted, that gives the sizes that the stream carries."""
    blocks, frames, shared, deep = example(prompts)
    schedule = schedule_of(SCHEDULES[name], prompts)
    config = stk.ToMeConfig(**SCHEDULES[name], trace_source=True)
    merging = VideoMergeState(config, schedule)
    with pytest.raises(RuntimeError, match="run the model"):
        merging.trace()
    with torch.no_grad():
        merging.run(blocks, VideoTokens(frames, shared), deep)
        each = [
            slow_stop.tower(
                blocks, frames.view(BATCH, FRAMES, -1, WIDTH)[b], shared[b], deep[:, b], schedule
            ) for b in range(BATCH)
        ]  # fmt: skip
    trace = merging.trace()
    assert trace.protected == 1 + prompts
    assert trace.dest.shape == (BATCH, FRAMES, 1 + prompts + PATCHES)
    assert trace.dest.dtype == torch.int32
    tokens, items = trace.tokens[-1], trace.items[-1]
    joined = FRAMES // items
    for b in range(BATCH):
        counts = torch.bincount(trace.dest[b].flatten().long(), minlength=items * tokens).view(items, tokens)
        guarded = joined * (1 + prompts)
        assert (counts[:, :guarded] == 1).all()
        for item in range(items):
            assert torch.equal(counts[item, guarded:].double(), each[b][2][item])
        for t in range(FRAMES):
            first = (t // joined) * tokens
            assert trace.dest[b, t, 0] == first + t % joined
            own = first + joined + (t % joined) * prompts + torch.arange(prompts)
            assert torch.equal(trace.dest[b, t, 1 : 1 + prompts].long(), own)
    for layer, step in enumerate(schedule.steps):
        assert trace.layers[layer].max() == step.items * step.tokens - 1
        assert len(trace.layers[layer].unique()) >= step.items * step.tokens // 2
    assert int(trace.layers[-1].numel()) == BATCH * FRAMES * (1 + prompts + PATCHES)


def test_checkpointing_is_exact():
    """Recomputing changes no bit, with sizes and clips."""
    blocks, frames, shared, deep = example(4)
    schedule = schedule_of(SCHEDULES["clips"], 4)
    leaves = [frames, shared, deep, *blocks.parameters()]
    found = []
    for checkpointing in (False, True):
        stream, _ = run_stack(
            blocks, VideoTokens(frames, shared), schedule, frame_prompts=deep, checkpointing=checkpointing
        )
        found.append(gradients((stream.prompts, stream.x), leaves))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_reentrant_checkpointing_is_refused():
    """It would lose the gradients of everything that travels in a tuple, without a word."""
    blocks, frames, shared, deep = example(4)
    step = schedule_of(SCHEDULES["r 2"], 4).steps[0]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        torch.utils.checkpoint.checkpoint(
            lambda x, y: blocks[0](VideoTokens(x, y), step, frame_prompts=deep[0]), frames, shared, use_reentrant=True
        )


def test_two_forwards_before_a_backward():
    """Nothing of a forward is kept on the modules: the first one's gradients are its own."""
    blocks, frames, shared, deep = example(4)
    schedule = schedule_of(SCHEDULES["r 2"], 4)

    def run(scale):
        stream, _ = run_stack(blocks, VideoTokens(frames * scale, shared), schedule, frame_prompts=deep)
        return stream.prompts.square().sum()

    alone = torch.autograd.grad(run(1.0), frames)[0]
    one, _other = run(1.0), run(-0.5)
    assert torch.equal(torch.autograd.grad(one, frames)[0], alone)


def test_metric_from_columns_of_the_projection(monkeypatch):
    """The mean over heads of the keys as more columns of one product gives the same stack (a GPU's default)."""
    blocks, frames, shared, deep = example(4)
    schedule = schedule_of(SCHEDULES["clips"], 4)
    attn = blocks[0].attn
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    *ours, metric = stream.project_qkv_and_metric(attn, x)
    for one, other in zip(ours, stream.project_qkv(attn, x, 0, 3), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(metric, ours[1].mean(1))
    with torch.no_grad():
        want, plans = run_stack(blocks, VideoTokens(frames, shared), schedule, frame_prompts=deep)
        asked = []
        monkeypatch.setattr(stream, "_metric_columns_cheaper", lambda attn, x: asked.append(x) or True)
        got, others = run_stack(blocks, VideoTokens(frames, shared), schedule, frame_prompts=deep)
    assert len(asked) == 3  # not in the last layer
    compare((got.x, got.prompts), (want.x, want.prompts))
    assert all(
        torch.equal(one.intra.dest, two.intra.dest)
        for one, two in zip(plans, others, strict=True)
        if one.intra is not None
    )
