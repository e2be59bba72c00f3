# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision transformers of every library, and the slow way to merge tokens in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import stoptome_kernels as stk
import torch
from torch import Tensor, nn

from harness import libraries  # noqa: F401  (first of all that may import torchvision)


@dataclass(frozen=True)
class Case:
    """A model of a family.

    Attributes:
        name: of the test.
        make: the model, in eval mode; its parameters are drawn anew by ``build``.
        inputs: ``inputs(batch)``, the positional arguments of its forward.
        blocks: its blocks, first to last; of a patched model too.
        protected: leading tokens that are never merged.
        slow: ``slow(model, inputs, rates)``, the answer of the unpatched model with so many tokens merged in each
            block, written without anything of stoptome_kernels but the reference matching.
        answer: the tensor of a forward's result that is compared.
        tokens: of an image.
        compiled: stands for others in tests that compile or export: its blocks or pooling are of a class of their own.
        traced: the unpatched model is one graph for compile and export, whatever the batch.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    blocks: Callable[[Any], list]
    protected: int
    slow: Callable[[Any, tuple, tuple[int, ...]], Tensor]
    answer: Callable[[Any], Tensor] = lambda result: result
    tokens: int = 65
    compiled: bool = False
    traced: bool = True


def build(case: Case, seed: int = 0) -> Any:
    """Return the case's model, with parameters so large that all parts of it matter (libraries start with tiny ones).

    Each is built once in a process, and copied; random numbers go on as after building it.
    """
    model, state = _built(case, seed)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@cache
def _built(case: Case, seed: int) -> tuple[Any, Tensor]:
    torch.manual_seed(seed)
    model = case.make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.2 + (0.0 if "bias" in name else 1.0))
    return model, torch.get_rng_state()


class Slow:
    """Token merging as its papers write it: dense matrices, one step after the other.

    Attributes:
        size: ``(N, T')``, how many tokens each stands for; 0 for padding.
        source: ``(N, T', T)``, 1 where an original token is part of a merged one.
    """

    def __init__(self, x: Tensor, protected: int, real: Tensor | None = None):
        self.protected = protected
        self.size = x.new_ones(x.shape[:2]) if real is None else real.to(x.dtype)
        self.source = torch.eye(x.shape[1], dtype=x.dtype).repeat(x.shape[0], 1, 1)

    @property
    def bias(self) -> Tensor:
        """``(N, 1, 1, T')``, what is added to the scores of each key."""
        return self.size.log()[:, None, None]

    def merge(self, x: Tensor, keys: Tensor, r: int) -> Tensor:
        """The tokens ``(N, T', D)``, r of them merged by the keys ``(N, H, T', d)``."""
        plan = stk.match(keys.detach(), r, self.protected, "reference")
        matrix = nn.functional.one_hot(plan.dest.long(), plan.tokens_out).to(x.dtype).mT  # (N, T' − r, T')
        weighted = matrix * self.size[:, None]
        self.size = weighted.sum(2)
        self.source = matrix @ self.source
        weighted = torch.where(self.size[..., None] > 0, weighted, matrix)  # of padding alone: its mean
        return (weighted @ x) / weighted.sum(2, keepdim=True)

    def spread(self, x: Tensor) -> Tensor:
        """``(N, T, D)``: every original token's row."""
        return self.source.mT @ x


def recorded(module: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a call gives, and what ``module`` gave in it."""
    seen = []
    hook = module.register_forward_hook(lambda _module, _args, out: seen.append(out))
    try:
        return call(), seen[-1]
    finally:
        hook.remove()


def cases() -> Iterator[Case]:
    """Yield all cases."""
    from support.vit import open_clip, timm, torch_encoder, torchvision, transformers

    for family in (timm, open_clip, torchvision, torch_encoder, transformers):
        yield from family.CASES
