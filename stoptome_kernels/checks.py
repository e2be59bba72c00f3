# SPDX-License-Identifier: Apache-2.0
"""Validation of arguments, the same for every backend, eager or traced.

Everything is decided from types, shapes, dtypes and devices: no check reads values on a GPU, so none waits for it. Only
indices are read, where they lie on the CPU: those of a matching over given sets, and those of plans.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference import AttentionInputs, Groups
from .reference.merging import can_raise

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = ("mean", "sum", "max")
BACKENDS = ("auto", "triton", "native", "reference")
AUGMENTED = "augmented"  # of the function attention alone, see ops/augment.py


def tensor(value: object, name: str, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; call {name}.to_dense()")


def can_read(value: Tensor) -> bool:
    """Return whether the numbers in a tensor can be read without waiting for a device or ending a trace."""
    return not torch.compiler.is_compiling() and can_raise(value)


def integer(value: object, name: str, what: str) -> int:
    """Give ``value`` as one of Python's ints: whatever says by ``__index__`` that it is one, as NumPy's ints do.

    A SymInt passes as it is. Bools, NumPy's too, and tensors are no numbers here.

    Raises:
        TypeError: anything else; the message reads "``name`` must be an int (``what``), got ...".
    """
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be an int ({what}), got a tensor, whose value would have to be read from its device; use "
            "int(...)"
        )
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    # NumPy's bools have an __index__ that raises, or warns before NumPy 2.3
    if type(value).__name__ not in ("bool", "bool_"):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:  # NumPy's arrays have one that raises
            pass
    raise TypeError(f"{name} must be an int ({what}), got {type(value).__name__}")


def count(value: object, name: str, what: str, least: int = 0) -> int:
    """Return ``value`` as an int of ``least`` or more, see ``integer``."""
    number = integer(value, name, what)
    if number < least:
        raise ValueError(f"{name} must be {least} or more ({what}), got {number}")
    # the operators' schema takes 64 bits; what is larger is larger than any tensor
    return min(number, 2**63 - 1) if isinstance(number, int) else number


def no_vmap_or_jvp(value: Tensor, name: str) -> None:
    """Refuse what torch.library can't differentiate or batch for us: it would give zeros or a wrong plan silently."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_batchedtensor(value):
        raise NotImplementedError(f"{name} is inside torch.vmap, which is not supported: give a batch of items instead")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} carries a forward-mode tangent (jvp), which is not supported: use torch.autograd.grad"
        )


def choice(value: object, name: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _floating(value: Tensor, name: str) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def _metric(metric: Tensor) -> None:
    if metric.dim() not in (3, 4):
        raise ValueError(f"metric must have shape (N, T, C) or (N, H, T, C), got {tuple(metric.shape)}")
    _floating(metric, "metric")
    if metric.shape[-1] == 0:
        raise ValueError(f"metric must have at least one channel in its last axis, got shape {tuple(metric.shape)}")
    if metric.dim() == 4 and metric.shape[1] == 0:
        raise ValueError(f"metric must have at least one head in its axis 1, got shape {tuple(metric.shape)}")
    if metric.shape[-2] >= 2**31:
        raise ValueError(f"metric has T = {metric.shape[-2]} tokens an item, but plans index them with int32")


def match(metric: Tensor, r: int, protected: int, backend: str) -> None:
    _metric(metric)
    count(r, "r", "tokens to remove from each item")
    count(protected, "protected", "leading tokens that are never merged")
    if protected > metric.shape[-2]:
        raise ValueError(
            f"protected must be at most the number of tokens T = {metric.shape[-2]}, got {protected}; "
            f"metric has shape {tuple(metric.shape)}"
        )
    choice(backend, "backend", BACKENDS)


def index(value: object, name: str, metric: Tensor) -> Tensor:
    """Return ``value`` as a tensor of token indices; Python's ints are checked and become one on metric's device."""
    if isinstance(value, Tensor):
        tensor(value, name, "(count,)")
        return value
    if isinstance(value, Iterable) and not isinstance(value, str):
        what = "a token index; a 1-D tensor or a list of ints holds them"
        numbers = [integer(number, f"each of {name}", what) for number in value]
        tokens = metric.shape[-2] if metric.dim() > 1 else 0
        for number in numbers:
            _in_range(number, name, tokens)
        return torch.tensor(numbers, dtype=torch.int64, device=metric.device)
    raise TypeError(f"{name} must be a 1-D tensor or a list of ints (token indices), got {type(value).__name__}")


def _in_range(number: int, name: str, tokens: int) -> None:
    if not 0 <= number < tokens:
        raise ValueError(f"{name} must hold token indices from 0 to T - 1 = {tokens - 1}, got {number}")


def match_sets(metric: Tensor, r: int, src: Tensor, dst: Tensor, backend: str) -> None:
    _metric(metric)
    count(r, "r", "tokens to remove from each item")
    tokens = metric.shape[-2]
    for value, name in ((src, "sets[0]"), (dst, "sets[1]")):
        if value.dim() != 1:
            raise ValueError(f"{name} must be 1-D (token indices, shared by all items), got {tuple(value.shape)}")
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64 (token indices), got {value.dtype}")
        if value.device != metric.device:
            raise ValueError(f"{name} is on {value.device}, but metric is on {metric.device}; move one of them")
    if src.shape[0] + dst.shape[0] > tokens:
        raise ValueError(
            f"sets must be disjoint, but {src.shape[0]} sources and {dst.shape[0]} destinations are more than the "
            f"T = {tokens} tokens of metric, whose shape is {tuple(metric.shape)}"
        )
    choice(backend, "backend", BACKENDS)


def indices(src: Tensor, dst: Tensor, tokens: int) -> None:
    """Check the values of ``sets``, on the CPU: in range, none twice, none in both."""
    for value, name in ((src, "sets[0]"), (dst, "sets[1]")):
        for wrong in value[(value < 0) | (value >= tokens)][:1].tolist():
            _in_range(wrong, name, tokens)
        seen, times = value.unique(return_counts=True)
        if len(seen) < len(value):
            raise ValueError(f"{name} must hold a token at most once, but has {seen[times > 1][0].item()} twice")
    both = src[torch.isin(src, dst)]
    if len(both):
        raise ValueError(f"sets must be disjoint, but token {both[0].item()} is a source and a destination")


def parts(dest: Tensor, members: Tensor, offsets: Tensor, name: str = "plan") -> None:
    """Raise what is wrong with a plan's tensors by themselves; ``plan_groups``, which every operator asks too, with how
    they belong together."""
    for part, value in (("dest", dest), ("members", members), ("offsets", offsets)):
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            what = f"{value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}.{part} must be a dense tensor, got {what}; use a plan from match()")
    device = dest.device
    for part, value in (("members", members), ("offsets", offsets)):
        if value.device != device:
            raise ValueError(f"{name}.{part} is on {value.device}, but {name}.dest on {device}; use plan.to()")
        _table(value, name, part)
    if dest.dtype != torch.int32 or dest.shape != members.shape:
        raise ValueError(
            f"{name}.dest must be int32 and of members' shape (N, T) = {tuple(members.shape)}, got {dest.dtype} of "
            f"shape {tuple(dest.shape)}; use a plan from match()"
        )


def plan_groups(members: Tensor, offsets: Tensor, name: str = "plan") -> None:
    """Raise what is wrong with the shapes and dtypes of a plan's groups."""
    _table(members, name, "members")
    _table(offsets, name, "offsets")
    n, tokens = members.shape
    items, ends = offsets.shape
    if items != n or ends < 1 or ends > tokens + 1:
        raise ValueError(
            f"{name}.members {tuple(members.shape)} and {name}.offsets {tuple(offsets.shape)} do not belong together; "
            "use a plan from match()"
        )


def _table(index: Tensor, name: str, part: str) -> None:
    if index.dim() != 2 or index.dtype != torch.int32:
        raise ValueError(f"{name}.{part} must be 2-D int32, got {index.dim()}-D {index.dtype}; use a plan from match()")


def merges_nothing(members: Tensor, offsets: Tensor) -> None:
    """Raise IndexError for a plan of r = 0 on the CPU that does anything else than leave every token where it is."""
    if can_read(members):
        every = torch.arange(offsets.shape[1], dtype=torch.int32)
        if not (torch.equal(members, every[:-1].expand_as(members)) and torch.equal(offsets, every.expand_as(offsets))):
            raise IndexError(
                "plan is damaged: it has r = 0, but moves tokens; it was changed after match(), or was not made by it"
            )


def rows(value: Tensor, name: str, groups: Groups, backend: str, *, merged: bool = False) -> None:
    """Check that ``value`` is ``(N, T, D)``, floating, of as many tokens as a plan has before merging or, if
    ``merged``, after it, and on its device; and that its sizes are right."""
    members, offsets, sizes = groups
    plan_groups(members, offsets)
    n, before = members.shape
    tokens = offsets.shape[1] - 1 if merged else before
    if value.dim() != 3:
        raise ValueError(f"{name} must have shape (N, T, D), got {tuple(value.shape)}")
    _floating(value, name)
    items, rows_of_item, _ = value.shape
    if items != n or rows_of_item != tokens:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but the plan wants N = {n} items of {tokens} tokens "
            f"({before} before merging, {offsets.shape[1] - 1} after)"
        )
    device = value.device
    for part in (members, offsets):
        if part.device != device:
            raise ValueError(f"{name} is on {device}, but the plan is on {part.device}; use plan.to({name}.device)")
    choice(backend, "backend", BACKENDS)
    size(sizes, members)


def size(value: Tensor | None, members: Tensor) -> None:
    if value is None:
        return
    if value.dtype != torch.float32:
        raise TypeError(f"size must be float32 (bfloat16 counts exactly only up to 256), got {value.dtype}")
    if value.shape != members.shape:
        raise ValueError(f"size must have shape (N, T) = {tuple(members.shape)}, got {tuple(value.shape)}")
    if value.device != members.device:
        raise ValueError(f"size is on {value.device}, but the plan is on {members.device}; move one of them")


def outputs(y: Tensor, size_out: Tensor, x: Tensor, offsets: Tensor) -> None:
    """Check ``out=(y, size_out)`` of a merge."""
    n, tokens = x.shape[0], offsets.shape[1] - 1
    for value, name, shape, dtype in (
        (y, "out[0]", (n, tokens, x.shape[2]), x.dtype),
        (size_out, "out[1]", (n, tokens), torch.float32),
    ):
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
        if value.is_neg():
            raise ValueError(f"{name} must be plain memory, got a view with the negative bit; use {name}.resolve_neg()")
        if tuple(value.shape) != shape or not value.is_contiguous():
            kind = "contiguous" if value.is_contiguous() else "strided"
            raise ValueError(f"{name} must be contiguous of shape {shape}, got {kind} of shape {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}; move one of them")


def no_overlap(outputs: dict[str, Tensor], inputs: dict[str, Tensor | None]) -> None:
    """Check that every output is memory of its own: rows are gathered while others are written."""

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    taken = [(name, span(t)) for name, t in inputs.items() if t is not None]
    for name, output in outputs.items():
        begin, end = span(output)
        for other, (low, high) in taken:
            if begin < high and low < end:
                raise ValueError(
                    f"{name} shares memory with {other}; merging does not work in place: give {name} memory of its own"
                )
        taken.append((name, (begin, end)))


def max_backward_inputs(x: Tensor | None, y: Tensor | None, grad: Tensor, members: Tensor, mode: str) -> None:
    """Check the merge's input and output, which the gradient of a maximum needs."""
    if mode != "max":
        return
    want = (grad.shape[0], members.shape[1], grad.shape[2])
    for value, name, shape in ((x, "x", want), (y, "y", tuple(grad.shape))):
        if value is None or tuple(value.shape) != shape or value.dtype != grad.dtype or value.device != grad.device:
            have = None if value is None else f"{tuple(value.shape)} {value.dtype} on {value.device}"
            raise ValueError(f"mode 'max' needs {name} of shape {shape} {grad.dtype} on {grad.device}, got {have}")


def merge_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Check what merge_norm asks besides what merge asks of x, plan and size."""
    if x.shape[2] == 0:
        raise ValueError(f"x must have at least one channel in its last axis, got shape {tuple(x.shape)}")
    _floating(residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, but x is on {x.device}; move one of them")
    affine(weight, "weight", x)
    affine(bias, "bias", x)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite (it is added to the variance), got {eps}")


def affine(value: Tensor | None, name: str, x: Tensor) -> None:
    """Check a parameter of LayerNorm."""
    if value is None:
        return
    _floating(value, name)
    if tuple(value.shape) != (x.shape[2],):
        raise ValueError(f"{name} must have shape (D,) = ({x.shape[2]},), got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but x is on {x.device}; move one of them")


def number(value: object, name: str, what: str) -> float:
    """Return ``value`` as a float (a SymFloat passes as it is)."""
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, Tensor)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a float ({what}), got {type(value).__name__}")
    return float(value)


def saved_tensor(
    value: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check a tensor that one operator saved for another."""
    if value is None:
        return
    if tuple(value.shape) != shape or value.dtype != dtype or value.device != device:
        have = f"{tuple(value.shape)} {value.dtype} on {value.device}"
        raise ValueError(f"{name} must be of shape {shape} {dtype} on {device}, got {have}")


def attention(inputs: AttentionInputs, backend: str, *more: str) -> None:
    """Check that queries, keys, values, the keys' sizes and a prefix fit each other, and that there is the backend, or
    that it is one of ``more``."""
    q, k, v, size, prefix_k, prefix_v, scale = inputs
    if (prefix_k is None) != (prefix_v is None):
        missing = "prefix_k" if prefix_k is None else "prefix_v"
        raise ValueError(f"prefix_k and prefix_v must be given together, but {missing} is None")
    _heads(q, "q", "(N, H, Tq, d)")
    n, heads, _, d = q.shape
    dtype, device = q.dtype, q.device
    others: list[tuple[Tensor, str, str, int | None]] = [(k, "k", "(N, H, T, d)", n), (v, "v", "(N, H, T, d)", n)]
    if prefix_k is not None and prefix_v is not None:
        others += [(prefix_k, "prefix_k", "(M, H, G, d)", None), (prefix_v, "prefix_v", "(M, H, G, d)", None)]
    for value, name, shape, items in others:
        _heads(value, name, shape)
        if value.dtype != dtype:
            raise TypeError(f"{name} must be of q's dtype {dtype}, got {value.dtype}; cast one of them")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, but q is on {device}; move one of them")
        own_items, own_heads, _, channels = value.shape
        if own_heads != heads or channels != d or items not in (None, own_items):
            want = f"N = {n}, H = {heads} and d = {d}" if items is not None else f"H = {heads} and d = {d}"
            raise ValueError(f"{name} must have shape {shape} with {want} as q has, got {tuple(value.shape)}")
    if d == 0:
        raise ValueError(f"q must have at least one channel in its last axis, got shape {tuple(q.shape)}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v must have as many tokens as k, {k.shape[2]}, got shape {tuple(v.shape)}")
    keys = k.shape[2]
    if prefix_k is not None and prefix_v is not None:
        if prefix_v.shape != prefix_k.shape:
            have, wanted = tuple(prefix_v.shape), tuple(prefix_k.shape)
            raise ValueError(f"prefix_v must have prefix_k's shape {wanted}, got {have}")
        m = prefix_k.shape[0]
        if n % m != 0 if m != 0 else n != 0:  # torch 2.6 takes the truth of a number for its value: a constant
            raise ValueError(
                f"prefix_k has M = {m} items, but q's N = {n} is not a multiple of M (N / M items share one prefix)"
            )
        keys += prefix_k.shape[2]
    if keys == 0:
        raise ValueError(f"k must have at least one key, or prefix_k one, got k of shape {tuple(k.shape)}")
    if size is not None:
        _sizes_of_keys(size, k)
    # a compiled module's scale may be a symbol, of which this can't be asked
    if scale is not None and not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    choice(backend, "backend", (*BACKENDS, *more))


def augment_qk(q: Tensor, k: Tensor, size: Tensor) -> None:
    """Check that queries, keys and the keys' sizes fit each other; heads of the keys may be shared by queries'."""
    _heads(q, "q", "(N, H, Tq, d)")
    _heads(k, "k", "(N, Hk, T, d)")
    if k.dtype != q.dtype:
        raise TypeError(f"k must be of q's dtype {q.dtype}, got {k.dtype}; cast one of them")
    if k.device != q.device:
        raise ValueError(f"k is on {k.device}, but q is on {q.device}; move one of them")
    n, heads, _, d = q.shape
    if k.shape[0] != n or k.shape[3] != d:
        raise ValueError(f"k must have shape (N, Hk, T, d) with N = {n} and d = {d} as q has, got {tuple(k.shape)}")
    if k.shape[1] == 0 or heads % k.shape[1] != 0:
        raise ValueError(f"k must have heads Hk of which q's H = {heads} is a multiple, got shape {tuple(k.shape)}")
    if d == 0:
        raise ValueError(f"q must have at least one channel in its last axis, got shape {tuple(q.shape)}")
    _sizes_of_keys(size, k)


def _sizes_of_keys(size: Tensor, k: Tensor) -> None:
    if size.dtype != torch.float32:
        raise TypeError(f"size must be float32 (bfloat16 counts exactly only up to 256), got {size.dtype}")
    if tuple(size.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(f"size must have shape (N, T) = {(k.shape[0], k.shape[2])}, got {tuple(size.shape)}")
    if size.device != k.device:
        raise ValueError(f"size is on {size.device}, but q is on {k.device}; move one of them")


def _heads(value: Tensor, name: str, shape: str) -> None:
    if value.dim() != 4:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    _floating(value, name)


def fft_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    """Check that a convolution's input, weight and bias fit each other."""
    for value, name, shape in ((x, "x", "(B, C, T, H, W)"), (weight, "weight", "(O, C, kt, kh, kw)")):
        if value.dim() != 5:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        _floating(value, name)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have x's C = {x.shape[1]} channels in its axis 1, got {tuple(weight.shape)}")
    if 0 in (*x.shape[1:], *weight.shape):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must not be empty, but in x's B")
    for taps in weight.shape[2:]:
        if taps % 2 == 0:
            raise ValueError(
                f"weight must have odd kt, kh and kw, so that zeros on both sides keep the size, got "
                f"{tuple(weight.shape)}; use torch.nn.functional.conv3d"
            )
    if bias is not None:
        _floating(bias, "bias")
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must have shape (O,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    for part, name in ((weight, "weight"), (bias, "bias")):
        if part is not None and part.device != x.device:
            raise ValueError(f"{name} is on {part.device}, but x is on {x.device}; move one of them")
        if part is not None and part.dtype == torch.float64 != x.dtype:
            raise TypeError(f"{name} is float64, but x is {x.dtype}; cast one of them")
    choice(backend, "backend", BACKENDS)
