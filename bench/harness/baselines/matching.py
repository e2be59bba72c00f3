# SPDX-License-Identifier: Apache-2.0
"""Baselines of token merging: as many tokens fewer, without looking for similar ones.

Each is a stand-in for the matching of a model's blocks, with the same arguments and a plan of the same shape, so that
everything else of a patched model stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from stoptome_kernels import MergePlan, merge_norm, reference
from stoptome_kernels.video import blocks as video
from stoptome_kernels.vit import state as vit
from torch import Tensor

Matching = Callable[[Tensor, int, int], MergePlan]


MERGE, SIZES_OFF, PAIRS, DROP, POOL = "merge", "merge, sizes off", "random pairs", "drop", "pool"


class RandomDrop:
    """Throws away ``r`` unprotected tokens of each item, drawn at random."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, metric: Tensor, r: int, protected: int) -> MergePlan:
        drawn, r = _shuffled(metric, r, protected, self.generator)
        # what is thrown away is a member of weight 0 of some token that stays
        last = drawn[:, -1:].expand(-1, r)
        return _plan(drawn[:, :r], last, metric.shape[-2], protected, weightless=True)


class RandomPairs:
    """Merges ``r`` unprotected tokens of each item, drawn at random, each into one of the others, drawn at random."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, metric: Tensor, r: int, protected: int) -> MergePlan:
        drawn, r = _shuffled(metric, r, protected, self.generator)
        others = drawn.shape[1] - r
        chosen = torch.randint(max(1, others), (drawn.shape[0], r), generator=self.generator).to(drawn.device)
        return _plan(drawn[:, :r], drawn.gather(1, r + chosen), metric.shape[-2], protected, weightless=False)


def average_pool(metric: Tensor, r: int, protected: int) -> MergePlan:
    """Merge ``r`` pairs of neighbours, spread evenly over the item: pooling by place, not by likeness."""
    n, tokens = metric.shape[0], metric.shape[-2]
    pairs = (tokens - protected) // 2
    r = min(r, pairs)
    source = protected + 2 * (torch.arange(r, device=metric.device) * pairs // max(1, r))
    source = source.expand(n, -1)
    return _plan(source, source + 1, tokens, protected, weightless=False)


# by a seed; None: by similarity
METHODS: dict[str, Callable[[int], Matching | None]] = {
    MERGE: lambda seed: None,
    SIZES_OFF: lambda seed: None,
    PAIRS: RandomPairs,
    DROP: RandomDrop,
    POOL: lambda seed: average_pool,
}


def _shuffled(metric: Tensor, r: int, protected: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return the unprotected tokens of each item in random order, and how many may go at most as in a matching."""
    n, tokens = metric.shape[0], metric.shape[-2]
    drawn = torch.rand(n, tokens - protected, generator=generator).argsort(1).to(metric.device) + protected
    return drawn, min(r, (tokens - protected) // 2)


def _plan(source: Tensor, target: Tensor, tokens: int, protected: int, weightless: bool) -> MergePlan:
    """Return the plan by which each of ``source (N, r)`` goes to the ``target (N, r)`` beside it, which stays; the
    order is kept."""
    n, r = source.shape
    gone = torch.zeros(n, tokens, dtype=torch.bool, device=source.device).scatter(1, source, True)
    dest = (~gone).cumsum(1) - 1
    dest = dest.scatter(1, source, dest.gather(1, target))
    members, offsets = reference.build_groups(dest, gone & weightless, tokens - r)
    return MergePlan(dest.int(), members, offsets, protected)


@contextmanager
def matching(by: Matching | None) -> Iterator[None]:
    """Let patched models choose their tokens by this function; None: by similarity, as ever."""
    if by is None:
        yield
        return

    def match_merge_norm(metric, r, protected, x, residual, size, norm):
        plan = by(metric, r, protected)
        return plan, *merge_norm(x, residual, plan, size, *norm)

    with (
        mock.patch.object(video, "match", by),
        mock.patch.object(vit, "match", by),
        mock.patch.object(vit, "match_merge_norm", match_merge_norm),
    ):
        yield
