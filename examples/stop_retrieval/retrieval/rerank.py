# SPDX-License-Identifier: Apache-2.0
"""Similarities corrected for hubs, the candidates that many queries find whether they belong to them or not.

Both corrections take raw cosines with their default settings. On logits, cosines times ``scale = exp(logit_scale)``,
the same result takes ``beta / scale`` and ``temperature * scale``. Queries are rows: pass the transpose for the other
way round.
"""

from __future__ import annotations

import torch
from torch import Tensor


def qb_norm(similarity: Tensor, bank_similarity: Tensor, k: int = 1, beta: float = 20.0, theta: int = 1) -> Tensor:
    """QB-Norm with the dynamic inverted softmax (Bogolin et al., CVPR 2022, arXiv 2112.12777).

    A candidate is a hub if it is among the first k of at least ``theta`` bank queries. A query whose first candidate is
    a hub has ``exp(beta · s)`` of every candidate divided by the sum of the same over the bank; other queries stay.

    Args:
        similarity: ``(A, B)`` cosines of A queries and B candidates.
        bank_similarity: ``(bank, B)`` cosines of other queries, from the training set as a rule, and the same
            candidates.
        k: candidates that a bank query finds; more than B are B.
        beta: inverse temperature; 20 is the paper's.
        theta: bank queries that make a hub; 1 is the paper's, STOP searches with 3 for texts and 5 for videos.

    Returns:
        ``(A, B)`` float32 (float64 if ``similarity`` is): the logarithm of the quotient, over ``beta``, which is
        ``s − logsumexp(beta · bank) / beta``. It orders the candidates of a query as the quotient does, stays finite
        where exponentials don't, and can't be compared between queries. NaN stays NaN.

    Raises:
        ValueError: shapes that don't match, or a setting out of range.
    """
    for value, name in ((similarity, "similarity"), (bank_similarity, "bank_similarity")):
        if value.dim() != 2 or value.shape[1] != similarity.shape[1] or not value.shape[1]:
            raise ValueError(f"{name} must be queries by candidates (as many in both), got shape {tuple(value.shape)}")
    if k < 1 or theta < 1 or not beta > 0:
        raise ValueError(f"k and theta must be 1 or more and beta above 0, got {k}, {theta} and {beta}")
    result = _wide(similarity).clone()
    found = bank_similarity.topk(min(k, bank_similarity.shape[1])).indices
    hubs = found.flatten().bincount(minlength=similarity.shape[1]) >= theta
    rows = hubs[similarity.argmax(1)].nonzero()[:, 0]
    result[rows] -= (beta * _wide(bank_similarity)).logsumexp(0).to(result) / beta
    return result


def dual_softmax(similarity: Tensor, temperature: float = 0.01) -> Tensor:
    """DSL, the dual softmax of CAMoE at inference (Cheng et al., 2021, arXiv 2109.04290): similarities times a prior,
    the softmax over all queries for each candidate.

    It takes the test queries together, as no search engine could, so that its figures belong beside others with DSL
    only.

    Args:
        similarity: ``(A, B)`` cosines of A queries and B candidates.
        temperature: of the softmax; 0.01 is that of trained CLIP models.

    Returns:
        ``(A, B)`` float64, ``s · softmax(s / temperature) · A``. A float32 prior would reach 0 for cosines 1.04 apart,
        and candidates that are all 0 have no order. Negative cosines rise as their prior falls, as in the original.

    Raises:
        ValueError: no matrix, or a temperature that isn't positive.
    """
    if similarity.dim() != 2:
        raise ValueError(f"similarity must be queries by candidates, got shape {tuple(similarity.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    prior = (similarity.double() / temperature).softmax(0)
    return prior.mul_(similarity).mul_(len(similarity))


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
