# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels (csrc/cpu) as a backend: they get addresses and strides, and torch's own threads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import unit

_missing: str | None = None
try:
    from stoptome_kernels import _native
except ImportError as error:
    _missing = f"the native kernels were not built ({error}); reinstall with a C++ compiler: pip install -v ."
else:
    # one pool of threads in the process: the OpenMP runtime that torch itself depends on
    _native.use_openmp_of(torch._C.__file__)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MODES = {"mean": 0, "sum": 1, "max": 2, "all": 3}
_NOTHING = (0, 0, 0)


def why_not(device: str, dtype: torch.dtype, explicit: bool) -> str | None:
    """The reason why the native kernels can't run on such tensors here, or None."""
    if _missing:
        return _missing
    if device != "cpu":
        return f"the native kernels run on CPU tensors, not on {device}"
    return None


def _rows(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`stoptome_kernels.reference.match`."""
    metric = unit(metric)
    n, heads, tokens, channels = metric.shape
    dest = metric.new_empty((n, tokens), dtype=torch.int32)
    members = metric.new_empty((n, tokens), dtype=torch.int32)
    offsets = metric.new_empty((n, tokens - r + 1), dtype=torch.int32)
    _native.match(
        metric.data_ptr(), _DTYPES[metric.dtype], n, heads, tokens, channels,
        metric.stride(0), metric.stride(1), metric.stride(2), r, protected,
        dest.data_ptr(), members.data_ptr(), offsets.data_ptr(), torch.get_num_threads(),
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
    """See :func:`stoptome_kernels.reference.reduce`; ``out`` is where to write, contiguous."""
    x, members, offsets = unit(x), members.contiguous(), offsets.contiguous()
    n, tokens, dim = x.shape
    tokens_out = offsets.shape[1] - 1
    y = x.new_empty((n, tokens_out, dim)) if out is None else out[0]
    size_out = x.new_empty((n, tokens_out), dtype=torch.float32) if out is None else out[1]
    _native.reduce(
        _rows(x), _rows(y), _DTYPES[x.dtype], _MODES[mode], members.data_ptr(), offsets.data_ptr(), n, tokens,
        tokens_out, dim, _NOTHING if size is None else _rows(size), size_out.data_ptr(), out is None,
        torch.get_num_threads(),
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
    """See :func:`stoptome_kernels.reference.spread`."""
    grad, members, offsets = unit(grad), members.contiguous(), offsets.contiguous()
    n, tokens_out, dim = grad.shape
    out = grad.new_empty((n, members.shape[1], dim))
    x, y = (None if t is None else unit(t) for t in (x, y))
    _native.spread(
        _rows(grad), _rows(out), _DTYPES[grad.dtype], _MODES[mode], members.data_ptr(), offsets.data_ptr(), n,
        members.shape[1], tokens_out, dim, _NOTHING if size is None else _rows(size),
        _NOTHING if x is None else _rows(x), _NOTHING if y is None else _rows(y), torch.get_num_threads(),
    )  # fmt: skip
    return out
