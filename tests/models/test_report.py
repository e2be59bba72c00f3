# SPDX-License-Identifier: Apache-2.0
"""Descriptions and traces of patched models: tables, lines, the log, printed models, sizes of tokens."""

import copy
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel
from stoptome_kernels.tome.schedule import plan_layers
from stoptome_kernels.tome.trace import Trace
from torch import nn

from support.families import CASES, CLIPS, clip4clip_tower, stop_model, stop_tower, tempme_model
from support.vit import build
from support.vit.timm import dynamic, images  # in this order: see harness/libraries.py

TRACE = {"trace_source": True}


class Wrapper(nn.Module):
    """DistributedDataParallel without processes; or any other module that holds a model."""

    def __init__(self, model: nn.Module, name: str = "module", **attributes):
        super().__init__()
        self.add_module(name, model)
        self.__dict__.update(attributes)


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
    "stop": Kind(stop_model, {"tome_r": 2}, "StopModel, 4 frames: 19 → 13 tokens, ideal 1.21×", "VisualT", run_stop),
    "stop-off": Kind(stop_model, {}, "StopModel, 4 frames: 19 → 19 tokens, ideal 1.00×", "prompts and class", run_stop),
    "stop-clips": Kind(
        stop_model, {"tome_r": 2, **CLIPS}, "StopModel, 4 frames: 4 × 19 → 2 × 24 tokens, ideal 1.30×", "20 % + 10 %",
        run_stop,
    ),
    "upstream": Kind(
        stop_tower, {"tome_r": 2}, "StopTower, 4 frames: 17 → 11 tokens, ideal 1.24×", "StopTower (", run_upstream
    ),
    "upstream-clips": Kind(
        stop_tower, {"tome_r": 2, **CLIPS}, "StopTower, 4 frames: 4 × 17 → 2 × 20 tokens, ideal 1.35×",
        "prompt", run_upstream,
    ),
    "clip4clip": Kind(
        clip4clip_tower, {"tome_r": 2}, "Clip4ClipTower: 13 → 7 tokens, ideal 1.35×", LEFT, run_clip4clip
    ),
    "clip4clip-frames": Kind(
        clip4clip_tower, {"tome_r": 2, "frames": 4}, "Clip4ClipTower, 4 frames: 13 → 7 tokens, ideal 1.35×", LEFT,
        run_clip4clip,
    ),
    "clip4clip-clips": Kind(
        clip4clip_tower, {"tome_r": 2, "frames": 4, **CLIPS},
        "Clip4ClipTower, 4 frames: 4 × 13 → 2 × 16 tokens, ideal 1.36×", "after the last layer: class tokens\n",
        run_clip4clip,
    ),
    "clip4clip-off": Kind(
        clip4clip_tower, {"tome_r": 0}, "Clip4ClipTower: 13 → 13 tokens, ideal 1.00×", "layer: all tokens\n",
        run_clip4clip,
    ),
    "tempme": Kind(
        tempme_model, {}, "Model: merges by its own schedule, tokens known when it runs", "as published",
        run_tempme, False,
    ),
    "tempme-clips": Kind(
        tempme_model, {"tome_r": 2, **CLIPS}, "Model, 4 frames: 4 × 17 → 2 × 17 tokens, ideal 1.50×", "20 % + 10 %",
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
    tower, seen = clip4clip_tower(), []
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
    tower = stop_tower()
    with pytest.warns(UserWarning, match="tome_r asks for"):
        stk.apply_tome_patch(tower, [5, 5], prop_attn=False)
    *head, table = str(stk.describe(tower)).split("\n", 4)
    assert head == [
        "StopTower, 4 frames: 17 → 9 tokens, ideal 1.57×", "family: StopTower (harness.baselines.stop)",
        "prop_attn: False, trace_source: False, protected tokens: 5",
        "after the last layer: global prompts and class tokens",
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
    both = nn.ModuleDict({"one": build(CASES["timm-vit"]), "two": stop_model()})
    stk.apply_tome_patch(both["one"], 6)
    assert stk.describe(both).line == "ModuleDict: 65 → 41 tokens, ideal 1.26×"
    stk.apply_tome_patch(both["two"], 1)
    for call in (stk.describe, stk.tome_trace):
        with pytest.raises(ValueError, match="2 towers of ModuleDict are patched: pass them one by one"):
            call(both)
    assert stk.is_patched(both)
    assert stk.describe(both["two"]).line == "StopModel, 4 frames: 19 → 16 tokens, ideal 1.10×"


def test_patching_beside_a_patched_tower(caplog):
    """What is logged is what was patched, even where the model holds another tower that was patched before."""
    teacher = stk.apply_tome_patch(build(CASES["torch-pre-norm"]), 6)
    model = Wrapper(clip4clip_tower(), "visual")
    model.teacher = teacher
    says = logged(caplog, lambda: stk.apply_tome_patch(model, 2))
    assert says == ["Wrapper: 13 → 7 tokens, ideal 1.35×"]


def test_wrappers_are_not_named():
    model = stk.apply_tome_patch(clip4clip_tower(), 2)
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


# Printed models


@pytest.mark.parametrize(("make", "settings", "shown"), [
    (stop_tower, {"tome_r": [3, 2]}, ["tome_r=3", "tome_r=2", "tome_r=0"]),
    (stop_tower, {"tome_r": [3], **CLIPS}, ["tome_r=3", "tome_join=2, tome_inter=5, tome_r=2", "tome_r=2"]),
    (clip4clip_tower, {"tome_r": 2}, ["tome_r=2"] * 3),
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
