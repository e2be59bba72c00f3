# SPDX-License-Identifier: Apache-2.0
"""The patch on models built like upstream's: exact where it is off, right where it is on, gone without a trace."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.video.blocks import VideoTokens
from torch import nn

from harness.baselines import stop as upstream
from support import clip4clip

WIDTH, LAYERS, PATCHES, FRAMES, BATCH = 64, 3, 12, 4, 2


class Holder(nn.Module):
    """As upstream's CLIP and CLIP4Clip hold their tower."""

    def __init__(self, tower: nn.Module, name: str = "visual", **attributes):
        super().__init__()
        self.add_module(name, tower)
        for key, value in attributes.items():
            setattr(self, key, value)


def stop_tower(prompts: int = 4, block=upstream.StopBlock) -> upstream.StopTower:
    torch.manual_seed(1)
    return upstream.StopTower(WIDTH, LAYERS, PATCHES, FRAMES, prompts, block=block).eval()


def clip4clip_tower() -> clip4clip.Clip4ClipTower:
    torch.manual_seed(1)
    return clip4clip.Clip4ClipTower(WIDTH, LAYERS, PATCHES).eval()


def inputs(prompts: int = 4):
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(BATCH * FRAMES, PATCHES, WIDTH, generator=generator)
    deep = torch.randn(LAYERS, BATCH, FRAMES * prompts, WIDTH, generator=generator)
    return patches, deep


def readers(hidden: torch.Tensor, prompts: int = 4) -> torch.Tensor:
    """Return what upstream's encode_image reads of a tower's output: global prompts and class tokens."""
    classes = hidden[:, prompts:].reshape(len(hidden), -1, FRAMES, WIDTH)[:, 0]
    return torch.cat([hidden[:, :prompts], classes], 1)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 2e-5 * (1 + other.abs().max()))


TOWERS = {"stop": (stop_tower, inputs), "clip4clip": (clip4clip_tower, lambda: (inputs()[0], FRAMES))}


@pytest.mark.parametrize("kind", TOWERS)
def test_off_is_bit_for_bit_and_removal_leaves_nothing(kind):
    make, given = TOWERS[kind]
    tower, args = make(), given()
    before, state = tower(*args), dict(tower.state_dict())
    own = {name: (type(m), set(m.__dict__)) for name, m in tower.named_modules()}
    assert stk.apply_tome_patch(tower) is tower
    assert torch.equal(tower(*args), before)
    stk.apply_tome_patch(tower, 2)
    merged = tower(*args)
    assert merged.shape[1] < before.shape[1]
    seen = slice(0, 4) if kind == "stop" else slice(0, 1)
    assert not close(merged[:, seen], before[:, seen])
    assert list(tower.state_dict()) == list(state)
    assert all(torch.equal(tower.state_dict()[name], value) for name, value in state.items())
    for module, original in (
        (tower, type(make())),
        (tower.transformer.resblocks[0], type(make().transformer.resblocks[0])),
    ):
        assert isinstance(module, original)
        assert type(module).__name__ == original.__name__
    stk.apply_tome_patch(tower, 0)
    assert torch.equal(tower(*args), before)
    stk.remove_tome_patch(tower)
    assert {name: (type(m), set(m.__dict__)) for name, m in tower.named_modules()} == own
    assert torch.equal(tower(*args), before)
    stk.remove_tome_patch(tower)  # nothing to do


@pytest.mark.parametrize("r", [1, 3])
def test_stop_against_eager_merging(r):
    """Against merging written in eager operations into upstream's own way of computing, with gradients."""
    eager, ours = stop_tower(block=upstream.MergingStopBlock), stop_tower()
    ours.load_state_dict(eager.state_dict())
    for block in eager.transformer.resblocks:
        block.r = r
    stk.apply_tome_patch(ours, r)
    found = []
    for tower in (eager, ours):
        patches, deep = (t.requires_grad_() for t in inputs())
        out = readers(tower(patches, deep))
        leaves = [patches, deep, *tower.parameters()]
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)])
    assert found[1][0].shape == (BATCH, 4 + FRAMES, WIDTH)
    assert sum(g is not None and g.abs().sum() > 0 for g in found[1][1:]) > 40
    for theirs, own in zip(*found, strict=True):
        if own is None:
            assert theirs is None
        else:
            assert close(own, theirs)


@pytest.mark.parametrize("prompts", [4, 3])
def test_r_zero_with_a_trace(prompts):
    """Bit for bit what it was, and the trace is the identity."""
    tower, args = stop_tower(prompts), inputs(prompts)
    before = tower(*args)
    stk.apply_tome_patch(tower, 0, trace_source=True)
    assert torch.equal(tower(*args), before)
    trace = stk.tome_trace(tower)
    tokens = 1 + prompts + PATCHES
    assert trace.dest.shape == (BATCH, FRAMES, tokens)
    assert torch.equal(trace.dest[0].flatten(), torch.arange(FRAMES * tokens, dtype=torch.int32))


def test_clip4clip_merges_and_reads_class_tokens():
    """Against the same blocks run as a stack; with clips, every frame still has its class token."""
    tower, args = clip4clip_tower(), TOWERS["clip4clip"][1]()
    plain = tower(*args)
    stk.apply_tome_patch(tower, 2, trace_source=True)
    merged = tower(*args)
    assert merged.shape == (BATCH * FRAMES, 1 + PATCHES - 2 * LAYERS, WIDTH)
    assert 0.5 < torch.cosine_similarity(merged[:, 0], plain[:, 0], dim=-1).min() < 0.99999
    assert stk.tome_trace(tower).dest.shape == (BATCH * FRAMES, 1, 1 + PATCHES)
    clips = {"merge_layers": (1,), "merge_frame_nums": (2,), "merge_token_proportions": (20, 10)}
    with pytest.raises(ValueError, match="give frames="):
        stk.apply_tome_patch(tower, 2, **clips)
    stk.apply_tome_patch(tower, 2, **clips, frames=FRAMES, trace_source=True)
    assert tower(*args).shape == (BATCH * FRAMES, 1, WIDTH)
    assert stk.tome_trace(tower).dest.shape == (BATCH, FRAMES, 1 + PATCHES)
    whole = Holder(Holder(clip4clip_tower()), "clip", task_config=SimpleNamespace(max_frames=FRAMES))
    stk.apply_tome_patch(whole, 2, **clips)
    assert torch.equal(whole.clip.visual(*args), tower(*args))
    with pytest.raises(ValueError, match=r"video_frame is 2, but .* of videos of 4 frames: patch again with frames=2"):
        tower(args[0], 2)
    stk.apply_tome_patch(whole, 2, trace_source=True)  # frames known, though not joined: the trace has videos
    whole.clip.visual(*args)
    assert stk.tome_trace(whole).dest.shape == (BATCH, FRAMES, 1 + PATCHES)
    assert stk.tome_trace(whole).dest.max() == FRAMES * (1 + PATCHES - 6) - 1


def test_copies_and_files():
    """deepcopy, pickle and torch.save of a patched model give a patched model, that can be unpatched."""
    tower, args = stop_tower(), inputs()
    stk.apply_tome_patch(tower, 2, trace_source=True)
    want = tower(*args)
    file = io.BytesIO()
    torch.save(tower, file)
    file.seek(0)
    copies = [copy.deepcopy(tower), pickle.loads(pickle.dumps(tower)), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other(*args), want)
        stk.remove_tome_patch(other)
        assert type(other) is upstream.StopTower
    assert torch.equal(tower(*args), want)


def test_found_inside_wrappers():
    tower = stop_tower()
    whole = Holder(Holder(Holder(tower), "clip"), "module")
    stk.apply_tome_patch(whole, 1)
    assert stk.apply_tome_patch(tower, 1).tome.config.tome_r == 1
    assert stk.remove_tome_patch(whole).module.clip.visual is tower


def test_blocks_called_as_before_do_as_before():
    """Somebody who calls a block himself gets what he always got."""
    tower = stop_tower()
    x = torch.randn(4 + FRAMES * (5 + PATCHES), BATCH, WIDTH)
    before = tower.transformer.resblocks[0]((x, FRAMES, True))[0]
    stk.apply_tome_patch(tower, 2)
    assert torch.equal(tower.transformer.resblocks[0]((x, FRAMES, True))[0], before)


def test_hooks_on_blocks_still_fire():
    """They see what a patched block gives: VideoTokens. One that changes a tuple of upstream's is told so."""
    tower, seen = stop_tower(), []
    tower.transformer.resblocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    stk.apply_tome_patch(tower, 2)
    tower(*inputs())
    (found,) = seen
    assert isinstance(found[0], VideoTokens)
    assert found[0].x.shape == (BATCH * FRAMES, 1 + PATCHES - 4, WIDTH)
    tower.transformer.resblocks[1].register_forward_hook(lambda module, args, out: (out[0] * 2, *out[1:]))
    with pytest.raises(TypeError, match="a hook made for upstream's tuples"):
        tower(*inputs())


def test_frame_embeddings():
    """Zero at the start, so that nothing changes; they learn; they go with the patch."""
    tower, args = stop_tower(), inputs()
    clips = {"merge_layers": (1, 2), "merge_frame_nums": (2, 2), "merge_token_proportions": (20, 10)}
    stk.apply_tome_patch(tower, 1, **clips)
    plain, names = tower(*args), set(tower.state_dict())
    stk.apply_tome_patch(tower, 1, **clips, frame_pos=1)
    added = {name: tuple(p.shape) for name, p in tower.named_parameters() if name not in names}
    assert added == {
        "transformer.resblocks.1.tome_frame_embedding": (1, FRAMES, 1, WIDTH),
        "transformer.resblocks.2.tome_frame_embedding": (1, FRAMES // 2, 1, WIDTH),
    }
    assert torch.equal(tower(*args), plain)
    readers(tower(*args)).square().sum().backward()
    embedding = tower.transformer.resblocks[1].tome_frame_embedding
    assert embedding.grad.abs().min() > 0
    with torch.no_grad():
        embedding.add_(1.0)
    stk.apply_tome_patch(tower, 2, **clips, frame_pos=1)
    assert tower.transformer.resblocks[1].tome_frame_embedding is embedding  # patching again keeps what was learnt
    stk.remove_tome_patch(tower)
    assert set(tower.state_dict()) == names


def test_frozen_embeddings_are_said():
    """STOP's freeze_clip freezes, in each train(), what is not on its list of new modules: at zero, for good."""
    tower, arguments = stop_tower(), inputs()
    stk.apply_tome_patch(
        tower, 1, merge_layers=(1,), merge_frame_nums=(2,), merge_token_proportions=(10, 10), frame_pos=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower.train()(*arguments)  # they learn
        for p in tower.parameters():
            p.requires_grad_(False)
        tower.eval()(*arguments)
        with torch.no_grad():
            tower.train()(*arguments)
    with pytest.warns(UserWarning, match="tome_frame_embedding are frozen.*freeze_clip.*add tome_frame_embedding"):
        tower(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower(*arguments)  # once is enough


def test_from_a_task_config():
    tower = stop_tower()
    with pytest.warns(UserWarning, match="has none of tome_r"):
        assert stk.apply_from_config(tower, SimpleNamespace(lr=1e-4)) is tower
    assert type(tower) is upstream.StopTower
    stk.apply_from_config(tower, SimpleNamespace(tome_r=2, tome_prop_attn=False, merge_layers=""))
    assert tower.tome.config == stk.ToMeConfig(2, prop_attn=False)


def broken(change) -> nn.Module:
    tower = stop_tower()
    change(tower)
    return tower


def _second(tower: nn.Module) -> nn.Module:
    return tower.transformer.resblocks[1]


@pytest.mark.parametrize(
    ("model", "settings", "error", "says"),
    [
        (nn.Linear(2, 2), {}, TypeError, "can't merge tokens in Linear: it has no visual tower"),
        ("model", {}, TypeError, "torch.nn.Module, got str"),
        (stop_tower(), {"tome_r": -1}, ValueError, "tome_r must be 0 or more"),
        (stop_tower(), {"tome_r": [1] * 4}, ValueError, "tome_r has 4 numbers, but there are 3 layers"),
        (stop_tower(), {"config": {"tome_r": 1}}, TypeError, "config must be a ToMeConfig"),
        (
            stop_tower(),
            {"merge_layers": (1,), "merge_frame_nums": (3,), "merge_token_proportions": (5, 5)},
            ValueError, "joins 3 items at layer 1, but a video of 4 frames",
        ),
        (broken(lambda t: setattr(_second(t).attn, "dropout", 0.1)), {}, ValueError, "dropout=0.1"),
        (broken(lambda t: setattr(_second(t).attn, "batch_first", True)), {}, ValueError, "batch_first"),
        (broken(lambda t: setattr(_second(t), "attn_mask", torch.ones(2, 2))), {}, ValueError, "attention mask"),
        (broken(lambda t: setattr(_second(t), "attn", nn.Linear(2, 2))), {}, TypeError, "MultiheadAttention"),
        (broken(lambda t: _second(t).add_module("adapter", nn.Linear(2, 2))), {}, TypeError, "parts are LoRA, adapter"),
        (broken(lambda t: setattr(_second(t), "ln_2", nn.RMSNorm(WIDTH))), {}, TypeError, "ln_2 must be a torch.nn"),
        (stop_tower(), {"config": stk.ToMeConfig(1), "tome_r": 3}, ValueError, "either config or tome_r"),
        (stop_tower(), {"frames": 7}, ValueError, "frames is 7, but the model is made for videos of 4"),
        (stop_tower(), {"protected": 1}, ValueError, "has 5 tokens that must not be merged"),
        (stop_tower(), {"unmerge": True}, ValueError, "unmerge is not for STOP, .* class tokens alone"),
        (clip4clip_tower(), {"frames": -4}, ValueError, "frames must be 1 or more"),
        (clip4clip_tower(), {"frames": "4"}, TypeError, "frames must be an int"),
        (clip4clip_tower(), {"frames": 0}, ValueError, "frames must be 1 or more"),
        (stop_tower(), {"merge_layers": 1}, TypeError, "merge_layers must be a sequence"),
        (stop_tower(), {"merge_layers": "1-2"}, TypeError, "merge_layers must be a sequence"),
        (broken(lambda t: setattr(_second(t), "forward", lambda x: x)), {}, RuntimeError, "patch first"),
        (broken(lambda t: setattr(t, "forward_deep_prompt", lambda x: x)), {}, RuntimeError, "patch first"),
        (broken(lambda t: setattr(t, "video_frames", None)), {}, ValueError, "no int video_frames"),
    ],
)  # fmt: skip
def test_refusals(model, settings, error, says):
    with pytest.raises(error, match=says):
        stk.apply_tome_patch(model, **{"tome_r": 1, **settings})


def test_a_refusal_changes_nothing():
    tower = broken(lambda t: setattr(t.transformer.resblocks[2].attn, "dropout", 0.1))
    with pytest.raises(ValueError, match="dropout"):
        stk.apply_tome_patch(tower, 2)
    assert type(tower) is upstream.StopTower
    assert type(tower.transformer.resblocks[0]) is upstream.StopBlock


def test_sharded_models_are_refused():
    """fully_shard before the patch is refused wherever it was applied; after it, everything works."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for pick in (lambda t: t, lambda t: t.transformer.resblocks[1]):
            tower = stop_tower()
            fully_shard(pick(tower), mesh=mesh)
            with pytest.raises(RuntimeError, match="patch first, then call fully_shard"):
                stk.apply_tome_patch(tower, 2)
        tower, args = stop_tower(), inputs()
        stk.apply_tome_patch(tower, 2, trace_source=True)
        want = tower(*args)
        for block in tower.transformer.resblocks:
            fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)
        if torch.__version__.startswith("2.6."):
            pytest.skip("torch 2.6's fully_shard runs no forward on a CPU, whose streams record no events there")
        assert close(tower(*args), want)
        assert stk.tome_trace(tower).tokens == (15, 13, 11)
        with pytest.raises(RuntimeError, match="another class after it was patched"):
            stk.remove_tome_patch(tower)
    finally:
        dist.destroy_process_group()


def test_embeddings_come_before_distributed_data_parallel():
    """A parameter added afterwards would drift apart between processes, silently."""
    import torch.distributed as dist

    clips = {"merge_layers": (1,), "merge_frame_nums": (2,), "merge_token_proportions": (20, 10)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(stop_tower(), find_unused_parameters=True)
        with pytest.raises(RuntimeError, match="patch first, then wrap"):
            stk.apply_tome_patch(wrapped, 1, **clips, frame_pos=1)
        stk.apply_tome_patch(wrapped, 1, **clips)
        tower = stk.apply_tome_patch(stop_tower(), 1, **clips, frame_pos=1)
        wrapped = nn.parallel.DistributedDataParallel(tower, find_unused_parameters=True)
        stk.apply_tome_patch(wrapped, 2, **clips, frame_pos=1)
    finally:
        dist.destroy_process_group()


class WideGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.5 * x)


WideGELU.__name__ = "QuickGELU"


class PostNorm(upstream.StopBlock):
    def feed_forward(self, x):
        return self.ln_2(x + self.mlp(x))


def test_blocks_that_compute_something_else_are_refused():
    """Structure alone does not tell: every block is tried on random tokens."""
    with_other_gelu = broken(lambda t: setattr(_second(t).mlp, "gelu", WideGELU()))
    for tower in (stop_tower(block=PostNorm), with_other_gelu):
        with pytest.raises(ValueError, match="computes something else"):
            stk.apply_tome_patch(tower, 2)
        assert type(tower) is upstream.StopTower


class Adapted(nn.Module):
    """As PEFT puts it in the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.more(x)


def test_what_was_added_to_the_mlp_is_computed():
    """Adapters, layers in between, and pruning hooks: whatever is in the MLP takes part."""
    from torch.nn.utils import prune

    def adapt(tower):
        tower.transformer.resblocks[0].mlp.c_fc = Adapted(tower.transformer.resblocks[0].mlp.c_fc)
        mlp = tower.transformer.resblocks[1].mlp
        tower.transformer.resblocks[1].mlp = nn.Sequential(
            OrderedDict(c_fc=mlp.c_fc, gelu=mlp.gelu, scale=nn.LayerNorm(4 * WIDTH), c_proj=mlp.c_proj)
        )
        prune.l1_unstructured(tower.transformer.resblocks[2].mlp.c_fc, "weight", 0.3)

    eager, ours = (stop_tower(block=upstream.MergingStopBlock), stop_tower())
    adapt(eager)
    adapt(ours)
    ours.load_state_dict(eager.state_dict())
    for block in eager.transformer.resblocks:
        block.r = 2
    stk.apply_tome_patch(ours, 2)
    for factor in (1.0, 3.0):
        for tower in (eager, ours):
            with torch.no_grad():
                tower.transformer.resblocks[2].mlp.c_fc.weight_orig.mul_(factor)
        assert close(readers(ours(*inputs())), readers(eager(*inputs())))


def test_traces_that_are_not_there():
    tower = stop_tower()
    with pytest.raises(RuntimeError, match="not patched"):
        stk.tome_trace(tower)
    stk.apply_tome_patch(tower, 2)
    with pytest.raises(RuntimeError, match="trace_source=True"):
        stk.tome_trace(tower)
    stk.apply_tome_patch(tower, 2, trace_source=True)
    with pytest.raises(RuntimeError, match="run the model"):
        stk.tome_trace(tower)


def test_wrong_videos_are_refused():
    tower = stop_tower()
    stk.apply_tome_patch(tower, 2)
    _, deep = inputs()
    for count, said in ((16 * FRAMES, "tokens that are no whole number of such frames"), (17 * 6, "got 6 frames")):
        with pytest.raises(ValueError, match=rf"videos of 4 frames \(max_frames\) of 17 tokens, but .*{said}"):
            tower.forward_deep_prompt(torch.randn(4 + count, BATCH, WIDTH), deep)
