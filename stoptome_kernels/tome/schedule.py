# SPDX-License-Identifier: Apache-2.0
"""How many tokens each layer of a stack merges, known before any model runs.

Sources: Bolya et al., ICLR 2023 (a constant r, and schedules that fall or rise); Shen et al., *TempMe*, ICLR 2025
(frames joined into clips, and shares of the tokens instead of a number).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any

from torch import Tensor

from .. import checks
from ..reference import cap_r
from .table import table

Rate = int | Sequence[int] | tuple[int, float]


class Rates(tuple):
    """One r for each layer; a plain tuple of two numbers is a pair (r, inflection)."""

    __slots__ = ()


def parse_r(tome_r: Rate, layers: int) -> tuple[int, ...]:
    """Return the number of tokens to merge in each of ``layers`` layers.

    Args:
        tome_r: an int for every layer; a list (or 1-D NumPy array) with one int per layer, padded with 0; or a pair
            (tuple) ``(r, inflection)`` with inflection in [−1, 1]: the first layer merges ``r(1 − inflection)``
            truncated to int, the last ``2r − first``, those between are interpolated linearly and truncated. Rounding
            of floats loses no token: ``(10, 0.9)`` starts from 1, not from 0.9999999999999998.
        layers: number of layers.

    Raises:
        TypeError, ValueError: anything else; the message says what is allowed.
    """
    rate = as_rate(tome_r)
    if isinstance(rate, int):
        return (rate,) * layers
    if not isinstance(rate, Rates):
        return _linear(*rate, layers)
    if len(rate) > layers:
        raise ValueError(f"tome_r has {len(rate)} numbers, but there are {layers} layers; give one per layer")
    return (*rate, *(0 for _ in range(layers - len(rate))))


def as_rate(tome_r: Any) -> int | tuple[int, float] | Rates:
    """Return ``tome_r`` of ``parse_r`` in Python's own numbers; what is no pair is marked as ``Rates``.

    Raises:
        TypeError, ValueError: as ``parse_r``, but for the number of layers.
    """
    if type(tome_r) is tuple and len(tome_r) == 2:
        r = checks.count(tome_r[0], "r of the pair tome_r = (r, inflection)", "tokens to merge")
        what = "of the pair tome_r = (r, inflection), from -1 to 1"
        inflection = _real(tome_r[1], "inflection", what)
        if not -1 <= inflection <= 1:
            raise ValueError(
                f"inflection of the pair tome_r = (r, inflection) must be from -1 to 1, got {inflection!r}; "
                "to give one number per layer use a list"
            )
        return r, inflection
    if _is_list(tome_r):
        return Rates(checks.count(r, f"tome_r[{i}]", "tokens to merge") for i, r in enumerate(tome_r))
    return checks.count(tome_r, "tome_r", "tokens to merge; or a list of ints, or a pair (r, inflection)")


def _is_list(value: object) -> bool:
    """Return whether a value is a sequence, or an array of NumPy with one axis, which is none by its type."""
    if isinstance(value, (str, bytes, Tensor)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", None) == 1


def _linear(r: int, inflection: float, layers: int) -> tuple[int, ...]:
    first = int(r * (1 - Fraction(inflection)) + Fraction(1, 10**9))  # 0.9 and -1/3 are a little off as floats
    steps = max(1, layers - 1)
    return tuple((first * steps + 2 * (r - first) * i) // steps for i in range(layers))


def as_integers(values: Iterable[int], name: str, what: str) -> tuple[int, ...]:
    """Return the numbers of a setting as Python's ints; the error of a wrong one says which."""
    return tuple(checks.integer(value, f"{name}[{i}]", what) for i, value in enumerate(values))


def as_proportions(values: Iterable[float]) -> tuple[float, ...]:
    """Return ``merge_token_proportions`` as Python's ints and floats."""
    return tuple(_real(value, f"merge_token_proportions[{i}]", "per cent") for i, value in enumerate(values))


def _real(value: object, name: str, what: str) -> float:
    """Return ``value`` as an int, if it is one, or as a float."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return checks.integer(value, name, what)
    number = checks.number(value, name, what)
    # by the digits that it is printed with: float(np.float32(0.1)) is 0.10000000149, and can be a token less
    return number if isinstance(value, float) or not math.isfinite(number) else float(Fraction(str(value)))


@dataclass(frozen=True)
class Step:
    """Merging in one layer, and the shape of a video there.

    Attributes:
        join: number of adjacent items that become one before attention (1: none are joined).
        inter: number of tokens merged right after joining, compared by the tokens themselves.
        r: number of tokens merged between attention and MLP, compared by the keys.
        items: number of items of a video in this layer, after joining.
        frames: number of frames in each item; the first ``frames`` tokens of an item are their class tokens.
        attended: number of tokens of an item in attention, protected ones included.
        tokens: number of tokens of an item after the layer.
    """

    join: int
    inter: int
    r: int
    items: int
    frames: int
    attended: int
    tokens: int


@dataclass(frozen=True)
class Schedule:
    """Steps of a stack of layers, and the FLOPs they save. ``str()`` of it is a table, ``line`` its first line.

    Attributes:
        steps: one step for each layer.
        tokens_in: number of tokens of a frame before the first layer.
        width: embedding dimension, which determines the share of attention in a layer.
    """

    steps: tuple[Step, ...]
    tokens_in: int
    width: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of an item after each layer."""
        return tuple(step.tokens for step in self.steps)

    @property
    def items(self) -> tuple[int, ...]:
        """Number of items of a video after each layer."""
        return tuple(step.items for step in self.steps)

    @property
    def idle(self) -> bool:
        """Whether nothing is merged or joined in any layer."""
        return all(step.join == 1 and not step.inter and not step.r for step in self.steps)

    @property
    def frames(self) -> int:
        """Number of frames of a video."""
        return self.steps[0].items * self.steps[0].frames if self.steps else 1

    @property
    def flops(self) -> int:
        """FLOPs of the stack for a video.

        Counted are QKV, attention and output projection on the tokens before the layer's merge, and the MLP on the
        tokens after it.
        """
        return sum(step.items * _flops(step.attended, step.tokens, self.width) for step in self.steps)

    @property
    def flops_unmerged(self) -> int:
        """FLOPs of the stack for a video without merging."""
        return len(self.steps) * self.frames * _flops(self.tokens_in, self.tokens_in, self.width)

    @property
    def speedup(self) -> float:
        """Ideal speed-up: ``flops_unmerged`` ÷ ``flops``."""
        return self.flops_unmerged / self.flops if self.steps else 1.0

    @property
    def flops_left(self) -> float:
        """Remaining share of the FLOPs: ``flops`` ÷ ``flops_unmerged``."""
        return 1 / self.speedup

    @property
    def joins(self) -> bool:
        """Whether items are joined in any layer."""
        return any(step.join > 1 for step in self.steps)

    @property
    def line(self) -> str:
        """One line for a log: tokens before the first and after the last layer, and the ideal speed-up.

        Tokens are counted per frame, or over all items where frames are joined.
        """
        before, behind = str(self.tokens_in), str((self.tokens or (self.tokens_in,))[-1])
        if self.joins:
            before, behind = f"{self.frames} × {before}", f"{self.items[-1]} × {behind}"
        return f"{before} → {behind} tokens, ideal {self.speedup:.2f}×"

    def columns(self) -> dict[str, list[str]]:
        """Return the columns of the table, a cell for each layer; those about items only where items are joined."""
        whole = self.frames * _flops(self.tokens_in, self.tokens_in, self.width)
        left = [step.items * _flops(step.attended, step.tokens, self.width) / whole for step in self.steps]
        columns = {
            "merged": [f"{step.inter} + {step.r}" if step.inter else str(step.r) for step in self.steps],
            "tokens": [str(step.tokens) for step in self.steps],
            "FLOPs left": [f"{100 * share:.0f} %" for share in left],
        }
        if not self.joins:
            return columns
        joined = [str(step.join) if step.join > 1 else "" for step in self.steps]
        items = [f"{step.items} × {step.tokens}" for step in self.steps]
        return {
            "joined": joined, "merged": columns["merged"], "items × tokens": items, "FLOPs left": columns["FLOPs left"]
        }  # fmt: skip

    def __str__(self) -> str:
        frames = f"{self.frames} frames: " if self.frames > 1 else ""
        return "\n".join([frames + self.line, *table({"layer": range(len(self.steps)), **self.columns()})])


def _flops(attended: int, tokens: int, width: int) -> int:
    """Return the FLOPs of one item in one layer: QKV 6·D², projection 2·D², scores and values 4·T·D a token; MLP 16·D²
    a token."""
    return attended * (8 * width * width + 4 * attended * width) + tokens * 16 * width * width


def plan_layers(
    tome_r: Rate,
    layers: int,
    tokens: int,
    frames: int = 1,
    protected: int = 1,
    *,
    merge_layers: Sequence[int] = (),
    merge_frame_nums: Sequence[int] = (),
    merge_token_proportions: Sequence[float] = (),
    width: int = 768,
) -> Schedule:
    """Return the schedule of a stack of layers.

    Args:
        tome_r: number of tokens to merge, see ``parse_r``; applies before the first of ``merge_layers``.
        layers: number of layers.
        tokens: number of tokens of a frame, protected ones included.
        frames: number of frames of a video.
        protected: number of tokens of a frame that are never merged (class token, prompts).
        merge_layers: layers (from 0) where frames are joined.
        merge_frame_nums: number of adjacent items joined in each of them.
        merge_token_proportions: per cent of an item's tokens merged between frames (right after joining) and within
            (after attention, from the first merge layer on).
        width: embedding dimension.

    Raises:
        TypeError: a number has the wrong type (NumPy numbers are accepted, bools are not).
        ValueError: the frames can't be joined like this, or a frame has no token that may be merged.
    """
    layers = checks.count(layers, "layers", "layers of the model", least=1)
    tokens = checks.count(tokens, "tokens", "tokens of a frame", least=1)
    frames = checks.count(frames, "frames", "frames of a video", least=1)
    width = checks.count(width, "width", "width of the model", least=1)
    protected = checks.integer(protected, "protected", "tokens of a frame that are never merged")
    rates = parse_r(tome_r, layers)
    if not 0 <= protected <= tokens:
        raise ValueError(f"protected must be from 0 to the {tokens} tokens of a frame, got {protected}")
    groups, (inter_share, intra_share) = _groups(merge_layers, merge_frame_nums, merge_token_proportions, layers)
    if (any(rates) or groups) and tokens - protected < 2:
        raise ValueError(
            f"a frame has {tokens} tokens, of which {protected} are protected: too few to merge any; use tome_r=0"
        )
    steps: list[Step] = []
    item, items, length = protected, frames, tokens  # protected tokens of an item, items, tokens of an item
    for layer in range(layers):
        join = groups.get(layer, 1)
        if items % join:
            raise ValueError(
                f"merge_frame_nums joins {join} items at layer {layer}, but a video of {frames} frames has {items} "
                f"items there: choose a number that divides {items}"
            )
        item, items, length = item * join, items // join, length * join
        inter = cap_r(_share(length, inter_share), length, item) if join > 1 else 0
        attended = length - inter
        clips = any(layer >= first for first in groups)
        wanted = _share(attended, intra_share) if clips else rates[layer]
        r = cap_r(wanted, attended, item)
        length = attended - r
        steps.append(Step(join, inter, r, items, frames // items, attended, length))
    return Schedule(tuple(steps), tokens, width)


def _share(tokens: int, per_cent: Fraction) -> int:
    return int(tokens * per_cent / 100)  # exact: floats would lose a token here and there


def _groups(
    layers_at: Sequence[int], frame_nums: Sequence[int], proportions: Sequence[float], layers: int
) -> tuple[dict[int, int], tuple[Fraction, Fraction]]:
    layers_at = as_integers(layers_at, "merge_layers", "layers from 0")
    frame_nums = as_integers(frame_nums, "merge_frame_nums", "how many items are joined")
    proportions = as_proportions(proportions)
    if len(layers_at) != len(frame_nums):
        raise ValueError(
            f"merge_layers has {len(layers_at)} layers and merge_frame_nums {len(frame_nums)} group sizes; give one "
            "group size for each layer"
        )
    for at in layers_at:
        if not 0 <= at < layers:
            raise ValueError(f"merge_layers must be layers from 0 to {layers - 1}, got {at!r}")
    if tuple(sorted(set(layers_at))) != layers_at:
        raise ValueError(f"merge_layers must be in ascending order without duplicates, got {layers_at}")
    for number in frame_nums:
        if number < 1:
            raise ValueError(f"merge_frame_nums must be ints of 1 or more, got {number!r}")
    if proportions and len(proportions) != 2:
        raise ValueError(
            f"merge_token_proportions must be two numbers in per cent, (inter-frame, intra-frame), got {proportions}"
        )
    for share in proportions:
        if not (share == 0 or 1 <= share <= 100):
            raise ValueError(
                f"merge_token_proportions must be in per cent, 0 or from 1 to 100, got {share!r}; for 10 % give 10"
            )
    if layers_at and not proportions:
        raise ValueError("merge_layers needs merge_token_proportions, for instance (10, 10) per cent")
    if proportions and not layers_at:
        raise ValueError(
            "merge_token_proportions has no effect without merge_layers and merge_frame_nums: give all three or none"
        )
    inter, intra = (Fraction(str(share)) for share in (proportions or (0, 0)))
    return dict(zip(layers_at, frame_nums, strict=True)), (inter, intra)
