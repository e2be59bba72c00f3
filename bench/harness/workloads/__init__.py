# SPDX-License-Identifier: Apache-2.0
"""The calls that benchmarks time: a module for each, with all implementations side by side."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import stoptome_kernels as stk
import torch
from stoptome_kernels.tome.schedule import Schedule
from torch import Tensor, nn

DIRECTIONS = ("inference", "training")


@dataclass(frozen=True)
class Side:
    """One implementation of a model at one setting: ``call()`` runs it and gives what is compared."""

    impl: str
    setting: str
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    schedule: Schedule | None = None

    @property
    def name(self) -> str:
        return f"{self.impl} {self.setting}"

    def train(self) -> object:
        return torch.autograd.grad(self.call().float().square().sum(), self.leaves, allow_unused=True)

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.call()

    def run(self, direction: str) -> Callable[[], object]:
        """Return what is timed in a direction."""
        return self.train if direction == "training" else self.infer


def patch(model: nn.Module, config: stk.ToMeConfig, **options: Any) -> nn.Module:
    """Patch a model and return it, without a warning if the last layers have fewer tokens than a large r asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tome_r asks for", UserWarning)
        return stk.apply_tome_patch(model, config=config, **options)


def casting(args: argparse.Namespace):
    """Return the context in which a model computes in ``args.dtype``."""
    return torch.autocast(args.device, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()
