# SPDX-License-Identifier: Apache-2.0
"""Who is measured: this package's backends, and token merging as PyTorch users write it today.

The eager peers are written from the descriptions in section 3 of the ToMe paper (arXiv 2210.09461) and, for images, in
section 4 of "Token Merging for Fast Stable Diffusion" (CVPRW 2023) with the operations that users reach for: argsort,
gather, scatter. Their output is in the order of this package, which costs them nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import stoptome_kernels as stk
import torch
from stoptome_kernels import compat
from torch import Tensor

from ..shapes import Inputs, Shape


class EagerPlan(NamedTuple):
    kept: Tensor  # (N, evens - r, 1): places among the even tokens that stay, ascending
    gone: Tensor  # (N, r, 1): places among the even tokens that are merged away
    into: Tensor  # (N, r, 1): for each of those, the place of its partner among the odd tokens


def eager_match(metric: Tensor, r: int, protected: int) -> EagerPlan:
    if metric.dim() == 4:
        metric = metric.mean(1)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, : (protected + 1) // 2] = -torch.inf
    scores[:, :, : protected // 2] = -torch.inf
    best, nearest = scores.max(-1)
    ranking = best.argsort(-1, descending=True)  # protected tokens come last: they have −inf
    gone = ranking[:, :r]
    kept = ranking[:, r:].sort(-1).values
    return EagerPlan(kept[..., None], gone[..., None], nearest.gather(1, gone)[..., None])


def _fold(v: Tensor, plan: EagerPlan, protected: int) -> Tensor:
    """Add the merged tokens to their partners and pull the list together: ``(N, T, C) → (N, T - r, C)``."""
    even, odd, width = v[:, 0::2], v[:, 1::2], v.shape[2]
    kept, gone, into = (index.expand(-1, -1, width) for index in plan)
    odd = odd.scatter_reduce(1, into, even.gather(1, gone), "sum")
    kept_even = even.gather(1, kept)
    return torch.cat([v[:, :protected], kept_even[:, (protected + 1) // 2 :], odd[:, protected // 2 :]], 1)


def eager_merge(x: Tensor, plan: EagerPlan, column: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """Merge as users do; ``column`` is the size as ``(N, T, 1)``."""
    total = _fold(column, plan, protected)
    return _fold(x * column, plan, protected) / total, total


def eager_unmerge(y: Tensor, plan: EagerPlan, protected: int) -> Tensor:
    n, evens, odds = y.shape[0], plan.kept.shape[1] + plan.gone.shape[1], y.shape[1] - plan.kept.shape[1]
    behind = y.shape[1] - (odds - protected // 2)  # where the unprotected odd tokens begin
    stayed = torch.cat([y[:, :protected:2], y[:, protected:behind]], 1)
    odd = torch.cat([y[:, 1:protected:2], y[:, behind:]], 1)
    kept, gone, into = (index.expand(-1, -1, y.shape[2]) for index in plan)
    out = y.new_empty(n, evens + odds, y.shape[2])
    out[:, 1::2] = odd
    out[:, 0::2].scatter_(1, kept, stayed).scatter_(1, gone, odd.gather(1, into))
    return out


def eager_both(metric: Tensor, x: Tensor, column: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    return eager_merge(x, eager_match(metric, r, protected), column, protected)


class ImagePlan(NamedTuple):
    src: Tensor  # (S,): tokens that may be merged, the same in every image
    dst: Tensor  # (D,)
    edges: EagerPlan  # places in src, and for the merged ones in dst


def image_match(metric: Tensor, shape: Shape) -> ImagePlan:
    """Match an image, in which the first token of every cell is a destination."""
    inside = torch.ones(shape.side, shape.side, dtype=torch.int8, device=metric.device)
    cells = (shape.side // shape.cell) ** 2
    whole = shape.side // shape.cell * shape.cell
    inside[: whole : shape.cell, : whole : shape.cell] = 0
    order = inside.flatten().argsort(stable=True)
    dst, src = order[:cells], order[cells:]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, nearest = (unit[:, src] @ unit[:, dst].transpose(1, 2)).max(-1)
    ranking = best.argsort(-1, descending=True)
    gone, kept = ranking[:, : shape.r], ranking[:, shape.r :].sort(-1).values
    return ImagePlan(src, dst, EagerPlan(kept[..., None], gone[..., None], nearest.gather(1, gone)[..., None]))


def image_merge(x: Tensor, plan: ImagePlan) -> tuple[Tensor, None]:
    src, dst = x[:, plan.src], x[:, plan.dst]
    kept, gone, into = (index.expand(-1, -1, x.shape[2]) for index in plan.edges)
    dst = dst.scatter_reduce(1, into, src.gather(1, gone), "mean")
    return torch.cat([src.gather(1, kept), dst], 1), None


def image_unmerge(y: Tensor, plan: ImagePlan) -> Tensor:
    kept, gone, into = (index.expand(-1, -1, y.shape[2]) for index in plan.edges)
    stayed, dst = y.split([kept.shape[1], len(plan.dst)], 1)
    out = y.new_empty(y.shape[0], len(plan.src) + len(plan.dst), y.shape[2])
    out[:, plan.dst] = dst
    return out.scatter_(1, plan.src[kept], stayed).scatter_(1, plan.src[gone], dst.gather(1, into))


@dataclass(frozen=True)
class Peer:
    """One implementation. Its functions take ``Inputs``; a plan is whatever its own ``match`` returns."""

    name: str
    backend: str | None
    match: Callable[[Inputs], Any]
    merge: Callable[[Inputs, Tensor, Any], tuple[Tensor, Tensor | None]]  # (inputs, x, plan) -> y, size if tracked
    unmerge: Callable[[Inputs, Tensor, Any], Tensor]
    both: Callable[[Inputs, Tensor], tuple[Tensor, Tensor | None]]
    into: Callable[[Inputs, Any], Callable[[], object]] | None = None  # (inputs, plan) -> a merge into existing memory
    only_both: bool = False  # measure match + merge alone
    fused: bool = False  # held to this package's contract: float32 inside, one rounding at the end
    graphs: bool = True  # try to capture it in a CUDA graph

    @property
    def metric_form(self) -> str:
        return "keys (N, H, T, 64), mean inside" if self.fused else "keys, .mean(1) first"

    def dest(self, inputs: Inputs, plan: Any) -> Tensor:
        """Return the output token of every input token, ``(N, T)`` int64: by unmerging the tokens' own numbers."""
        n, out = inputs.x.shape[0], inputs.shape.tokens_out
        numbers = torch.arange(out, dtype=torch.float32, device=inputs.x.device).expand(n, -1)
        return self.unmerge(inputs, numbers[..., None].contiguous(), plan)[..., 0].long()


def eager(image: bool = False) -> Peer:
    def match(i: Inputs) -> Any:
        return image_match(i.metric, i.shape) if image else eager_match(i.metric, *i.args)

    def merge(i: Inputs, x: Tensor, plan: Any) -> tuple[Tensor, Tensor | None]:
        return image_merge(x, plan) if image else eager_merge(x, plan, i.column, i.shape.protected)

    def unmerge(i: Inputs, y: Tensor, plan: Any) -> Tensor:
        return image_unmerge(y, plan) if image else eager_unmerge(y, plan, i.shape.protected)

    return Peer("eager", None, match, merge, unmerge, lambda i, x: merge(i, x, match(i)))


def compiled() -> Peer:
    """Return the eager peer under torch.compile: match + merge in one graph, which is what it is good at."""
    torch._dynamo.reset()  # else the shapes of a run add up to dynamo's recompilation limit
    both = torch.compile(eager_both, fullgraph=True, dynamic=False)
    own = {"name": "compile", "only_both": True}
    return replace(eager(), **own, both=lambda i, x: both(i.metric, x, i.column, *i.args))


def package(backend: str, only_both: bool = False, image: bool = False) -> Peer:
    """Return a backend of stoptome_kernels; of an image through the functions that code for image generation calls."""

    def match(i: Inputs) -> stk.MergePlan:
        if not image:
            return stk.match(i.metric, *i.args, backend=backend)
        side, cell, choose = i.shape.side, i.shape.cell, compat.bipartite_soft_matching_random2d
        return choose(i.metric, side, side, cell, cell, i.shape.r, no_rand=True, backend=backend)[0].plan

    def merge(i: Inputs, x: Tensor, plan: stk.MergePlan) -> tuple[Tensor, Tensor | None]:
        return (compat.Merge(plan, backend)(x), None) if image else stk.merge(x, plan, i.size, backend=backend)

    def unmerge(i: Inputs, y: Tensor, plan: stk.MergePlan) -> Tensor:
        return compat.Unmerge(plan, backend)(y) if image else stk.unmerge(y, plan, backend=backend)

    def into(i: Inputs, plan: stk.MergePlan) -> Callable[[], object]:
        size = None if image else i.size
        out = stk.merge(i.x, plan, size, backend=backend)
        return lambda: stk.merge(i.x, plan, size, backend=backend, out=out)

    own = {"into": into, "only_both": only_both, "fused": True, "graphs": backend != "reference"}
    return Peer(backend, backend, match, merge, unmerge, lambda i, x: merge(i, x, match(i)), **own)


def tome(inputs: Inputs) -> Peer | None:
    """Return ToMe itself, if the user has it: called through its public functions, where its one class token allows."""
    if inputs.shape.protected > 1 or inputs.shape.cell:
        return None
    try:
        from tome.merge import bipartite_soft_matching, merge_wavg
    except ImportError:
        return None

    def match(i: Inputs) -> Any:
        metric = i.metric.mean(1) if i.metric.dim() == 4 else i.metric
        return bipartite_soft_matching(metric, i.shape.r, i.shape.protected == 1, False)

    def merge(i: Inputs, x: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        return merge_wavg(plan[0], x, i.column)

    return Peer("tome", None, match, merge, lambda i, y, plan: plan[1](y), lambda i, x: merge(i, x, match(i)))


def unavailable_reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Return the reason why a backend of the package is not measured here, or None."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: the interpreter's times mean nothing"
    if (reason := stk.backends()[backend]) is not None:
        return reason
    try:  # backends() answers for the machine: a CPU backend can run on one with a GPU, but not on the GPU's tensors
        stk.match(torch.ones(1, 4, 8, device=device, dtype=dtype), 1, 0, backend=backend)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
