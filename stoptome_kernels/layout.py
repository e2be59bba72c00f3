# SPDX-License-Identifier: Apache-2.0
"""Layouts of tensors in memory that the kernels ask for, memory for their results, and the dtype that they add in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Groups


def unit_stride(x: Tensor) -> Tensor:
    """Return ``x`` with neighbouring elements of its last axis next to each other: the kernels take all other strides
    as they are, and this is the one case that copies."""
    return x if x.stride()[-1] == 1 or x.shape[-1] <= 1 else x.contiguous()


def with_prefix(prefix: Tensor | None, x: Tensor) -> Tensor:
    """Return keys or values ``x (N, H, T, d)`` with those of the prefix ``(M, H, G, d)`` in front, for kernels that
    can't read them where they are: ``(N, H, G + T, d)``, with the heads of a token next to each other in memory, as in
    x."""
    if prefix is None:
        return x
    n, m = x.shape[0], prefix.shape[0]
    rows = prefix.transpose(1, 2).unsqueeze(1).expand(-1, n // max(m, 1), -1, -1, -1).flatten(0, 1)
    return torch.cat([rows, x.transpose(1, 2)], 1).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """Return ``x (N, H, T, d)`` with the heads of a token next to each other in memory: copied only if they are not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_heads_last(x: Tensor, n: int, heads: int, tokens: int) -> Tensor:
    """Return memory for ``(n, heads, tokens, d)`` of x's kind, laid out as ``heads_last`` has it."""
    d = x.shape[-1]
    # no view, which autograd would not let be changed in place behind a function of its own
    return x.new_empty_strided((n, heads, tokens, d), (tokens * heads * d, d, heads * d, 1))


def contiguous_groups(groups: Groups) -> Groups:
    """Return ``groups`` with all tensors contiguous, as the kernels read them."""
    members, offsets, size = groups
    if members.is_contiguous() and offsets.is_contiguous() and (size is None or size.is_contiguous()):
        return groups
    return Groups(members.contiguous(), offsets.contiguous(), None if size is None else size.contiguous())


def empty_plan(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for dest, members and offsets of a matching of ``metric (N, H, T, C)`` or ``(N, T, C)``."""
    n, tokens = metric.shape[0], metric.shape[-2]
    dest = metric.new_empty((n, tokens), dtype=torch.int32)
    return dest, torch.empty_like(dest), dest.new_empty((n, tokens - r + 1))


def empty_merged(x: Tensor, groups: Groups, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return memory for x ``(N, T, D)`` merged and its sizes: ``(N, T_out, D)`` of x's dtype, or another, and
    ``(N, T_out)`` float32."""
    n, _, dim = x.shape
    tokens, given = groups.offsets.shape[1] - 1, x.dtype
    # to ask for a dtype costs a microsecond
    y = x.new_empty((n, tokens, dim)) if dtype in (None, given) else x.new_empty((n, tokens, dim), dtype=dtype)
    like = x if given == torch.float32 else groups.size
    return y, x.new_empty((n, tokens), dtype=torch.float32) if like is None else like.new_empty((n, tokens))


def log_size_bias(size: Tensor | None, keys: Tensor) -> Tensor | None:
    """Return sizes ``(N, T)`` as an additive mask ``(N, 1, 1, K)`` for K keys, of which those before the last T count
    once; float32 (float64 for float64). No mask for each query, and no gradient, with which torch has no fused
    kernel."""
    if size is None:
        return None
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    return F.pad(size.detach().to(dtype).log(), (keys.shape[2] - size.shape[1], 0))[:, None, None]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
