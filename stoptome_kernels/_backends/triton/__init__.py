# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as a backend, for NVIDIA GPUs; Triton itself is imported at the first call."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from ...reference import AttentionInputs
from ..contract import Backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_CHANNELS = 128  # of attention: the accumulators of wider heads do not fit the registers


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


def _guard(device: torch.device) -> AbstractContextManager | None:
    """Return what makes a device the current one, on which Triton launches; None where it is: a switch costs
    microseconds."""
    if device.type != "cuda":  # interpreted by numpy, which would warn of every NaN and overflow
        import numpy

        return numpy.errstate(all="ignore")
    return None if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _operation(module: str, name: str) -> Any:
    """Return an operation of a module of this folder, which is imported, and Triton with it, at the first call. It runs
    on the device of its first argument, or of that one's first tensor."""

    @cache
    def load():
        return getattr(import_module(f"{__name__}.{module}"), name)

    def run(first, *rest):
        tensor = first if isinstance(first, torch.Tensor) else first[0]
        guard = _guard(tensor.device)
        if guard is None:
            return load()(first, *rest)
        with guard:
            return load()(first, *rest)

    run.__name__ = run.__qualname__ = name
    return staticmethod(run)


class Triton(Backend):
    """The kernels of this folder."""

    name = "triton"
    devices = ("cuda", "cpu")
    match = _operation("match", "match")
    reduce = _operation("merge", "reduce")
    spread = _operation("merge", "spread")
    merge_norm = _operation("norm", "merge_norm")
    merge_norm_backward = _operation("norm", "merge_norm_backward")
    attention = _operation("attention", "attention")
    attention_backward = _operation("attention_grad", "attention_backward")
    fft_conv3d = _operation("conv", "fft_conv3d")
    fft_conv3d_backward = _operation("conv", "fft_conv3d_backward")

    def unavailable_reason(self, device: str, dtype: torch.dtype, explicit: bool) -> str | None:
        """Return the reason why the Triton kernels can't run on such tensors here, or None.

        CPU tensors are taken only when asked for and under Triton's interpreter, which is thousands of times slower.
        """
        if device != "cuda":
            if not explicit or device != "cpu":
                return f"the Triton kernels run on CUDA tensors, not on {device}"
            if os.environ.get("TRITON_INTERPRET") != "1":
                return (
                    "the Triton kernels need an NVIDIA GPU; they take CPU tensors only under TRITON_INTERPRET=1, in "
                    "tests"
                )
        if dtype not in _DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
        return _no_triton() or (_no_gpu() if device == "cuda" else None)

    def takes(self, inputs: AttentionInputs) -> bool:
        """Return whether the kernels attend to inputs of such shapes; asked while compiling, where a message with a
        number in it would make that number a constant."""
        if inputs.q.shape[3] > _MOST_CHANNELS:  # noqa: SIM103, the comparison of a trace is no bool
            return False
        return True

    def unsupported_attention(self, inputs: AttentionInputs) -> str | None:
        if self.takes(inputs):
            return None
        return f"the Triton kernels attend with at most {_MOST_CHANNELS} channels a head, not with {inputs.q.shape[3]}"
