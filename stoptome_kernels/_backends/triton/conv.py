# SPDX-License-Identifier: Apache-2.0
"""Products of spectra as Triton kernels: what ``fft_conv3d`` does between its transforms.

All frequencies of a plane lie in one row, so a program takes a block of them for one output channel: it holds the
complex sums of all frames, or of a tile of them, and reads each filter once. No sum is shared by programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import accumulator_dtype
from .. import frequency
from . import config


@triton.jit
def multiply_spectra(
    x, filters, y, plane, videos, inputs, outputs, taps, frames_in, frames_out, shift, tiles,
    FRAMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute y (V, O, frames_out, plane) from x (V, C, frames_in, plane) and filters (O, C, taps, plane): complex
    numbers, each two floats."""
    zero = tl.zeros((), tl.int64)  # what is added to it is a tensor of 64 bits, even where Triton makes it a constant
    output = tl.program_id(0) % outputs  # next to each other: they read the same frames
    rest = tl.program_id(0) // outputs
    video = zero + (rest // tiles) % videos
    column = (rest // tiles // videos) * BLOCK + tl.arange(0, BLOCK)
    inside = column < plane
    frame = (rest % tiles) * FRAMES + tl.arange(0, FRAMES)
    wide_plane = zero + plane
    re = tl.zeros((FRAMES, BLOCK), tl.float32)
    im = tl.zeros((FRAMES, BLOCK), tl.float32)
    for channel in range(0, inputs):
        for tap in range(0, taps):
            at = ((((zero + output) * inputs + channel) * taps + tap) * wide_plane + column) * 2
            w_re = tl.load(filters + at, mask=inside, other=0.0)[None, :]
            w_im = tl.load(filters + at + 1, mask=inside, other=0.0)[None, :]
            source = frame + tap + shift
            mask = ((source >= 0) & (source < frames_in))[:, None] & inside[None, :]
            rows = ((video * inputs + channel) * frames_in + source)[:, None] * wide_plane
            x_re = tl.load(x + (rows + column[None, :]) * 2, mask=mask, other=0.0)
            x_im = tl.load(x + (rows + column[None, :]) * 2 + 1, mask=mask, other=0.0)
            re += w_re * x_re - w_im * x_im
            im += w_re * x_im + w_im * x_re
    rows = ((video * outputs + output) * frames_out + frame)[:, None] * wide_plane
    mask = (frame < frames_out)[:, None] & inside[None, :]
    tl.store(y + (rows + column[None, :]) * 2, re, mask=mask)
    tl.store(y + (rows + column[None, :]) * 2 + 1, im, mask=mask)


@triton.jit
def correlate_spectra(
    x, grad, sums, plane, videos, inputs, outputs, taps, frames_in, frames_out, shift,
    FRAMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to sums (O, C, taps, plane) the products of x, conjugated, and of grad over videos and frames; shapes as in
    multiply_spectra. A program for each filter and block of frequencies."""
    zero = tl.zeros((), tl.int64)
    filters = outputs * inputs * taps
    filter = tl.program_id(0) % filters
    tap = filter % taps
    channel = (filter // taps) % inputs
    output = (filter // taps) // inputs
    column = (tl.program_id(0) // filters) * BLOCK + tl.arange(0, BLOCK)
    inside = column < plane
    wide_plane = zero + plane
    re = tl.zeros((FRAMES, BLOCK), tl.float32)
    im = tl.zeros((FRAMES, BLOCK), tl.float32)
    for video in range(0, videos):
        for start in range(0, frames_out, FRAMES):
            frame = start + tl.arange(0, FRAMES)
            source = frame + tap + shift
            mask = ((frame < frames_out) & (source >= 0) & (source < frames_in))[:, None] & inside[None, :]
            rows = (((zero + video) * inputs + channel) * frames_in + source)[:, None] * wide_plane
            x_re = tl.load(x + (rows + column[None, :]) * 2, mask=mask, other=0.0)
            x_im = tl.load(x + (rows + column[None, :]) * 2 + 1, mask=mask, other=0.0)
            rows = (((zero + video) * outputs + output) * frames_out + frame)[:, None] * wide_plane
            g_re = tl.load(grad + (rows + column[None, :]) * 2, mask=mask, other=0.0)
            g_im = tl.load(grad + (rows + column[None, :]) * 2 + 1, mask=mask, other=0.0)
            re += x_re * g_re + x_im * g_im
            im += x_re * g_im - x_im * g_re
    at = (filter * wide_plane + column) * 2
    before_re = tl.load(sums + at, mask=inside, other=0.0)
    before_im = tl.load(sums + at + 1, mask=inside, other=0.0)
    tl.store(sums + at, before_re + tl.sum(re, 0), mask=inside)
    tl.store(sums + at + 1, before_im + tl.sum(im, 0), mask=inside)


def multiply_launch(x: Tensor, filters: Tensor, y: Tensor, shift: int) -> tuple:
    """Return what multiply runs on spectra as real numbers, (…, plane, 2): (kernel, grid, arguments, constants and
    options)."""
    videos, inputs, frames_in, plane, _ = x.shape
    outputs, _, taps = filters.shape[:3]
    meta = config.spectra(y.shape[2])
    tiles = triton.cdiv(y.shape[2], meta["FRAMES"])
    arguments = (x, filters, y, plane, videos, inputs, outputs, taps, frames_in, y.shape[2], shift, tiles)
    programs = triton.cdiv(plane, meta["BLOCK"]) * videos * tiles * outputs
    return multiply_spectra, (programs,), arguments, meta


def correlate_launch(x: Tensor, grad: Tensor, sums: Tensor, shift: int) -> tuple:
    """Return what correlate runs, as multiply_launch."""
    videos, inputs, frames_in, plane, _ = x.shape
    outputs, _, taps = sums.shape[:3]
    meta = config.spectra(grad.shape[2])
    arguments = (x, grad, sums, plane, videos, inputs, outputs, taps, frames_in, grad.shape[2], shift)
    programs = triton.cdiv(plane, meta["BLOCK"]) * outputs * inputs * taps
    return correlate_spectra, (programs,), arguments, meta


class Products:
    """Products of spectra by Triton kernels, as a ``frequency.Products``; filters are whole, (O, C, kt, rows, columns)
    complex."""

    budget = 512 << 20  # enough planes to fill a GPU

    @staticmethod
    def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``frequency.Products``."""
        return like.new_empty(shape, dtype=dtype)

    @staticmethod
    def spectra(x: Tensor, sizes: frequency.Sizes) -> Tensor:
        """See ``frequency.Products``."""
        return torch.fft.rfft2(x.to(accumulator_dtype(x.dtype)), s=(sizes.rows, sizes.padded_width)).contiguous()

    @staticmethod
    def planes(spectra: Tensor, sizes: frequency.Sizes, bias: Tensor | None, out: Tensor) -> None:
        """See ``frequency.Products``."""
        padded = torch.fft.irfft2(spectra, s=(sizes.rows, sizes.padded_width), norm="forward")
        plane = padded[..., : sizes.height, : sizes.width]
        out.copy_(plane if bias is None else plane.add_(bias[:, None, None, None]))

    @staticmethod
    def filters(weight: Tensor, sizes: frequency.Sizes) -> Tensor:
        """See ``frequency.Products``."""
        rows, columns = _met(weight.shape, sizes)
        weight = weight[..., rows, columns]
        tall, wide = weight.shape[3:]
        padded = weight.new_zeros((*weight.shape[:3], sizes.rows, sizes.padded_width))
        padded[..., :tall, :wide] = weight
        padded = padded.roll((-(tall // 2), -(wide // 2)), (3, 4))  # the middle tap comes first
        return torch.fft.rfft2(padded, norm="forward").conj().resolve_conj().contiguous()

    @staticmethod
    def weight_grad(sums: Tensor, kernel: torch.Size, sizes: frequency.Sizes) -> Tensor:
        """See ``frequency.Products``."""
        grad = sums.real.new_zeros(kernel)
        rows, columns = _met(kernel, sizes)
        met = grad[..., rows, columns]
        tall, wide = met.shape[3:]
        padded = torch.fft.irfft2(sums.conj(), s=(sizes.rows, sizes.padded_width))
        met.copy_(padded.roll((tall // 2, wide // 2), (3, 4))[..., :tall, :wide])
        return grad

    @staticmethod
    def multiply(spectra: Tensor, filters: Tensor, kernel: torch.Size, frames: int, shift: int) -> Tensor:
        """See ``frequency.Products``."""
        out = spectra.new_empty((len(spectra), kernel[0], frames, *spectra.shape[3:]))
        launch, grid, arguments, meta = multiply_launch(_flat(spectra), _flat(filters), _flat(out), shift)
        launch[grid](*arguments, **meta)
        return out

    @staticmethod
    def no_sums(spectra: Tensor, kernel: torch.Size) -> Tensor:
        """See ``frequency.Products``."""
        return spectra.new_zeros((*kernel[:3], *spectra.shape[3:]))

    @staticmethod
    def correlate(spectra: Tensor, grad: Tensor, sums: Tensor, kernel: torch.Size, shift: int) -> None:
        """See ``frequency.Products``."""
        launch, grid, arguments, meta = correlate_launch(_flat(spectra), _flat(grad), _flat(sums), shift)
        launch[grid](*arguments, **meta)


def _met(kernel: torch.Size, sizes: frequency.Sizes) -> tuple[slice, slice]:
    """Return the taps along height and width that ever meet a pixel: others may not fit in a padded plane."""
    reaches = (min(taps // 2, side - 1) for taps, side in zip(kernel[3:], (sizes.height, sizes.width), strict=True))
    first, last = (slice(taps // 2 - r, taps // 2 + r + 1) for taps, r in zip(kernel[3:], reaches, strict=True))
    return first, last


def _flat(spectra: Tensor) -> Tensor:
    return torch.view_as_real(spectra).flatten(3, 4)


def fft_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See ``Backend.fft_conv3d``."""
    return frequency.convolve(Products, x, weight, bias)


def fft_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``Backend.fft_conv3d_backward``."""
    return frequency.convolve_backward(Products, grad, x, weight, needed)
