# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching (ToMe, section 3, "Bipartite Soft Matching") as plain tensor operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# How many float64 numbers of the similarity (or, to tie exactly, products) are held at once: 2**24 are 128 MiB.
_CHUNK = 1 << 24

Places = slice | Tensor  # of the tokens of a set: a slice or int64 indices, ascending


def cap_r(r: int, tokens: int, protected: int) -> int:
    """Return how many tokens an item loses of ``r`` asked for: at most half of the unprotected ones. Given sets are
    capped at the number of sources instead."""
    return min(r, (tokens - protected) // 2)


def match_sets(tokens: int, protected: int) -> tuple[slice, slice]:
    """Return the two sets of step 1 of the matching: A (even indices) proposes, B (odd indices) receives.

    The split is by the global token index with the first ``protected`` tokens left out.
    """
    return slice(protected + protected % 2, tokens, 2), slice(protected + 1 - protected % 2, tokens, 2)


def arrange(src: Tensor, dst: Tensor, tokens: int) -> Tensor:
    """Return tokens of neither set, then sources, then destinations, each ascending.

    Args:
        src, dst: 1-D int32 or int64, disjoint indices below ``tokens``, in any order.

    Returns:
        ``(tokens,)`` int32, a permutation whatever ``src`` and ``dst`` hold, so that nothing that follows it leaves its
        range: an index outside is taken for the nearest inside, a token in both sets for a destination. Where the sets
        have fewer tokens than indices, their first places go to the highest tokens of the set before.
    """
    role = torch.zeros(tokens, dtype=torch.uint8, device=src.device)
    for value, index in ((1, src), (2, dst)):
        role.index_fill_(0, index.long().clamp(0, tokens - 1), value)
    return role.sort(stable=True).indices.int()


def unit_tokens(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(N, T, C)`` float64: the mean over heads of ``metric (N, H, T, C)``, scaled to norm 1 (a token of norm 0
    stays 0); and ``(N, T)`` bool: tokens that hold a NaN or an infinity, which become 0."""
    m = metric.double().mean(1)
    bad = ~m.isfinite().all(-1)
    m = m.masked_fill(bad[..., None], 0.0)
    # cos(2^k u, v) = cos(u, v): dividing each token by a power of two costs no accuracy and keeps squares in range
    _, exponent = torch.frexp(m.abs().amax(-1, keepdim=True))
    m = m * torch.exp2(-exponent.clamp(-1022, 1022).double())
    norm = m.square().sum(-1, keepdim=True).sqrt()
    return m / norm.masked_fill(norm == 0, 1.0), bad


def _similarities(metric: Tensor, a: Places, b: Places) -> Iterator[Tensor]:
    """Yield the similarity of A and B, ``(N, rows, |B|)`` for a few rows of A at a time, so that sets of any size
    fit."""
    m, bad = unit_tokens(metric)
    left, left_bad, right, right_bad = m[:, a], bad[:, a], m[:, b], bad[:, b]
    exact = metric.dtype == torch.float64
    each = right.numel() if exact else right.shape[0] * right.shape[1]
    rows = max(1, _CHUNK // max(1, each))
    for part, part_bad in zip(left.split(rows, 1), left_bad.split(rows, 1), strict=True):
        s = (part[:, :, None] * right[:, None]).sum(-1) if exact else (part @ right.transpose(1, 2)).float()
        yield s.masked_fill(part_bad[..., None] | right_bad[:, None], -torch.inf)


def similarity(metric: Tensor, protected: int) -> Tensor:
    """Return the cosine similarity of every a in A with every b in B.

    Args:
        metric: ``(N, H, T, C)``; the mean over H is what tokens are compared by (ToMe, "Token Similarity").
        protected: leading tokens that belong to neither set.

    Returns:
        ``(N, |A|, |B|)``, float64 for a float64 metric, else float32. A token of norm 0 has similarity 0 to everything,
        a token with a NaN or an infinity has −inf to everything.

    All arithmetic is in float64. For narrower inputs the result is rounded to float32, which makes tokens that are
    copies of each other tie exactly although BLAS sums their products in different orders. For a float64 metric there
    is no wider type to round from, so the products are summed along the last axis, in one order for every pair.
    """
    return torch.cat(list(_similarities(metric, *match_sets(metric.shape[2], protected))), 1)


def match(
    metric: Tensor, r: int, protected: int, order: Tensor | None = None, sources: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Run steps 1 to 5 of the matching.

    Args:
        metric: ``(N, H, T, C)``, any floating dtype.
        r: tokens to remove from each item, already capped: by ``cap_r``, or at ``sources``.
        protected: tokens of neither set, which are never merged: the leading ones, or those that lead ``order``.
        order: ``(T,)`` int32, the tokens as ``arrange`` has them; None for even sources and odd destinations.
        sources: number of sources in ``order``; without ``order`` not used.

    Returns:
        ``(dest, members, offsets)`` as ``stoptome_kernels.MergePlan`` describes them.
    """
    n, _, tokens, _ = metric.shape
    if r == 0 or n == 0:
        return identity(n, tokens, tokens - r, metric.device)
    kept: Places = slice(0, protected)
    a: Places
    b: Places
    if order is None:
        a, b = match_sets(tokens, protected)
    else:
        kept, a, b = order.long().split([protected, sources, tokens - protected - sources])
    # each a proposes its nearest b; the first one on a tie
    nearest = [part.max(-1) for part in _similarities(metric, a, b)]
    best, partner = (torch.cat(parts, 1) for parts in zip(*nearest, strict=True))
    sources = best.shape[1]

    # keep the r most similar edges; a stable sort puts the lowest a first on a tie
    rank = best.sort(dim=-1, descending=True, stable=True).indices.argsort(1)
    merged = rank < r

    # output order: protected, unmerged A ascending, all of B ascending
    first_b = protected + sources - r
    stays = protected + torch.cumsum(~merged, 1) - 1
    dest = torch.empty(n, tokens, dtype=torch.int64, device=metric.device)
    dest[:, kept] = torch.arange(protected, device=metric.device)
    dest[:, a] = torch.where(merged, first_b + partner, stays)
    dest[:, b] = torch.arange(first_b, tokens - r, device=metric.device)

    # an edge of similarity −inf is carried out with weight 0, so that every item loses exactly r tokens
    weightless = torch.zeros(n, tokens, dtype=torch.bool, device=metric.device)
    weightless[:, a] = merged & (best == -torch.inf)
    members, offsets = build_groups(dest, weightless, tokens - r)
    return dest.int(), members, offsets


def build_groups(dest: Tensor, weightless: Tensor, tokens_out: int) -> tuple[Tensor, Tensor]:
    """Sort the tokens by destination: the gather lists that merging works from.

    Args:
        dest: ``(N, T)`` integer, input token to output token.
        weightless: ``(N, T)`` bool, tokens that are merged with weight 0.
        tokens_out: number of output tokens.

    Returns:
        members: ``(N, T)`` int32, tokens in order of destination, then of index; a weightless token i stands as ``~i``.
        offsets: ``(N, tokens_out + 1)`` int32; the members of output o are ``members[offsets[o]:offsets[o + 1]]``.
    """
    ordered, members = dest.long().sort(dim=-1, stable=True)
    members = torch.where(weightless.gather(1, members), ~members, members)
    # offset o is the number of tokens that go to outputs before o; counting by scatter would wait for the device on a
    # GPU in deterministic mode
    outputs = torch.arange(tokens_out + 1, device=dest.device).repeat(dest.shape[0], 1)
    return members.int(), torch.searchsorted(ordered, outputs, out_int32=True)


def identity(n: int, tokens: int, tokens_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plan that merges nothing (r = 0): every token stays where it is."""
    dest = torch.arange(tokens, dtype=torch.int32, device=device).repeat(n, 1)
    offsets = torch.arange(tokens_out + 1, dtype=torch.int32, device=device).repeat(n, 1)
    return dest, dest.clone(), offsets
