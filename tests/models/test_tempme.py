# SPDX-License-Identifier: Apache-2.0
"""TempMe's model on our operators: by its own schedule with its own numbers, and by the user's."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.tome.schedule import Step
from stoptome_kernels.video.blocks import VideoTokens, feed_forward, project_qkv, project_qkv_and_metric
from stoptome_kernels.video.tempme import TempMeTokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from support import GOLDEN
from support import slow_tempme as slow

FRAMES, BATCH, LAYERS = 4, 2, 5
OFF = {"tome_r": 0, "merge_frame_num": "1", "merge_layer": "4", "merge_token_proportion": "0-0", "frame_pos": 0}


def model(apply=slow.merge_eagerly, **changes) -> slow.Model:
    torch.manual_seed(1)
    return slow.Model(slow.settings(**changes), apply=apply).eval()


def video() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(BATCH, FRAMES)
    mask[1, 3] = 0
    return torch.randn(BATCH * FRAMES, 3, 16, 16, generator=generator), mask


def blocks_of(whole: nn.Module) -> nn.Sequential:
    return whole.clip.visual.transformer.resblocks


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 2e-5 * (1e-3 + other.abs().max()))


class Stripped(nn.Module):
    """DistributedDataParallel without processes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


# how a model comes to the patch: with TempMe's own patch, given whole, wrapped, or its CLIP alone; without TempMe's
# patch; or made with ours in the place of TempMe's
WAYS = {
    "whole": lambda make: stk.apply_tome_patch(make(slow.merge_eagerly), trace_source=True),
    "wrapped": lambda make: stk.apply_tome_patch(Stripped(make(slow.merge_eagerly)), trace_source=True).module,
    "bare": lambda make: stk.apply_tome_patch(make(None), trace_source=True),
    "drop-in": lambda make: make(stk.apply_tome_patch),
}


@pytest.mark.parametrize("way", [*WAYS, "upstream"])
@pytest.mark.parametrize("tag", ["pos", "nopos"])
def test_golden(tag, way):
    """Upstream's own outputs, from its weights, through the patch; and from the stand-in, which is so held to them."""
    data = np.load(GOLDEN / "tempme_blocks_upstream.npz")
    found = {k.removeprefix(f"{tag}/"): torch.from_numpy(data[k]) for k in data.files if k.startswith(f"{tag}/")}
    batch, frames, patches, width, heads, r, layers, frame_pos = found["config"].tolist()
    layer, number = ("-".join(map(str, column.tolist())) for column in found["merge"].T)
    config = slow.settings(
        tome_r=r, merge_layer=layer, merge_frame_num=number, frame_pos=frame_pos, max_frames=frames, lora_dim=4,
        merge_token_proportion="-".join(str(round(100 * p)) for p in found["props"].tolist()), tome_tracesource=True,
    )  # fmt: skip

    def make(apply) -> slow.Model:
        return slow.Model(config, width, heads, layers, round(patches**0.5), apply=apply)

    whole = make(slow.merge_eagerly) if way == "upstream" else WAYS[way](make)
    weights = {k.removeprefix("weights/"): v for k, v in found.items() if k.startswith("weights/")}
    whole.clip.visual.transformer.load_state_dict(weights)  # strict: the patch adds and renames nothing
    got = whole.blocks(found["x"])
    assert (got - found["y"]).abs().max() < 4e-6 * found["y"].abs().max()
    if way == "upstream":
        assert torch.equal(whole.clip._tome_info["size"][..., 0], found["size"])
        return
    trace = stk.tome_trace(whole)
    assert [[batch * i, t] for i, t in zip(trace.items, trace.tokens, strict=True)] == found["counts"].tolist()
    sizes = torch.stack([video.flatten().bincount() for video in trace.dest]).view(found["size"].shape)
    assert torch.equal(sizes.float(), found["size"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [True, False])
def test_features_and_gradients(way, frozen):
    """Against merging in eager operations, trained as TempMe trains (what is called TVPt alone) and as a whole."""
    found = []
    for make in (lambda: model(), lambda: WAYS[way](lambda apply: model(apply))):
        whole = make()
        for name, weight in whole.named_parameters():
            weight.requires_grad_("TVPt" in name or not frozen)
        out = whole.get_video_feat(*video())
        leaves = {name: p for name, p in whole.named_parameters() if p.requires_grad and ".visual." in name}
        grads = torch.autograd.grad(out.sin().sum(), list(leaves.values()))
        with torch.no_grad():
            found.append([out, whole.get_video_feat(*video()), *grads])
    assert len(found[0]) == (14 if frozen else 82)
    for theirs, ours in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        assert close(ours, theirs)


def test_more_than_there_is():
    """Both merge at most half of the tokens that may be merged."""
    whole, many = model(tome_r=6), model(tome_r=6)
    assert close(stk.apply_tome_patch(many).get_video_feat(*video()), whole.get_video_feat(*video()))
    assert many.clip._tome_info == whole.clip._tome_info | {"size": None}
    assert TempMeTokens(VideoTokens(torch.randn(8, 17, 32)), 17, 4).step(2, 99, 99) == Step(2, 16, 8, 2, 2, 18, 10)
    share = model(merge_token_proportion="90-90")
    want = share.get_video_feat(*video())
    assert close(stk.apply_tome_patch(share).get_video_feat(*video()), want)


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("frozen", [True, False])
def test_parts_of_a_projection(frozen, tokens):
    """q, k, v by themselves, two of them, and with their mean over heads."""
    attn = blocks_of(model())[0].attn
    attn.in_proj_weight.requires_grad_(not frozen)
    x = torch.randn(2, tokens, 32)
    want = nn.functional.linear(x, attn.in_proj_weight + attn.TVPt_LoRA_b @ attn.TVPt_LoRA_a, attn.in_proj_bias)
    want = want.unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    for first, last in ((0, 1), (1, 3), (0, 3)):
        for got, part in zip(project_qkv(attn, x, first, last), want[first:last], strict=True):
            assert close(got, part)
    for got, part in zip(project_qkv_and_metric(attn, x), (*want, want[1].mean(1)), strict=True):
        assert close(got, part)


def test_blocks_see_what_training_needs():
    """With frozen projections no gradient as large as one is computed: the low-rank update is applied to the tokens."""
    whole = stk.apply_tome_patch(model())
    for name, weight in whole.named_parameters():
        weight.requires_grad_("TVPt" in name)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        whole.get_video_feat(*video())
    assert (BATCH * FRAMES * 17, 4) in [(s[0] * s[1], s[2]) if len(s) == 3 else s for s in seen]


@pytest.mark.parametrize("config", [None, stk.ToMeConfig(), stk.ToMeConfig(trace_source=True)])
def test_without_merging_it_is_bit_for_bit(config):
    """A model that merges nothing by its own settings, and one of which the user wants that."""
    off = model(**OFF)
    off.load_state_dict(model().state_dict(), strict=False)
    before = off.get_video_feat(*video())
    merging = model()
    if config is None:
        stk.apply_tome_patch(off)
        assert torch.equal(off.get_video_feat(*video()), before)
    else:
        assert not close(merging.get_video_feat(*video()), before)
        stk.apply_tome_patch(merging, config=config)
        assert torch.equal(merging.get_video_feat(*video()), before)
        stk.apply_tome_patch(merging, 0)
        assert torch.equal(merging.get_video_feat(*video()), before)
        bare = stk.apply_tome_patch(model(None), config=config)
        assert close(bare.get_video_feat(*video()), before)
        images = video()[0]
        assert torch.equal(bare.clip.visual(images), model(None).clip.visual(images))


def test_layers_before_the_first_merging_are_bit_for_bit():
    """And what they give goes on into the layers that merge."""
    whole, plain, seen = model(tome_r=0), model(tome_r=0), []
    stk.apply_tome_patch(whole, trace_source=True)
    blocks_of(whole)[1].register_forward_hook(lambda block, args, out: seen.append(out.stream.x))
    blocks_of(plain)[1].register_forward_hook(lambda block, args, out: seen.append(out))
    assert close(whole.get_video_feat(*video()), plain.get_video_feat(*video()))
    assert torch.equal(*seen)
    assert stk.tome_trace(whole).tokens == (17, 17, 22, 28, 26)


def test_the_users_schedule_wins():
    """Given as settings or as a config, in place of the model's own and not mixed with it."""
    want = model(**OFF | {"tome_r": 3, "merge_layer": "3"})
    want.load_state_dict(model().state_dict(), strict=False)
    for given in ({"tome_r": [3, 3, 3]}, {"config": stk.ToMeConfig([3, 3, 3])}):
        whole = stk.apply_tome_patch(model(), **given)
        assert close(whole.get_video_feat(*video()), want.get_video_feat(*video()))
        assert whole.clip._tome_info["token_num"] == 17 - 9
    own = stk.apply_tome_patch(model())
    same = {"tome_r": 2, "merge_layers": (2, 3), "merge_frame_nums": (2, 2), "merge_token_proportions": (30, 10)}
    whole = stk.apply_tome_patch(model(), **same, frame_pos=1)
    assert torch.equal(whole.get_video_feat(*video()), own.get_video_feat(*video()))
    other = model()
    other.frame_pos = 0
    for way in (model(), model(None)):
        stk.apply_tome_patch(way, **same)
        assert close(way.get_video_feat(*video()), other.get_video_feat(*video()))
        assert not close(way.get_video_feat(*video()), own.get_video_feat(*video()))
    stk.apply_tome_patch(whole)  # and back to its own
    assert torch.equal(whole.get_video_feat(*video()), own.get_video_feat(*video()))


def test_its_command_line():
    """TempMe's flags, read as a config, are its own schedule."""
    flags = slow.settings(tome_propattn=False, tome_tracesource=True)
    config = stk.ToMeConfig.from_args(flags)
    assert config == stk.ToMeConfig(2, True, False, (2, 3), (2, 2), (30, 10), 1)
    assert config.schedule(LAYERS, 17, FRAMES).tokens == (15, 13, 18, 24, 22)
    own = stk.apply_tome_patch(model(tome_propattn=False))
    whole = stk.apply_from_config(model(), flags)
    assert torch.equal(whole.get_video_feat(*video()), own.get_video_feat(*video()))


def test_proportional_attention_as_the_model_was_made():
    plain = model(tome_propattn=False).get_video_feat(*video())
    assert not close(plain, model().get_video_feat(*video()))
    whole = stk.apply_tome_patch(model(tome_propattn=False))
    assert close(whole.get_video_feat(*video()), plain)
    stk.apply_tome_patch(whole, prop_attn=True)
    assert close(whole.get_video_feat(*video()), model().get_video_feat(*video()))
    stk.apply_tome_patch(whole, prop_attn=False)
    assert close(whole.get_video_feat(*video()), plain)


def test_embeddings_where_the_model_has_none():
    """Its own are used where they fit; new ones are the patch's and go with it."""
    whole = model(None, frame_pos=0)
    names = set(whole.state_dict())
    clips = {"tome_r": 2, "merge_layers": (1, 3), "merge_frame_nums": (2, 2), "merge_token_proportions": (30, 10)}
    stk.apply_tome_patch(whole, **clips, frame_pos=1)
    assert {name.split("resblocks.")[1] for name in set(whole.state_dict()) - names} == {
        "1.tome_frame_embedding", "3.tome_frame_embedding"
    }  # fmt: skip
    whole.get_video_feat(*video()).square().sum().backward()
    assert blocks_of(whole)[3].tome_frame_embedding.grad.abs().min() > 0
    stk.remove_tome_patch(whole)
    assert set(whole.state_dict()) == names
    whole = model()
    stk.apply_tome_patch(whole, **clips, frame_pos=1)
    added = set(whole.state_dict()) - set(model().state_dict())
    assert [name.split("resblocks.")[1] for name in added] == ["1.tome_frame_embedding"]
    with torch.no_grad():
        before = whole.get_video_feat(*video())
        blocks_of(whole)[3].TVPt_Video_Positional_embedding.add_(torch.randn(1, 2, 1, 32))
        assert not close(whole.get_video_feat(*video()), before)
    clips["merge_layers"] = (2, 3)
    clips["merge_frame_nums"] = (4, 1)
    stk.apply_tome_patch(whole, **clips, frame_pos=1)
    assert "1.tome_frame_embedding" not in str(list(whole.state_dict()))
    with pytest.raises(ValueError, match=r"layer 3 would join 4 items of a video, but .* for 2"):
        stk.apply_tome_patch(whole, 2, merge_layers=(3,), merge_frame_nums=(2,), merge_token_proportions=(9, 9),
                             frame_pos=1)  # fmt: skip


@pytest.mark.parametrize("apply", [slow.merge_eagerly, None])
def test_removal_leaves_nothing(apply):
    whole = model(apply)
    own = {name: (type(m), set(m.__dict__)) for name, m in whole.named_modules()}
    state, counts = dict(whole.state_dict()), dict(whole.clip.__dict__.get("_tome_info", {}))
    stk.apply_tome_patch(whole, trace_source=True)
    assert apply is None or whole.clip._tome_info == counts
    whole.get_video_feat(*video())
    assert list(whole.state_dict()) == list(state)
    assert isinstance(blocks_of(whole)[0], slow.Block)
    assert type(blocks_of(whole)[0]).__name__ == ("Block" if apply is None else "MergingBlock")
    assert type(whole.clip.transformer.resblocks[0]) is slow.Block  # the text tower
    stk.apply_tome_patch(whole, 1)
    stk.remove_tome_patch(whole)
    assert {name: (type(m), set(m.__dict__)) for name, m in whole.named_modules()} == own
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in state.items())
    if apply is not None:
        assert torch.equal(whole.get_video_feat(*video()), model().get_video_feat(*video()))
    stk.remove_tome_patch(whole)  # nothing to do


def test_copies_and_files():
    whole = stk.apply_tome_patch(model(), trace_source=True)
    want, file = whole.get_video_feat(*video()), io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), torch.load(file, weights_only=False)):
        assert torch.equal(other.get_video_feat(*video()), want)
        assert other.clip._tome_info is not whole.clip._tome_info
        assert stk.tome_trace(other).tokens == (15, 13, 18, 24, 22)
        stk.remove_tome_patch(other)
        assert type(blocks_of(other)[0]) is slow.MergingBlock
    assert torch.equal(whole.get_video_feat(*video()), want)


@pytest.mark.parametrize("layer", ["0-3", "2-3"])
def test_checkpointing_and_several_forwards(layer):
    """Blocks under non-reentrant checkpoints; two forwards before a backward."""
    found = []
    for save in (False, True):
        whole = stk.apply_tome_patch(model(merge_layer=layer))
        if save:
            for block in blocks_of(whole):
                inner = block.forward
                block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
        images, mask = video()
        one = whole.get_video_feat(images, mask)
        two = whole.get_video_feat(images.flip(0), mask)
        leaves = [p for name, p in whole.named_parameters() if "TVPt" in name and ".visual." in name]
        found.append([one, two, *torch.autograd.grad((one + two.sin()).sum(), leaves)])
    for plain, saved in zip(*found, strict=True):
        assert torch.equal(plain, saved)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_refused():
    whole = stk.apply_tome_patch(model())
    block = blocks_of(whole)[1]
    inner = block.forward
    block.forward = lambda x, **k: checkpoint(lambda x: inner(x, **k), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        whole.get_video_feat(*video())


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(("apply", "given"), [(None, {}), (slow.merge_eagerly, {"tome_r": [0, 2]})])
def test_compiles_in_one_graph(apply, given):
    """By the model's own schedule, and by one whose first layer runs the block's own forward."""
    whole = stk.apply_tome_patch(model(apply), **given)
    want = whole.get_video_feat(*video())
    compiled = torch.compile(whole.get_video_feat, fullgraph=True, backend="aot_eager")
    assert close(compiled(*video()), want)
    assert whole.clip._tome_info["token_num"] == (22 if apply is None else 15)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("training", [False, True])
def test_compiled_mlp(training):
    """torch 2.13's compiler leaves the alpha of an addition to a product out."""
    block, x = blocks_of(stk.apply_tome_patch(model()))[0], torch.randn(3, 7, 32)
    with torch.set_grad_enabled(training):
        want = feed_forward(block, x, x.cos())
        assert close(torch.compile(feed_forward, fullgraph=True)(block, x, x.cos()), want)


def test_autocast_and_half_weights():
    """bfloat16 merges other tokens here and there; what is asked is that it runs and means the same."""
    want = model().get_video_feat(*video())
    whole = stk.apply_tome_patch(model())
    with torch.autocast("cpu", torch.bfloat16):
        cast = whole.get_video_feat(*video())
    for block in blocks_of(whole):
        for part in (block.attn, block.mlp):
            part.bfloat16()
    images, _ = video()
    x = whole.clip.visual.embed(images).bfloat16()
    half = whole.blocks(x)
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(cast.float(), want).min() > 0.9
    exact = stk.apply_tome_patch(model()).blocks(x.float())
    assert torch.cosine_similarity(half.float()[:, 0], exact[:, 0]).min() > 0.9


def changed(change, apply=None) -> slow.Model:
    whole = model(apply)
    change(whole, blocks_of(whole)[1])
    return whole


class WideGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.5 * x)


WideGELU.__name__ = "QuickGELU"


def wide(whole, block):
    block.mlp.gelu = WideGELU()


@pytest.mark.parametrize("apply", [slow.merge_eagerly, None])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (wide, ValueError, "block 1, a .*Block, computes something else"),
        (lambda w, b: setattr(b.attn, "drop", nn.Dropout(0.1)), TypeError, "TempMe's attention, which has"),
        (lambda w, b: setattr(b.attn, "dropout", 0.1), ValueError, "dropout=0.1, but only 0 is supported"),
        (lambda w, b: setattr(b.attn, "scaling", 1.0), ValueError, "scaling=1.0, but only 0.3536 is supported"),
        (lambda w, b: setattr(b.attn, "num_heads", 3), TypeError, "num_heads=3 and head_dim=8"),
        (lambda w, b: setattr(b.attn, "TVPt_LoRA_a", nn.Parameter(torch.ones(3, 32))), TypeError, "TVPt_LoRA_a"),
        (lambda w, b: setattr(b, "attn", nn.MultiheadAttention(32, 4)), TypeError, "TempMe's attention, which has"),
        (lambda w, b: setattr(b, "attn_mask", torch.ones(2, 2)), ValueError, "attention mask"),
        (lambda w, b: b.attn.register_forward_hook(print), ValueError, "attn has hooks"),
        (lambda w, b: b.add_module("adapter", nn.Linear(2, 2)), TypeError, "its parts are adapter, attn"),
        (lambda w, b: setattr(b, "forward", lambda x: x), RuntimeError, "patch first"),
    ],
)
def test_refused_models(change, error, says, apply):
    whole = changed(change, apply)
    kinds = [type(module) for module in whole.modules()]
    with pytest.raises(error, match=says):
        stk.apply_tome_patch(whole)
    assert [type(module) for module in whole.modules()] == kinds


def test_what_it_needs_around_it():
    whole = model()
    with pytest.raises(ValueError, match=r"the visual tower alone does not have: give the whole model, or its clip"):
        stk.apply_tome_patch(whole.clip.visual)
    with pytest.raises(ValueError, match="frames is 7, but the model is made for videos of 4"):
        stk.apply_tome_patch(whole, frames=7)
    with pytest.raises(ValueError, match="unmerge is not for STOP, DGL, CLIP4Clip and TempMe"):
        stk.apply_tome_patch(whole, unmerge=True)
    clips = {"merge_layers": (2,), "merge_frame_nums": (2,), "merge_token_proportions": (30, 10)}
    alone = model(None, frame_pos=0).clip
    with pytest.raises(ValueError, match="give frames="):
        stk.apply_tome_patch(alone, 2, **clips)
    stk.apply_tome_patch(alone, 2, **clips, frames=FRAMES)
    stk.apply_tome_patch(model(None).clip, 2, **clips)  # its embeddings say how many
    with pytest.raises(ValueError, match="joins 2 items at layer 2, but a video of 3 frames"):
        stk.apply_tome_patch(model(None, frame_pos=0).clip, 2, **clips, frames=3)


def test_refused_calls():
    whole = stk.apply_tome_patch(model())
    x = torch.randn(BATCH * FRAMES, 17, 32)
    with pytest.raises(RuntimeError, match="use the model's get_video_feat for videos"):
        whole.clip.visual(video()[0])
    with pytest.raises(TypeError, match=r"block 2 got Tensor instead of the previous block's output \(TempMeTokens\)"):
        blocks_of(whole)[2](x, M_frame_num=1, M_token_num=[2])
    with pytest.raises(ValueError, match="videos of 4 frames, but got 3: give whole videos"):
        whole.blocks(x[:3])
    assert not torch.equal(blocks_of(model(None))[0](x), x)
    assert torch.equal(blocks_of(stk.apply_tome_patch(model(None)))[0](x), blocks_of(model(None))[0](x))
    whole.config.merge_frame_num = "3-2"
    with pytest.raises(ValueError, match="layer 2 joins 3 items, but a video of 4 frames has 4 items there"):
        whole.blocks(x)
    whole.config.merge_frame_num = "1-2"
    with pytest.raises(ValueError, match="layer 2: merge_frame_num is 1, which joins nothing"):
        whole.blocks(x)
    whole.config.merge_frame_num, whole.merge_layer = "2-2", [3, 4]
    with pytest.raises(ValueError, match="joins 4 items of a video, but its frame embedding is for 2"):
        whole.blocks(x)
    whole = stk.apply_tome_patch(model(frame_pos=0))
    whole.frame_pos = 1
    with pytest.raises(ValueError, match="make the model with frame_pos=1"):
        whole.blocks(x)
    stk.apply_tome_patch(whole, 2)
    with pytest.raises(ValueError, match="the schedule is for frames of 17 tokens, but got 15"):
        whole.blocks(x[:, :15])


def test_a_namespace_is_not_asked_for_more_than_it_has():
    """``config`` of other models is no TempMe's."""
    whole = model(None, frame_pos=0)
    whole.config = SimpleNamespace()
    with pytest.raises(ValueError, match="give frames="):
        stk.apply_tome_patch(whole, 2, merge_layers=(2,), merge_frame_nums=(2,), merge_token_proportions=(9, 9))
