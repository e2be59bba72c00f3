# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching (ToMe, section 3, "Bipartite Soft Matching") as plain tensor operations."""

import torch
from torch import Tensor

# How many products the exactly tied float64 similarity may hold at once: 2**24 doubles are 128 MiB.
_CHUNK_PRODUCTS = 1 << 24


def match_sets(tokens: int, protected: int) -> tuple[slice, slice]:
    """The two sets of step 1 of the matching: A (even indices) proposes, B (odd indices) receives.

    The split is by the global token index with the first ``protected`` tokens left out.
    """
    return slice(protected + protected % 2, tokens, 2), slice(protected + 1 - protected % 2, tokens, 2)


def similarity(metric: Tensor, protected: int) -> Tensor:
    """Cosine similarity of every a in A with every b in B.

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
    a, b = match_sets(metric.shape[2], protected)
    m = metric.double().mean(1)
    bad = ~m.isfinite().all(-1)
    m = m.masked_fill(bad[..., None], 0.0)
    # cos(2^k u, v) = cos(u, v): dividing each token by a power of two costs no accuracy and keeps squares in range
    _, exponent = torch.frexp(m.abs().amax(-1, keepdim=True))
    m = m * torch.exp2(-exponent.clamp(-1022, 1022).double())
    norm = m.square().sum(-1, keepdim=True).sqrt()
    m = m / norm.masked_fill(norm == 0, 1.0)
    if metric.dtype == torch.float64:
        rows = max(1, _CHUNK_PRODUCTS // max(1, m.shape[0] * m[:, b].shape[1] * m.shape[2]))
        parts = [(part[:, :, None] * m[:, None, b]).sum(-1) for part in m[:, a].split(rows, 1)]
        s = torch.cat(parts, 1)
    else:
        s = (m[:, a] @ m[:, b].transpose(1, 2)).float()
    return s.masked_fill(bad[:, a, None] | bad[:, None, b], -torch.inf)


def match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 to 5 of the matching.

    Args:
        metric: ``(N, H, T, C)``, any floating dtype.
        r: tokens to remove from each item, already capped at ``(T - protected) // 2``.
        protected: leading tokens that are never merged.

    Returns:
        ``(dest, members, offsets)`` as :class:`stoptome_kernels.MergePlan` describes them.
    """
    n, _, tokens, _ = metric.shape
    if r == 0 or n == 0:
        return identity(n, tokens, tokens - r, metric.device)
    a, b = match_sets(tokens, protected)
    best, partner = similarity(metric, protected).max(-1)  # each a proposes its nearest b; the first one on a tie
    sources = best.shape[1]

    # keep the r most similar edges; a stable sort puts the lowest a first on a tie
    chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, :r]
    merged = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)

    # output order: protected, unmerged A ascending, all of B ascending
    first_b = protected + sources - r
    kept = protected + torch.cumsum(~merged, 1) - 1
    dest = torch.empty(n, tokens, dtype=torch.int64, device=metric.device)
    dest[:, :protected] = torch.arange(protected, device=metric.device)
    dest[:, a] = torch.where(merged, first_b + partner, kept)
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
    dest = dest.long()
    members = dest.sort(dim=-1, stable=True).indices
    members = torch.where(weightless.gather(1, members), ~members, members)
    # integer addition: atomics would be exact here, in any order
    counts = torch.zeros(dest.shape[0], tokens_out + 1, dtype=torch.int64, device=dest.device)
    counts.scatter_add_(1, dest + 1, torch.ones_like(dest))
    return members.int(), counts.cumsum(1).int()


def identity(n: int, tokens: int, tokens_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The plan that merges nothing (r = 0): every token stays where it is."""
    dest = torch.arange(tokens, dtype=torch.int32, device=device).repeat(n, 1)
    offsets = torch.arange(tokens_out + 1, dtype=torch.int32, device=device).repeat(n, 1)
    return dest, dest.clone(), offsets
