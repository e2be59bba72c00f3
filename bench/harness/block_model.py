# SPDX-License-Identifier: Apache-2.0
"""The launches of a transformer block and of a stack of blocks, patched and not, for the model of their time.

A pre-norm block in inference, all numbers bfloat16, as timm's: LayerNorm, QKV, attention, projection, add, LayerNorm,
MLP with GELU, add. Patched, attention has sizes, and match and merge_norm stand in place of the first add and the
second LayerNorm. All layers merge, the last one too; launches follow each other as in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stoptome_kernels.tome.schedule import Schedule, plan_layers

from .kernel_work import Counted, Sizes, attend_work, match_work, merge_norm_work
from .roofline import Device, Work, elementwise, flash, layer_norm, product, time_us

BATCHES = (8, 64, 256)  # images, or videos of 12 frames
MERGING = ("match_item", "score_blocks", "plan_blocks", "norm_rows")


@dataclass(frozen=True)
class Stack:
    """A model whose speed-up is predicted."""

    name: str
    layers: int
    tokens: int
    dim: int
    heads: int
    protected: int
    r: int
    frames: int = 1
    prefix: int = 0  # STOP's global prompts, keys that all frames of a video share

    @property
    def schedule(self) -> Schedule:
        return plan_layers(self.r, self.layers, self.tokens, 1, self.protected, width=self.dim)

    def sizes(self, batch: int, tokens: int, r: int) -> Sizes:
        """Return the shape of a layer with so many tokens."""
        n = batch * self.frames
        return Sizes(n, tokens, self.dim, self.heads, self.protected, r, self.prefix, self.frames)


STACKS = (
    *(Stack(f"STOP B/32 r {r}", 12, 54, 768, 12, 5, r, frames=12, prefix=4) for r in (2, 4, 8)),
    *(Stack(f"ViT-B/16 r {r}", 12, 197, 768, 12, 1, r) for r in (13, 16)),
    Stack("ViT-L/16 r 8", 24, 197, 1024, 16, 1, 8),
    Stack("ViT-L/16 @384 r 23", 24, 577, 1024, 16, 1, 23),
)


def before(s: Sizes, device: Device) -> list[Work]:
    """Return what both blocks do first."""
    rows = s.n * s.tokens
    return [layer_norm(rows, s.dim), product("QKV", rows, s.dim, 3 * s.dim, device)]


def mlp(rows: int, dim: int, device: Device) -> list[Work]:
    """Return what both blocks do last, on the tokens that are left."""
    return [
        product("MLP up", rows, dim, 4 * dim, device), elementwise("GELU", rows * 4 * dim, 2),
        product("MLP down", rows, 4 * dim, dim, device), elementwise("add", rows * dim, 3),
    ]  # fmt: skip


def attention(s: Sizes, device: Device) -> Work:
    """Return attention without sizes."""
    return flash(s.n, s.heads, s.tokens, s.tokens + s.prefix, s.channels, device)


def add_and_norm(s: Sizes) -> list[Work]:
    """Return what match and merge_norm stand for."""
    rows = s.n * s.tokens
    return [elementwise("add", rows * s.dim, 3), layer_norm(rows, s.dim)]


def unpatched(s: Sizes, device: Device) -> list[Work]:
    """Return the launches of a block that merges nothing."""
    rows = s.n * s.tokens
    return [
        *before(s, device),
        attention(s, device),
        product("projection", rows, s.dim, s.dim, device),
        *add_and_norm(s),
        *mlp(rows, s.dim, device),
    ]


def patched(s: Sizes, device: Device, counted: Counted) -> list[Work]:
    """Return the launches of a block that merges r tokens, or nothing any more, as its last layers may."""
    rows = s.n * s.tokens
    merging = s.out < s.tokens
    return [
        *before(s, device),
        *attend_work(s, counted),
        product("projection", rows, s.dim, s.dim, device),
        *((*match_work(s, counted), *merge_norm_work(s, counted)) if merging else add_and_norm(s)),
        *mlp(s.n * s.out, s.dim, device),
    ]


@dataclass(frozen=True)
class Forecast:
    """A stack's times in µs, and the ideal speed-up by FLOPs."""

    unpatched_us: float
    patched_us: float
    attention_us: float  # of the patched one's
    flash_us: float  # of attention without sizes over as many keys
    merging_us: float  # match and merge_norm, less the add and LayerNorm that they stand for
    ideal: float

    @property
    def speedup(self) -> float:
        return self.unpatched_us / self.patched_us

    @property
    def eta(self) -> float:
        return self.speedup / self.ideal

    @property
    def eta_at_flash(self) -> float:
        """η if attention took no longer with sizes than without."""
        return self.unpatched_us / (self.patched_us - self.attention_us + self.flash_us) / self.ideal


def layers(stack: Stack, batch: int) -> Iterator[Sizes]:
    """Return the shape of each layer."""
    for step in stack.schedule.steps:
        yield stack.sizes(batch, step.attended, step.r)


def forecast(stack: Stack, batch: int, device: Device, counted: Counted) -> Forecast:
    """Return what the model says of a stack, patched and not."""
    whole = stack.sizes(batch, stack.tokens, 0)
    plain = stack.layers * sum(time_us(work, device) for work in unpatched(whole, device))
    total = attending = without_sizes = merging = 0.0
    for s in layers(stack, batch):
        times = [(work.name, time_us(work, device)) for work in patched(s, device, counted)]
        total += sum(us for _, us in times)
        attending += sum(us for name, us in times if name == "attend")
        without_sizes += time_us(attention(s, device), device)
        if s.out < s.tokens:
            merging += sum(us for name, us in times if name in MERGING)
            merging -= sum(time_us(work, device) for work in add_and_norm(s))
    return Forecast(plain, total, attending, without_sizes, merging, stack.schedule.speedup)
