# SPDX-License-Identifier: Apache-2.0
"""The one table of tolerances, and what several test files ask of plans and rows."""

from collections.abc import Iterator
from itertools import pairwise

import hypothesis
import stoptome_kernels as stk
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Unit roundoff of each dtype: half the distance from 1 to the next number.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [d for d in DTYPES if not (backend == "triton" and d == torch.float64)]


def examples(backend: str, **strategies):
    """hypothesis.given, with fewer examples for Triton: interpreted they take a thousand times longer, compiled a
    second each."""
    count = 8 if backend == "triton" else 40
    return lambda f: hypothesis.settings(max_examples=count)(hypothesis.given(**strategies)(f))


def eager_merge(x: Tensor, plan: stk.MergePlan, size: Tensor | None, mode: str = "mean") -> Tensor:
    """Return what users write: scatter_reduce in x's own dtype. For plans without weight-0 tokens."""
    index = plan.dest.long()[..., None].expand_as(x)
    shape = (x.shape[0], plan.tokens_out, x.shape[2])
    weight = torch.ones(x.shape[:2]) if size is None else size
    weight = weight.to(x)[..., None].expand_as(x)
    if mode == "max":
        return x.new_full(shape, -torch.inf).scatter_reduce(1, index, x, "amax")
    if mode == "sum":
        return x.new_zeros(shape).scatter_reduce(1, index, x, "sum")
    total = x.new_zeros(shape).scatter_reduce(1, index, weight, "sum")
    return x.new_zeros(shape).scatter_reduce(1, index, x * weight, "sum") / total


def assert_as_exact_as_eager(got: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0) -> None:
    """The error against float64 is at most twice that of eager PyTorch in the same dtype, plus one rounding; and one
    of a float32 as large as ``terms``, for a difference of numbers of that size that may cancel."""
    exact = exact.double()
    floor = ROUNDOFF[got.dtype] * exact.abs().max().item() if exact.numel() else 0.0
    floor += ROUNDOFF[torch.float32] * terms
    ours, theirs = ((t.double() - exact).abs().max().item() if t.numel() else 0.0 for t in (got, eager))
    assert ours <= 2 * theirs + 2 * floor, f"error {ours:.3g}, eager {theirs:.3g}, floor {floor:.3g}"


def views(x: Tensor) -> Iterator[Tensor]:
    """Yield the same values behind different strides."""
    n, t, d = x.shape
    yield torch.zeros(n + 2, t + 3, d + 5, dtype=x.dtype, device=x.device)[1 : n + 1, 2 : t + 2, 3 : d + 3].copy_(x)
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x.transpose(1, 2).contiguous().transpose(1, 2)  # the one case that needs a copy
    yield torch.zeros(n, t, 2 * d, dtype=x.dtype, device=x.device)[..., ::2].copy_(x)


def groups(plan: stk.MergePlan, item: int) -> list[list[int]]:
    """Members of every output token of one item, read from members and offsets; a weight-0 token i is ``~i``."""
    members, offsets = plan.members[item].tolist(), plan.offsets[item].tolist()
    return [members[low:high] for low, high in pairwise(offsets)]


def assert_valid(plan: stk.MergePlan) -> None:
    """Everything that must hold for any plan."""
    n, tokens = plan.dest.shape
    assert plan.tokens_in == tokens
    assert plan.tokens_out == tokens - plan.r
    for tensor in (plan.dest, plan.members, plan.offsets):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    for item in range(n):
        dest = plan.dest[item].tolist()
        assert sorted(set(dest)) == list(range(plan.tokens_out)), "dest must reach every output"
        assert dest[: plan.protected] == list(range(plan.protected)), "protected tokens stay where they are"
        seen = groups(plan, item)
        assert len(seen) == plan.tokens_out
        for output, members in enumerate(seen):
            tokens_of = [m if m >= 0 else ~m for m in members]
            assert tokens_of == [t for t in range(tokens) if dest[t] == output], "ascending members of dest"
            assert any(m >= 0 for m in members), "no output without a token of weight 1"
            assert output >= plan.protected or members == [output]


def similarity_gap(metric: Tensor, protected: int, ours: Tensor, theirs: Tensor, r: int) -> float:
    """How far apart, in float64, the choices of two plans of one item are: 0 if they chose the same.

    Every source chooses a partner and whether to be merged. Where two plans differ, the similarity given up by either
    choice is returned: it must be within the rounding of the dot product.
    """
    m = metric.double()
    m = m.mean(0) if m.dim() == 3 else m
    s = stk.reference.similarity(m[None, None], protected)[0]
    a, _ = stk.reference.matching.match_sets(len(m), protected)
    best, gap = s.max(-1).values, 0.0
    base = protected + s.shape[0] - r
    chosen = [(plan[a] - base) for plan in (ours, theirs)]  # below 0: not merged
    threshold = best.sort(descending=True).values[r - 1] if r else torch.tensor(torch.inf)
    for i, (one, other) in enumerate(zip(chosen[0].tolist(), chosen[1].tolist(), strict=True)):
        if one >= 0 and other >= 0 and one != other:
            gap = max(gap, abs(s[i, one] - s[i, other]).item())
        elif (one >= 0) != (other >= 0):
            gap = max(gap, abs(best[i] - threshold).item())
    return gap
