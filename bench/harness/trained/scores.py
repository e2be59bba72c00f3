# SPDX-License-Identifier: Apache-2.0
"""How far features have moved, and whether what is made of them is still the same."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..intervals import difference_interval, mean_interval, share_interval

TOP = 0.1  # share of a map that counts as salient


def cosine_losses(got: Tensor, want: Tensor) -> list[float]:
    """Return 1 − the cosine of each picture's vectors to what they were, mean over its vectors.

    Args:
        got: ``(N, D)`` or ``(N, vectors, D)``.
        want: the same shape.
    """
    found = 1 - F.cosine_similarity(got.double(), want.double(), dim=-1)
    return found.reshape(len(found), -1).mean(1).tolist()


def losses_between_groups(vectors: Tensor, groups: Tensor) -> list[float]:
    """Return 1 − the cosine of each vector ``(N, D)`` to those of other groups, mean over them; nothing of one group.

    Args:
        vectors: ``(N, D)``.
        groups: ``(N,)``, the number of each vector's group.
    """
    unit = F.normalize(vectors.double(), dim=1)
    losses, others = 1 - unit @ unit.t(), groups[:, None] != groups
    return [row[other].mean().item() for row, other in zip(losses, others, strict=True) if other.any()]


def correlation_losses(got: Tensor, want: Tensor) -> list[float]:
    """Return 1 − Pearson's correlation of each pair of maps ``(N, height, width)``."""
    centred = [(maps - maps.mean(1, keepdim=True)) for maps in (got.double().flatten(1), want.double().flatten(1))]
    return (1 - F.cosine_similarity(*centred, dim=1)).tolist()


def top_losses(got: Tensor, want: Tensor) -> list[float]:
    """Return the share of the highest tenth of each map ``(N, height, width)`` that is not in the other's."""
    count = round(TOP * got[0].numel())
    highest = [
        torch.zeros(maps.shape, dtype=torch.bool).scatter(1, maps.topk(count, dim=1).indices, True)
        for maps in (got.flatten(1), want.flatten(1))
    ]
    return (1 - (highest[0] & highest[1]).sum(1) / count).tolist()


def nearest(queries: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """Return the label of each query's nearest neighbour by cosine, itself left out.

    Args:
        queries: ``(N, D)``.
        gallery: ``(N, D)``, the same pictures in the same order.
        labels: ``(N,)``.
    """
    likeness = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).t()
    return labels[likeness.fill_diagonal_(-2).argmax(1)]


def columns_of(name: str, losses: list[float], others: list[float] | None = None) -> dict[str, Any]:
    """Return the columns of a row that tell of one loss for each picture: median, mean, deviation, the worst, and the
    mean's 95 % interval; and, if there are others, that of how much larger these are, picture by picture."""
    columns = {
        f"{name}_median": statistics.median(losses),
        f"{name}_mean": statistics.mean(losses),
        f"{name}_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        f"{name}_worst": max(losses),
        f"{name}_interval": mean_interval(losses),
    }
    if others is not None:
        columns[f"{name}_over_merging_interval"] = difference_interval(losses, others)
    return columns


def between(at: float, curve: list[tuple[float, list[float]]]) -> list[float] | None:
    """Return the losses of each picture at some speed-up, linear between those that are known; None beyond them.

    Args:
        at: the speed-up.
        curve: speed-ups, and the losses at each; in any order.
    """
    known = sorted(curve)
    for (low, below), (high, above) in itertools.pairwise(known):
        if low <= at <= high:
            share = (at - low) / (high - low)
            return [one + share * (other - one) for one, other in zip(below, above, strict=True)]
    return None


def classified(got: Tensor, want: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the columns of a row that tell of nearest neighbours by features with merging and without.

    Args:
        got: ``(N, D)``, features with merging.
        want: ``(N, D)``, without.
        labels: ``(N,)``.
    """
    before, after, mixed = (nearest(*pair, labels) for pair in ((want, want), (got, got), (got, want)))
    lost = (before == labels).double() - (after == labels).double()
    return {
        "accuracy": 100 * (after == labels).double().mean().item(),
        "accuracy_mixed": 100 * (mixed == labels).double().mean().item(),
        "agreement": 100 * (after == before).double().mean().item(),
        "lost_mean": 100 * lost.mean().item(),
        "lost_interval": [100 * bound for bound in share_interval(lost.tolist())],
    }
