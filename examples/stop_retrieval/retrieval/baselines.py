# SPDX-License-Identifier: Apache-2.0
"""Baselines of token merging: as many tokens fewer, without looking for similar ones.

Each is a stand-in for the matching of a visual tower's blocks, with the same arguments and a plan of the same shape, so
that everything else of a model stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from stoptome_kernels import MergePlan, reference
from stoptome_kernels.video import blocks as stream
from torch import Tensor


class RandomDrop:
    """``r`` unprotected tokens of each item, drawn at random, are thrown away."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, metric: Tensor, r: int, protected: int) -> MergePlan:
        n, tokens = metric.shape[0], metric.shape[-2]
        r = min(r, (tokens - protected) // 2)
        drawn = torch.rand(n, tokens - protected, generator=self.generator).argsort(1).to(metric.device) + protected
        # what is thrown away is a member of weight 0 of some token that stays
        return _plan(drawn[:, :r], drawn[:, -1:].expand(-1, r), tokens, protected, weightless=True)


def average_pool(metric: Tensor, r: int, protected: int) -> MergePlan:
    """``r`` pairs of neighbours, spread evenly over the item, become their mean: pooling by place, not by likeness."""
    n, tokens = metric.shape[0], metric.shape[-2]
    pairs = (tokens - protected) // 2
    r = min(r, pairs)
    source = protected + 2 * (torch.arange(r, device=metric.device) * pairs // max(1, r))
    source = source.expand(n, -1)
    return _plan(source, source + 1, tokens, protected, weightless=False)


def _plan(source: Tensor, target: Tensor, tokens: int, protected: int, weightless: bool) -> MergePlan:
    """Each of ``source (N, r)`` goes to the ``target (N, r)`` beside it, which stays; the order is kept."""
    n, r = source.shape
    gone = torch.zeros(n, tokens, dtype=torch.bool, device=source.device).scatter(1, source, True)
    dest = (~gone).cumsum(1) - 1
    dest = dest.scatter(1, source, dest.gather(1, target))
    members, offsets = reference.build_groups(dest, gone & weightless, tokens - r)
    return MergePlan(dest.int(), members, offsets, protected)


@contextmanager
def matching(by) -> Iterator[None]:
    """Visual towers choose their tokens by this function; None: by similarity, as ever."""
    if by is None:
        yield
        return
    with mock.patch.object(stream, "match", by):
        yield
