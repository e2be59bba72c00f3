# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels (csrc/cpu) as a backend: they get addresses and strides, and torch's own threads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import (
    accumulator_dtype,
    contiguous_groups,
    empty_heads_last,
    empty_merged,
    empty_plan,
    heads_last,
    log_size_bias,
    unit_stride,
    with_prefix,
)
from ..reference import AttentionInputs, Groups, MergedRows, prefix_length, scale_of
from . import frequency
from .contract import Backend

_missing: str | None = None
try:
    import stoptome_kernels._native as _native  # "from … import" would blame a circular import
except ImportError as error:
    _missing = f"the native kernels were not built ({error}); reinstall with a C++ compiler: pip install -v ."
else:
    if getattr(_native, "INTERFACE", 1) != 6:
        _missing = "the native kernels are of another version of this package; reinstall: pip install -v ."
    # one pool of threads in the process: the OpenMP runtime that torch itself depends on
    _native.use_openmp_of(torch._C.__file__)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MODES = {"mean": 0, "sum": 1, "max": 2, "all": 3}
_NOTHING, _NO_HEADS = (0, 0, 0), (0, 0, 0, 0)
_MOST_KEYS, _MOST_CHANNELS = 4096, 256  # of attention: a thread holds all keys and values of a head
_HAS_TILES = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


class Native(Backend):
    """The native kernels, and on a CPU torch's own fused attention."""

    name = "native"

    def unavailable_reason(self, device: str, dtype: torch.dtype, explicit: bool) -> str | None:
        if _missing:
            return _missing
        if device != "cpu":
            return f"the native kernels run on CPU tensors, not on {device}"
        return None

    def match(
        self, metric: Tensor, r: int, protected: int, order: Tensor | None = None, sources: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        metric = unit_stride(metric)
        dest, members, offsets = empty_plan(metric, r)
        (n, heads, tokens, channels), (by_item, by_head, by_token, _) = metric.shape, metric.stride()
        _native.match(
            (metric.data_ptr(), by_item, by_head, by_token), (n, heads, tokens, channels), _DTYPES[metric.dtype], r,
            protected, _address(order), sources,
            (dest.data_ptr(), members.data_ptr(), offsets.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        return dest, members, offsets

    def reduce(
        self, x: Tensor, groups: Groups, mode: str, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        x, groups = unit_stride(x), contiguous_groups(groups)
        y, size_out = empty_merged(x, groups) if out is None else out
        _native.reduce(
            _rows(x), _rows(y), _DTYPES[x.dtype], _MODES[mode], _addresses(groups), x.shape[2], size_out.data_ptr(),
            out is None, torch.get_num_threads(),
        )  # fmt: skip
        return y, size_out

    def spread(
        self, grad: Tensor, groups: Groups, mode: str, x: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        grad, groups = unit_stride(grad), contiguous_groups(groups)
        out = grad.new_empty((grad.shape[0], groups.members.shape[1], grad.shape[2]))
        x, y = (None if t is None else unit_stride(t) for t in (x, y))
        _native.spread(
            _rows(grad), _rows(out), _DTYPES[grad.dtype], _MODES[mode], _addresses(groups), grad.shape[2],
            _rows(x), _rows(y), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def merge_norm(
        self, x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _merge_norm(x, residual, groups, weight, bias, eps, True)  # type: ignore[return-value]

    def merge_norm_inference(
        self, x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _merge_norm(x, residual, groups, weight, bias, eps, False)  # type: ignore[return-value]

    def merge_norm_backward(
        self, grad_normed: Tensor, grad_y: Tensor | None, rows: MergedRows, groups: Groups, weight: Tensor | None,
        affine: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        grad_normed, groups = unit_stride(grad_normed), contiguous_groups(groups)
        grad_y = None if grad_y is None else unit_stride(grad_y)
        y, mean, rstd = unit_stride(rows.y), rows.mean.contiguous(), rows.rstd.contiguous()
        weight = _as(weight, mean.dtype)
        n, _, dim = grad_normed.shape
        grad = grad_normed.new_empty((n, groups.members.shape[1], dim))
        sums = mean.new_empty((2 if affine else 0, dim))
        _native.merge_norm_backward(
            _rows(grad_normed), _rows(grad_y), _rows(y), _rows(grad), _DTYPES[grad.dtype], _addresses(groups), dim,
            mean.data_ptr(), rstd.data_ptr(), _address(weight), sums.data_ptr() if affine else 0,
            torch.get_num_threads(),
        )  # fmt: skip
        return grad, sums

    def takes(self, inputs: AttentionInputs) -> bool:
        """Return whether the kernel attends to inputs of such shapes and dtype, rather than torch's own function: for
        vectors as narrow as the baseline's that is faster, for 16 bits where the processor multiplies tiles of them."""
        keys = prefix_length(inputs) + inputs.k.shape[2]
        if (
            keys > _MOST_KEYS
            or inputs.q.shape[3] > _MOST_CHANNELS
            or _missing
            or _native.instruction_set() == "baseline"
        ):
            return False
        return not (_HAS_TILES and inputs.q.dtype in (torch.bfloat16, torch.float16))

    def attention(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        if self.takes(inputs):
            n, heads, queries, _ = inputs.q.shape
            lse = inputs.q.new_empty((n, heads, queries), dtype=accumulator_dtype(inputs.q.dtype))
            return _attention(inputs, lse), lse
        q, keys, values = _queries_keys_values(inputs)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, attn_mask=log_size_bias(inputs.size, keys), scale=scale_of(inputs)
        )
        return heads_last(out), lse.contiguous()

    def attention_inference(self, inputs: AttentionInputs) -> Tensor:
        return _attention(inputs, None) if self.takes(inputs) else self.attention(inputs)[0]

    def attention_backward(self, grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> tuple:
        q, keys, values = _queries_keys_values(inputs)
        if inputs.size is not None:  # of a query with nothing to attend to: its weights are exp(−inf), whatever this is
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        dq, dkeys, dvalues = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            unit_stride(grad), q, keys, values, unit_stride(out), lse, 0.0, False,
            attn_mask=log_size_bias(inputs.size, keys), scale=scale_of(inputs),
        )  # fmt: skip
        if inputs.prefix_k is None:
            return dq, dkeys, dvalues, None, None
        m, ahead = inputs.prefix_k.shape[0], prefix_length(inputs)
        # summed in float32 and rounded once, as on every backend
        shared = (x[:, :, :ahead].unflatten(0, (m, -1)).sum(1, dtype=lse.dtype).to(q.dtype) for x in (dkeys, dvalues))
        return dq, dkeys[:, :, ahead:], dvalues[:, :, ahead:], *shared

    def fft_conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return frequency.convolve(_Products, x, weight, bias)

    def fft_conv3d_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return frequency.convolve_backward(_Products, grad, x, weight, needed)


def _merge_norm(
    x: Tensor, residual: Tensor, groups: Groups, weight: Tensor | None, bias: Tensor | None, eps: float, stats: bool
) -> tuple[Tensor, ...]:
    """See ``Backend.merge_norm``; without ``stats`` neither mean nor rstd."""
    stream = x.dtype
    if residual.dtype != stream:
        stream = torch.promote_types(stream, residual.dtype)
        x, residual = x.to(stream), residual.to(stream)
    wide = accumulator_dtype(stream)
    x, residual, groups = unit_stride(x), unit_stride(residual), contiguous_groups(groups)
    weight, bias = _as(weight, wide), _as(bias, wide)
    y, size_out = empty_merged(x, groups)
    normed = torch.empty_like(y)
    more = tuple(size_out.new_empty(size_out.shape, dtype=wide) for _ in range(2)) if stats else ()
    mean, rstd = (t.data_ptr() for t in more) if stats else (0, 0)
    _native.merge_norm(
        _rows(x), _rows(residual), _rows(y), _rows(normed), _DTYPES[stream], _addresses(groups), x.shape[2],
        size_out.data_ptr(), _address(weight), _address(bias), eps, mean, rstd, torch.get_num_threads(),
    )  # fmt: skip
    return y, normed, size_out, *more


def _attention(inputs: AttentionInputs, lse: Tensor | None) -> Tensor:
    """See ``Backend.attention``; lse is written where it is given."""
    q, k, v, size, prefix_k, prefix_v, _ = inputs
    (n, heads, queries, d), tokens = q.shape, k.shape[2]
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if prefix_k is None or prefix_v is None:
        m, ahead, prefix = 0, 0, (_NO_HEADS, _NO_HEADS)
    else:
        m, _, ahead, _ = prefix_k.shape
        prefix_k, prefix_v = unit_stride(prefix_k), unit_stride(prefix_v)
        prefix = _heads(prefix_k), _heads(prefix_v)
    out = empty_heads_last(q, n, heads, queries)
    _native.attention(
        _heads(q), _heads(k), _heads(v), *prefix, (n, heads, queries, tokens, d, m, ahead), _DTYPES[q.dtype],
        _rows(size), scale_of(inputs), out.data_ptr(), _address(lse), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    by_item, by_head, by_token, _ = x.stride()
    return x.data_ptr(), by_item, by_head, by_token


def _as(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a parameter ``(D,)`` as the kernels read it."""
    if parameter is None or (parameter.dtype == dtype and parameter.is_contiguous()):
        return parameter
    return parameter.to(dtype).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(x: Tensor | None) -> tuple[int, int, int]:
    if x is None:
        return _NOTHING
    by_item, by_row, *_ = x.stride()
    return x.data_ptr(), by_item, by_row


def _addresses(groups: Groups) -> tuple[int, int, int, int, int, tuple[int, int, int]]:
    """Return contiguous groups as the kernels take them."""
    members, offsets, size = groups
    items, tokens = members.shape
    return members.data_ptr(), offsets.data_ptr(), items, tokens, offsets.shape[1] - 1, _rows(size)


def _queries_keys_values(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return what torch's attention takes, with the prefix concatenated."""
    keys, values = with_prefix(inputs.prefix_k, inputs.k), with_prefix(inputs.prefix_v, inputs.v)
    return unit_stride(inputs.q), unit_stride(keys), unit_stride(values)


# -- convolution in the frequency domain ------------------------------------------------------------------------------


class _Products:
    """The products of spectra by native kernels, as a ``frequency.Products``.

    Filters are transformed along the width alone, ``(blocks, O, C, kt, kh, 2, 16)``: 16 frequencies of a block, real
    and imaginary parts; along the height the sums of taps at the same distance from the middle one, then their
    differences. See csrc/cpu/conv.cpp, which goes on from there.
    """

    budget = 52 << 20  # a video of STOP's layers of 9 channels

    @staticmethod
    def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``frequency.Products``. In huge pages, if the system gives them."""
        out = like.new_empty(shape, dtype=dtype)
        _native.expect_writes(out.data_ptr(), out.numel() * out.element_size())
        return out

    @classmethod
    def spectra(cls, x: Tensor, sizes: frequency.Sizes) -> Tensor:
        """See ``frequency.Products``. A few planes at a time: what is in the cache is transformed twice as fast."""
        wide = accumulator_dtype(x.dtype)
        out = cls.empty(x, (*x.shape[:3], sizes.rows, sizes.columns), wide.to_complex())
        at_once = _planes_at_once()
        padded = x.new_zeros((at_once, sizes.rows, sizes.padded_width), dtype=wide)
        inside = padded[:, : sizes.height, : sizes.width]
        for video, spectra in zip(x.unbind(), out.unbind(), strict=True):
            for channel, spectrum in zip(video.unbind(), spectra.unbind(), strict=True):
                for first in range(0, len(channel), at_once):
                    planes = channel[first : first + at_once]
                    inside[: len(planes)].copy_(planes)
                    torch.fft.rfft2(padded[: len(planes)], out=spectrum[first : first + at_once])
        return out

    @staticmethod
    def planes(spectra: Tensor, sizes: frequency.Sizes, bias: Tensor | None, out: Tensor) -> None:
        """See ``frequency.Products``."""
        at_once, size = _planes_at_once(), (sizes.rows, sizes.padded_width)
        for video, to in zip(spectra.unbind(), out.unbind(), strict=True):
            for channel in range(len(video)):
                for first in range(0, video.shape[1], at_once):
                    padded = torch.fft.irfft2(video[channel, first : first + at_once], s=size, norm="forward")
                    plane = padded[:, : sizes.height, : sizes.width]
                    if bias is not None:
                        plane.add_(bias[channel])
                    to[channel, first : first + at_once].copy_(plane)

    @staticmethod
    def filters(weight: Tensor, sizes: frequency.Sizes) -> Tensor:
        """See ``frequency.Products`` and the layout above."""
        tall = weight.shape[3]
        wave = _waves_across(weight.shape[4], sizes)
        rows = (weight.double().flatten(0, 3) @ wave.flatten(1)).view(*weight.shape[:4], 2, sizes.columns)
        above, middle, below = rows.split([tall // 2, 1, tall // 2], 3)
        above = above.flip(3)
        folded = torch.cat([middle, below + above, below - above], 3).to(weight.dtype)
        blocks = -(-sizes.columns // _native.CONV_BLOCK)
        folded = F.pad(folded, (0, blocks * _native.CONV_BLOCK - sizes.columns))
        return folded.unflatten(-1, (blocks, -1)).permute(5, 0, 1, 2, 3, 4, 6).contiguous()

    @staticmethod
    def weight_grad(sums: Tensor, kernel: torch.Size, sizes: frequency.Sizes) -> Tensor:
        """See ``frequency.Products``: the transpose of ``filters``, where a frequency counts for its mirror, too."""
        half = kernel[3] // 2
        folded = sums.permute(1, 2, 3, 4, 5, 0, 6).flatten(-2)[..., : sizes.columns].double()
        middle, even, odd = folded.split([1, half, half], 3)
        rows = torch.cat([(even - odd).flip(3), middle, even + odd], 3)
        wave = 2 * _waves_across(kernel[4], sizes)
        wave[..., :: sizes.columns - 1] /= 2  # the first and the last are their own
        return (rows.flatten(4) @ wave.flatten(1).t()).to(sums.dtype)

    @classmethod
    def multiply(cls, spectra: Tensor, filters: Tensor, kernel: torch.Size, frames: int, shift: int) -> Tensor:
        """See ``frequency.Products``."""
        out = cls.empty(spectra, (len(spectra), kernel[0], frames, *spectra.shape[3:]), spectra.dtype)
        for x, y in zip(spectra.unbind(), out.unbind(), strict=True):
            _conv(x, y, filters, None, kernel, shift)
        return out

    @staticmethod
    def no_sums(spectra: Tensor, kernel: torch.Size) -> Tensor:
        """See ``frequency.Products``."""
        blocks = -(-spectra.shape[-1] // _native.CONV_BLOCK)
        return spectra.real.new_zeros((blocks, *kernel[:4], 2, _native.CONV_BLOCK))

    @staticmethod
    def correlate(spectra: Tensor, grad: Tensor, sums: Tensor, kernel: torch.Size, shift: int) -> None:
        """See ``frequency.Products``."""
        for x, y in zip(spectra.unbind(), grad.unbind(), strict=True):
            _conv(x, y, None, sums, kernel, shift)


def _planes_at_once() -> int:
    return 3 * torch.get_num_threads()


def _waves_across(taps: int, sizes: frequency.Sizes) -> Tensor:
    """Return what maps the taps along the width to real and imaginary parts, ``(taps, 2, columns)`` float64, with the
    factor of both transforms."""
    half = taps // 2
    cosine, sine = (wave.t() for wave in frequency.waves(sizes.columns, sizes.padded_width, half + 1))
    cosine, sine = torch.cat([cosine[1:].flip(0), cosine]), torch.cat([-sine[1:].flip(0), sine])
    return torch.stack([cosine, sine], 1) / (sizes.rows * sizes.padded_width)


def _conv(x: Tensor, y: Tensor, filters: Tensor | None, sums: Tensor | None, kernel: torch.Size, shift: int) -> None:
    """Multiply the spectra ``x (C, F, rows, columns)`` by the filters and write ``y (O, F', rows, columns)``; or, with
    y the gradient of that, add the filters' gradient to ``sums``."""
    rows, columns = x.shape[2:]
    wide = x.dtype.to_real()
    down = tuple(wave.to(wide) for wave in frequency.waves(rows // 2 + 1, rows, kernel[3] // 2 + 1))
    _native.conv(
        ((kernel[1], kernel[0], kernel[2], kernel[3]), (x.shape[1], y.shape[1], shift), (rows, columns)),
        _DTYPES[wide], x.data_ptr(), y.data_ptr(), (down[0].data_ptr(), down[1].data_ptr()), _address(filters),
        _address(sums), torch.get_num_threads(),
    )  # fmt: skip
