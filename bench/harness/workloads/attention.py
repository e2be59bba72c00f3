# SPDX-License-Identifier: Apache-2.0
"""Attention with sizes at many lengths: ours, and what else PyTorch has for it, with sizes and without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import no_gpu
from .fused import FRAMES, PREFIX, Sides


@dataclass(frozen=True)
class Case:
    """N items of as many queries as keys; in STOP's case a prefix of four keys more, shared by twelve items."""

    name: str
    n_gpu: int
    n_cpu: int
    heads: int
    tokens: int
    channels: int = 64
    prefix: bool = False

    def n(self, device: str) -> int:
        n = self.n_gpu if device == "cuda" else self.n_cpu
        return min(n, FRAMES) if no_gpu.pretending() else n


CASES = {
    case.name: case
    for case in (
        Case("stop-b32-58", 1536, 96, 12, 54, prefix=True),  # 54 and the prefix
        Case("vit-b16-197", 256, 16, 12, 197),
        Case("vit-h14-257", 64, 4, 16, 257, 80),
        Case("vit-l16-577", 64, 4, 16, 577),
        Case("videomae-1568", 16, 1, 12, 1568),
        Case("image-4096", 8, 1, 8, 4096),
        Case("image-4096-d128", 8, 1, 4, 4096, 128),
    )
}
PLAIN = {  # torch's kernels without sizes, on a GPU; on a CPU there is one
    "flash, no sizes": SDPBackend.FLASH_ATTENTION,
    "cudnn, no sizes": SDPBackend.CUDNN_ATTENTION,
}


def attention_sides(case: Case, device: str, dtype: torch.dtype, items: int | None = None) -> Sides:
    """Return attention with sizes in every form, and torch's own without, each with what it is differentiated by."""
    n, rng = items or case.n(device), torch.Generator(torch.empty(0, device=device).device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, case.heads, case.channels, generator=rng, device=device).to(dtype)

    packed = random(n, case.tokens, 3).requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    size = torch.randint(1, 5, (n, case.tokens), generator=rng, device=device).float()
    leaves, prefix = [packed], (None, None)
    if case.prefix:
        ahead = random(max(1, n // FRAMES), PREFIX, 2).requires_grad_()
        leaves, prefix = [packed, ahead], tuple(part.transpose(1, 2) for part in ahead.unbind(2))

    def ours(backend: str) -> Callable[[], tuple[Tensor]]:
        return lambda: (stk.attention(q, k, v, size, *prefix, backend=backend),)

    def mask() -> tuple[Tensor]:
        keys, values, sizes = k, v, size
        if case.prefix:
            keys, values = (
                torch.cat([p.repeat_interleave(n // p.shape[0], 0), x], 2) for p, x in zip(prefix, (k, v), strict=True)
            )
            sizes = F.pad(size, (PREFIX, 0), value=1.0)
        bias = sizes.log()[:, None, None].to(dtype)
        return (F.scaled_dot_product_attention(q, keys, values, attn_mask=bias),)

    def plain(backend: SDPBackend | None) -> Callable[[], tuple[Tensor]]:
        def run() -> tuple[Tensor]:
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return (F.scaled_dot_product_attention(q, k, v),)

        return run

    sides: Sides = {
        "attention": (ours("auto"), leaves), "augmented": (ours("augmented"), leaves), "mask": (mask, leaves),
        "reference": (ours("reference"), leaves),
    }  # fmt: skip
    if device == "cuda":
        sides |= {name: (plain(backend), [packed]) for name, backend in PLAIN.items()}
    else:
        sides["sdpa, no sizes"] = (plain(None), [packed])
    return sides
