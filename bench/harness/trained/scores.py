# SPDX-License-Identifier: Apache-2.0
"""How far features have moved, and whether what is made of them is still the same."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..intervals import mean_interval, share_interval

TOP = 0.1  # share of a map that counts as salient


def cosines(got: Tensor, want: Tensor) -> list[float]:
    """Return the mean cosine of each picture's vectors to what they should be.

    Args:
        got: ``(N, D)`` or ``(N, vectors, D)``.
        want: the same shape.
    """
    found = F.cosine_similarity(got.double(), want.double(), dim=-1)
    return found.reshape(len(found), -1).mean(1).tolist()


def correlations(got: Tensor, want: Tensor) -> list[float]:
    """Return Pearson's correlation of each pair of maps ``(N, height, width)``."""
    centred = [(maps - maps.mean(1, keepdim=True)) for maps in (got.double().flatten(1), want.double().flatten(1))]
    return F.cosine_similarity(*centred, dim=1).tolist()


def overlaps(got: Tensor, want: Tensor) -> list[float]:
    """Return the share of the highest tenth of each map ``(N, height, width)`` that both maps have in common."""
    count = round(TOP * got[0].numel())
    highest = [
        torch.zeros(maps.shape, dtype=torch.bool).scatter(1, maps.topk(count, dim=1).indices, True)
        for maps in (got.flatten(1), want.flatten(1))
    ]
    return ((highest[0] & highest[1]).sum(1) / count).tolist()


def nearest(queries: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """Return the label of each query's nearest neighbour by cosine, itself left out.

    Args:
        queries: ``(N, D)``.
        gallery: ``(N, D)``, the same pictures in the same order.
        labels: ``(N,)``.
    """
    likeness = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).t()
    return labels[likeness.fill_diagonal_(-2).argmax(1)]


def told(name: str, values: list[float], merging: list[float] | None = None) -> dict[str, Any]:
    """Return the columns of a row that tell of one value for each picture: mean, deviation, least, the mean's 95 %
    interval, and that of the difference to merging, picture by picture, if that is given."""
    columns = {
        f"{name}_mean": statistics.mean(values),
        f"{name}_deviation": statistics.stdev(values) if len(values) > 1 else None,
        f"{name}_worst": min(values),
        f"{name}_interval": mean_interval(values),
    }
    if merging is not None:
        columns[f"{name}_over_merging_interval"] = mean_interval(
            [value - other for value, other in zip(values, merging, strict=True)]
        )
    return columns


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
        "lost": 100 * lost.mean().item(),
        "lost_interval": [100 * bound for bound in share_interval(lost.tolist())],
    }
