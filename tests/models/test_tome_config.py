# SPDX-License-Identifier: Apache-2.0
"""Schedules, settings, presets and command-line flags."""

import argparse
import copy
import enum
import pickle
import re
from fractions import Fraction
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.tome.schedule import parse_r, plan_layers

STOP = {"layers": 12, "tokens": 54, "frames": 12, "protected": 5}


class Rate(enum.IntEnum):
    FOUR = 4


@pytest.mark.parametrize(
    ("given", "layers", "expected"),
    [
        (3, 4, (3, 3, 3, 3)),
        (0, 2, (0, 0)),
        ([5, 2], 4, (5, 2, 0, 0)),
        ([7, 1], 2, (7, 1)),  # a list of two numbers is no pair
        ((4, 0.0), 3, (4, 4, 4)),
        ((4, 1), 5, (0, 2, 4, 6, 8)),
        ((4, -1), 5, (8, 6, 4, 2, 0)),
        ((5, 0.5), 4, (2, 4, 6, 8)),  # 2.5 truncated, and as far from 5 at the last
        ((13, 0.5), 12, (6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 20)),  # 6.5 truncated
        ((7, -0.5), 4, (10, 8, 6, 4)),
        # exact where floats are not: 10 (1 - 0.9) is 0.9999999999999998, 3 (1 + 1/3) is 3.9999999999999996 in binary
        ((10, 0.9), 3, (1, 10, 19)),
        ((3, -1 / 3), 2, (4, 2)),
        ((10, 0.1), 2, (9, 11)),
        ((9, 1), 50, tuple(18 * i // 49 for i in range(50))),
        ((3, 1, 2), 3, (3, 1, 2)),
        ((8, -0.25), 1, (10,)),
        ([], 2, (0, 0)),
    ],
)
def test_rates(given, layers, expected):
    assert parse_r(given, layers) == expected


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (np.int64(4), 4),
        (np.uint8(4), 4),
        (np.array(4), 4),
        (Rate.FOUR, 4),
        ([np.int64(5), np.int32(2)], [5, 2]),
        (np.array([5, 2]), [5, 2]),  # no pair
        (range(2), [0, 1]),
        ((np.int64(4), np.float64(0.5)), (4, 0.5)),
        ((4, np.float32(0.1)), (4, 0.1)),  # by its digits: float(np.float32(0.1)) is another number
        ((4, np.int8(-1)), (4, -1)),
        ((4, Fraction(1, 2)), (4, 0.5)),
        ((np.int64(3), 1, 2), [3, 1, 2]),
    ],
)
def test_numbers_of_numpy(given, plain):
    """They are accepted, and held as Python's: a config compares, hashes and pickles as if they had been."""
    assert parse_r(given, np.int64(12)) == parse_r(plain, 12)
    assert all(type(r) is int for r in parse_r(given, 12))
    one, two = stk.ToMeConfig(given), stk.ToMeConfig(plain)
    assert one == two
    assert repr(one) == repr(two)
    assert hash(one) == hash(two)
    assert pickle.dumps(one) == pickle.dumps(two)


def test_every_setting_takes_numbers_of_numpy():
    one = stk.ToMeConfig(
        np.int64(1), np.True_, np.False_, np.array([6, 9]), [np.int64(2), np.int32(2)],
        (np.float32(12.6), np.float64(5)), np.int64(1),
    )  # fmt: skip
    two = stk.ToMeConfig(1, True, False, (6, 9), (2, 2), (12.6, 5.0), 1)
    assert one == two
    assert repr(one) == repr(two)
    assert hash(one) == hash(two)
    assert pickle.dumps(one) == pickle.dumps(two)
    assert [type(value) for value in (one.trace_source, one.prop_attn, one.frame_pos)] == [bool, bool, int]
    flags = {"tome_r": np.int64(1), "tome_prop_attn": np.False_, "merge_layers": np.array([])}
    assert stk.ToMeConfig.from_args(flags) == stk.ToMeConfig(1, prop_attn=False)
    schedule = one.schedule(*(np.int64(number) for number in (12, 54, 12, 5, 512)))
    assert schedule == two.schedule(12, 54, 12, 5, 512)
    assert repr(schedule) == repr(two.schedule(12, 54, 12, 5, 512))


CLIPS = {"merge_layers": (3,), "merge_frame_nums": (2,), "merge_token_proportions": (5, 5)}


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True), np.array(True), np.float64(1), "1", None])
def test_what_is_no_number(wrong):
    for settings in (
        {"tome_r": wrong},
        {"tome_r": [wrong]},
        {"tome_r": (wrong, 0.5)},
        {**CLIPS, "tome_r": 1, "merge_layers": [wrong]},
        {**CLIPS, "tome_r": 1, "merge_frame_nums": [wrong]},
        {**CLIPS, "tome_r": 1, "frame_pos": wrong},
    ):
        with pytest.raises(TypeError, match="must be an int"):
            stk.ToMeConfig(**settings)
    if not isinstance(wrong, float):
        for settings in ({"tome_r": (4, wrong)}, {**CLIPS, "tome_r": 1, "merge_token_proportions": (5, wrong)}):
            with pytest.raises(TypeError, match="must be a float"):
                stk.ToMeConfig(**settings)
    for name in ("layers", "tokens", "frames", "protected", "width"):
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            stk.ToMeConfig(1).schedule(**{**STOP, name: wrong})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("layers", 0, "layers must be 1 or more (layers of the model), got 0"),
        ("tokens", -1, "tokens must be 1 or more (tokens of a frame), got -1"),
        ("frames", np.int64(0), "frames must be 1 or more (frames of a video), got 0"),
        ("width", 0, "width must be 1 or more (width of the model), got 0"),
        ("protected", -1, "protected must be from 0 to the 54 tokens of a frame, got -1"),
        ("protected", 55, "protected must be from 0 to the 54 tokens of a frame, got 55"),
    ],
)
def test_numbers_out_of_range(name, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        stk.ToMeConfig(1).schedule(**{**STOP, name: value})


def test_tokens_worked_out_by_hand():
    schedule = stk.ToMeConfig(2).schedule(**STOP)
    assert schedule.tokens == tuple(range(52, 29, -2))
    assert schedule.items == (12,) * 12
    # at 54 tokens, 5 of them protected, each layer can merge half of what is left: 49 → 25 → 13 → 7 → 4 → 2 → 1
    assert stk.ToMeConfig(30).schedule(7, 54, 12, 5).tokens == (30, 18, 12, 9, 7, 6, 6)
    memory = stk.ToMeConfig.preset("memory").schedule(**STOP)
    # r 4 for three layers; 2 · 42 = 84 − ⌊12.6⌋ = 72 − ⌊10.8⌋ = 62; then 15 % a layer
    assert memory.tokens[:5] == (50, 46, 42, 62, 53)
    assert memory.items == (12, 12, 12, 6, 6, 6, 3, 3, 3, 1, 1, 1)
    assert [step.frames for step in memory.steps] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 12, 12, 12]


def test_proportions_are_exact():
    """29 per cent of 100 tokens are 29; as floats, 0.29 · 100 is a little less."""
    schedule = plan_layers(0, 1, 100, 2, 1, merge_layers=(0,), merge_frame_nums=(2,), merge_token_proportions=(14.5, 0))
    assert schedule.steps[0].inter == 29


def test_ideal_speedup_by_hand():
    one = plan_layers(4, 1, 10, 1, 1, width=64)
    before = 10 * (8 * 64**2 + 4 * 10 * 64) + 10 * 16 * 64**2
    after = 10 * (8 * 64**2 + 4 * 10 * 64) + 6 * 16 * 64**2
    assert (one.flops_unmerged, one.flops) == (before, after)
    assert one.speedup == before / after
    assert one.flops_left == pytest.approx(after / before, rel=1e-15)
    assert stk.ToMeConfig(0).schedule(**STOP).speedup == 1


@hypothesis.given(
    rates=st.lists(st.integers(0, 60), max_size=6),
    tokens=st.integers(8, 60),
    protected=st.integers(0, 6),
    groups=st.sampled_from([((), ()), ((0,), (2,)), ((1, 3), (2, 3)), ((2,), (12,)), ((5,), (1,))]),
    shares=st.tuples(st.integers(1, 100), st.integers(0, 100)),
)
def test_every_schedule_keeps_its_bounds(rates, tokens, protected, groups, shares):
    layers, numbers = groups
    schedule = plan_layers(
        rates, 6, tokens, 12, protected, merge_layers=layers, merge_frame_nums=numbers,
        merge_token_proportions=shares if layers else (),
    )  # fmt: skip
    items, length = 12, tokens
    for step in schedule.steps:
        assert step.items * step.join == items
        items, length = step.items, length * step.join
        assert step.frames * step.items == 12
        guarded = protected * step.frames
        assert 0 <= step.inter <= (length - guarded) // 2
        assert step.attended == length - step.inter
        assert 0 <= step.r <= (step.attended - guarded) // 2
        length = step.tokens
        assert length == step.attended - step.r
        assert length >= guarded
    assert schedule.speedup >= 1 or groups[0]  # joined items attend to more keys


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tome_r": -1}, ValueError, "tome_r must be 0 or more"),
        ({"tome_r": 2.5}, TypeError, "tome_r must be an int"),
        ({"tome_r": True}, TypeError, "tome_r must be an int"),
        ({"tome_r": "2"}, TypeError, "tome_r must be an int"),
        ({"tome_r": [1, "x"]}, TypeError, r"tome_r\[1\]"),
        ({"tome_r": (2, 1.5)}, ValueError, "inflection.*from -1 to 1"),
        ({"tome_r": (2, np.float32("nan"))}, ValueError, "inflection.*from -1 to 1"),
        ({"tome_r": (2, 10**400)}, ValueError, "inflection.*from -1 to 1"),
        ({"merge_layers": (3,)}, ValueError, "merge_frame_nums 0 group sizes"),
        (
            {"merge_layers": (3,), "merge_frame_nums": (2,), "merge_token_proportions": (5, 5)},
            ValueError, "tome_r=0 turns all merging off",
        ),
        ({"merge_layers": (3,), "merge_frame_nums": (2,)}, ValueError, "needs merge_token_proportions"),
        ({"merge_token_proportions": (10, 10)}, ValueError, "no effect without merge_layers"),
        ({"merge_layers": (6, 3), "merge_frame_nums": (2, 2), "merge_token_proportions": (5, 5)}, ValueError, "ascend"),
        ({"merge_layers": (3,), "merge_frame_nums": (0,), "merge_token_proportions": (5, 5)}, ValueError, "1 or more"),
        ({"merge_layers": (3,), "merge_frame_nums": (2,), "merge_token_proportions": (0.1, 0)}, ValueError, "give 10"),
        ({"merge_layers": (3,), "merge_frame_nums": (2,), "merge_token_proportions": (5,)}, ValueError, "two numbers"),
        ({"merge_layers": (-1,), "merge_frame_nums": (2,), "merge_token_proportions": (5, 5)}, ValueError, "from 0"),
        ({"merge_layers": "3-6"}, TypeError, "merge_layers must be a sequence"),
        ({"frame_pos": 2}, ValueError, "frame_pos must be 0 or 1"),
        ({"frame_pos": 1}, ValueError, "frame_pos=1 has no effect without merge_layers"),
        ({"prop_attn": "no"}, TypeError, "prop_attn must be True or False"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_is_right(settings, error, says):
    with pytest.raises(error, match=says):
        stk.ToMeConfig(**settings)


def test_frames_that_cannot_be_joined():
    with pytest.raises(ValueError, match=r"joins 5 items at layer 3, but a video of 12 frames has 12"):
        plan_layers(0, 12, 54, 12, 5, merge_layers=(3,), merge_frame_nums=(5,), merge_token_proportions=(5, 5))
    with pytest.raises(ValueError, match="5 are protected: too few to merge any"):
        stk.ToMeConfig(1).schedule(12, 6, 1, 5)
    with pytest.raises(ValueError, match="tome_r has 13 numbers, but there are 12 layers"):
        stk.ToMeConfig([1] * 13).schedule(**STOP)


def test_a_config_is_a_value():
    one, two = stk.ToMeConfig([2, 2]), stk.ToMeConfig([2, 2])
    assert one == two
    assert hash(one) == hash(two)
    assert one != stk.ToMeConfig((2, 1))
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    # a list of two stays a list of two, also after a copy
    assert pickle.loads(pickle.dumps(one)).schedule(2, 54).tokens == (52, 50)
    with pytest.raises(AttributeError):
        one.tome_r = 3


@pytest.mark.parametrize(("rate", "off"), [(0, True), ([0, 0], True), ((0, 1), True), (1, False), ((1, -1), False)])
def test_off(rate, off):
    assert stk.ToMeConfig(rate).off is off


def test_presets():
    names = ("training", "inference", "prototyping", "accuracy", "memory")
    for name in names:
        config = stk.ToMeConfig.preset(name)
        config.schedule(12, 54, 8 if name == "prototyping" else 12, 5)
    assert stk.ToMeConfig.preset("accuracy") == stk.ToMeConfig(
        1, merge_layers=(6, 9), merge_frame_nums=(2, 2), merge_token_proportions=(5, 5), frame_pos=1
    )
    assert [stk.ToMeConfig.preset(name).tome_r for name in names] == [2, 4, 8, 1, 4]
    with pytest.raises(ValueError, match=r"preset must be one of 'training'.*got 'fast'"):
        stk.ToMeConfig.preset("fast")


def parsed(*words: str) -> stk.ToMeConfig:
    return stk.ToMeConfig.from_args(stk.add_tome_args(argparse.ArgumentParser(exit_on_error=False)).parse_args(words))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--tome_r 2 --tome_prop_attn", {"tome_r": 2}),
        ("--tome_r 2 --tome_prop_attn 0", {"tome_r": 2, "prop_attn": False}),
        ("--tome_r 2 --no-tome_prop_attn", {"tome_r": 2, "prop_attn": False}),
        ("--tome_r 4 --tome_trace_source", {"tome_r": 4, "trace_source": True}),
        (
            "--tome_r 1 --merge_layers 3-6-9 --merge_frame_nums 2-2-3 --merge_token_proportions 10-12.5 --frame_pos 1",
            {
                "tome_r": 1, "merge_layers": (3, 6, 9), "merge_frame_nums": (2, 2, 3),
                "merge_token_proportions": (10, 12.5),
                "frame_pos": 1,
            },
        ),
    ],
)  # fmt: skip
def test_flags(line, expected):
    assert parsed(*line.split()) == stk.ToMeConfig(**expected)


@pytest.mark.parametrize(
    "line",
    [
        "--tome_r two",
        "--tome_r -2",
        "--merge_layers 3--6",
        "--merge_layers -3",
        "--merge_layers 3-inf",
        "--merge_layers 3,6",
        "--frame_pos 2",
        "--tome_prop_attn maybe",
    ],
)
def test_wrong_flags(line):
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parsed(*line.split())


def test_any_object_with_flags():
    """STOP's own namespace has strings where our parser has tuples, and much else."""
    given = SimpleNamespace(tome_r=1, merge_layers="6-9", merge_frame_nums="2-2", merge_token_proportions="5-5", lr=1.0)
    assert stk.ToMeConfig.from_args(given) == stk.ToMeConfig(
        1, merge_layers=(6, 9), merge_frame_nums=(2, 2), merge_token_proportions=(5, 5)
    )
    assert stk.ToMeConfig.from_args(SimpleNamespace(tome_trace_source=1, tome_prop_attn=0)) == stk.ToMeConfig(
        trace_source=True, prop_attn=False
    )
    assert stk.ToMeConfig.from_args(SimpleNamespace()).off
    assert stk.ToMeConfig.from_args({"tome_r": 2, "merge_layers": ""}) == stk.ToMeConfig(2)
    with pytest.raises(ValueError, match="merge_layers must be numbers joined by dashes"):
        stk.ToMeConfig.from_args({"tome_r": 2, "merge_layers": "3,6"})
