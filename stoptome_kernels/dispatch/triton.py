# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as a backend, for NVIDIA GPUs; Triton itself is imported at the first call."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import frequency

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_KEYS, _MOST_CHANNELS = 256, 128  # of attention: all keys of a head are held at once


@cache
def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        found = version("triton")
    except PackageNotFoundError:  # another name on the wheel, as pytorch-triton
        return None
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < (3, 2):
        return f"the Triton kernels need Triton 3.2 or later, found {found}: pip install -U triton"
    return None


@cache
def _no_gpu() -> str | None:
    """Return why there is no GPU that Triton can use, or None; asked only once there is a CUDA tensor or device."""
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the Triton kernels need a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    return None


def unavailable_reason(device: str, dtype: torch.dtype, explicit: bool) -> str | None:
    """Return the reason why the Triton kernels can't run on such tensors here, or None.

    CPU tensors are taken only when asked for and under Triton's interpreter, which is thousands of times slower.
    """
    if device != "cuda":
        if not explicit or device != "cpu":
            return f"the Triton kernels run on CUDA tensors, not on {device}"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "the Triton kernels need an NVIDIA GPU; they take CPU tensors only under TRITON_INTERPRET=1, in tests"
            )
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    return _no_triton() or (_no_gpu() if device == "cuda" else None)


def unsupported_attention(keys: int, channels: int) -> str | None:
    """Return the reason why the Triton kernels can't attend to so many keys with heads so wide, or None."""
    if keys > _MOST_KEYS:
        return f"the Triton kernels attend to at most {_MOST_KEYS} keys, prefix included, not to {keys}"
    if channels > _MOST_CHANNELS:
        return f"the Triton kernels attend with at most {_MOST_CHANNELS} channels a head, not with {channels}"
    return None


def _on(tensor: Tensor):
    """Make a device the current one, on which Triton launches; a switch costs microseconds, so only where it is
    needed."""
    if not tensor.is_cuda:  # interpreted by numpy, which would warn of every NaN and overflow
        import numpy

        return numpy.errstate(all="ignore")
    if tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def match(
    metric: Tensor, r: int, protected: int, order: Tensor | None = None, sources: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``stoptome_kernels.reference.match``."""
    from ..kernels import match as kernels

    with _on(metric):
        return kernels.match(metric, r, protected, order, sources)


def reduce(
    x: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    mode: str,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``stoptome_kernels.reference.reduce``; ``out`` is where to write, contiguous."""
    from ..kernels import merge as kernels

    with _on(x):
        return kernels.reduce(x, members, offsets, size, mode, out)


def spread(
    grad: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    mode: str,
    x: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """See ``stoptome_kernels.reference.spread``."""
    from ..kernels import merge as kernels

    with _on(grad):
        return kernels.spread(grad, members, offsets, size, mode, x, y)


def merge_norm(
    x: Tensor,
    residual: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``stoptome_kernels.reference.merge_norm``."""
    from ..kernels import norm as kernels

    with _on(x):
        return kernels.merge_norm(x, residual, members, offsets, size, weight, bias, eps)


def merge_norm_backward(
    grad_normed: Tensor,
    grad_y: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """See ``stoptome_kernels.reference.merge_norm_backward``."""
    from ..kernels import norm as kernels

    with _on(grad_normed):
        return kernels.merge_norm_backward(grad_normed, grad_y, y, mean, rstd, members, offsets, size, weight, affine)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``stoptome_kernels.reference.attention``."""
    from ..kernels import attention as kernels

    with _on(q):
        return kernels.attention(q, k, v, size, prefix_k, prefix_v, scale)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See ``stoptome_kernels.reference.attention_backward``."""
    from ..kernels import attention as kernels

    with _on(q):
        return kernels.attention_backward(grad, q, k, v, size, prefix_k, prefix_v, out, lse, scale)


def fft_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See ``stoptome_kernels.reference.fft_conv3d``."""
    from ..kernels import conv as kernels

    with _on(x):
        return frequency.convolve(kernels.Products, x, weight, bias)


def fft_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``stoptome_kernels.reference.fft_conv3d_backward``."""
    from ..kernels import conv as kernels

    with _on(grad):
        return frequency.convolve_backward(kernels.Products, grad, x, weight, needed)
