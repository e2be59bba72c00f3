# SPDX-License-Identifier: Apache-2.0
"""Checks of results: nothing is timed before it has passed here.

Truth is computed in float64 on the very numbers that the implementation saw, and every tolerance is derived.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from stoptome_kernels import reference
from torch import Tensor

from .baselines.operators import Peer
from .shapes import Inputs, sets

SINGLE = torch.finfo(torch.float32).eps / 2  # unit roundoff
FLIPPED = 0.01  # at most this share of the decisions may fall otherwise than in float64


class WrongResult(Exception):
    """An implementation computed something that rounding does not explain."""


@dataclass
class Check:
    """The columns of one implementation in the rows."""

    plan_decisions: int = 0  # sources: each stays or is merged somewhere
    plan_differences: int | None = None  # decided otherwise than by exact arithmetic; None: not comparable
    merge_max_error: float = 0.0  # against float64, given the implementation's own plan
    merge_of_bound: float = 0.0  # the largest error as a share of what rounding may cause
    grad_max_error: float = 0.0
    grad_of_bound: float = 0.0

    def fields(self) -> dict:
        return {f"check_{key}": value for key, value in asdict(self).items()}


class Truth:
    """Exact similarities of one set of inputs."""

    def __init__(self, inputs: Inputs):
        self.inputs, shape = inputs, inputs.shape
        metric = inputs.metric.double()
        heads, channels = (metric.shape[1] if metric.dim() == 4 else 1), metric.shape[-1]
        metric = metric.mean(1) if metric.dim() == 4 else metric
        metric = metric / metric.norm(dim=-1, keepdim=True)
        self.a, self.b = sets(shape, metric.device)
        self.scores = metric[:, self.a] @ metric[:, self.b].transpose(1, 2)
        self.best, self.nearest = self.scores.max(-1)
        self.r = shape.tokens - shape.tokens_out
        edge, ranking = self.best.sort(dim=-1, descending=True, stable=True)
        self.merged = torch.zeros_like(ranking, dtype=torch.bool).scatter(1, ranking[:, : self.r], True)
        self.weakest = edge[:, self.r - 1 : self.r]  # the weakest proposal that is carried out
        self.strongest_left = edge[:, self.r : self.r + 1] if self.r < edge.shape[1] else edge[:, -1:] - 4
        # a dot product of unit vectors of C terms, whose terms are means of H: each similarity may be off by this
        self.band = 2 * (channels + 2 * heads + 8) * SINGLE
        self._dest: Tensor | None = None

    def merged_by(self, dest: Tensor) -> tuple[Tensor, ...]:
        """``members``, ``offsets``, and in float64: merged rows, merged absolute values, sizes, gradient."""
        if self._dest is None or not torch.equal(dest, self._dest):  # most peers choose the same plan
            i = self.inputs
            nothing = torch.zeros_like(dest, dtype=torch.bool)
            members, offsets = reference.build_groups(dest, nothing, i.shape.tokens_out)
            groups = reference.Groups(members, offsets, i.size)
            rows = i.x.double()
            exact, total = reference.reduce(rows, groups, "mean")
            mean_abs, _ = reference.reduce(rows.abs(), groups, "mean")
            spread = reference.spread(i.grad.double(), groups, "mean")
            self._dest, self._merged = dest, (members, offsets, exact, mean_abs, total, spread)
        return self._merged

    def differences(self, dest: Tensor, who: str) -> int:
        """Check a plan against the contract; returns how many decisions differ from exact arithmetic."""
        shape, r = self.inputs.shape, self.r
        merged, partner = self.decisions(dest, who)
        sources = self.best.shape[1]
        expected = dest.clone()
        expected[:, : shape.protected] = torch.arange(shape.protected, device=dest.device)
        expected[:, self.b] = shape.protected + sources - r + torch.arange(self.scores.shape[2], device=dest.device)
        stays = shape.protected + (~merged).cumsum(1) - 1
        expected[:, self.a] = torch.where(merged, dest[:, self.a], stays)
        if not torch.equal(expected, dest):
            raise WrongResult(f"{who}: its output tokens are not in the order of the contract")
        chosen = self.scores.gather(2, partner[..., None]).squeeze(-1)
        wrong = (merged & (chosen < self.best - self.band)) | (merged & (self.best < self.weakest - self.band))
        wrong |= ~merged & (self.best > self.strongest_left + self.band)
        if wrong.any():
            raise WrongResult(f"{who}: {int(wrong.sum())} tokens matched otherwise than rounding explains")
        flips = int(((merged != self.merged) | (merged & self.merged & (partner != self.nearest))).sum())
        if flips > max(2, FLIPPED * merged.numel()):
            raise WrongResult(f"{who}: {flips} of {merged.numel()} decisions within rounding: too many to be chance")
        return flips

    def decisions(self, dest: Tensor, who: str) -> tuple[Tensor, Tensor]:
        first_b = self.inputs.shape.protected + self.best.shape[1] - self.r
        mine = dest[:, self.a]
        merged = mine >= first_b
        if bool((dest < 0).any()) or bool((dest >= self.inputs.shape.tokens_out).any()):
            raise WrongResult(f"{who}: a destination outside the output tokens")
        if bool((merged.sum(1) != self.r).any()):
            raise WrongResult(f"{who}: an item does not lose exactly r = {self.r} tokens")
        return merged, torch.where(merged, mine - first_b, 0)


def check(peer: Peer, truth: Truth) -> Check:
    """Run every function of ``peer`` once and compare. Raises WrongResult."""
    inputs, found = truth.inputs, Check(truth.best.numel())
    plan = peer.match(inputs)
    dest = peer.dest(inputs, plan)
    # a peer that averages and multiplies in bfloat16 picks other pairs by design: only its form can be checked
    if peer.fused or inputs.x.dtype == torch.float32:
        found.plan_differences = truth.differences(dest, peer.name)
    else:
        truth.decisions(dest, peer.name)
    members, offsets, exact, mean_abs, exact_total, spread = truth.merged_by(dest)
    if peer.fused and not (torch.equal(members, plan.members) and torch.equal(offsets, plan.offsets)):
        raise WrongResult(f"{peer.name}: members and offsets of the plan do not follow from its dest")

    leaf = inputs.x.detach().requires_grad_()
    y, total = peer.merge(inputs, leaf, plan)
    (g,) = torch.autograd.grad(y, leaf, inputs.grad)
    width, info = offsets.diff(dim=1)[..., None], torch.finfo(inputs.x.dtype)
    unit, floor = info.eps / 2, 4 * info.eps * info.smallest_normal  # the floor: below it numbers are subnormal
    if peer.fused:  # products and sums in float32, then one rounding to the dtype
        bound = (width + 3) * SINGLE * mean_abs + unit * exact.abs() + floor
        grad_bound = (4 * SINGLE + unit) * spread.abs() + floor
    else:  # every step rounds to the dtype: product, sums of rows and of sizes, division
        bound = 2 * (width + 3) * unit * mean_abs + floor
        grad_bound = 2 * (width.max() + 3) * unit * spread.abs() + floor
    found.merge_max_error, found.merge_of_bound = _compare(y, exact, bound, f"{peer.name}: merge")
    found.grad_max_error, found.grad_of_bound = _compare(g, spread, grad_bound, f"{peer.name}: gradient of merge")
    loose = SINGLE if peer.fused else unit
    if total is not None:
        size = total.reshape(exact_total.shape)
        _compare(size, exact_total, width[..., 0] * loose * exact_total, f"{peer.name}: size")

    slot = dest[..., None].expand(-1, -1, inputs.x.shape[2])
    if not torch.equal(peer.unmerge(inputs, y.detach(), plan), y.detach().gather(1, slot)):
        raise WrongResult(f"{peer.name}: unmerge does not give every token its group's row")
    check_both(peer, inputs, leaf, y, g)
    return found


def check_both(peer: Peer, inputs: Inputs, leaf: Tensor, y: Tensor, g: Tensor) -> None:
    """match + merge in one call must give what the two calls gave: the package bit for bit, others nearly."""
    both, _ = peer.both(inputs, leaf)
    (both_g,) = torch.autograd.grad(both, leaf, inputs.grad)
    far = torch.zeros(y.shape[0], dtype=torch.bool, device=y.device)
    for got, want in ((both, y), (both_g, g)):
        if got.shape != want.shape or not got.isfinite().all() or (peer.fused and not torch.equal(got, want)):
            raise WrongResult(f"{peer.name}: match + merge differs from match, then merge")
        far |= ((got - want).abs() > 0.02 + 0.05 * want.abs()).flatten(1).any(1)
    # a compiler sums similarities in another order and may so pick another pair, which moves rows of that item; in
    # bfloat16 it also keeps more digits than eager, so most items differ
    if inputs.x.dtype == torch.float32 and far.sum() > max(2, 5 * FLIPPED * far.numel()):
        raise WrongResult(f"{peer.name}: {int(far.sum())} of {far.numel()} items differ from the eager peer's")


def check_directions(who: str, got: Tensor, right: Tensor, least: float) -> None:
    """Raise WrongResult if a row of ``got`` is not finite, or points elsewhere than that of ``right``.

    Of models that merge, results differ where two tokens are equally similar to rounding; directions hardly do.
    """
    cosine = torch.cosine_similarity(got, right, dim=-1).min().item()
    if not (got.isfinite().all() and cosine >= least):
        raise WrongResult(f"{who}: a row's cosine with the expected one is {cosine:.6f}")


def _compare(got: Tensor, exact: Tensor, bound: Tensor, what: str) -> tuple[float, float]:
    if got.shape != exact.shape:
        raise WrongResult(f"{what} has shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    error = (got.double() - exact).abs()
    share = (error / bound).max().item()
    if not share <= 1:  # a NaN fails too
        raise WrongResult(f"{what} is off by {error.max().item():.3g}, {share:.3g} times what rounding may cause")
    return error.max().item(), share
