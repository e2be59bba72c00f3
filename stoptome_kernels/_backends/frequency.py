# SPDX-License-Identifier: Apache-2.0
"""Convolution in the frequency domain, ``fft_conv3d``: what the backends share.

A large kernel over few channels leaves most lanes of a processor idle if it is applied tap by tap. Between a Fourier
transform of each plane and its inverse it is one product for each frequency, pair of channels and tap in time: for 9
channels and 3 x 11 x 11 taps, fifty times fewer operations. The transforms are torch's; the products are a kernel of
each backend's. A video is taken in pieces, so that the memory for its spectra does not grow with the batch.

Source: Mathieu et al., *Fast Training of Convolutional Networks through FFTs* (ICLR 2014, arXiv 1312.5851).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..layout import accumulator_dtype


class Sizes(NamedTuple):
    """Sizes of a convolution's planes: as given, ``height × width``; padded, ``rows × padded_width``; and transformed,
    ``rows × columns``."""

    height: int
    width: int
    rows: int
    padded_width: int

    @property
    def columns(self) -> int:
        """Number of frequencies along the width: of real numbers half of them tell all."""
        return self.padded_width // 2 + 1


class Products(Protocol):
    """The part of a convolution that each backend has of its own."""

    budget: int  # bytes of the spectra of a piece, about

    def empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory on a tensor's device that is about to be written."""

    def spectra(self, x: Tensor, sizes: Sizes) -> Tensor:
        """Transform the planes of ``x (V, C, F, H, W)`` → ``(V, C, F, rows, columns)`` complex."""

    def planes(self, spectra: Tensor, sizes: Sizes, bias: Tensor | None, out: Tensor) -> None:
        """Transform ``(V, O, F, rows, columns)`` back, without a factor, and write it to ``out (V, O, F, H, W)`` with
        the bias added."""

    def filters(self, weight: Tensor, sizes: Sizes) -> Tensor:
        """Transform ``weight (O, C, kt, kh, kw)`` to whatever ``multiply`` takes, with the factor of both
        transforms."""

    def multiply(self, spectra: Tensor, filters: Tensor, kernel: torch.Size, frames: int, shift: int) -> Tensor:
        """Return the spectra ``(V, O, frames, rows, columns)`` of the result: frame t and tap k meet frame
        ``t + k + shift`` of ``spectra``, or 0 where there is none."""

    def no_sums(self, spectra: Tensor, kernel: torch.Size) -> Tensor:
        """Return zeros like the filters of such a weight, for spectra like these."""

    def correlate(self, spectra: Tensor, grad: Tensor, sums: Tensor, kernel: torch.Size, shift: int) -> None:
        """Add the gradient of the filters to ``sums``."""

    def weight_grad(self, sums: Tensor, kernel: torch.Size, sizes: Sizes) -> Tensor:
        """Return the gradient of a weight of shape ``kernel`` from that of its filters."""


def fast_length(least: int) -> int:
    """Return the smallest even number of at least ``least`` whose prime factors are 2, 3 and 5: other lengths take up
    to ten times as long to transform."""
    length = max(2, least + least % 2)
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2


def sizes_of(x: Tensor, weight: Tensor) -> Sizes:
    """Return the sizes of x's planes ``(…, H, W)`` for this weight: as many zeros are put behind a plane as the taps
    reach out of it on one side, and serve both, since frequencies see a plane as if it went round."""
    (height, width), (tall, wide) = x.shape[-2:], weight.shape[-2:]
    return Sizes(height, width, fast_length(height + tall // 2), fast_length(width + wide // 2))


def _pieces(x: Tensor, channels: int, sizes: Sizes, budget: int) -> Iterator[tuple[slice, slice]]:
    """Yield videos and frames of x ``(B, C, T, H, W)`` whose spectra, of ``channels`` in all, take about ``budget``
    bytes."""
    videos, _, frames = x.shape[:3]
    frame = channels * sizes.rows * sizes.columns * (16 if x.dtype == torch.float64 else 8)
    at_once = max(1, budget // frame)
    if at_once < frames:
        step, together = math.ceil(frames / math.ceil(frames / at_once)), 1
    else:
        step, together = frames, at_once // frames
    for video in range(0, videos, together):
        for first in range(0, frames, step):
            yield slice(video, min(video + together, videos)), slice(first, min(first + step, frames))


def _reach(frames: slice, taps: int, length: int) -> tuple[slice, int]:
    """Return the frames that the taps of some frames reach, and the shift of ``multiply``."""
    half = taps // 2
    first = max(0, frames.start - half)
    return slice(first, min(length, frames.stop + half)), frames.start - half - first


def convolve(run: Products, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``fft_conv3d`` by a backend's products; see ``stoptome_kernels.reference``."""
    wide = accumulator_dtype(x.dtype)
    sizes, kernel = sizes_of(x, weight), weight.shape
    out = run.empty(x, (x.shape[0], kernel[0], *x.shape[2:]), x.dtype)
    if not out.numel():
        return out
    filters = run.filters(weight.to(wide), sizes)
    bias = None if bias is None else bias.to(wide)
    for videos, frames in _pieces(x, kernel[0] + kernel[1], sizes, run.budget):
        reach, shift = _reach(frames, kernel[2], x.shape[2])
        spectra = run.spectra(x[videos, :, reach], sizes)
        spectra = run.multiply(spectra, filters, kernel, frames.stop - frames.start, shift)
        run.planes(spectra, sizes, bias, out[videos, :, frames])
    return out


def convolve_backward(
    run: Products, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``fft_conv3d_backward`` by a backend's products; see ``stoptome_kernels.reference``."""
    wide = accumulator_dtype(x.dtype)
    sizes, kernel, taps = sizes_of(x, weight), weight.shape, weight.shape[2]
    grad_x = run.empty(x, x.shape if needed[0] else (0,), x.dtype)
    grad_weight = x.new_zeros(kernel if needed[1] else 0, dtype=wide)
    grad_bias = grad.sum((0, 2, 3, 4), dtype=wide) if needed[2] else x.new_empty(0, dtype=wide)
    if not x.numel() or not any(needed[:2]):
        return grad_x, grad_weight, grad_bias
    # the gradient of x is the convolution of that of y with the kernel mirrored
    mirrored = weight.transpose(0, 1).flip(2, 3, 4)
    filters = run.filters(mirrored.to(wide), sizes) if needed[0] else None
    sums = None
    for videos, frames in _pieces(x, kernel[0] + kernel[1], sizes, run.budget):
        reach, shift = _reach(frames, taps, x.shape[2])
        spectra = run.spectra(grad[videos, :, reach], sizes)
        if needed[1]:
            # x's frames are in one piece each, and meet the frames of y that are at most half the taps away
            own = run.spectra(x[videos, :, frames], sizes)
            if sums is None:
                sums = run.no_sums(spectra, kernel)
            run.correlate(own, spectra, sums, kernel, reach.start - taps // 2 - frames.start)
            del own
        if filters is not None:
            spectra = run.multiply(spectra, filters, mirrored.shape, frames.stop - frames.start, shift)
            run.planes(spectra, sizes, None, grad_x[videos, :, frames])
    if sums is not None:
        grad_weight = run.weight_grad(sums, kernel, sizes)
    return grad_x, grad_weight, grad_bias


@lru_cache(maxsize=64)
def waves(points: int, length: int, taps: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of ``2π · u · a / length`` for u below ``points`` and a below ``taps``, ``(points, taps)``
    float64 each; the products u · a are exact."""
    turn = torch.outer(torch.arange(points, device="cpu"), torch.arange(taps, device="cpu")) % length
    angle = turn.double() * (2 * math.pi / length)
    return angle.cos(), angle.sin()
