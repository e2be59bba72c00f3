# SPDX-License-Identifier: Apache-2.0
"""The plans of a video's blocks, composed into its source map."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import MergePlan
from ..tome.schedule import Schedule
from ..tome.trace import Trace
from .blocks import BlockPlans


def compose_trace(
    plans: tuple[BlockPlans, ...], schedule: Schedule, batch: int, prompts: int, prompts_inline: bool
) -> Trace:
    """Return the trace of a stack from what its blocks merged.

    Args:
        plans: plans of each block.
        schedule: schedule by which the blocks ran.
        batch: videos B.
        prompts: frame prompts P of each frame.
        prompts_inline: the plans index the prompts too (otherwise they index class tokens and patches alone).
    """
    first = schedule.steps[0]
    frames = first.items * first.frames
    patches = schedule.tokens_in - 1 - prompts
    carried = prompts if prompts_inline else 0
    device = next((plan.dest.device for pair in plans for plan in pair if plan is not None), torch.device("cpu"))
    length = 1 + carried + patches
    place = torch.arange(frames * length, device=device).view(1, frames, length).repeat(batch, 1, 1)
    layers = []
    classes = 1  # class tokens of an item
    for step, (inter, intra) in zip(schedule.steps, plans, strict=True):
        if step.join > 1:
            place = _join_places(place, length, classes, carried, step.join)
            classes, length = classes * step.join, length * step.join
        for plan in (inter, intra):
            if plan is not None:
                place = _follow_plan(place, plan, length)
                length = plan.tokens_out
        layers.append(_with_prompts(place, length, classes, prompts, bool(prompts_inline)).int())
    return Trace(tuple(layers), schedule.tokens, schedule.items, 1 + prompts)


def _join_places(place: Tensor, length: int, classes: int, carried: int, count: int) -> Tensor:
    """Return where tokens go when ``count`` adjacent items become one: part by part, see ``blocks.join_adjacent``."""
    item, local = place // length, place % length
    start = 0
    out = local
    for part in (classes, classes * carried, length - classes * (1 + carried)):
        here = (local >= start) & (local < start + part)
        out = torch.where(here, start * count + (item % count) * part + local - start, out)
        start += part
    return (item // count) * (length * count) + out


def _follow_plan(place: Tensor, plan: MergePlan, length: int) -> Tensor:
    """Follow a plan whose items are ``(B · items, length)``."""
    batch, frames, tokens = place.shape
    dest = plan.dest.long().view(batch, -1, length)
    item = torch.arange(dest.shape[1], device=dest.device)[:, None]
    table = (item * plan.tokens_out + dest).flatten(1)
    return table.gather(1, place.flatten(1)).view(batch, frames, tokens)


def _with_prompts(place: Tensor, length: int, classes: int, prompts: int, prompts_inline: bool) -> Tensor:
    """Put the prompt rows in, where the plans did not know them."""
    if prompts_inline or not prompts:
        return place
    item, local = place // length, place % length
    added = classes * prompts
    known = item * (length + added) + torch.where(local < classes, local, local + added)
    frame = torch.arange(place.shape[1], device=place.device)
    own = torch.arange(prompts, device=place.device)
    base = (frame // classes) * (length + added) + classes + (frame % classes) * prompts
    rows = (base[:, None] + own).expand(place.shape[0], -1, -1)
    return torch.cat([known[:, :, :1], rows, known[:, :, 1:]], 2)
