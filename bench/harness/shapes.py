# SPDX-License-Identifier: Apache-2.0
"""The inputs that are measured: the table of shapes, and real tokens for each of them.

The tokens come from frames panned and zoomed over a photograph that matplotlib ships, so neighbouring patches and
neighbouring frames look alike, as in a video: random tokens would give a matching without structure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from stoptome_kernels import reference
from torch import Tensor

from . import no_gpu

PATCH = 16  # pixels a side: 3 · 16 · 16 = 768 numbers a patch, as wide as ViT-B
HEAD_DIM = 64
DRY_ITEMS = 12  # at most, where nothing is measured


@dataclass(frozen=True)
class Shape:
    """One line of the table: N items of T tokens of width D, of which r are to be merged away."""

    name: str
    n_gpu: int
    n_cpu: int
    tokens: int
    dim: int
    heads: int
    protected: int
    r: int
    metric: str = "keys"  # or "x": the tokens themselves, as clip merging compares them
    frames: int = 1  # frames joined into one item
    cell: int = 0  # of an image of T tokens: one destination in every cell × cell, sizes are not tracked
    default: bool = True  # measured if no shapes are named
    compile_on: tuple[str, ...] = ()  # torch.compile takes about ten seconds a shape: on few
    quick: bool = False

    def n(self, device: str) -> int:
        n = self.n_gpu if device == "cuda" else self.n_cpu
        return min(n, self.frames * DRY_ITEMS) if no_gpu.pretending() else n

    def columns(self, device: str) -> dict[str, str | int]:
        """Return the columns of rows of this shape."""
        own = {"tokens": self.tokens, "dim": self.dim, "heads": self.heads, "protected": self.protected, "r": self.r}
        return {"shape": self.name, "n": self.n(device), **own}

    @property
    def side(self) -> int:
        """Width and height of an image in tokens."""
        return math.isqrt(self.tokens)

    @property
    def tokens_out(self) -> int:
        return self.tokens - min(self.r, (self.tokens - self.protected) // 2)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("stop-b32-train", 128 * 12, 192, 54, 768, 12, 5, 2, compile_on=("cpu", "cuda"), quick=True),
        Shape("stop-b32-video-r2", 12, 12, 54, 768, 12, 5, 2, compile_on=("cuda",), quick=True),
        Shape("vit-b16-r16", 256, 96, 197, 768, 12, 1, 16, compile_on=("cpu", "cuda")),
        Shape("stop-b32-video-r4", 12, 12, 54, 768, 12, 5, 4),
        Shape("stop-b32-video-r8", 12, 12, 54, 768, 12, 5, 8),
        Shape("clip-b16", 64 * 12, 48, 197, 768, 12, 1, 10),
        Shape("tempme-b32-clip2", 64 * 6, 48, 68, 768, 12, 2, 20, "x", 2),
        Shape("tempme-b32-clip4", 64 * 3, 24, 88, 768, 12, 4, 26, "x", 4),
        Shape("tempme-b32-clip12", 64, 8, 168, 768, 12, 12, 50, "x", 12),
        Shape("vit-b16-r13", 256, 32, 197, 768, 12, 1, 13),
        Shape("vit-l16-384", 64, 16, 577, 1024, 16, 1, 23),
        Shape("long", 8, 1, 4097, 1024, 16, 1, 512),
        # the first layers of Stable Diffusion's U-Net at 512 and 1024 pixels a side, guided: two items; on a CPU they
        # take one minute and several
        Shape("sd-512", 2, 2, 4096, 320, 0, 0, 2048, "x", cell=2, default=False),
        Shape("sd-1024", 2, 2, 16384, 320, 0, 0, 8192, "x", cell=2, default=False),
    )
}


def _sizes(name: str) -> tuple[int, ...]:
    shape = SHAPES[name]
    heads = shape.heads if shape.metric == "keys" else 0
    return shape.n_gpu, shape.tokens, shape.dim, heads, shape.protected, shape.r


# what bench/aot_report.py compiles, by the names in its tables: (N, T, D, heads, protected, r); heads 0: the metric is
# x itself
COMPILED = {
    "stop-b32-train": _sizes("stop-b32-train"),
    "stop-b32-video": _sizes("stop-b32-video-r8"),
    "clip-b16": _sizes("clip-b16"),
    **{f"tempme-{tokens}": _sizes(f"tempme-b32-clip{clip}") for tokens, clip in ((68, 2), (88, 4), (168, 12))},
    "vit-b16": _sizes("vit-b16-r16"),
    "vit-b16-deep": (256, 101, 768, 12, 1, 16),
    "few-tokens": (256, 16, 768, 12, 1, 2),
    "vit-l16-384": _sizes("vit-l16-384"),
    "long": _sizes("long"),
    "sd-64": _sizes("sd-512"),
}


# and attention alone, by keys and channels of a head: (N, T, heads, channels)
ATTENDED = {
    "keys-1568": (16, 1568, 12, 64),
    "keys-729-d72": (64, 729, 16, 72),  # SigLIP so400m; EVA-g's heads have 88 channels: no multiples of 16
    "keys-257-d88": (64, 257, 16, 88),
    **{f"keys-{keys}-d{d}": (n, keys, 16, d) for d in (80, 128) for keys, n in ((54, 384), (197, 256), (577, 64))},
    **{f"keys-{keys}-d{d}": (n, keys, 16, d) for d in (80, 128) for keys, n in ((1568, 16), (4096, 8))},
}


@dataclass(frozen=True)
class Inputs:
    """One set of tensors of a shape."""

    shape: Shape
    metric: Tensor  # (N, H, T, 64), a strided view into packed QKV, or x itself
    x: Tensor  # (N, T, D)
    size: Tensor  # (N, T) float32
    column: Tensor  # (N, T, 1) in x's dtype: how code without this package carries sizes
    grad: Tensor  # (N, T - r, D), what arrives from the layers behind

    @property
    def args(self) -> tuple[int, int]:
        return self.shape.r, self.shape.protected


def sets(shape: Shape, device: str) -> tuple[slice | Tensor, slice | Tensor]:
    """Sources and destinations: even and odd tokens; in an image, the first of every cell is a destination."""
    if not shape.cell:
        return reference.match_sets(shape.tokens, shape.protected)
    grid = torch.arange(shape.tokens, device=device).view(shape.side, shape.side)
    whole = shape.side // shape.cell * shape.cell  # cells that the border cuts off have no destination
    dst = grid[: whole : shape.cell, : whole : shape.cell].flatten()
    others = torch.ones(shape.tokens, dtype=torch.bool, device=device)
    others[dst] = False
    return others.nonzero()[:, 0], dst


@cache
def photograph() -> Tensor:
    """``(1, 3, H, W)`` float32 of mean about 0 and deviation about 1."""
    try:
        from matplotlib.cbook import get_sample_data
        from matplotlib.image import imread
    except ImportError as error:
        raise SystemExit(f"the input is a photograph of matplotlib's: pip install matplotlib ({error})") from error
    with get_sample_data("grace_hopper.jpg") as file:
        pixels = torch.tensor(imread(file, format="jpg"), dtype=torch.float32)
    return ((pixels / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]


def frames(count: int, per_video: int, pixels: int, device: str, seed: int) -> Tensor:
    """``(count, 3, pixels, pixels)``: videos of ``per_video`` frames, each a slow pan and zoom from its own start."""
    rng = torch.Generator().manual_seed(seed)
    videos = -(-count // per_video)
    start = torch.rand(videos, 3, generator=rng) * 6.28
    time = torch.arange(per_video) * 0.06
    phase = (start[:, None] + time[None, :, None] * torch.tensor([1.0, 1.3, 0.7])).reshape(-1, 3)[:count]
    zoom = 0.45 + 0.15 * phase[:, 0].sin()
    centre = (1 - zoom)[:, None] * phase[:, 1:].sin()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom, zoom, centre
    grid = F.affine_grid(theta.to(device), [count, 3, pixels, pixels], align_corners=False)
    photo = photograph().to(device).expand(count, -1, -1, -1)
    return F.grid_sample(photo, grid, padding_mode="border", align_corners=False)


def video(count: int, pixels: int, seed: int = 0) -> Tensor:
    """``(count, 3, pixels, pixels)`` in [0, 1]: one video, to be looked at."""
    return (frames(count, count, pixels, "cpu", seed) * 0.25 + 0.5).clamp(0, 1)


@cache
def projection(rows: int, columns: int, seed: int) -> Tensor:
    """``(rows, columns)`` with orthonormal rows or columns, whichever are fewer: it keeps angles nearly as they are."""
    rng = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=rng))
    return q if rows >= columns else q.T


def make(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Tokens, keys, sizes and a gradient of ``shape``; the same for the same seed."""
    n, d = shape.n(device), shape.dim
    rng = torch.Generator().manual_seed(1000 + seed)
    patches = shape.tokens - shape.protected
    each = -(-patches // shape.frames)
    side = next(s for s in range(1, each + 1) if s * s >= each)
    pictures = frames(n * shape.frames, 12, side * PATCH, device, seed)
    pixels = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)[:, :each]
    seen = (pixels @ projection(3 * PATCH * PATCH, d, 1).to(device)).reshape(n, shape.frames * each, d)[:, :patches]
    place = 0.02 * torch.randn(patches, d, generator=rng)
    front = torch.randn(shape.protected, d, generator=rng)  # class token and prompts: the same in every item
    x = torch.cat([front.to(device).expand(n, -1, -1), seen + place.to(device)], 1)

    metric = x = x.to(dtype)
    if shape.metric == "keys":
        weight = projection(d, shape.heads * HEAD_DIM, 2).to(device)
        keys = F.layer_norm(x.float(), (d,)) @ weight
        # as a block's QKV layer leaves them: queries and values between the keys, heads inside a token
        packed = torch.zeros(n, shape.tokens, 3, shape.heads, HEAD_DIM, dtype=dtype, device=device)
        packed[:, :, 1] = keys.view(n, shape.tokens, shape.heads, HEAD_DIM)
        metric = packed[:, :, 1].transpose(1, 2)

    size = torch.ones(n, shape.tokens)
    if not shape.cell:  # behind the first layer of a model some tokens stand for two or three
        size[:, shape.protected :] += (torch.rand(n, patches, generator=rng) < 0.15).float()
        size[:, shape.protected :] += (torch.rand(n, patches, generator=rng) < 0.05).float()
    size = size.to(device)
    grad = torch.randn(n, shape.tokens_out, d, generator=rng).to(device, dtype)
    return Inputs(shape, metric, x, size, size.to(dtype)[..., None], grad)
