# SPDX-License-Identifier: Apache-2.0
"""What people put on patched models: as without the patch, or refused, in every family (docs/situations.md)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support.families import Family, families
from support.situations import AS_BEFORE, SITUATIONS, Situation, expected, near, outcome, run

FAMILIES = list(families())
PAGE = expected()
QUICK = ("timm-avg", "STOP, DGL")  # one whose attention is called, one whose weights are read
# Their blocks, or what is done to their parts, are those of others.
ALIKE = ("timm-map", "timm-dinov3", "transformers-siglip2-padded", "transformers-dinov2", "CLIP4Clip")


def mark(family: Family):
    """Return what takes no time of ``make check``, or of ``make test``."""
    if family.name in QUICK:
        return ()
    return pytest.mark.full if family.name in ALIKE else pytest.mark.slow


def cells(marked):
    """Families × situations."""
    return [
        pytest.param(family, situation, id=f"{family.name}-{situation.name}", marks=marked(family))
        for family in FAMILIES
        for situation in SITUATIONS
    ]


def test_the_page_has_every_cell():
    assert set(PAGE) == {(situation.name, family.name) for situation in SITUATIONS for family in FAMILIES}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(("family", "situation"), cells(mark))
def test_outcome(family: Family, situation: Situation):
    assert outcome(situation, family) == PAGE[situation.name, family.name]


def under_autocast(family: Family, model) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return family.run(model).float()


def alike_in_bfloat16(got: torch.Tensor, want: torch.Tensor) -> bool:
    """By the median: rounding may choose other tokens, whose own rows are then far off."""
    return bool((got - want).abs().median() <= 0.02 * want.abs().median())


def compiled(family: Family, model) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(lambda: family.run(model), backend="eager")()


def checkpointed(family: Family, model) -> torch.Tensor:
    """Gradients of the first block, with every block computed a second time."""

    def wrapped(forward):
        return lambda *args, **options: checkpoint(forward, *args, use_reentrant=False, **options)

    for block in family.blocks(model):
        block.forward = wrapped(block.forward)
    family.run(model).sin().sum().backward()
    return torch.cat([p.grad.flatten() for p in family.blocks(model)[0].parameters() if p.grad is not None])


WAYS = {  # how a model runs, what is the same, and how the model runs that it is compared with
    "autocast": (under_autocast, alike_in_bfloat16, under_autocast),
    "compiled": (compiled, near, run),
    "checkpointed": (checkpointed, near, checkpointed),
}


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, behind a graph break
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("family", "situation"),
    [
        cell
        for cell in cells(
            lambda family: () if family.name in QUICK else pytest.mark.full
        )  # the ways are the same in all
        if PAGE.get((cell.values[1].name, cell.values[0].name)) == AS_BEFORE
    ],
)
def test_combined(family: Family, situation: Situation, way: str):
    assert outcome(situation, family, *WAYS[way]) == AS_BEFORE
