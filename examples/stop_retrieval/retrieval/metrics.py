# SPDX-License-Identifier: Apache-2.0
"""R@1 and its kin, from similarities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 24  # similarities compared at a time: 16 MiB of booleans


@dataclass(frozen=True)
class Retrieval:
    """How well queries found what belongs to them.

    Attributes:
        r1, r5, r10: per cent of the queries whose right candidate is among the first one, five, ten.
        median_rank, mean_rank: of the right candidates; the first has rank 1.
        queries, candidates: how many there were.
    """

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    queries: int
    candidates: int

    def line(self, way: str) -> str:
        """The line that STOP logs; ``way`` is ``text_to_video`` or ``video_to_text``."""
        title = {"text_to_video": "Text-to-Video", "video_to_text": "Video-to-Text"}[way]
        return (
            f"{title}: R@1: {self.r1:.1f} - R@5: {self.r5:.1f} - R@10: {self.r10:.1f} - "
            f"Median R: {self.median_rank:.1f} - Mean R: {self.mean_rank:.1f}"
        )


def ranks(similarity: Tensor, truth: Tensor) -> Tensor:
    """The place of the right candidate among all, by falling similarity.

    Equal similarities count against it, so that a model to which all is alike finds nothing; NaN is below everything.

    Args:
        similarity: ``(A, B)`` of A queries and B candidates.
        truth: ``(A,)`` integers, the index of each query's right candidate.

    Returns:
        ``(A,)`` int64 from 1 to B.

    Raises:
        ValueError: shapes that don't match, or an index out of range.
    """
    _check(similarity, truth, "truth")
    own = similarity.gather(1, truth[:, None])
    counts = torch.cat([(part >= mine).sum(1) for part, mine in _parts(similarity, own)])
    return torch.where(own.isnan()[:, 0], similarity.shape[1], counts)


def text_to_video(similarity: Tensor, video_of_caption: Tensor) -> Retrieval:
    """Captions look for their videos.

    Args:
        similarity: ``(captions, videos)``.
        video_of_caption: ``(captions,)`` integers, the index of each caption's video; one without captions is only
            something to be found wrongly.

    Returns:
        As STOP and CLIP4Clip count: where some video has several captions, the median of an even number of ranks is
        the lower of the two in the middle, elsewhere their mean.

    Raises:
        ValueError: shapes that don't match, an index out of range, or no captions.
    """
    _check(similarity, video_of_caption, "video_of_caption")
    found = ranks(similarity, video_of_caption)
    several = bool((video_of_caption.bincount() > 1).any())
    return _retrieval(found, similarity.shape[1], lower_median=several)


def video_to_text(similarity: Tensor, video_of_caption: Tensor) -> Retrieval:
    """Videos look for their captions. All captions of one video are one candidate, as similar as the best of them
    (STOP, CLIP4Clip); videos without captions take no part.

    Args:
        similarity: ``(captions, videos)``.
        video_of_caption: ``(captions,)`` integers, the index of each caption's video.

    Raises:
        ValueError: shapes that don't match, an index out of range, or no captions.
    """
    _check(similarity, video_of_caption, "video_of_caption")
    videos = similarity.shape[1]
    best = similarity.new_full((videos, videos), -torch.inf)  # [i, j]: the captions of i with video j
    for part, owners in _parts(similarity, video_of_caption):
        part = part.nan_to_num(-torch.inf, torch.inf, -torch.inf)  # NaN must not hide a video's other captions
        best.scatter_reduce_(0, owners[:, None].expand_as(part), part, "amax")
    queries = video_of_caption.unique()
    found = ranks(best[queries][:, queries].t(), torch.arange(len(queries), device=best.device))
    return _retrieval(found, len(queries), lower_median=False)


def paired_interval(differences: Tensor, owners: Tensor) -> tuple[float, float]:
    """Return a 95 % interval of a mean of paired differences, by the normal approximation.

    Args:
        differences: ``(queries,)`` floats, of the same queries by two models.
        owners: ``(queries,)`` integers; queries with the same one, the captions of one video, are not independent of
            each other, and vary together (a cluster-robust deviation).

    Differences are from -1 to 1. One more query that differs is added to the deviation, so that few queries without any
    difference are not taken for certainty (after Agresti and Min, 2005).
    """
    count = len(differences)
    mean = differences.double().mean()
    clusters = torch.zeros(int(owners.max()) + 1, dtype=torch.float64)
    clusters.index_add_(0, owners, differences.double() - mean)
    half = 1.96 * math.sqrt(float(clusters.square().sum()) + 1) / count
    return float(mean) - half, float(mean) + half


def _parts(similarity: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time of a matrix and of what belongs to its rows."""
    rows = max(1, CHUNK // max(1, similarity.shape[1]))
    return zip(similarity.split(rows), beside.split(rows), strict=True)


def _retrieval(found: Tensor, candidates: int, lower_median: bool) -> Retrieval:
    if not len(found):
        raise ValueError("similarity must have queries, got none")
    ordered = found.double().sort().values
    middle = (len(found) - 1) // 2
    upper = middle if lower_median else len(found) // 2
    r1, r5, r10 = (100 * int((found <= k).sum()) / len(found) for k in (1, 5, 10))
    median = (float(ordered[middle]) + float(ordered[upper])) / 2
    return Retrieval(r1, r5, r10, median, float(ordered.mean()), len(found), candidates)


def _check(similarity: Tensor, truth: Tensor, name: str) -> None:
    if similarity.dim() != 2 or not similarity.is_floating_point():
        raise ValueError(f"similarity must be a matrix of floats, got {similarity.dtype} {tuple(similarity.shape)}")
    count, candidates = similarity.shape
    if truth.shape != (count,) or truth.dtype != torch.int64:
        raise ValueError(f"{name} must be {count} int64 indices, got {truth.dtype} of shape {tuple(truth.shape)}")
    if count and not 0 <= int(truth.min()) <= int(truth.max()) < candidates:
        raise ValueError(f"{name} must be from 0 to {candidates - 1}, got {int(truth.min())} to {int(truth.max())}")
