# SPDX-License-Identifier: Apache-2.0
"""Intervals of means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return a 95 % interval of the mean of what values are drawn from, by Student's t; None of one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # here, so that commands without intervals need no SciPy

    mean = statistics.mean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def difference_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """Return a 95 % interval of the mean of how much larger values are than others, pair by pair; None of one pair."""
    return mean_interval([value - other for value, other in zip(values, others, strict=True)])


def loss_columns(before: Sequence[float], after: Sequence[float], merged: Sequence[float]) -> dict[str, Any]:
    """Return the columns of a row that tell of scores lost, each against one before it, and beside what merging lost.

    Args:
        before: a score for each seed, without fewer tokens.
        after: with fewer tokens.
        merged: with as many fewer by merging.
    """
    lost, merging = ([a - b for a, b in zip(before, scores, strict=True)] for scores in (after, merged))
    return {
        "lost": lost, "lost_mean": statistics.mean(lost), "lost_interval": mean_interval(lost),
        "over_merging_interval": difference_interval(lost, merging),
    }  # fmt: skip


def share_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval of the mean of paired differences of answers that are right (1) or wrong (0).

    One more pair that differs is added to the deviation, so that few pairs without any difference are not taken for
    certainty (after Agresti and Min, 2005).
    """
    mean = statistics.mean(differences)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in differences) + 1) / len(differences)
    return mean - half, mean + half
