# SPDX-License-Identifier: Apache-2.0
"""What a patched model merges, for a reader: a table, a line for a log, a warning where less is done than asked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from .config import ToMeConfig
from .schedule import Schedule

logger = logging.getLogger("stoptome_kernels")


@dataclass(frozen=True)
class Description:
    """What a model merges. ``str()`` of it is a table, :attr:`line` fits into a log.

    Attributes:
        model: name of the model's class.
        family: class and library of the tower that merges; empty if the model is not patched.
        config: the settings; None if the model is not patched.
        protected: leading tokens of a frame or image that are never merged.
        asked: tokens to merge in each layer, as asked for; None in a layer that is asked for a share of its tokens.
        schedule: what is carried out; None where that is known only when the model runs (images of any size, TempMe's
            own schedule).
        given: what stands behind the last layer.
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
        """One line: tokens before and behind, and the ideal speed-up."""
        if self.config is None:
            return f"{self.model}: not patched"
        if self.schedule is None:
            return f"{self.model}: tome_r={_short(self.asked)}, tokens known when it runs"
        first, last = self.schedule.steps[0], self.schedule.steps[-1]
        before = f"{first.items * first.join} × " if first.items * first.join > 1 else ""
        behind = f"{last.items} × " if before else ""
        return (
            f"{self.model}: {before}{self.schedule.tokens_in} → {behind}{last.tokens} tokens, ideal "
            f"{self.schedule.speedup:.2f}×"
        )

    def __str__(self) -> str:
        if self.config is None:
            return self.line
        head = [
            self.line,
            f"family: {self.family}",
            f"prop_attn: {self.config.prop_attn}, trace_source: {self.config.trace_source}, protected tokens: "
            f"{self.protected}",
            f"behind the last layer: {self.given}",
        ]
        rows: list[tuple[str, ...]]
        if self.schedule is None:
            rows = [("layer", "r asked"), *((str(i), _number(r)) for i, r in enumerate(self.asked))]
        else:
            rows = [("layer", "r asked", "merged", "tokens" if set(self.schedule.items) == {1} else "items × tokens")]
            for i, (asked, step) in enumerate(zip(self.asked, self.schedule.steps, strict=True)):
                merged = f"{step.inter} + {step.r}" if step.inter else str(step.r)
                tokens = str(step.tokens) if rows[0][3] == "tokens" else f"{step.items} × {step.tokens}"
                rows.append((str(i), _number(asked), merged, tokens))
        return "\n".join([*head, *table(rows)])


def _number(asked: int | None) -> str:
    return "share" if asked is None else str(asked)


def _short(asked: Sequence[int | None]) -> str:
    return str(asked[0]) if len(set(asked)) == 1 else str(list(asked))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the columns of these rows, the first its headings, set right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def warn_capped(asked: Sequence[int | None], schedule: Schedule) -> None:
    """Warn if layers merge fewer tokens than they were asked to: no more than half of the unprotected ones can be."""
    short = [
        layer for layer, (r, step) in enumerate(zip(asked, schedule.steps, strict=True)) if r is not None and step.r < r
    ]
    if short:
        wanted = sum(r for r in asked if r is not None)
        done = sum(step.r for r, step in zip(asked, schedule.steps, strict=True) if r is not None)
        warnings.warn(
            f"tome_r asks for {wanted} of {schedule.tokens_in} tokens to be merged, {done} are: a layer merges at most "
            f"half of its unprotected tokens, layers {short[0]} to {short[-1]} fewer than asked "
            f"(tokens behind each layer: {', '.join(map(str, schedule.tokens))})",
            stacklevel=4,
        )
