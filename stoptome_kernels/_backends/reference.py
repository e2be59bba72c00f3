# SPDX-License-Identifier: Apache-2.0
"""The fallback: plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import AttentionInputs, Groups
from .contract import Backend


class Reference(Backend):
    """The functions of ``stoptome_kernels.reference``."""

    name = "reference"
    match = staticmethod(reference.match)
    spread = staticmethod(reference.spread)
    merge_norm = staticmethod(reference.merge_norm)
    merge_norm_backward = staticmethod(reference.merge_norm_backward)
    attention = staticmethod(reference.attention)
    fft_conv3d = staticmethod(reference.fft_conv3d)
    fft_conv3d_backward = staticmethod(reference.fft_conv3d_backward)

    def unavailable_reason(self, device: str, dtype: torch.dtype, explicit: bool) -> str | None:
        return None

    def reduce(
        self, x: Tensor, groups: Groups, mode: str, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        y, size_out = reference.reduce(x, groups, mode)
        return (y, size_out) if out is None else (out[0].copy_(y), out[1].copy_(size_out))

    def attention_backward(self, grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> tuple:
        return reference.attention_backward(grad, inputs)
