# SPDX-License-Identifier: Apache-2.0
"""The operator fft_conv3d (convolution in the frequency domain) and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .._backends import choose
from ..layout import accumulator_dtype
from .library import define, gradient, no_gradient


def _fft_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    checks.fft_conv3d(x, weight, bias, backend)
    return choose(backend, x).fft_conv3d(x, weight, bias)


def _fft_conv3d_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    checks.fft_conv3d(x, weight, bias, backend)
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


define(
    "fft_conv3d(Tensor x, Tensor weight, Tensor? bias=None, str backend='auto') -> Tensor",
    _fft_conv3d,
    _fft_conv3d_fake,
)


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor, backend: str) -> None:
    checks.fft_conv3d(x, weight, None, backend)
    checks.saved_tensor(grad, "grad", (x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype, x.device)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(grad, x, weight, backend)
    return choose(backend, x).fft_conv3d_backward(grad, x, weight, (of_x, of_weight, of_bias))


def _backward_fake(grad, x, weight, of_x, of_weight, of_bias, backend):
    _check_backward(grad, x, weight, backend)
    wide = accumulator_dtype(x.dtype)
    return (
        x.new_empty(x.shape if of_x else 0),
        x.new_empty(weight.shape if of_weight else 0, dtype=wide),
        x.new_empty(weight.shape[0] if of_bias else 0, dtype=wide),
    )


# what isn't needed is empty; the gradients of weight and bias are in the wide type, as they are summed
define(
    "fft_conv3d_backward(Tensor grad, Tensor x, Tensor weight, bool of_x, bool of_weight, bool of_bias, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _grad(ctx, grad):
    x, weight = ctx.saved_tensors
    needed = (*ctx.needs_input_grad[:3], False)[:3]
    grads = torch.ops.stoptome.fft_conv3d_backward(grad, x, weight, *needed, ctx.backend)
    dtypes = (x.dtype, weight.dtype, ctx.bias_dtype)
    found = (g.to(dtype) if want else None for g, dtype, want in zip(grads, dtypes, needed, strict=True))
    return (*found, None)


gradient("fft_conv3d", _grad, _save)
no_gradient(
    "fft_conv3d_backward",
    "fft_conv3d has no second derivative; use torch.nn.functional.conv3d where one is needed",
)
