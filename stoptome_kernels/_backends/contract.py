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

    Arguments come by position, are checked before (types, shapes, dtypes, devices, ranges) and have any strides where
    nothing else is said. Results are new tensors, contiguous where nothing else is said, and the same bit for bit from
    run to run. An operation changes no argument but ``out``, and waits for no device. Groups may be damaged: on a CPU
    that raises IndexError, see ``reference.merging.read``; elsewhere no index leaves its range, and rows of tokens that
    are in no group are NaN.

    Attributes:
        name: what ``backend=`` and ``STOPTOME_BACKEND`` call it.
        devices: types of device whose tensors it takes, the preferred one first.
    """

    name: str
    devices: tuple[str, ...] = ("cpu",)

    @abstractmethod
    def unavailable_reason(self, device: str, dtype: torch.dtype, explicit: bool) -> str | None:
        """Return the reason why tensors of a type of device and a dtype can't be taken here, or None; ``explicit`` if
        the backend was asked for by name."""

    def unsupported_attention(self, inputs: AttentionInputs) -> str | None:
        """Return the reason why attention can't be computed for inputs of such shapes, or None."""
        return None

    @abstractmethod
    def match(
        self, metric: Tensor, r: int, protected: int, order: Tensor | None = None, sources: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Match ``metric (N, H, T, C)``, N ≥ 1, with 1 ≤ r, capped: return dest ``(N, T)``, members ``(N, T)`` and
        offsets ``(N, T - r + 1)``, int32. The leading ``protected`` tokens are in neither set; with ``order (T,)``,
        a contiguous int32 permutation, they are those that lead it, and the next ``sources`` are the sources."""

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
        """Apply the adjoint of ``reduce`` to ``grad (N, T_out, D)``: return ``(N, T, D)``. Mode max needs the merge's
        input x and output y."""

    @abstractmethod
    def merge_norm(
        self, x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Merge ``x + residual``, both ``(N, T, D)``, and normalise by LayerNorm with weight and bias ``(D,)``: return
        y and normed ``(N, T_out, D)`` in the dtype that x and residual promote to, size_out ``(N, T_out)`` float32, and
        mean and rstd ``(N, T_out)`` float32 (float64 for float64)."""

    def merge_norm_inference(
        self, x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, normed and size_out of ``merge_norm``, the same bit for bit."""
        return self.merge_norm(x, residual, groups, weight, bias, eps)[:3]

    @abstractmethod
    def merge_norm_backward(
        self, grad_normed: Tensor, grad_y: Tensor | None, rows: MergedRows, groups: Groups, weight: Tensor | None,
        affine: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the gradients of x ``(N, T, D)`` and of weight and bias ``(2, D)``, the latter in rstd's dtype, and
        ``(0, D)`` if not ``affine``; from those of normed and y ``(N, T_out, D)``."""

    @abstractmethod
    def attention(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Return out ``(N, H, Tq, d)``, with the heads of a token next to each other in memory, and the logarithm of
        the softmax's sum ``(N, H, Tq)``, float32 (float64 for float64). There is at least one query and one key."""

    def attention_inference(self, inputs: AttentionInputs) -> Tensor:
        """Return out of ``attention``, the same bit for bit."""
        return self.attention(inputs)[0]

    @abstractmethod
    def attention_backward(
        self, grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of q, k and v, of any strides, and of prefix_k and prefix_v, None without a prefix; from
        ``grad (N, H, Tq, d)`` and the results of ``attention``."""

    @abstractmethod
    def fft_conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve ``x (B, C, T, H, W)`` with ``weight (O, C, kt, kh, kw)`` and bias ``(O,)``: ``(B, O, T, H, W)``."""

    @abstractmethod
    def fft_conv3d_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, in its dtype, of weight and of bias, in float32 (float64 for float64), from
        ``grad (B, O, T, H, W)``; empty ones where they are not ``needed``."""
