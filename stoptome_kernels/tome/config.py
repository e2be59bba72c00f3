# SPDX-License-Identifier: Apache-2.0
"""The settings of token merging in a model: as a value, as command-line flags, and by name."""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from .. import checks
from .schedule import Rate, Schedule, as_integers, as_proportions, as_rate, plan_layers

_PRESETS: dict[str, dict] = {
    "training": {"tome_r": 2},
    "inference": {"tome_r": 4},
    "prototyping": {"tome_r": 8},
    "accuracy": {
        "tome_r": 1, "merge_layers": (6, 9), "merge_frame_nums": (2, 2), "merge_token_proportions": (5, 5),
        "frame_pos": 1,
    },
    "memory": {
        "tome_r": 4, "merge_layers": (3, 6, 9), "merge_frame_nums": (2, 2, 3), "merge_token_proportions": (15, 15),
    },
}  # fmt: skip
# TempMe's names of the same flags
_TEMPME = {
    "trace_source": "tome_tracesource", "prop_attn": "tome_propattn", "merge_layers": "merge_layer",
    "merge_frame_nums": "merge_frame_num", "merge_token_proportions": "merge_token_proportion",
}  # fmt: skip
# of add_tome_args
_FLAGS = (
    "tome_r", "tome_trace_source", "tome_prop_attn", "merge_layers", "merge_frame_nums", "merge_token_proportions",
    "frame_pos",
)  # fmt: skip


@dataclass(frozen=True)
class ToMeConfig:
    """Settings of token merging in a model; a value that can be compared, hashed and pickled.

    NumPy numbers are accepted and stored as Python numbers. A bool is not accepted as a number.

    Attributes:
        tome_r: number of tokens to merge from every frame in every layer: an int (0: off), a list with one int per
            layer, or a pair ``(r, inflection)``, see ``stoptome_kernels.tome.parse_r``.
        trace_source: whether to keep the source map of a forward, for ``stoptome_kernels.tome_trace``.
        prop_attn: proportional attention: a merged key counts as often as the number of tokens that it represents.
        merge_layers: layers of clip merging (TempMe), from 0: adjacent frames (or clips) are joined there.
        merge_frame_nums: number of adjacent frames (or clips) that become one in each of ``merge_layers``.
        merge_token_proportions: ``(inter, intra)``: per cent of the tokens merged between and within frames.
        frame_pos: 1 gives each layer of ``merge_layers`` a learnable embedding for the items that it joins,
            initialised to zero.
    """

    tome_r: Rate = 0
    trace_source: bool = False
    prop_attn: bool = True
    merge_layers: tuple[int, ...] = ()
    merge_frame_nums: tuple[int, ...] = ()
    merge_token_proportions: tuple[float, ...] = ()
    frame_pos: int = 0

    def __post_init__(self) -> None:
        for name in ("merge_layers", "merge_frame_nums", "merge_token_proportions"):
            value = getattr(self, name)
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise TypeError(f"{name} must be a sequence of numbers, got {value!r}")
        # a tuple of two would be a pair (r, inflection): as_rate says of a list that it is none
        self._hold("tome_r", as_rate(self.tome_r))
        self._hold("merge_layers", as_integers(self.merge_layers, "merge_layers", "layers from 0"))
        self._hold(
            "merge_frame_nums", as_integers(self.merge_frame_nums, "merge_frame_nums", "how many items are joined")
        )
        self._hold("merge_token_proportions", as_proportions(self.merge_token_proportions))
        self._hold("frame_pos", checks.integer(self.frame_pos, "frame_pos", "0 or 1"))
        if self.frame_pos not in (0, 1):
            raise ValueError(f"frame_pos must be 0 or 1, got {self.frame_pos!r}")
        if self.frame_pos and not self.merge_layers:
            raise ValueError(
                "frame_pos=1 has no effect without merge_layers: it belongs to the layers that join frames; give "
                "frame_pos=0 or merge_layers"
            )
        for name in ("trace_source", "prop_attn"):
            if getattr(self, name) not in (True, False):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
            self._hold(name, bool(getattr(self, name)))
        self._example_schedule()  # whatever else is wrong with the numbers shows at once
        if self.merge_layers and isinstance(self.tome_r, int) and self.tome_r == 0:
            raise ValueError(
                "tome_r=0 turns all merging off, but merge_layers is set: give tome_r=1 or more, or in Python a list "
                "of zeros for clip merging alone"
            )

    def _hold(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def schedule(self, layers: int, tokens: int, frames: int = 1, protected: int = 1, width: int = 768) -> Schedule:
        """Return the tokens after each layer and the ideal speed-up, without a model.

        Args:
            layers: number of layers.
            tokens: number of tokens of a frame before the first layer, class token and prompts included.
            frames: number of frames of a video.
            protected: number of class tokens and prompts of a frame (STOP: 1 + 4).
            width: embedding dimension.

        Raises:
            TypeError, ValueError: the settings don't fit such a model; the message says why.
        """
        return plan_layers(
            self.tome_r, layers, tokens, frames, protected, merge_layers=self.merge_layers,
            merge_frame_nums=self.merge_frame_nums, merge_token_proportions=self.merge_token_proportions, width=width,
        )  # fmt: skip

    def _example_schedule(self) -> Schedule:
        """Return the schedule of a stack just high enough, of frames and videos large enough for these numbers."""
        at = [layer + 1 for layer in self.merge_layers]
        layers = max([1, len(self.tome_r) if isinstance(self.tome_r, tuple) else 1, *at])
        frames = math.prod(n for n in self.merge_frame_nums if n > 0)
        return self.schedule(layers, 1 << 20, frames)

    @property
    def off(self) -> bool:
        """Whether nothing would be merged: the model then computes the same as without a patch."""
        return self._example_schedule().idle

    @classmethod
    def preset(cls, name: str) -> ToMeConfig:
        """Return the settings of a preset.

        Args:
            name: ``training`` (r 2), ``inference`` (r 4), ``prototyping`` (r 8, for 8 frames), ``accuracy`` (r 1, clip
                merging in layers 6-9 by 2-2, 5-5 per cent, frame_pos 1) or ``memory`` (r 4, in layers 3-6-9 by 2-2-3,
                15-15 per cent).

        Raises:
            ValueError: another name.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, _PRESETS))}, got {name!r}")
        return cls(**_PRESETS[name])

    @classmethod
    def from_args(cls, args: object) -> ToMeConfig:
        """Return the settings in parsed arguments.

        Args:
            args: namespace with STOP's flags (see ``add_tome_args``) or TempMe's, any object with some of these
                attributes, or a mapping with some of these keys. Missing flags have their defaults;
                ``merge_layers="3-6-9"`` is read as on the command line.

        Raises:
            TypeError, ValueError: a flag has an invalid value; the message names it.
        """
        found = {}
        for field in fields(cls):
            for name in _names(field.name):
                value = args.get(name) if isinstance(args, Mapping) else getattr(args, name, None)
                if value is not None:
                    found[field.name] = value
        for name in ("merge_layers", "merge_frame_nums", "merge_token_proportions"):
            if isinstance(found.get(name), str):
                found[name] = _parse_dashed(found[name], name)
        for name in ("trace_source", "prop_attn"):
            if name in found and found[name] in (0, 1):
                found[name] = bool(found[name])
        return cls(**found)


def _names(setting: str) -> tuple[str, ...]:
    """Return the names of a setting in arguments; if several are there, the last counts."""
    return (_TEMPME.get(setting, setting), f"tome_{setting}", setting)


def describe_missing_flags(args: object) -> str:
    """Say what arguments lack that have none of the names that ``ToMeConfig.from_args`` reads, or no tome_r but a
    name that is like it; else nothing.

    A name whose value is None, or 0, is there.
    """
    names = {name for field in fields(ToMeConfig) for name in _names(field.name)}
    if isinstance(args, Mapping):
        given = [name for name in args if isinstance(name, str)]
        there = names.intersection(given)
    else:  # dir knows slots, properties and what a class has; methods are no settings
        given = [name for name in dir(args) if not callable(inspect.getattr_static(args, name, None))]
        there = {name for name in names if hasattr(args, name)}
    like = _lookalike(name for name in given if name not in there)
    meant = f" (is {like[0]} a misspelt {like[1]}?)" if like else ""
    if not there:
        return f"has none of {', '.join(_FLAGS)}, nor TempMe's names for them{meant}"
    if like and like[1] == "tome_r" and there.isdisjoint(_names("tome_r")):
        return f"has no tome_r{meant}"
    return ""


def _lookalike(given: Iterable[str]) -> tuple[str, str] | None:
    """Return the name that is most like a flag's, and the flag; None if none is."""
    flags = (*_FLAGS, *_TEMPME.values())
    pairs = [(name, flag) for name in given if not name.startswith("_") for flag in flags]

    def likeness(pair: tuple[str, str]) -> float:
        name, flag = pair
        return difflib.SequenceMatcher(None, name.lower(), flag).ratio()

    best = max(pairs, key=likeness, default=None)
    return best if best is not None and likeness(best) > 0.75 else None


def _parse_dashed(text: str, name: str) -> tuple:
    """Parse numbers with dashes between them, ``3-6-9``; an empty string gives none."""
    try:
        numbers = [float(part) for part in text.split("-")] if text.strip() else []
        return tuple(int(number) if number == int(number) else number for number in numbers)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be numbers joined by dashes, such as 3-6-9, got {text!r}") from None


def _numbers(text: str) -> tuple:
    try:
        return _parse_dashed(text, "it")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an int of 0 or more (tokens merged per layer), got {text!r}")
    return int(text)


def add_tome_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add STOP's token merging flags to a parser and return it; ``ToMeConfig.from_args`` reads them back.

    ``--tome_r N`` (0: off), ``--tome_trace_source``, ``--tome_prop_attn`` (on; ``--no-tome_prop_attn`` or
    ``--tome_prop_attn 0`` turns it off), ``--merge_layers 3-6-9``, ``--merge_frame_nums 2-2-2``,
    ``--merge_token_proportions 10-10``, ``--frame_pos 0|1``.
    """
    group = parser.add_argument_group("token merging (ToMe)")
    add = group.add_argument
    add("--tome_r", type=_rate, default=0, metavar="N", help="tokens merged per frame and layer (default: 0, off)")
    add("--tome_trace_source", action="store_true", help="keep which token came from where, for visualisation")
    add(
        "--tome_prop_attn", nargs="?", const=True, default=True, type=_switch, metavar="0|1",
        help="attention weighted by the tokens' sizes (default: on)",
    )  # fmt: skip
    add("--no-tome_prop_attn", dest="tome_prop_attn", action="store_false", help="turn that off")
    add("--merge_layers", type=_numbers, default=(), metavar="A-B", help="clip merging: where frames are joined")
    add("--merge_frame_nums", type=_numbers, default=(), metavar="F-F", help="clip merging: how many are joined there")
    add(
        "--merge_token_proportions", type=_numbers, default=(), metavar="X-Y",
        help="clip merging: per cent of the tokens merged between frames and within frames",
    )  # fmt: skip
    add("--frame_pos", type=int, choices=(0, 1), default=0, help="clip merging: learnt embeddings of the joined items")
    return parser


def _switch(text: str) -> bool:
    named = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in named:
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}")
    return named[text.lower()]
