# SPDX-License-Identifier: Apache-2.0
"""Weighted merging over the groups of a plan and its adjoint (ToMe, "Tracking Token Size")."""

from typing import NamedTuple

import torch
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Groups(NamedTuple):
    """A plan's groups, and how many tokens each of their members stands for.

    Attributes:
        members: ``(N, T)`` int32, tokens in order of destination, then of index; ``~i`` for a token i of weight 0.
        offsets: ``(N, T_out + 1)`` int32; the members of output o are ``members[offsets[o]:offsets[o + 1]]``.
        size: ``(N, T)`` float32, by token; None for all ones.
    """

    members: Tensor
    offsets: Tensor
    size: Tensor | None = None


class CheckedGroups(NamedTuple):
    """A plan's groups as they are read, once, and checked.

    Attributes:
        index: ``(N, T)`` int64, the token of each member.
        valid: ``(N, T)`` bool, members of weight 1; ``~i`` stands for a token i of weight 0.
        offsets: ``(N, T_out + 1)`` int32.
        damaged: ``(N, 1, 1)`` bool, items whose groups don't hold each token once; None where that is an error.
    """

    index: Tensor
    valid: Tensor
    offsets: Tensor
    damaged: Tensor | None

    def marked(self, rows: Tensor) -> Tensor:
        """Return ``(N, …, D)`` with NaN in the items that are damaged."""
        return rows if self.damaged is None else rows.masked_fill(self.damaged, torch.nan)


def can_raise(tensor: Tensor) -> bool:
    """Return whether the numbers in a tensor can be asked for: they are on the CPU, and more than a trace's
    description."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and torch._C._get_tracing_state() is None


def read(groups: Groups) -> CheckedGroups:
    """Read and check a plan. On the CPU a damaged one is an error; elsewhere, where asking would wait for the device,
    its damaged items are replaced and marked.

    Raises:
        IndexError: a plan on the CPU whose groups don't hold each token of their item once.
    """
    # once, whatever another thread writes into them meanwhile
    members, offsets = groups.members.clone(), groups.offsets.clone()
    tokens = members.shape[1]
    every = torch.arange(tokens, device=members.device)
    valid = members >= 0
    index = torch.where(valid, members, ~members).long()
    good = (offsets[:, 0] == 0) & (offsets[:, -1] == tokens) & (offsets.diff(dim=1) > 0).all(1)
    good = good & (index.sort(1).values == every).all(1)
    if not can_raise(members):  # each token of a damaged item alone, the last group with the rest
        alone = torch.arange(offsets.shape[1], dtype=torch.int32, device=offsets.device)
        alone[-1] = tokens
        index, offsets = torch.where(good[:, None], index, every), torch.where(good[:, None], offsets, alone)
        return CheckedGroups(index, valid, offsets, ~good[:, None, None])
    if not bool(good.all()):
        item = int((~good).nonzero()[0])
        raise IndexError(
            f"plan is damaged: the groups of item {item} don't hold each of its {tokens} tokens once; it was changed "
            "after match(), or was not made by it"
        )
    return CheckedGroups(index, valid, offsets, None)


def _segments(rows: Tensor, offsets: Tensor, how: str) -> Tensor:
    """Reduce ``(N, T, D)`` rows, sorted by group, to ``(N, T_out, D)``; each group in ascending order, no atomics."""
    n, tokens, dim = rows.shape
    lengths = offsets.diff(dim=1)
    if rows.numel() == 0:
        return rows.new_zeros(n, lengths.shape[1], dim)
    flat = rows.reshape(n * tokens, dim)
    out = torch.segment_reduce(flat, how, lengths=lengths.flatten().long(), axis=0, unsafe=True)
    return out.view(n, lengths.shape[1], dim)


def group_of(offsets: Tensor, tokens: int) -> Tensor:
    """Return the output token of each position of ``members``: ``(N, T)`` int64."""
    position = torch.arange(tokens, dtype=offsets.dtype, device=offsets.device).repeat(offsets.shape[0], 1)
    group = torch.searchsorted(offsets[:, 1:].contiguous(), position, right=True)
    return group.clamp_max(max(offsets.shape[1] - 2, 0))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def reduce(x: Tensor, groups: Groups, mode: str) -> tuple[Tensor, Tensor]:
    """Merge: one output row for each group.

    Args:
        x: ``(N, T, D)`` floating.
        groups: groups and sizes of N items of T tokens.
        mode: ``mean`` Σ s x / Σ s; ``sum`` Σ x; ``max`` elementwise maximum, NaN if a member is NaN; ``all`` Σ x over
            the weight-0 members too (the adjoint of unmerging).

    Returns:
        y ``(N, T_out, D)`` in x's dtype, accumulated in float32 (float64 for float64) in ascending member order, and
        size_out ``(N, T_out)`` float32 = Σ s. A group of one token is copied bit for bit.
    """
    checked, size = read(groups), groups.size
    index, valid, offsets, _ = checked
    if mode == "all":
        valid = torch.ones_like(valid)
    weight = x.new_ones(index.shape, dtype=torch.float32) if size is None else size.gather(1, index)
    weight = weight.to(_wide(x.dtype)).masked_fill(~valid, 0.0)[..., None]
    size_out = _segments(weight, offsets, "sum")
    rows = _rows(x, index).to(_wide(x.dtype))
    if mode == "max":
        y = _segments(rows.masked_fill(~valid[..., None], -torch.inf), offsets, "max")
    elif mode == "mean":
        y = _segments((weight * rows).masked_fill(~valid[..., None], 0.0), offsets, "sum") / size_out
    else:
        y = _segments(rows.masked_fill(~valid[..., None], 0.0), offsets, "sum")

    position = torch.where(valid, index, -1)[..., None].to(torch.float64)  # exact: indices are below 2^53
    alone = _segments(valid[..., None].to(torch.float32), offsets, "sum") == 1
    only = _segments(position, offsets, "max").squeeze(-1).long()
    # copied as integers: gather and where change the bits of a NaN for 16-bit floats
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    copy = _rows(x.view(bits), only.clamp_min(0))
    y = torch.where(alone, copy, y.to(x.dtype).view(bits)).view(x.dtype)
    return checked.marked(y), checked.marked(size_out).squeeze(-1).float()


def spread(grad: Tensor, groups: Groups, mode: str, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """Return the adjoint of ``reduce``: one row for each token, read from its group's row.

    Args:
        grad: ``(N, T_out, D)``.
        groups, mode: as in ``reduce``; ``all`` is unmerging: x̂_i = y_dest(i).
        x, y: input and output of the merge, for ``max`` alone.

    Returns:
        ``(N, T, D)`` in grad's dtype: ``mean`` s_i / Σ s · grad, ``sum`` grad, ``max`` grad where the token is the
        first of its group to reach the maximum. Tokens of weight 0 get 0, except in ``all``.
    """
    checked, size = read(groups), groups.size
    index, valid, offsets, _ = checked
    group = group_of(offsets, index.shape[1])
    rows = _rows(grad, group)
    if mode == "max":
        if x is None or y is None:
            raise ValueError("mode 'max' needs x and y")
        won = _rows(_winners(x, y, checked), group) == index[..., None]
        rows = rows.masked_fill(~won, 0.0)
    elif mode == "mean":
        wide = _wide(grad.dtype)
        weight = grad.new_ones(index.shape, dtype=wide) if size is None else size.gather(1, index).to(wide)
        weight = weight.masked_fill(~valid, 0.0)
        total = _segments(weight[..., None], offsets, "sum").squeeze(-1)
        alone = _segments(valid[..., None].to(wide), offsets, "sum").squeeze(-1) == 1
        share = torch.where(alone.gather(1, group), 1.0, weight / total.gather(1, group))
        rows = (share[..., None] * rows.to(wide)).to(grad.dtype)
    if mode != "all":
        rows = rows.masked_fill(~valid[..., None], 0.0)
    # by sorting, not by scatter, which on a GPU waits for the device in deterministic mode
    return checked.marked(_rows(rows, index.argsort(1)))


def winners(x: Tensor, y: Tensor, groups: Groups) -> Tensor:
    """Return the token that gave each element of a ``max`` merge, the lowest one on a tie: ``(N, T_out, D)`` int64."""
    return _winners(x, y, read(groups))


def _winners(x: Tensor, y: Tensor, groups: CheckedGroups) -> Tensor:
    index, valid, offsets, _ = groups
    rows = _rows(x, index)
    reached = _rows(y, group_of(offsets, index.shape[1]))
    hit = ((rows == reached) | (rows.isnan() & reached.isnan())) & valid[..., None]
    candidate = torch.where(hit, index[..., None].double(), torch.inf)
    return _segments(candidate, offsets, "min").clamp_max(max(index.shape[1] - 1, 0)).long()
