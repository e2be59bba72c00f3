# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels (csrc/cpu) as a backend: they get addresses and strides, and torch's own threads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import heads_last, log_size_bias, unit_stride, with_prefix

_missing: str | None = None
try:
    import stoptome_kernels._native as _native  # "from … import" would blame a circular import
except ImportError as error:
    _missing = f"the native kernels were not built ({error}); reinstall with a C++ compiler: pip install -v ."
else:
    if getattr(_native, "INTERFACE", 1) != 2:
        _missing = "the native kernels are of another version of this package; reinstall: pip install -v ."
    # one pool of threads in the process: the OpenMP runtime that torch itself depends on
    _native.use_openmp_of(torch._C.__file__)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MODES = {"mean": 0, "sum": 1, "max": 2, "all": 3}
_NOTHING = (0, 0, 0)


def unavailable_reason(device: str, dtype: torch.dtype, explicit: bool) -> str | None:
    """Return the reason why the native kernels can't run on such tensors here, or None."""
    if _missing:
        return _missing
    if device != "cpu":
        return f"the native kernels run on CPU tensors, not on {device}"
    return None


def _rows(x: Tensor | None) -> tuple[int, int, int]:
    return _NOTHING if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _groups(members: Tensor, offsets: Tensor) -> tuple[int, int, int, int, int]:
    """Return a plan's groups as the kernels take them; both tensors must be contiguous."""
    items, tokens_in = members.shape
    return members.data_ptr(), offsets.data_ptr(), items, tokens_in, offsets.shape[1] - 1


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def match(
    metric: Tensor, r: int, protected: int, order: Tensor | None = None, sources: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``stoptome_kernels.reference.match``."""
    metric = unit_stride(metric)
    n, heads, tokens, channels = metric.shape
    dest = metric.new_empty((n, tokens), dtype=torch.int32)
    members = metric.new_empty((n, tokens), dtype=torch.int32)
    offsets = metric.new_empty((n, tokens - r + 1), dtype=torch.int32)
    _native.match(
        (metric.data_ptr(), metric.stride(0), metric.stride(1), metric.stride(2)), (n, heads, tokens, channels),
        _DTYPES[metric.dtype], r, protected, _address(order), sources,
        (dest.data_ptr(), members.data_ptr(), offsets.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return dest, members, offsets


def reduce(
    x: Tensor,
    members: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    mode: str,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``stoptome_kernels.reference.reduce``; ``out`` is where to write, contiguous."""
    x, members, offsets = unit_stride(x), members.contiguous(), offsets.contiguous()
    n, _, dim = x.shape
    tokens_out = offsets.shape[1] - 1
    y = x.new_empty((n, tokens_out, dim)) if out is None else out[0]
    size_out = x.new_empty((n, tokens_out), dtype=torch.float32) if out is None else out[1]
    _native.reduce(
        _rows(x), _rows(y), _DTYPES[x.dtype], _MODES[mode], _groups(members, offsets), dim, _rows(size),
        size_out.data_ptr(), out is None, torch.get_num_threads(),
    )  # fmt: skip
    return y, size_out


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
    grad, members, offsets = unit_stride(grad), members.contiguous(), offsets.contiguous()
    n, _, dim = grad.shape
    out = grad.new_empty((n, members.shape[1], dim))
    x, y = (None if t is None else unit_stride(t) for t in (x, y))
    _native.spread(
        _rows(grad), _rows(out), _DTYPES[grad.dtype], _MODES[mode], _groups(members, offsets), dim, _rows(size),
        _rows(x), _rows(y), torch.get_num_threads(),
    )  # fmt: skip
    return out


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
    stream = torch.promote_types(x.dtype, residual.dtype)
    wide = torch.float64 if stream == torch.float64 else torch.float32
    x, residual = unit_stride(x.to(stream)), unit_stride(residual.to(stream))
    members, offsets = members.contiguous(), offsets.contiguous()
    weight, bias = (None if t is None else t.to(wide).contiguous() for t in (weight, bias))
    n, _, dim = x.shape
    tokens_out = offsets.shape[1] - 1
    y, normed = (x.new_empty((n, tokens_out, dim)) for _ in range(2))
    size_out, mean, rstd = (x.new_empty((n, tokens_out), dtype=dtype) for dtype in (torch.float32, wide, wide))
    _native.merge_norm(
        _rows(x), _rows(residual), _rows(y), _rows(normed), _DTYPES[stream], _groups(members, offsets), dim,
        _rows(size), size_out.data_ptr(), _address(weight), _address(bias), eps, mean.data_ptr(), rstd.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, normed, size_out, mean, rstd


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
    grad_normed, y = unit_stride(grad_normed), unit_stride(y)
    members, offsets = members.contiguous(), offsets.contiguous()
    grad_y = None if grad_y is None else unit_stride(grad_y)
    weight = None if weight is None else weight.to(mean.dtype).contiguous()
    mean, rstd = mean.contiguous(), rstd.contiguous()
    n, _, dim = grad_normed.shape
    grad = grad_normed.new_empty((n, members.shape[1], dim))
    sums = mean.new_empty((2 if affine else 0, dim))
    _native.merge_norm_backward(
        _rows(grad_normed), _rows(grad_y), _rows(y), _rows(grad), _DTYPES[grad.dtype], _groups(members, offsets), dim,
        _rows(size), mean.data_ptr(), rstd.data_ptr(), _address(weight), sums.data_ptr() if affine else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return grad, sums


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``stoptome_kernels.reference.attention``: torch's own fused kernel, with the prefix concatenated."""
    keys, values = unit_stride(with_prefix(prefix_k, k)), unit_stride(with_prefix(prefix_v, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        unit_stride(q), keys, values, attn_mask=log_size_bias(size, keys), scale=scale
    )
    return heads_last(out), lse.contiguous()


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
    keys, values = unit_stride(with_prefix(prefix_k, k)), unit_stride(with_prefix(prefix_v, v))
    dq, dkeys, dvalues = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        unit_stride(grad),
        unit_stride(q),
        keys,
        values,
        out,
        lse,
        0.0,
        False,
        attn_mask=log_size_bias(size, keys),
        scale=scale,
    )
    if prefix_k is None:
        return heads_last(dq), heads_last(dkeys), heads_last(dvalues), None, None
    m, _, ahead, _ = prefix_k.shape
    # summed in float32 and rounded once, as on every backend
    shared = (x[:, :, :ahead].unflatten(0, (m, -1)).sum(1, dtype=lse.dtype).to(q.dtype) for x in (dkeys, dvalues))
    return heads_last(dq), heads_last(dkeys[:, :, ahead:]), heads_last(dvalues[:, :, ahead:]), *shared
