# SPDX-License-Identifier: Apache-2.0
"""Warnings: fewer tokens are merged than asked, no flag of ours is in a task_config."""

import copy
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
from torch import nn

from support import slow_tempme
from support.families import CASES, CLIPS, clip4clip_tower, stop_model, stop_tower, tempme_model
from support.vit import build
from support.vit.timm import VisionTransformer, dynamic, images  # in this order: see harness/libraries.py


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


# Warnings: the schedule is capped

NUMBERS = re.compile(
    r"tome_r asks for (\d+) of (\d+) tokens to be merged \(in (\d+) layers\), but only (\d+) are: .* "
    r"Layer (\d+) is the first to fall short, with (\d+) of (\d+); tokens after each layer: ([\d, ]+)$"
)
CAPPED = {  # asked, tokens, layers, done, first short layer with how many of how many, tokens
    "stop": (stop_model, {"tome_r": 100}, (300, 19, 3, 14, 0, 8, 100), [11, 7, 5]),
    "upstream": (stop_tower, {"tome_r": 100}, (300, 17, 3, 10, 0, 6, 100), [11, 8, 7]),
    "40-of-30": (lambda: clip4clip_tower(29, 4), {"tome_r": 10}, (40, 30, 4, 26, 1, 9, 10), [20, 11, 6, 4]),
    "in-between": (clip4clip_tower, {"tome_r": [1, 0, 7]}, (8, 13, 2, 6, 2, 5, 7), [12, 12, 7]),
    "clips": (stop_model, {"tome_r": 9, **CLIPS}, (9, 19, 1, 8, 0, 8, 9), [11, 17, 16]),
    "tempme": (tempme_model, {"tome_r": [2, 30]}, (32, 17, 2, 9, 1, 7, 30), [15, 8, 8, 8, 8]),
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
    model = stop_model()
    (found,) = warned(lambda: stk.apply_tome_patch(model, [0, 0, 0], **clips))
    assert found.filename == __file__
    tokens = stk.describe(model).schedule.tokens
    assert str(found.message).startswith(
        "merge_token_proportions asks for 60 % (between joined items) and 50.5 % (within an item), but"
    )
    assert str(found.message).endswith(f"after each layer: {', '.join(map(str, tokens))}")
    clips["merge_token_proportions"] = [50, 50]
    assert warned(lambda: stk.apply_tome_patch(model, [0, 0, 0], **clips)) == []


@pytest.mark.parametrize("name", ["40-of-30", "timm"])
def test_forwards_say_nothing_more(name):
    make, settings, *_ = CAPPED[name]
    model = make()
    assert len(warned(lambda: stk.apply_tome_patch(model, **settings))) == 1
    run = (lambda model: model(torch.randn(8, 29, 64), 4)) if name == "40-of-30" else (lambda model: model(*images(2)))
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
    (stop_model, {"tome_r": 2}), (stop_model, {"tome_r": 0}),
    (stop_model, {"tome_r": [8, 4, 2]}), (stop_model, {"tome_r": 2, **CLIPS}),
    (stop_tower, {"tome_r": [6]}), (clip4clip_tower, {"tome_r": [6, 3, 1]}), (tempme_model, {}),
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
    (Namespace(tome_R=2, lr=1), "tome_R a misspelt tome_r"),
    ({"tome-r": 2, 3: 4}, "tome-r a misspelt tome_r"),
    (MappingProxyType({"tomeR": 2}), "tomeR a misspelt tome_r"),
    (OrderedDict(Merge_Layer="3-6", lr=1), "Merge_Layer a misspelt merge_layer"),
    (Slotted(0.1, 2), "tomer a misspelt tome_r"),
    (Shared(), "tome_rate a misspelt tome_r"),
    (Namespace(tome_tracesources=True, tome_props=1), "tome_tracesources a misspelt tome_tracesource"),
    (Namespace(TOME_R=2), "TOME_R a misspelt tome_r"),
    (Namespace(_tome_r=2), None),
    (Namespace(), None),
    ({}, None),
    (None, None),
])  # fmt: skip
def test_no_flag_is_there(config, named):
    """The model is left alone, with one warning, which says what was looked for, and what is like it."""
    tower = clip4clip_tower()
    (found,) = warned(lambda: stk.apply_from_config(tower, config))
    assert not stk.is_patched(tower)
    assert found.filename == __file__
    text = str(found.message)
    assert text.startswith(f"Clip4ClipTower is not patched: task_config ({type(config).__name__}) has none of tome_r, ")
    parser = stk.add_tome_args(ArgumentParser())
    assert all(f"{name}," in text for name in vars(parser.parse_args([])))
    assert re.findall(r"\(is (.*)\?\)", text) == ([] if named is None else [named])


def test_a_misspelt_rate_beside_other_flags():
    with pytest.warns(UserWarning, match=r"has no tome_r \(is tome_R a misspelt tome_r\?\)"):
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
    tower = clip4clip_tower()
    assert warned(lambda: stk.apply_from_config(tower, config)) == []
    assert not stk.is_patched(tower)


@pytest.mark.parametrize("config", [{"tome_r": 2}, Namespace(tome_r=2, tome_R=3), Slots(2), stk.ToMeConfig(2)])
def test_a_flag_says_something(config):
    tower = clip4clip_tower()
    assert warned(lambda: stk.apply_from_config(tower, config)) == []
    assert stk.describe(tower).config == stk.ToMeConfig(2)
