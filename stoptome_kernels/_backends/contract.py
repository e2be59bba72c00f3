# SPDX-License-Identifier: Apache-2.0
"""The contract of a backend: its operations, once, with their shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..reference import AttentionInputs, Groups, MergedRows


class Backend(ABC):
    """An implementation of all operations for tensors of some device; what each computes is said, and done in plain
    PyTorch, by the function of the same name in ``stoptome_kernels.reference``.

    Arguments are checked before (types, shapes, dtypes, devices, ranges), and have any strides. Results are new
    tensors, contiguous where nothing else is said, and the same bit for bit from run to run. An operation changes no
    argument, and waits for no device. Groups may be damaged, since they are numbers on a device: no index may leave its
    range, and no row may show what was in memory before.

    Attributes:
        name: what ``backend=`` and ``STOPTOME_BACKEND`` call it.
    """

    name: str

    @abstractmethod
    def unavailable_reason(self, device: str, dtype: torch.dtype, explicit: bool) -> str | None:
        """Return the reason why such tensors can't be taken here, or None.

        Args:
            device: type of device, as ``cuda``.
            dtype: of the tensors.
            explicit: whether the backend was asked for by name.
        """

    def unsupported_attention(self, inputs: AttentionInputs) -> str | None:
        """Return the reason why attention can't be computed for inputs of such shapes, or None."""
        return None

    @abstractmethod
    def match(
        self, metric: Tensor, r: int, protected: int, order: Tensor | None = None, sources: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Match ``metric (N, H, T, C)``, N ≥ 1: return dest ``(N, T)``, members ``(N, T)`` and offsets
        ``(N, T - r + 1)``, int32. 1 ≤ r, capped; ``order (T,)`` int32 is a permutation."""

    @abstractmethod
    def reduce(
        self, x: Tensor, groups: Groups, mode: str, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Merge ``x (N, T, D)``: return y ``(N, T_out, D)`` and size_out ``(N, T_out)`` float32, written into ``out``
        (contiguous) if given. ``mode``: mean, sum, max or all."""

    @abstractmethod
    def spread(
        self, grad: Tensor, groups: Groups, mode: str, x: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Return the adjoint of ``reduce``, ``(N, T, D)`` of ``grad (N, T_out, D)``; for mode max of x and y."""

    @abstractmethod
    def merge_norm(
        self, x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Merge ``x + residual``, both ``(N, T, D)``, and normalise by LayerNorm with weight and bias ``(D,)``: return
        y and normed ``(N, T_out, D)``, size_out, mean and rstd ``(N, T_out)``."""

    @abstractmethod
    def merge_norm_backward(
        self, grad_normed: Tensor, grad_y: Tensor | None, rows: MergedRows, groups: Groups, weight: Tensor | None,
        affine: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the gradients of x ``(N, T, D)`` and of weight and bias ``(2, D)``, the latter ``(0, D)`` if not
        ``affine``; from those of normed and y ``(N, T_out, D)``."""

    @abstractmethod
    def attention(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Return out ``(N, H, Tq, d)``, with the heads of a token next to each other in memory, and the logarithm of
        the softmax's sum ``(N, H, Tq)``, float32 (float64 for float64). There is at least one query and one key."""

    @abstractmethod
    def attention_backward(
        self, grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of q, k, v, prefix_k and prefix_v, as they are laid out in ``attention``; from
        ``grad (N, H, Tq, d)`` and what ``attention`` gave."""

    @abstractmethod
    def fft_conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve ``x (B, C, T, H, W)`` with ``weight (O, C, kt, kh, kw)`` and bias ``(O,)``: ``(B, O, T, H, W)``."""

    @abstractmethod
    def fft_conv3d_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, in its dtype, of weight and of bias, in float32 (float64 for float64), from
        ``grad (B, O, T, H, W)``; empty ones where they are not ``needed``."""
