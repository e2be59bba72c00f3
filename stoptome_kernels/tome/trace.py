# SPDX-License-Identifier: Apache-2.0
"""The source map: the token of the last layer that every original token of a video ended in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grouping import group
from ..plan import MergePlan
from .schedule import Schedule
from .stream import Plans
from .table import table


@dataclass(frozen=True, eq=False)
class Trace:
    """Source map of a forward. ``str()`` of it is a table.

    Attributes:
        layers: one ``(B, T, L)`` int32 tensor per layer: the token that each of the L tokens of a frame (class token,
            prompts, patches) is part of after that layer. Tokens of a video are numbered item after item,
            ``item · tokens + token``; an item contains the class tokens of its frames, their prompts, then patches.
        tokens: number of tokens of an item after each layer.
        items: number of items of a video after each layer.
        protected: number of class tokens and prompts of a frame.
    """

    layers: tuple[Tensor, ...]
    tokens: tuple[int, ...]
    items: tuple[int, ...]
    protected: int

    @property
    def dest(self) -> Tensor:
        """Map after the last layer, ``(B, T, L)`` int32."""
        return self.layers[-1]

    @property
    def sizes(self) -> Tensor:
        """Number of original tokens in each token after the last layer, ``(B, items · tokens)`` float32.

        Counted in ``dest``: padding and tokens merged with weight 0 count as all others do; a token that never appears
        in ``dest`` counts 0.
        """
        return self._counts(-1).float()

    def _counts(self, layer: int) -> Tensor:
        dest = self.layers[layer].flatten(1)
        _, offsets = group(dest, torch.zeros_like(dest, dtype=torch.bool), self.items[layer] * self.tokens[layer])
        return offsets.diff(dim=1)  # by a sort: a sum by index would be in no order on a GPU, bincount wait for it

    @property
    def _line(self) -> str:
        batch, frames, tokens = self.dest.shape
        several = frames > 1
        before, behind = f"{frames} × " if several else "", f"{self.items[-1]} × " if several else ""
        return f"{before}{tokens} → {behind}{self.tokens[-1]} tokens, batch of {batch}"

    def __repr__(self) -> str:
        return f"Trace({self._line}, {len(self.layers)} layers)"

    def __str__(self) -> str:
        counts = [self._counts(layer) for layer in range(len(self.layers))]
        largest = [int(count.max()) if count.numel() else 0 for count in counts]
        columns = {"items": self.items, "tokens": self.tokens, "largest group": largest}
        head = f"{self._line}, {self.protected} protected"
        return "\n".join([head, *table({"layer": range(len(largest)), **columns})])


def compose(plans: tuple[Plans, ...], schedule: Schedule, batch: int, prompts: int, inside: bool) -> Trace:
    """The trace of a stack from what its blocks merged.

    Args:
        plans: of each block.
        schedule: by which they ran.
        batch: videos B.
        prompts: frame prompts P of each frame.
        inside: the plans index the prompts too (otherwise they index class tokens and patches alone).
    """
    first = schedule.steps[0]
    frames = first.items * first.frames
    patches = schedule.tokens_in - 1 - prompts
    carried = prompts if inside else 0
    device = next((plan.dest.device for pair in plans for plan in pair if plan is not None), torch.device("cpu"))
    length = 1 + carried + patches
    place = torch.arange(frames * length, device=device).view(1, frames, length).repeat(batch, 1, 1)
    layers = []
    classes = 1  # class tokens of an item
    for step, (inter, intra) in zip(schedule.steps, plans, strict=True):
        if step.join > 1:
            place = _joined(place, length, classes, carried, step.join)
            classes, length = classes * step.join, length * step.join
        for plan in (inter, intra):
            if plan is not None:
                place = _moved(place, plan, length)
                length = plan.tokens_out
        layers.append(_with_prompts(place, length, classes, prompts, bool(inside)).int())
    return Trace(tuple(layers), schedule.tokens, schedule.items, 1 + prompts)


def _joined(place: Tensor, length: int, classes: int, carried: int, count: int) -> Tensor:
    """Where tokens go when ``count`` adjacent items become one: part by part, see ``stream.join``."""
    item, local = place // length, place % length
    start = 0
    out = local
    for part in (classes, classes * carried, length - classes * (1 + carried)):
        here = (local >= start) & (local < start + part)
        out = torch.where(here, start * count + (item % count) * part + local - start, out)
        start += part
    return (item // count) * (length * count) + out


def _moved(place: Tensor, plan: MergePlan, length: int) -> Tensor:
    """Follow a plan whose items are ``(B · items, length)``."""
    batch, frames, tokens = place.shape
    dest = plan.dest.long().view(batch, -1, length)
    item = torch.arange(dest.shape[1], device=dest.device)[:, None]
    table = (item * plan.tokens_out + dest).flatten(1)
    return table.gather(1, place.flatten(1)).view(batch, frames, tokens)


def _with_prompts(place: Tensor, length: int, classes: int, prompts: int, inside: bool) -> Tensor:
    """Put the prompt rows in, where the plans did not know them."""
    if inside or not prompts:
        return place
    item, local = place // length, place % length
    added = classes * prompts
    known = item * (length + added) + torch.where(local < classes, local, local + added)
    frame = torch.arange(place.shape[1], device=place.device)
    own = torch.arange(prompts, device=place.device)
    base = (frame // classes) * (length + added) + classes + (frame % classes) * prompts
    rows = (base[:, None] + own).expand(place.shape[0], -1, -1)
    return torch.cat([known[:, :, :1], rows, known[:, :, 1:]], 2)
