# SPDX-License-Identifier: Apache-2.0
"""The result of a matching: which token goes where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .onnx import group_tokens
from .reference import Groups
from .reference.merging import group_of, read


@dataclass(frozen=True, eq=False)
class MergePlan:
    """The output token of every input token of every item; made by ``stoptome_kernels.match``, never changed.

    A value without hidden state: it can be reused for any tensors of its shape, passed into and out of compiled
    functions, and composed with ``then``. It takes 12 bytes per token and 4 per item.

    Attributes:
        dest: ``(N, tokens_in)`` int32, output token of every input token. Composed over layers it is the *source
            trace*: the merged token that an original token ended in.
        members: ``(N, tokens_in)`` int32, input tokens sorted by output token, then by index. A token that was merged
            with weight 0 (its metric held a NaN or an infinity) is written as ``~i``.
        offsets: ``(N, tokens_out + 1)`` int32; output o gathers ``members[offsets[o]:offsets[o + 1]]``.
        protected: number of leading tokens that are never merged; 0 where sources and destinations were given by index.
    """

    dest: Tensor
    members: Tensor
    offsets: Tensor
    protected: int

    @property
    def tokens_in(self) -> int:
        """Number of tokens of an item before merging."""
        return self.dest.shape[1]

    @property
    def tokens_out(self) -> int:
        """Number of tokens of an item after merging."""
        return self.offsets.shape[1] - 1

    @property
    def r(self) -> int:
        """Number of tokens removed from each item: the requested number, capped at half of the unprotected tokens, or
        at the number of given sources."""
        return self.dest.shape[1] - self.offsets.shape[1] + 1

    def _groups(self, size: Tensor | None = None) -> Groups:
        """Return the groups, with the sizes of the tokens, as the operators take them."""
        return Groups(self.members, self.offsets, size)

    def then(self, following: MergePlan) -> MergePlan:
        """Return the plan from this plan's input to the output of ``following``.

        Sizes merged by the composed plan equal sizes merged by one plan after the other; its ``dest`` is the trace
        through both. Deterministic, no host synchronisation.

        Args:
            following: plan that was matched on this plan's output.

        Raises:
            TypeError: ``following`` is not a MergePlan.
            ValueError: ``following`` does not start from this plan's tokens.
            IndexError: a plan on the CPU is damaged: its groups don't contain each token exactly once, or contradict
                its ``dest``. A plan on a GPU is not checked, since this would synchronise with the device: a token with
                an output out of range goes to the nearest one.
        """
        if not isinstance(following, MergePlan):
            raise TypeError(f"following must be a MergePlan, got {type(following).__name__}")
        for plan, name in ((self, "this plan"), (following, "following")):
            checks.parts(plan.dest, plan.members, plan.offsets, name)
            checks.plan_groups(plan.members, plan.offsets, name)
        have, want = (self.dest.shape[0], self.tokens_out), tuple(following.dest.shape)
        if have != want:
            raise ValueError(
                f"following starts from (N, tokens) = {want}, but this plan leads to {have}; "
                "compose plans in the order of the layers"
            )
        if self.dest.device != following.dest.device:
            raise ValueError(
                f"following is on {following.dest.device}, this plan on {self.dest.device}; move one of them"
            )
        step, weightless = self._read("this plan")
        dest, more = following._read("following")
        step = step.long()
        dest = dest.gather(1, step)
        weightless = weightless | more.gather(1, step)
        members, offsets = group_tokens(dest, weightless, following.tokens_out)
        return MergePlan(dest, members, offsets, min(self.protected, following.protected))

    def to(self, device: torch.device | str) -> MergePlan:
        """Return the same plan on another device; the plan itself if it is there already."""
        if self.dest.device == torch.device(device):
            return self
        return MergePlan(self.dest.to(device), self.members.to(device), self.offsets.to(device), self.protected)

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """Return ``dest`` and, ``(N, tokens_in)`` bool, which tokens had weight 0. Both are read once, whatever another
        thread writes meanwhile; see ``then`` for plans that are damaged."""
        dest = self.dest
        if checks.can_read(dest):
            dest = dest.clone()
            try:
                groups = read(self._groups())
            except IndexError as error:
                raise IndexError(f"{name}: {error}") from None
            if not torch.equal(dest.gather(1, groups.index).long(), group_of(groups.offsets, self.tokens_in)):
                raise IndexError(
                    f"{name} is damaged: its dest and its groups send tokens to different outputs; it was changed "
                    "after match(), or was not made by it"
                )
            return dest, _by_token(~groups.valid, groups.index)
        return dest.clamp(0, max(self.tokens_out - 1, 0)), self._weightless()

    def _weightless(self) -> Tensor:
        """Return ``(N, tokens_in)`` bool: tokens that were merged with weight 0."""
        return _by_token(self.members < 0, torch.where(self.members >= 0, self.members, ~self.members))

    def __repr__(self) -> str:
        return (
            f"MergePlan({self.dest.shape[0]} items, {self.tokens_in} -> {self.tokens_out} tokens, r={self.r}, "
            f"protected={self.protected}, {self.dest.device})"
        )


def _by_token(marks: Tensor, token: Tensor) -> Tensor:
    """Return marks of members in the order of their tokens. By argsort, not scatter: on a GPU scatter waits for the
    device in deterministic mode."""
    return marks.gather(1, token.argsort(1))


def _flatten(plan: MergePlan) -> tuple[list[Tensor], int]:
    return [plan.dest, plan.members, plan.offsets], plan.protected


def _unflatten(tensors, protected: int) -> MergePlan:
    dest, members, offsets = tensors
    return MergePlan(dest, members, offsets, protected)


# a pytree node, so that torch.export and tree_map look inside a plan that a model returns
torch.utils._pytree.register_pytree_node(
    MergePlan, _flatten, _unflatten, serialized_type_name="stoptome_kernels.MergePlan"
)

# torch.load(weights_only=True), its default, may restore a saved plan: it is three tensors and a number
torch.serialization.add_safe_globals([MergePlan])
