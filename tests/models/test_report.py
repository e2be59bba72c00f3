# SPDX-License-Identifier: Apache-2.0
"""What a user is told: tables, lines, the log, warnings, printed models, sizes of tokens."""

import copy
import logging
import pickle
import re
import warnings
from argparse import ArgumentParser, Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel
from stoptome_kernels.tome import Trace, plan_layers
from torch import nn

from peers import upstream
from support import slow_tempme
from support.vit import build, cases
from support.vit.timm import SIZE, VisionTransformer, images  # in this order: see libraries.py

CASES = {case.name: case for case in cases()}
CLIPS = {"merge_layers": (1,), "merge_frame_nums": (2,), "merge_token_proportions": (20, 10)}
TRACE = {"trace_source": True}


class Wrapper(nn.Module):
    """DistributedDataParallel without processes; or any other module that holds a model."""

    def __init__(self, model: nn.Module, name: str = "module", **attributes):
        super().__init__()
        self.add_module(name, model)
        self.__dict__.update(attributes)


def stop() -> StopModel:
    torch.manual_seed(0)
    config = StopConfig(
        image_size=32, patch_size=8, width=64, layers=3, embed_dim=24, frames=4, global_prompts=3, frame_prompts=2,
        text_prompts=4, text_width=64, text_heads=1, text_layers=1, vocab_size=50, context_length=16, max_words=10,
        temporal_prompt="DGL",
    )  # fmt: skip
    return StopModel(config).eval()


def upstream_stop() -> nn.Module:
    torch.manual_seed(0)
    return upstream.StopTower(64, 3, 12, 4, 4).eval()


def clip4clip(patches: int = 12, layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return upstream.Clip4ClipTower(64, layers, patches).eval()


def tempme() -> nn.Module:
    torch.manual_seed(0)
    return slow_tempme.Model(slow_tempme.settings()).eval()


def dynamic() -> nn.Module:
    return VisionTransformer(**SIZE, dynamic_img_size=True).eval()


def run_clip4clip(tower: Any) -> torch.Tensor:
    return tower(torch.randn(8, tower.positional_embedding.shape[0] - 1, 64), 4)


@dataclass
class Kind:
    """A model, how it is patched, what is said of it in one line, and a forward.

    Attributes:
        of_table: a part of its table.
        known: tokens are known before it runs.
    """

    make: Callable[[], Any]
    settings: dict
    line: str
    of_table: str
    run: Callable[[Any], Any]
    known: bool = True


def run_stop(model: Any) -> Any:
    return model.encode_video(torch.randn(2, 4, 3, 32, 32))


def run_upstream(tower: Any) -> Any:
    return tower(torch.randn(8, 12, 64), torch.randn(3, 2, 16, 64))


def run_tempme(model: Any) -> Any:
    return model.get_video_feat(torch.randn(8, 3, 16, 16), torch.ones(2, 4))


def library(name: str, line: str, of_table: str, known: bool = True, **settings) -> Kind:
    case = CASES[name]
    return Kind(
        lambda: build(case), {"tome_r": 6} | settings, line, of_table, lambda model: model(*case.inputs(2)), known
    )


def layer_alone() -> nn.Module:
    return nn.TransformerEncoderLayer(48, 4, 96, batch_first=True).eval()


LEFT, DENSE = "the tokens that are left (sizes: ", "a row for each original token"
KINDS = {
    "stop": Kind(stop, {"tome_r": 2}, "StopModel, 4 frames: 19 → 13 tokens, ideal 1.21×", "VisualT", run_stop),
    "stop-off": Kind(stop, {}, "StopModel, 4 frames: 19 → 19 tokens, ideal 1.00×", "prompts and class", run_stop),
    "stop-clips": Kind(
        stop, {"tome_r": 2, **CLIPS}, "StopModel, 4 frames: 4 × 19 → 2 × 24 tokens, ideal 1.30×", "20 % + 10 %",
        run_stop,
    ),
    "upstream": Kind(
        upstream_stop, {"tome_r": 2}, "StopTower, 4 frames: 17 → 11 tokens, ideal 1.24×", "StopTower (", run_upstream
    ),
    "upstream-clips": Kind(
        upstream_stop, {"tome_r": 2, **CLIPS}, "StopTower, 4 frames: 4 × 17 → 2 × 20 tokens, ideal 1.35×",
        "prompt", run_upstream,
    ),
    "clip4clip": Kind(
        clip4clip, {"tome_r": 2}, "Clip4ClipTower: 13 → 7 tokens, ideal 1.35×", LEFT, run_clip4clip
    ),
    "clip4clip-frames": Kind(
        clip4clip, {"tome_r": 2, "frames": 4}, "Clip4ClipTower, 4 frames: 13 → 7 tokens, ideal 1.35×", LEFT,
        run_clip4clip,
    ),
    "clip4clip-clips": Kind(
        clip4clip, {"tome_r": 2, "frames": 4, **CLIPS}, "Clip4ClipTower, 4 frames: 4 × 13 → 2 × 16 tokens, ideal 1.36×",
        "behind the last layer: class tokens\n", run_clip4clip,
    ),
    "clip4clip-off": Kind(
        clip4clip, {"tome_r": 0}, "Clip4ClipTower: 13 → 13 tokens, ideal 1.00×", "layer: all tokens\n", run_clip4clip
    ),
    "tempme": Kind(
        tempme, {}, "Model: merges by its own schedule, tokens known when it runs", "as published", run_tempme, False
    ),
    "tempme-clips": Kind(
        tempme, {"tome_r": 2, **CLIPS}, "Model, 4 frames: 4 × 17 → 2 × 17 tokens, ideal 1.50×", "20 % + 10 %",
        run_tempme,
    ),
    "timm": library("timm-registers", "VisionTransformer: 69 → 45 tokens, ideal 1.25×", LEFT),
    "timm-unmerge": library("timm-vit", "VisionTransformer: 65 → 41 tokens, ideal 1.26×", DENSE, unmerge=True),
    "timm-off": library("timm-vit", "VisionTransformer: 65 → 65 tokens, ideal 1.00×", "protected tokens: 1", tome_r=0),
    "timm-sizes": Kind(
        dynamic, {"tome_r": [6, 6]}, "VisionTransformer: tome_r=[6, 6, 0, 0], tokens known when it runs",
        "layer  r asked\n    0        6\n    1        6\n    2        0", lambda model: model(*images(2)), False,
    ),
    "open_clip": library("open_clip-clip", "CLIP: 65 → 41 tokens, ideal 1.26×", LEFT),
    "torchvision": library("torchvision-vit", "VisionTransformer: 65 → 41 tokens, ideal 1.26×", "torchvision.models"),
    "transformers": library("transformers-clip", "Paired: 65 → 41 tokens, ideal 1.26×", "CLIPEncoder"),
    "torch": library("torch-pre-norm", "TransformerEncoder: tome_r=6, tokens known when it runs", DENSE, False),
    "torch-layer": Kind(
        layer_alone, {"tome_r": 6}, "TransformerEncoderLayer: tome_r=6, tokens known when it runs", DENSE,
        lambda model: model(torch.randn(2, 65, 48)), False,
    ),
}  # fmt: skip


def logged(caplog, call: Callable[[], Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "stoptome_kernels"):
        call()
    ours = [record for record in caplog.records if record.name == "stoptome_kernels"]
    assert all(record.levelno == logging.INFO for record in ours)
    return [record.getMessage() for record in ours]


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name, caplog):
    """Before, patched, as a copy, in a wrapper, removed; and what is said before a forward is what it does."""
    kind = KINDS[name]
    model = kind.make()
    plain = f"{type(model).__name__}: not patched"
    assert not stk.is_patched(model)
    assert str(stk.describe(model)) == stk.describe(model).line == plain
    assert logged(caplog, lambda: stk.apply_tome_patch(model, **kind.settings, **TRACE)) == [kind.line]
    found = stk.describe(model)
    assert found.line == kind.line
    assert str(found).startswith(f"{kind.line}\nfamily: {found.family}\nprop_attn: True, trace_source: True, protected")
    assert kind.of_table in str(found)
    assert "tensor(" not in str(found) + repr(found)
    file = pickle.dumps(model)
    ways = {
        "deepcopy": (copy.deepcopy(model), found),
        "pickle": (pickle.loads(file), found),
        "Sequential": (nn.Sequential(model), None),
        "parallel": (Wrapper(model), found),
    }
    for way, (other, same) in ways.items():
        assert stk.is_patched(other), way
        again = stk.describe(other)
        assert again == found if same else again.line == kind.line.replace(found.model, way), way
        assert str(again).split("\n")[1:] == str(found).split("\n")[1:]
    with torch.no_grad():
        kind.run(model)
    trace = stk.tome_trace(model)
    assert (found.schedule is not None) == kind.known
    if kind.known:
        assert trace.tokens == found.schedule.tokens
        assert trace.items == found.schedule.items
        if trace.dest.shape[1] > 1:
            assert f", {trace.dest.shape[1]} frames" in kind.line
    check_trace(trace)
    stk.remove_tome_patch(model)
    assert not stk.is_patched(model)
    assert str(stk.describe(model)) == plain


def check_trace(trace: Trace) -> None:
    """Sizes against counting by hand; a table without tensors."""
    batch, frames, tokens = trace.dest.shape
    want = torch.zeros(batch, trace.items[-1] * trace.tokens[-1])
    for video, places in enumerate(trace.dest.flatten(1).tolist()):
        for place in places:
            want[video, place] += 1
    sizes = trace.sizes
    assert sizes.dtype == torch.float32
    assert not sizes.requires_grad
    assert torch.equal(sizes, want)
    head, headings, *rows = str(trace).split("\n")
    several = (f"{frames} × ", f"{trace.items[-1]} × ") if frames > 1 else ("", "")
    line = f"{several[0]}{tokens} → {several[1]}{trace.tokens[-1]} tokens, batch of {batch}"
    assert head == f"{line}, {trace.protected} protected"
    assert repr(trace) == f"Trace({line}, {len(trace.layers)} layers)"
    assert headings.split() == ["layer", "items", "tokens", "largest", "group"]
    largest = [max(layer[video].flatten().bincount().max().item() for video in range(batch)) for layer in trace.layers]
    cells = [tuple(map(int, row.split())) for row in rows]
    assert cells == list(zip(range(len(rows)), trace.items, trace.tokens, largest, strict=True))


def test_sizes_of_a_map_made_by_hand():
    """What the map never names counts nothing; items are counted one after the other; nothing at all is fine too."""
    trace = Trace((torch.tensor([[[0, 1, 1], [3, 1, 5]], [[4, 4, 4], [4, 4, 0]]], dtype=torch.int32),), (3,), (2,), 1)
    assert trace.sizes.tolist() == [[1, 3, 0, 1, 0, 1], [1, 0, 0, 0, 5, 0]]
    assert str(trace) == (
        "2 × 3 → 2 × 3 tokens, batch of 2, 1 protected\nlayer  items  tokens  largest group\n    0      2       3"
        "              5"
    )
    nobody = Trace((trace.dest[:0],), (3,), (2,), 1)
    assert nobody.sizes.shape == (0, 6)
    assert str(nobody).endswith(" 0")


@pytest.mark.parametrize("prop_attn", [True, False])
def test_sizes_weigh_what_forward_features_gives(prop_attn):
    """A mean over the tokens that are left, weighted so, is the mean over every original token's row."""
    model, inputs = build(CASES["timm-registers"]), images(3)
    stk.apply_tome_patch(model, 6, trace_source=True, prop_attn=prop_attn)
    with torch.no_grad():
        left, sizes = model.forward_features(*inputs), stk.tome_trace(model).sizes
        dense = stk.apply_tome_patch(model, 6, unmerge=True, prop_attn=prop_attn).forward_features(*inputs)
    assert sizes.shape == left.shape[:2] == (3, 69 - 24)
    assert sizes.max() > 1
    torch.testing.assert_close((left * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True), dense.mean(1))
    assert (left.mean(1) - dense.mean(1)).abs().max() > 0.01  # a plain mean is another


def test_sizes_are_those_that_blocks_hand_on():
    """CLIP4Clip's last block gives its stream to a hook, sizes with it."""
    tower, seen = clip4clip(), []
    stk.apply_tome_patch(tower, 2, trace_source=True)
    tower.transformer.resblocks[-1].register_forward_hook(lambda module, args, out: seen.append(out[0].size))
    run_clip4clip(tower)
    assert seen[0].max() > 1
    assert torch.equal(stk.tome_trace(tower).sizes, seen[0].flatten(1))


def test_what_stop_logs(caplog, monkeypatch):
    """At STOP's own size. Nothing of it is computed, so that its weights may be anything."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 340 MB
    with torch.device("meta"):
        model = StopModel(StopConfig(text_layers=1, vocab_size=50))
    model.to_empty(device="cpu")
    says = logged(caplog, lambda: stk.apply_tome_patch(model, 2))
    assert says == [stk.describe(model).line] == ["StopModel, 12 frames: 54 → 30 tokens, ideal 1.30×"]
    assert logged(caplog, lambda: stk.apply_from_config(model, {"tome_r": 4})) == [
        "StopModel, 12 frames: 54 → 8 tokens, ideal 1.84×"
    ]
    preset = stk.ToMeConfig.preset("memory")
    assert logged(caplog, lambda: stk.apply_tome_patch(model, config=preset)) == [
        "StopModel, 12 frames: 12 × 54 → 1 × 80 tokens, ideal 2.17×"
    ]
    assert logged(caplog, lambda: stk.remove_tome_patch(model)) == []
    assert logged(caplog, lambda: stk.apply_from_config(model, {"tome_r": 0})) == []


def test_tables_by_hand():
    """12 patches of which 5 are merged, then half of 7; in a very wide model attention's own FLOPs are nothing."""
    tower = upstream_stop()
    with pytest.warns(UserWarning, match="tome_r asks for"):
        stk.apply_tome_patch(tower, [5, 5], prop_attn=False)
    *head, table = str(stk.describe(tower)).split("\n", 4)
    assert head == [
        "StopTower, 4 frames: 17 → 9 tokens, ideal 1.57×", "family: StopTower (peers.upstream)",
        "prop_attn: False, trace_source: False, protected tokens: 5",
        "behind the last layer: global prompts and class tokens",
    ]  # fmt: skip
    assert [line.split() for line in table.split("\n")] == [
        ["layer", "r", "asked", "merged", "tokens", "FLOPs", "left"],
        ["0", "5", "5", "12", "81", "%"],
        ["1", "5", "3", "9", "58", "%"],
        ["2", "0", "0", "9", "52", "%"],
    ]
    assert len({len(line) for line in table.split("\n")}) == 1
    wide = plan_layers(2, 3, 20, 4, 1, **CLIPS, width=10**9)
    assert str(wide) == (
        "4 frames: 4 × 20 → 2 × 25 tokens, ideal 1.32×\n"
        "layer  joined  merged  items × tokens  FLOPs left\n"
        "    0               2          4 × 18        93 %\n"
        "    1       2   7 + 2          2 × 27        69 %\n"
        "    2               2          2 × 25        64 %"
    )
    assert str(plan_layers(2, 2, 20)).split("\n")[1:] == [
        "layer  merged  tokens  FLOPs left",
        "    0       2      18        93 %",
        "    1       2      16        83 %",
    ]


def test_several_towers():
    """Each can be patched, and is described by itself; of the two together nothing can be said."""
    both = nn.ModuleDict({"one": build(CASES["timm-vit"]), "two": stop()})
    stk.apply_tome_patch(both["one"], 6)
    assert stk.describe(both).line == "ModuleDict: 65 → 41 tokens, ideal 1.26×"
    stk.apply_tome_patch(both["two"], 1)
    for call in (stk.describe, stk.tome_trace):
        with pytest.raises(ValueError, match="2 towers of ModuleDict are patched: give them one by one"):
            call(both)
    assert stk.is_patched(both)
    assert stk.describe(both["two"]).line == "StopModel, 4 frames: 19 → 16 tokens, ideal 1.10×"


def test_patching_beside_a_patched_tower(caplog):
    """What is logged is what was patched, even where the model holds another tower that was patched before."""
    teacher = stk.apply_tome_patch(build(CASES["torch-pre-norm"]), 6)
    model = Wrapper(clip4clip(), "visual")
    model.teacher = teacher
    says = logged(caplog, lambda: stk.apply_tome_patch(model, 2))
    assert says == ["Wrapper: 13 → 7 tokens, ideal 1.35×"]


def test_wrappers_are_not_named():
    model = stk.apply_tome_patch(clip4clip(), 2)
    for wrapped in (Wrapper(model), Wrapper(model, "_orig_mod"), Wrapper(Wrapper(model, "_orig_mod"))):
        assert stk.describe(wrapped) == stk.describe(model)
    assert stk.describe(Wrapper(nn.Linear(2, 2))).line == "Linear: not patched"
    assert stk.describe(nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})).model == "ModuleDict"


def test_an_attribute_of_that_name():
    """Other code may call something of its own tome."""
    for value in (True, "on", SimpleNamespace(merging=3), SimpleNamespace(family="x")):
        model = Wrapper(nn.Linear(2, 2), tome=value)
        assert not stk.is_patched(model)
        assert stk.describe(model).line == "Linear: not patched"


@pytest.mark.parametrize("call", [stk.describe, stk.is_patched])
@pytest.mark.parametrize("wrong", [None, "model", nn.Linear])
def test_no_module(call, wrong):
    with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module, got {type(wrong).__name__}"):
        call(wrong)


# Warnings: the schedule is capped

NUMBERS = re.compile(
    r"tome_r asks for (\d+) of (\d+) tokens to be merged \(in (\d+) layers\), (\d+) are: .* "
    r"Layer (\d+) is the first to fall short, with (\d+) of (\d+); tokens behind each layer: ([\d, ]+)$"
)
CAPPED = {  # asked, tokens, layers, done, first short layer with how many of how many, tokens
    "stop": (stop, {"tome_r": 100}, (300, 19, 3, 14, 0, 8, 100), [11, 7, 5]),
    "upstream": (upstream_stop, {"tome_r": 100}, (300, 17, 3, 10, 0, 6, 100), [11, 8, 7]),
    "40-of-30": (lambda: clip4clip(29, 4), {"tome_r": 10}, (40, 30, 4, 26, 1, 9, 10), [20, 11, 6, 4]),
    "in-between": (clip4clip, {"tome_r": [1, 0, 7]}, (8, 13, 2, 6, 2, 5, 7), [12, 12, 7]),
    "clips": (stop, {"tome_r": 9, **CLIPS}, (9, 19, 1, 8, 0, 8, 9), [11, 17, 16]),
    "tempme": (tempme, {"tome_r": [2, 30]}, (32, 17, 2, 9, 1, 7, 30), [15, 8, 8, 8, 8]),
    "timm": (lambda: build(CASES["timm-vit"]), {"tome_r": 100}, (400, 65, 4, 60, 0, 32, 100), [33, 17, 9, 5]),
    "torchvision": (
        lambda: build(CASES["torchvision-vit"]),
        {"tome_r": (20, 0.5)},
        (79, 65, 4, 54, 2, 19, 23),
        [55, 39, 20, 11],
    ),
}


@pytest.mark.parametrize("name", CAPPED)
def test_less_is_merged_than_asked(name):
    """Said once, where the user patches, with true numbers."""
    make, settings, numbers, tokens = CAPPED[name]
    model = make()
    (found,) = warned(lambda: stk.apply_tome_patch(model, **settings))
    assert found.category is UserWarning
    assert found.filename == __file__
    *got, left = NUMBERS.fullmatch(str(found.message)).groups()
    assert tuple(map(int, got)) == numbers
    assert [int(number) for number in left.split(", ")] == tokens == list(stk.describe(model).schedule.tokens)


def test_shares_above_half():
    clips = {"merge_layers": [1, 2], "merge_frame_nums": [2, 2], "merge_token_proportions": [60, 50.5]}
    model = stop()
    (found,) = warned(lambda: stk.apply_tome_patch(model, [0, 0, 0], **clips))
    assert found.filename == __file__
    tokens = stk.describe(model).schedule.tokens
    assert str(found.message).startswith(
        "merge_token_proportions asks for 60 % (between joined items) and 50.5 % (within"
    )
    assert str(found.message).endswith(f"behind each layer: {', '.join(map(str, tokens))}")
    clips["merge_token_proportions"] = [50, 50]
    assert warned(lambda: stk.apply_tome_patch(model, [0, 0, 0], **clips)) == []


@pytest.mark.parametrize("name", ["40-of-30", "timm"])
def test_forwards_say_nothing_more(name):
    make, settings, *_ = CAPPED[name]
    model = make()
    assert len(warned(lambda: stk.apply_tome_patch(model, **settings))) == 1
    run = run_clip4clip if name == "40-of-30" else (lambda model: model(*images(2)))
    assert warned(lambda: [run(model) for _ in range(2)]) == []


@pytest.mark.parametrize(("make", "run"), [
    (dynamic, lambda model, side: model(torch.randn(2, 3, side, side))),
    (lambda: build(CASES["torch-pre-norm"]), lambda model, side: model(torch.randn(2, 1 + side**2 // 16, 48))),
])  # fmt: skip
def test_images_of_any_size(make, run):
    """Said at the first forward that falls short, and at no other."""
    model = make()
    assert warned(lambda: stk.apply_tome_patch(model, 10, trace_source=True)) == []
    assert warned(lambda: run(model, 40)) == []  # 101 tokens are enough
    (found,) = warned(lambda: run(model, 24))
    *got, left = NUMBERS.fullmatch(str(found.message)).groups()
    assert tuple(map(int, got)) == (40, 37, 4, 32, 2, 8, 10)
    assert tuple(map(int, left.split(", "))) == stk.tome_trace(model).tokens == (27, 17, 9, 5)
    assert warned(lambda: [run(model, 24), run(model, 16), copy.deepcopy(model)]) == []
    assert len(warned(lambda: [stk.apply_tome_patch(model, 20), run(model, 16)])) == 1  # asked anew


@pytest.mark.parametrize(("make", "settings"), [
    (stop, {"tome_r": 2}), (stop, {"tome_r": 0}), (stop, {"tome_r": [8, 4, 2]}), (stop, {"tome_r": 2, **CLIPS}),
    (upstream_stop, {"tome_r": [6]}), (clip4clip, {"tome_r": [6, 3, 1]}), (tempme, {}),
    (lambda: build(CASES["timm-vit"]), {"tome_r": [32, 16, 8, 4]}), (dynamic, {"tome_r": [32, 16, 8, 4]}),
])  # fmt: skip
def test_all_that_was_asked_for(make, settings):
    model = make()
    assert warned(lambda: stk.apply_tome_patch(model, **settings)) == []
    if isinstance(model, VisionTransformer):
        assert warned(lambda: model(*images(2))) == []


# Warnings: no flag of ours in a task_config

# of CLIP4Clip's main, and names of STOP's and others that are a little like ours
FOREIGN = re.findall(r"\w+", """
    do_pretrain do_train do_eval train_csv val_csv data_path features_path num_thread_reader lr epochs batch_size
    batch_size_val lr_decay n_display video_dim seed max_words max_frames feature_framerate margin hard_negative_rate
    negative_weighting n_pair output_dir cross_model init_model resume_model do_lower_case warmup_proportion
    gradient_accumulation_steps n_gpu cache_dir fp16 fp16_opt_level task_type datatype world_size local_rank rank
    coef_lr use_mil sampled_use_mil text_num_hidden_layers visual_num_hidden_layers cross_num_hidden_layers loose_type
    expand_msrvtt_sentences train_frame_order eval_frame_order freeze_layer_num slice_framepos linear_patch sim_header
    pretrained_clip_name temporal_prompt time_embedding num_tokens frame_token_pos tower name mode
""")  # fmt: skip


@dataclass
class Slotted:
    __slots__ = ("lr", "tomer")
    lr: float
    tomer: int


class Shared:
    tome_rate = 2

    @property
    def lr(self) -> float:
        return 0.1

    def merge_layer_(self) -> None:
        """No setting."""


@pytest.mark.parametrize(("config", "named"), [
    (SimpleNamespace(**dict.fromkeys(FOREIGN, 1)), None),
    (dict.fromkeys(FOREIGN, 1), None),
    (Namespace(tome_R=2, lr=1), "tome_R to be tome_r"),
    ({"tome-r": 2, 3: 4}, "tome-r to be tome_r"),
    (MappingProxyType({"tomeR": 2}), "tomeR to be tome_r"),
    (OrderedDict(Merge_Layer="3-6", lr=1), "Merge_Layer to be merge_layer"),
    (Slotted(0.1, 2), "tomer to be tome_r"),
    (Shared(), "tome_rate to be tome_r"),
    (Namespace(tome_tracesources=True, tome_props=1), "tome_tracesources to be tome_tracesource"),
    (Namespace(TOME_R=2), "TOME_R to be tome_r"),
    (Namespace(_tome_r=2), None),
    (Namespace(), None),
    ({}, None),
    (None, None),
])  # fmt: skip
def test_no_flag_is_there(config, named):
    """The model is left alone, with one warning, which says what was looked for, and what is like it."""
    tower = clip4clip()
    (found,) = warned(lambda: stk.apply_from_config(tower, config))
    assert not stk.is_patched(tower)
    assert found.filename == __file__
    text = str(found.message)
    assert text.startswith(
        f"Clip4ClipTower is left as it is: task_config ({type(config).__name__}) has none of tome_r, "
    )
    parser = stk.add_tome_args(ArgumentParser())
    assert all(f"{name}," in text for name in vars(parser.parse_args([])))
    assert re.findall(r"is its (.*)\?\)", text) == ([] if named is None else [named])


def test_a_misspelt_rate_beside_other_flags():
    with pytest.warns(UserWarning, match=r"has no tome_r \(is its tome_R to be tome_r\?\)"):
        stk.apply_from_config(nn.Linear(2, 2), Namespace(tome_R=2, tome_prop_attn=True))


class Slots:
    __slots__ = ("tome_r",)

    def __init__(self, tome_r: int):
        self.tome_r = tome_r


@pytest.mark.parametrize("config", [
    {"tome_r": 0}, Namespace(tome_r=0), Namespace(tome_r=None), SimpleNamespace(tome_prop_attn=True),
    {"merge_layer": ""},
    {"tome_tracesource": False, "patience": 2}, Namespace(trace_source=True), Slots(0),
    MappingProxyType({"frame_pos": 0}),
    stk.add_tome_args(ArgumentParser()).parse_args([]), stk.ToMeConfig(),
    slow_tempme.settings(tome_r=0, merge_layer="", merge_frame_num="", merge_token_proportion="", frame_pos=0),
])  # fmt: skip
def test_a_flag_is_there(config):
    tower = clip4clip()
    assert warned(lambda: stk.apply_from_config(tower, config)) == []
    assert not stk.is_patched(tower)


@pytest.mark.parametrize("config", [{"tome_r": 2}, Namespace(tome_r=2, tome_R=3), Slots(2), stk.ToMeConfig(2)])
def test_a_flag_says_something(config):
    tower = clip4clip()
    assert warned(lambda: stk.apply_from_config(tower, config)) == []
    assert stk.describe(tower).config == stk.ToMeConfig(2)


# Printed models


@pytest.mark.parametrize(("make", "settings", "shown"), [
    (upstream_stop, {"tome_r": [3, 2]}, ["tome_r=3", "tome_r=2", "tome_r=0"]),
    (upstream_stop, {"tome_r": [3], **CLIPS}, ["tome_r=3", "tome_join=2, tome_inter=5, tome_r=2", "tome_r=2"]),
    (clip4clip, {"tome_r": 2}, ["tome_r=2"] * 3),
    (lambda: build(CASES["timm-vit"]), {"tome_r": [1, 2, 3]}, ["tome_r=1", "tome_r=2", "tome_r=3", "tome_r=0"]),
    (lambda: build(CASES["torch-pre-norm"]), {"tome_r": [1, 2, 3]}, ["tome_r=1", "tome_r=2", "tome_r=3", "tome_r=0"]),
])  # fmt: skip
def test_patched_blocks_show_what_they_merge(make, settings, shown):
    model = make()
    plain = repr(model)
    stk.apply_tome_patch(model, 1)
    stk.apply_tome_patch(model, **settings)
    assert re.findall(r"tome_.*", repr(model)) == shown
    assert repr(copy.deepcopy(model)) == repr(model)
    stk.remove_tome_patch(model)
    assert repr(model) == plain
    assert not any(name.startswith("tome_") for module in model.modules() for name in module.__dict__)
