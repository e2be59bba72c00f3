# SPDX-License-Identifier: Apache-2.0
"""The operators of this package in operations that ONNX has; ``api`` runs them while ``torch.onnx.export`` captures a
program. Attention is torch's own function there, ``ops.attention.sdpa``, and matching of given sets is refused.

The same meaning as python_ref's, which is written with ones that ONNX lacks (segment_reduce, frexp, a stable sort);
sums are in float32 (float64 for float64) in whatever order the runtime adds. Plans are given and returned as tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import accumulator_dtype
from .reference import build_groups, cap_r, match_sets


def is_onnx_exporting() -> bool:
    """Return whether ``torch.onnx.export`` is capturing the program."""
    return torch.onnx.is_in_onnx_export()


is_onnx_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it is False whenever torch.compile traces


def group_tokens(dest: Tensor, weightless: Tensor, tokens_out: int) -> tuple[Tensor, Tensor]:
    """Return ``members (N, T)`` and ``offsets (N, tokens_out + 1)`` of a plan, see ``reference.build_groups``; in
    operations that ONNX has where it is asked for.

    Args:
        dest: ``(N, T)`` integer, input token to output token.
        weightless: ``(N, T)`` bool, tokens that are merged with weight 0.
        tokens_out: number of output tokens.
    """
    if not is_onnx_exporting():
        return build_groups(dest, weightless, tokens_out)
    # a stable sort has no ONNX form: no two of these keys are equal
    dest, tokens = dest.long(), dest.shape[1]
    place = torch.arange(tokens, device=dest.device)
    members = (dest * tokens + place).topk(tokens, dim=-1, largest=False).indices
    members = torch.where(weightless.gather(1, members), ~members, members)
    counts = torch.zeros(dest.shape[0], tokens_out + 1, dtype=torch.int64, device=dest.device)
    return members.int(), counts.scatter_add(1, dest + 1, torch.ones_like(dest)).cumsum(1).int()


def match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dest``, ``members`` and ``offsets``, see ``stoptome_kernels.match``."""
    m = metric.detach().to(accumulator_dtype(metric.dtype))
    m = m.mean(1) if m.dim() == 4 else m
    n, tokens, _ = m.shape
    r = cap_r(r, tokens, protected)
    bad = (m.isnan() | m.isinf()).any(-1, keepdim=True)
    m = m.masked_fill(bad, 0.0)
    largest = m.abs().amax(-1, keepdim=True)
    m = m / torch.where(largest == 0, 1.0, largest)  # squares stay in range
    norm = m.square().sum(-1, keepdim=True).sqrt()
    m = m / torch.where(norm == 0, 1.0, norm)
    a, b = match_sets(tokens, protected)
    scores = m[:, a] @ m[:, b].mT
    scores = scores.masked_fill(bad[:, a] | bad[:, b].mT, -torch.inf)
    best, partner = scores.max(-1)
    sources = best.shape[1]
    chosen = best.topk(r, dim=-1).indices  # in ONNX the lowest first on a tie
    merged = torch.zeros_like(best, dtype=torch.int64).scatter(1, chosen, torch.ones_like(chosen)) > 0
    first_b = protected + sources - r
    stays = protected + torch.cumsum((~merged).long(), 1) - 1
    places = torch.arange(tokens, device=m.device)
    lead, tail = places[:protected].expand(n, -1), places[first_b : tokens - r].expand(n, -1)
    # by sets, then by index: what stands where is known before any token is
    by_sets = torch.cat([lead, torch.where(merged, first_b + partner, stays), tail], 1)
    back = torch.cat([places[:protected], places[a], places[b]]).argsort()
    dest = by_sets[:, back]
    nothing = torch.zeros(n, 1, dtype=torch.bool, device=m.device)
    lost = torch.cat(
        [nothing.expand(-1, protected), merged & (best == -torch.inf), nothing.expand(-1, tail.shape[1])], 1
    )
    return dest.int(), *group_tokens(dest, lost[:, back], tokens - r)


def merge(
    x: Tensor, dest: Tensor, weightless: Tensor, tokens_out: int, size: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """Return merged tokens and sizes, see ``stoptome_kernels.merge``; ``weightless`` as in ``group_tokens``."""
    counts = torch.ones_like(dest, dtype=torch.float32) if size is None else size
    counts = counts.masked_fill(weightless, 0.0)
    into = dest.long()
    total = counts.new_zeros(x.shape[0], tokens_out).scatter_add(1, into, counts)
    rows, weight = x.to(accumulator_dtype(x.dtype)), counts[..., None].to(accumulator_dtype(x.dtype))
    into = into[..., None].expand(-1, -1, x.shape[2])
    empty = rows.new_zeros(x.shape[0], tokens_out, x.shape[2])
    if mode == "mean":
        y = empty.scatter_add(1, into, rows * weight) / total[..., None]
    elif mode == "sum":
        y = empty.scatter_add(1, into, rows.masked_fill(weight == 0, 0.0))
    else:
        y = (empty - torch.inf).scatter_reduce(1, into, rows.masked_fill(weight == 0, -torch.inf), "amax")
    return y.to(x.dtype), total


def unmerge(y: Tensor, dest: Tensor) -> Tensor:
    """Return a row for each original token, see ``stoptome_kernels.unmerge``."""
    return y.gather(1, dest.long()[..., None].expand(-1, -1, y.shape[2]))


def merge_norm(
    x: Tensor,
    residual: Tensor,
    dest: Tensor,
    weightless: Tensor,
    tokens_out: int,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return merged tokens, the same normalised, and sizes, see ``stoptome_kernels.merge_norm``."""
    y, total = merge(x + residual, dest, weightless, tokens_out, size, "mean")
    weight, bias = (None if p is None else p.to(y.dtype) for p in (weight, bias))
    return y, F.layer_norm(y, y.shape[-1:], weight, bias, eps), total
