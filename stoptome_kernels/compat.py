# SPDX-License-Identifier: Apache-2.0
"""The functions that code around token merging imports, on this package's kernels.

``bipartite_soft_matching``, ``merge_wavg``, ``merge_source`` and ``parse_r`` as code for ToMe calls them, TempMe's form
of the first, and ``bipartite_soft_matching_random2d`` as image generation does. They take the same arguments and give
tokens in the same order; written from the papers (Bolya et al., ICLR 2023; Bolya & Hoffman, *Token Merging for Fast
Stable Diffusion*, CVPRW 2023; Shen et al., ICLR 2025) and from their results. What a matching returns are values, not
closures: they can be pickled, copied, and passed in and out of compiled functions, and ``.plan`` is their MergePlan.

Differences: ties, zeros and NaN go as :func:`stoptome_kernels.match` says, arithmetic is float32 inside, sizes are
float32, and the gradient of ``max`` goes to one token. New code has no need of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import api, checks
from .plan import MergePlan
from .tome.schedule import parse_r as _parse_r

_MODES = {"mean": "mean", "sum": "sum", "max": "max", "amax": "max"}


@dataclass(frozen=True, eq=False)
class Merge:
    """Merges the tokens of a tensor; the first of the two callables that a matching returns.

    Attributes:
        plan: what goes where.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.
    """

    plan: MergePlan
    backend: str = "auto"

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """``(N, T, D) → (N, T - r, D)`` in x's dtype, differentiable; x itself if nothing is merged.

        Args:
            x: ``(N, T, D)`` floating, any strides.
            mode: ``mean`` (each member counts once: :func:`merge_wavg` weighs by size), ``sum``, ``max`` or ``amax``.

        Raises:
            TypeError, ValueError: as :func:`stoptome_kernels.merge`, or another mode.
        """
        if self.plan.r == 0:
            return x
        checks.choice(mode, "mode", tuple(_MODES))
        return api.merge(x, self.plan, mode=_MODES[mode], backend=self.backend)[0]


@dataclass(frozen=True, eq=False)
class Unmerge:
    """Gives every original token the row it was merged into; the second callable that a matching returns."""

    plan: MergePlan
    backend: str = "auto"

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, T - r, D) → (N, T, D)``, differentiable; x itself if nothing was merged."""
        return x if self.plan.r == 0 else api.unmerge(x, self.plan, self.backend)


def _flatten(value: Merge | Unmerge) -> tuple[list[MergePlan], str]:
    return [value.plan], value.backend


def _unflatten_merge(plans, backend: str) -> Merge:
    (plan,) = plans
    return Merge(plan, backend)


def _unflatten_unmerge(plans, backend: str) -> Unmerge:
    (plan,) = plans
    return Unmerge(plan, backend)


# pytree nodes, as the plan inside is one
for _kind, _unflatten in ((Merge, _unflatten_merge), (Unmerge, _unflatten_unmerge)):
    torch.utils._pytree.register_pytree_node(
        _kind, _flatten, _unflatten, serialized_type_name=f"stoptome_kernels.compat.{_kind.__name__}"
    )
# torch.load(weights_only=True) may restore them: a plan and a name
torch.serialization.add_safe_globals([Merge, Unmerge])


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    class_token: bool | int = False,
    distill_token: bool | int = False,
    *,
    backend: str = "auto",
) -> tuple[Merge, Unmerge]:
    """Match tokens with an even and an odd index, as ToMe does; with an int as third argument, as TempMe does.

    Args:
        metric: ``(N, T, C)``, or ``(N, H, T, C)`` for the mean over heads. No gradient flows into it.
        r: tokens to remove; capped at half of the unprotected tokens. At 0 or less the callables return their argument.
        class_token: True if the first token is not to be merged. An int (that is no bool) is TempMe's ``cls_num``, and
            the call goes to :func:`bipartite_soft_matching_tempme`; 0 and 1 mean the same in both.
        distill_token: True if the second token is not to be merged either; TempMe's ``r_f`` with an int before it.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``merge(x, mode="mean")`` and ``unmerge(x)``. Merged tokens come in the order: protected tokens, unmerged even
        ones, odd ones.

    Raises:
        TypeError, ValueError: as :func:`stoptome_kernels.match`; a distillation token without a class token.
    """
    if not isinstance(class_token, bool):
        r_f = 0 if distill_token is False else distill_token
        return bipartite_soft_matching_tempme(metric, r, class_token, r_f, backend=backend)
    if not isinstance(distill_token, bool):
        raise TypeError(
            f"distill_token must be a bool behind a bool, got {type(distill_token).__name__}; for TempMe's form "
            "(metric, r, cls_num, r_f) cls_num must be an int"
        )
    if distill_token and not class_token:
        raise ValueError(
            "distill_token=True needs class_token=True: the distillation token is the second of two; for other tokens "
            "use stoptome_kernels.match(..., sets=...)"
        )
    return _leading(metric, r, class_token + distill_token, backend)


def bipartite_soft_matching_tempme(
    metric: Tensor, r: int, cls_num: int, r_f: int = 0, *, backend: str = "auto"
) -> tuple[Merge, Unmerge]:
    """Match as TempMe does, with any number of class tokens in front (a joined clip has one for each frame).

    Args:
        metric, r, backend: as of :func:`bipartite_soft_matching`.
        cls_num: leading tokens that are not merged.
        r_f: must be 0. TempMe's paper defines no second number of tokens to merge, so what another value would do is
            not known here, and it is refused. Where it gives counts as a share of the tokens, as in the paper, work
            out the count and pass it as ``r``.

    Returns:
        As :func:`bipartite_soft_matching`.

    Raises:
        TypeError, ValueError: as :func:`stoptome_kernels.match`; ``r_f`` other than 0.
    """
    cls_num = checks.count(cls_num, "cls_num", "leading tokens that are not merged; bools are ToMe's form")
    if checks.count(r_f, "r_f", "only 0 is known") != 0:
        raise ValueError(
            f"r_f must be 0 (no paper says what it does), got {r_f}; pass the number of tokens to merge as r"
        )
    return _leading(metric, r, cls_num, backend)


def bipartite_soft_matching_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
    *,
    backend: str = "auto",
) -> tuple[Merge, Unmerge]:
    """Match the tokens of an image, one destination in every cell, as image generation does (ToMe for SD, section 4).

    Args:
        metric: ``(N, T, C)`` or ``(N, H, T, C)`` with ``T = w·h``: h rows of w tokens. No gradient flows into it.
        w, h: width and height of the image in tokens.
        sx, sy: width and height of a cell. Every cell that fits has one destination; all other tokens are sources, also
            those of the cells that the right and the lower border cut off.
        r: tokens to remove; capped at the number of sources. At 0 or less the callables return their argument.
        no_rand: take the first token of each cell as destination instead of a random one.
        generator: where the random choice comes from, one for all items; None for the default one of metric's device.
            Numbers drawn on another device are copied. torch.compile takes no generator into a graph.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``merge(x, mode="mean")`` and ``unmerge(x)``. Merged tokens come in the order: unmerged sources, destinations.

    Raises:
        TypeError, ValueError: as :func:`stoptome_kernels.match`, or sizes that do not fit.
    """
    checks.tensor(metric, "metric", "(N, T, C) or (N, H, T, C)")
    checks.match(metric, 0, 0, backend)
    w, h = checks.count(w, "w", "tokens in a row"), checks.count(h, "h", "rows of tokens")
    sx, sy = checks.count(sx, "sx", "width of a cell"), checks.count(sy, "sy", "height of a cell")
    if sx < 1 or sy < 1:
        raise ValueError(f"sx and sy must be 1 or more (width and height of a cell), got {sx} and {sy}")
    if metric.shape[-2] != w * h:
        raise ValueError(
            f"metric must have T = w·h = {w}·{h} = {w * h} tokens, got T = {metric.shape[-2]} in {tuple(metric.shape)}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    sets = _cells(w, h, sx, sy, no_rand, generator, metric.device)
    plan = api.match(metric, _not_negative(r), backend=backend, sets=sets)
    return Merge(plan, backend), Unmerge(plan, backend)


def merge_wavg(merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average the members of every merged token, weighted by how many tokens each stands for.

    Args:
        merge: from one of the matchings above: then it is one fused :func:`stoptome_kernels.merge`. Any other callable
            ``merge(x, mode="sum")`` is called twice.
        x: ``(N, T, D)``.
        size: ``(N, T, 1)``, any floating dtype; None for all ones. No gradient flows into it.

    Returns:
        ``x (N, T', D)`` in x's dtype and ``size (N, T', 1)``, float32 whatever x is: bfloat16 counts exactly only up to
        256, float16 to 2048. Where sizes are added to attention scores of a narrower dtype, cast there:
        ``size.log().to(scores.dtype)``. With another callable, ``size`` is what that callable gives for float32 sizes.

    Raises:
        TypeError, ValueError: as :func:`stoptome_kernels.merge`, or a size of another shape.
    """
    if size is not None:
        checks.tensor(size, "size", "(N, T, 1)")
        if size.dim() != 3 or size.shape[2] != 1 or not size.is_floating_point():
            raise ValueError(f"size must be floating of shape (N, T, 1), got {size.dtype} of {tuple(size.shape)}")
    if isinstance(merge, Merge):
        given = None if size is None else size[..., 0].float()
        y, total = api.merge(x, merge.plan, given, backend=merge.backend)
        return y, total[..., None]
    size = torch.ones_like(x[..., :1], dtype=torch.float32) if size is None else size.float()
    total = merge(size, mode="sum")
    return (merge(x * size, mode="sum") / total).to(x.dtype), total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which original tokens every token is made of, as a dense matrix, which takes T'·T numbers an item.

    ``plan.dest`` says the same in 4 bytes a token, and ``plan.then(next)`` carries it through layers.

    Args:
        merge: from one of the matchings above, or a callable ``merge(x, mode="amax")``.
        x: ``(N, T, D)``, the tokens that are merged; what counts are N, T, dtype and device.
        source: ``(N, T, T0)``, what the layer before returned; None in the first layer.

    Returns:
        ``(N, T', T0)`` of zeros and ones in x's dtype (of source's, if given). Each column has a single one. A token
        that was removed with weight 0 is counted where ``plan.dest`` puts it.

    Raises:
        TypeError, ValueError: as :func:`stoptome_kernels.merge`.
    """
    checks.tensor(x, "x", "(N, T, D)")
    n, tokens = x.shape[:2]
    if not isinstance(merge, Merge):
        if source is None:
            source = torch.eye(tokens, dtype=x.dtype, device=x.device).expand(n, -1, -1)
        return merge(source, mode="amax")
    plan = merge.plan
    if source is None:
        if (n, tokens) != tuple(plan.dest.shape):
            raise ValueError(f"x has shape {tuple(x.shape)}, but the plan wants {tuple(plan.dest.shape)} tokens")
        outputs = torch.arange(plan.tokens_out, device=x.device)
        return (plan.dest[:, None] == outputs[:, None]).to(x.dtype)
    if plan.r == 0:
        return source
    # the sum over all members, those of weight 0 too; no column has more than a single one
    return torch.ops.stoptome.unmerge_backward(source, plan.members, plan.offsets, merge.backend)


def parse_r(num_layers: int, r: int | Sequence[int] | tuple[int, float]) -> list[int]:
    """Tokens to merge in each of ``num_layers`` layers.

    Args:
        num_layers: how many layers there are.
        r: an int for every layer; a list with one int a layer, short ones padded with 0; or a pair (tuple) ``(r,
            inflection)``: linear from ``r(1 − inflection)`` at the first layer to ``r(1 + inflection)`` at the last,
            truncated to int.

    Raises:
        TypeError, ValueError: anything else, such as a list with more numbers than layers.
    """
    return list(_parse_r(r, checks.count(num_layers, "num_layers", "layers of the model")))


def _leading(metric: Tensor, r: int, protected: int, backend: str) -> tuple[Merge, Unmerge]:
    """Matching with leading tokens protected; more of them than there are means that none is left to merge."""
    checks.tensor(metric, "metric", "(N, T, C) or (N, H, T, C)")
    checks.match(metric, 0, 0, backend)
    plan = api.match(metric, _not_negative(r), min(protected, metric.shape[-2]), backend)
    return Merge(plan, backend), Unmerge(plan, backend)


def _not_negative(r: int) -> int:
    return 0 if isinstance(r, int) and r < 0 else r


def _cells(
    w: int, h: int, sx: int, sy: int, no_rand: bool, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sources and destinations of an image: their counts follow from the sizes alone, so nothing waits for a GPU."""
    rows, columns = h // sy, w // sx
    grid = torch.arange(h * w, device=device).view(h, w)
    corner = grid[: rows * sy : sy, : columns * sx : sx].reshape(-1, 1)
    if no_rand:
        chosen = torch.zeros_like(corner)
    else:
        origin = device if generator is None else generator.device
        chosen = torch.randint(sx * sy, (rows * columns, 1), generator=generator, device=origin).to(device)
    others = torch.arange(sx * sy - 1, device=device)
    others = others + (others >= chosen)  # (cells, sx·sy - 1): every place of a cell but the chosen one
    dst, inner = (corner + (place // sx * w + place % sx) for place in (chosen, others))
    border = grid[: rows * sy, columns * sx :].flatten(), grid[rows * sy :].flatten()
    return torch.cat([inner.flatten(), *border]), dst[:, 0]
