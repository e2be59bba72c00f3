# SPDX-License-Identifier: Apache-2.0
"""Descriptions of patched models: a table, a line for a log, a warning where less is merged than asked."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from .config import ToMeConfig
from .schedule import Schedule
from .table import table

logger = logging.getLogger("stoptome_kernels")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True)
class Description:
    """Description of what a model merges. ``str()`` of it is a table, ``line`` is one line for a log.

    Attributes:
        model: name of the model's class.
        family: class and library of the tower that merges; empty if the model is not patched.
        config: settings; None if the model is not patched.
        protected: number of leading tokens of a frame or image that are never merged.
        asked: requested number of tokens to merge in each layer; None in a layer with a requested share of its tokens.
        schedule: actual schedule; None where it is known only when the model runs (images of any size, TempMe's own
            schedule).
        given: output of the last layer.
    """

    model: str
    family: str = ""
    config: ToMeConfig | None = None
    protected: int = 0
    asked: tuple[int | None, ...] = ()
    schedule: Schedule | None = None
    given: str = ""

    @property
    def line(self) -> str:
        """One line for a log: tokens before the first and after the last layer, and the ideal speed-up."""
        if self.config is None:
            return f"{self.model}: not patched"
        if self.schedule is None:
            asked = "merges by its own schedule" if self._own else f"tome_r={_short(self.asked)}"
            return f"{self.model}: {asked}, tokens known when it runs"
        frames = f", {self.schedule.frames} frames" if self.schedule.frames > 1 else ""
        return f"{self.model}{frames}: {self.schedule.line}"

    @property
    def _own(self) -> bool:
        """The model tells its blocks what to merge, in each forward."""
        return self.schedule is None and None in self.asked

    def __str__(self) -> str:
        if self.config is None:
            return self.line
        head = [
            self.line,
            f"family: {self.family}",
            f"prop_attn: {self.config.prop_attn}, trace_source: {self.config.trace_source}, protected tokens: "
            f"{self.protected}",
            f"after the last layer: {self.given}",
        ]
        if self._own:
            return "\n".join(head)
        columns: dict[str, Sequence[object]] = {
            "layer": range(len(self.asked)),
            "r asked": [self._share(layer) if r is None else r for layer, r in enumerate(self.asked)],
        }
        if self.schedule is not None:
            columns.update(self.schedule.columns())
        return "\n".join([*head, *table(columns)])

    def _share(self, layer: int) -> str:
        """Return the shares asked for in a layer: between items, if it joins any, and within them."""
        assert self.config is not None  # nothing is asked for without settings
        assert self.schedule is not None  # and shares never without a schedule
        inter, intra = self.config.merge_token_proportions
        return f"{inter:g} % + {intra:g} %" if self.schedule.steps[layer].join > 1 else f"{intra:g} %"


def family_of(tower: object) -> str:
    """Return the class of a tower and its library, for ``Description.family``."""
    return f"{type(tower).__name__} ({type(tower).__module__})"


def _short(asked: Sequence[int | None]) -> str:
    return str(asked[0]) if len(set(asked)) == 1 else str(list(asked))


def warn(message: str) -> None:
    """Warn as if from the line that called this package, which may be any number of calls away."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_capped(asked: Sequence[int | None], schedule: Schedule, proportions: Sequence[float] = ()) -> None:
    """Warn if layers merge fewer tokens than they were asked to: no more than half of the unprotected ones can be.

    Args:
        asked: tokens to merge in each layer; None where a share is asked for.
        schedule: schedule that is carried out.
        proportions: the shares asked for in per cent, between joined items and within one; empty if nothing is joined.
    """
    counted = [(layer, r, step.r) for layer, (r, step) in enumerate(zip(asked, schedule.steps, strict=True)) if r]
    short = [each for each in counted if each[2] < each[1]]
    if short:
        layer, r, done = short[0]
        warn(
            f"tome_r asks for {sum(each[1] for each in counted)} of {schedule.tokens_in} tokens to be merged "
            f"(in {len(counted)} layers), but only {sum(each[2] for each in counted)} are: a layer merges at most half "
            f"of its unprotected tokens. Layer {layer} is the first to fall short, with {done} of {r}; tokens after "
            f"each layer: {', '.join(map(str, schedule.tokens))}"
        )
    if any(share > 50 for share in proportions):
        inter, intra = proportions
        warn(
            f"merge_token_proportions asks for {inter:g} % (between joined items) and {intra:g} % (within an item), "
            "but at most half of the unprotected tokens can be merged at a time; tokens of an item after each layer: "
            f"{', '.join(map(str, schedule.tokens))}"
        )
