# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for the published functions of token merging, on this package's kernels.

``bipartite_soft_matching``, ``kth_bipartite_soft_matching``, ``random_bipartite_soft_matching``, ``merge_wavg``,
``merge_source`` and ``parse_r`` have ToMe's signatures (the first also TempMe's);
``bipartite_soft_matching_random2d`` and ``do_nothing`` have those of ToMe for Stable Diffusion. They take the same
arguments and merge the same tokens, except where a docstring says otherwise. They were written from the papers (Bolya
et al., ICLR 2023; Bolya & Hoffman, *Token Merging for Fast Stable Diffusion*, CVPRW 2023; Shen et al., ICLR 2025) and
from the results of the published functions. A matching returns values, not closures: they can be pickled, copied, and
passed into and out of compiled functions, and ``.plan`` is their MergePlan.

Order of the output tokens: unmerged tokens by their index, then destinations by theirs. With a class token this is the
published order, too. Without one (``class_token=False``), and on images, the published functions leave the unmerged
tokens in the order of their similarity: the same tokens with the same values in other rows. ``unmerge`` and everything
that uses ``plan.dest`` or ``merge_source`` do not depend on the order.

Differences: ties, zeros and NaN are treated as in ``stoptome_kernels.match``, arithmetic is float32 inside, sizes are
float32, and the gradient of ``max`` goes to one token. New code does not need this module.
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
    """Callable that merges the tokens of a tensor; the first of the two that a matching returns.

    Attributes:
        plan: output token of every input token.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.
    """

    plan: MergePlan
    backend: str = "auto"

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Merge ``(N, T, D) → (N, T - r, D)`` in x's dtype, differentiable; return x itself if nothing is merged.

        Args:
            x: ``(N, T, D)``, floating dtype, any strides.
            mode: ``mean`` (each member counts once; ``merge_wavg`` weights by size), ``sum``, ``max`` or ``amax``.

        Raises:
            TypeError, ValueError: as ``stoptome_kernels.merge``, or an unknown mode.
        """
        if self.plan.r == 0:
            return x
        checks.choice(mode, "mode", tuple(_MODES))
        return api.merge(x, self.plan, mode=_MODES[mode], backend=self.backend)[0]


@dataclass(frozen=True, eq=False)
class Unmerge:
    """Callable that copies merged rows back to all original tokens; the second of the two that a matching returns.

    Attributes:
        plan: output token of every input token.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.
    """

    plan: MergePlan
    backend: str = "auto"

    def __call__(self, x: Tensor) -> Tensor:
        """Unmerge ``(N, T - r, D) → (N, T, D)``, differentiable; return x itself if nothing was merged."""
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
    cls_num: int | None = None,
    r_f: int | None = None,
    backend: str = "auto",
) -> tuple[Merge, Unmerge]:
    """Match tokens of even index with tokens of odd index, as ToMe does; with an int as third argument, as TempMe does.

    Args:
        metric: ``(N, T, C)``, or ``(N, H, T, C)`` for the mean over heads. No gradient flows into it.
        r: number of tokens to remove; capped at half of the unprotected tokens. At 0 or less the callables return their
            argument.
        class_token: True protects the first token. An int (not a bool) is TempMe's ``cls_num``, and the call goes to
            ``bipartite_soft_matching_tempme``; 0 and 1 mean the same in both.
        distill_token: True protects the second token, too; TempMe's ``r_f`` after an int.
        cls_num: TempMe's third argument by name, instead of ``class_token``; see ``bipartite_soft_matching_tempme``.
        r_f: TempMe's fourth argument by name, instead of ``distill_token``; see ``bipartite_soft_matching_tempme``.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``merge(x, mode="mean")`` and ``unmerge(x)``. The order of the merged tokens is: protected tokens, unmerged even
        ones, odd ones, each by index. With a class token this is the published order; without one, the published
        function leaves the unmerged tokens in the order of their similarity.

    Raises:
        TypeError, ValueError: as ``stoptome_kernels.match``; a distillation token without a class token; arguments of
            both forms at once.
    """
    if cls_num is not None:
        for value, name in ((class_token, "class_token"), (distill_token, "distill_token")):
            if value is not False:
                raise ValueError(
                    f"{name}={value} can't be given together with cls_num={cls_num}, the number of all leading tokens "
                    f"that are not merged: leave {name} out"
                )
        class_token = checks.count(cls_num, "cls_num", "leading tokens that are not merged")
    if not isinstance(class_token, bool):
        if r_f is not None and distill_token is not False:
            raise ValueError(
                f"r_f={r_f} can't be given together with distill_token={distill_token}: in TempMe's form they are the "
                "same argument"
            )
        if r_f is None:
            r_f = 0 if distill_token is False else distill_token
        return bipartite_soft_matching_tempme(metric, r, class_token, r_f, backend=backend)
    if r_f is not None:
        raise ValueError("r_f belongs to TempMe's form, which needs cls_num, too: give the number of leading tokens")
    if not isinstance(distill_token, bool):
        raise TypeError(
            f"distill_token must be a bool after a bool class_token, got {type(distill_token).__name__}; for TempMe's "
            "form (metric, r, cls_num, r_f) give an int cls_num"
        )
    if distill_token and not class_token:
        raise ValueError(
            "distill_token=True needs class_token=True: the distillation token is the second of two; to protect other "
            "tokens use stoptome_kernels.match(..., sets=...)"
        )
    return _leading(metric, r, class_token + distill_token, backend)


def bipartite_soft_matching_tempme(
    metric: Tensor, r: int, cls_num: int, r_f: int = 0, *, backend: str = "auto"
) -> tuple[Merge, Unmerge]:
    """Match as TempMe does, with any number of leading class tokens (a joined clip has one for each frame).

    Args:
        metric: as in ``bipartite_soft_matching``.
        r: as in ``bipartite_soft_matching``.
        cls_num: number of leading tokens that are not merged.
        r_f: any int, without effect: the published function takes it (1, or the number of frames) and never uses it.
        backend: as in ``bipartite_soft_matching``.

    Returns:
        As ``bipartite_soft_matching``.

    Raises:
        TypeError, ValueError: as ``stoptome_kernels.match``.
    """
    cls_num = checks.count(cls_num, "cls_num", "leading tokens that are not merged; bools are ToMe's form")
    checks.integer(r_f, "r_f", "without effect")
    return _leading(metric, r, cls_num, backend)


def kth_bipartite_soft_matching(metric: Tensor, k: int, *, backend: str = "auto") -> tuple[Merge, Unmerge]:
    """Keep one token of every ``k`` adjacent ones: the last of each k is a destination, all others are merged.

    Args:
        metric: ``(N, T, C)``, or ``(N, H, T, C)`` for the mean over heads. No gradient flows into it.
        k: tokens per group. At 1 or less, and where T < k leaves no destination, the callables return their argument.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``merge(x, mode="mean")`` and ``unmerge(x)``. The output is the ``T // k`` destinations by index. Every other
        token is merged into the most similar of them, which may be of another group. So are the last ``T % k`` tokens,
        which fill no group; the published function drops them.

    Raises:
        TypeError, ValueError: as ``stoptome_kernels.match``.
    """
    tokens = _tokens(metric, backend)
    k = min(max(1, checks.integer(k, "k", "tokens of a group")), 2**31)  # more than a metric's tokens
    groups = tokens // k
    src = torch.arange(tokens - groups, device=metric.device)
    dst = torch.arange(groups, device=metric.device) * k + (k - 1)
    sets = src + src // max(1, k - 1), dst  # k - 1 sources in front of every destination
    plan = api.match(metric, tokens, backend=backend, sets=sets)  # capped at the sources: all of them
    return Merge(plan, backend), Unmerge(plan, backend)


def random_bipartite_soft_matching(
    metric: Tensor, r: int, *, generator: torch.Generator | None = None, backend: str = "auto"
) -> tuple[Merge, Unmerge]:
    """Merge ``r`` tokens drawn at random, each into the most similar of the others.

    Args:
        metric: ``(N, T, C)``, or ``(N, H, T, C)`` for the mean over heads. No gradient flows into it.
        r: number of tokens to remove; capped at T - 1. At 0 or less the callables return their argument.
        generator: random number generator; None for the default one of metric's device. Numbers drawn on another device
            are copied. torch.compile takes no generator into a graph.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``merge(x, mode="mean")`` and ``unmerge(x)``. The output is the other tokens, by index. One choice is made for
        all items of the call; the published function makes one for each item.

    Raises:
        TypeError, ValueError: as ``stoptome_kernels.match``.
    """
    tokens = _tokens(metric, backend)
    r = min(_not_negative(r), max(0, tokens - 1))
    origin = _origin(generator, metric.device)
    order = torch.randperm(tokens, generator=generator, device=origin).to(metric.device)
    plan = api.match(metric, r, backend=backend, sets=(order[:r], order[r:]))
    return Merge(plan, backend), Unmerge(plan, backend)


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
    """Match the tokens of an image with one destination in every cell (ToMe for Stable Diffusion, section 4).

    Args:
        metric: ``(N, T, C)`` or ``(N, H, T, C)`` with ``T = w·h``: h rows of w tokens. No gradient flows into it.
        w: width of the image in tokens.
        h: height of the image in tokens.
        sx: width of a cell in tokens. Every whole cell has one destination; all other tokens are sources, including
            those of the cells that the right and the lower border cut off.
        sy: height of a cell in tokens.
        r: number of tokens to remove; capped at the number of sources. At 0 or less the callables return their
            argument.
        no_rand: take the first token of each cell as destination instead of a random one.
        generator: random number generator; None for the default one of metric's device. One choice is made for all
            items. Numbers drawn on another device are copied. torch.compile takes no generator into a graph.
        backend: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        ``merge(x, mode="mean")`` and ``unmerge(x)``. The order of the merged tokens is: unmerged sources, destinations,
        each by index. The published function leaves the unmerged sources in the order of their similarity.

    Raises:
        TypeError, ValueError: as ``stoptome_kernels.match``, or T is not ``w·h``.
    """
    tokens = _tokens(metric, backend)
    w, h = checks.count(w, "w", "tokens in a row"), checks.count(h, "h", "rows of tokens")
    sx, sy = checks.count(sx, "sx", "width of a cell", least=1), checks.count(sy, "sy", "height of a cell", least=1)
    if tokens != w * h:
        raise ValueError(
            f"metric must have T = w·h = {w}·{h} = {w * h} tokens, got T = {tokens} in {tuple(metric.shape)}"
        )
    _origin(generator, metric.device)  # refused even where nothing is drawn
    sets = _cells(w, h, sx, sy, no_rand, generator, metric.device)
    plan = api.match(metric, _not_negative(r), backend=backend, sets=sets)
    return Merge(plan, backend), Unmerge(plan, backend)


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """Return ``x``: takes the place of merge or unmerge where nothing is merged."""
    return x


def merge_wavg(merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average the members of every merged token, weighted by the number of tokens that each represents.

    Args:
        merge: result of a matching above, for one fused ``stoptome_kernels.merge``. Any other callable
            ``merge(x, mode="sum")`` is called twice.
        x: ``(N, T, D)``.
        size: ``(N, T, 1)``, any floating dtype; None means all ones. No gradient flows into it.

    Returns:
        ``x (N, T', D)`` in x's dtype and ``size (N, T', 1)``, float32 for any dtype of x: bfloat16 counts exactly only
        up to 256, float16 up to 2048. To add sizes to attention scores of a narrower dtype, cast there:
        ``size.log().to(scores.dtype)``. With another callable, ``size`` is its result for float32 sizes.

    Raises:
        TypeError, ValueError: as ``stoptome_kernels.merge``, or a size of another shape.
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
    """Return the original tokens that every token is made of, as a dense matrix of T'·T numbers per item.

    ``plan.dest`` holds the same in 4 bytes per token, and ``plan.then(next)`` carries it through layers.

    Args:
        merge: result of a matching above, or a callable ``merge(x, mode="amax")``.
        x: ``(N, T, D)``, the tokens that are merged; only N, T, dtype and device matter.
        source: ``(N, T, T0)``, result of the previous layer; None in the first layer.

    Returns:
        ``(N, T', T0)`` of zeros and ones in x's dtype (in source's, if given). Each column has a single one. A token
        that was removed with weight 0 is counted where ``plan.dest`` puts it.

    Raises:
        TypeError, ValueError: as ``stoptome_kernels.merge``.
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
    """Return the number of tokens to merge in each of ``num_layers`` layers.

    Args:
        num_layers: number of layers.
        r: an int for every layer; a list with one int per layer, padded with 0; or a pair (tuple) ``(r, inflection)``:
            the first layer merges ``r(1 − inflection)`` truncated to int, the last ``2r − first``, those between are
            interpolated linearly and truncated. This is the published formula without its rounding of floats, which
            can lose a token: ``(10, 0.9)`` starts from 1 here.

    Raises:
        TypeError, ValueError: anything else, such as a list with more numbers than layers.
    """
    return list(_parse_r(r, checks.count(num_layers, "num_layers", "layers of the model")))


def _leading(metric: Tensor, r: int, protected: int, backend: str) -> tuple[Merge, Unmerge]:
    """Match with leading tokens protected; more of them than there are means that none is left to merge."""
    protected = min(protected, _tokens(metric, backend))
    plan = api.match(metric, _not_negative(r), protected, backend)
    return Merge(plan, backend), Unmerge(plan, backend)


def _tokens(metric: Tensor, backend: str) -> int:
    """Return the number of tokens of a metric that is one."""
    checks.tensor(metric, "metric", "(N, T, C) or (N, H, T, C)")
    checks.match(metric, 0, 0, backend)
    return metric.shape[-2]


def _not_negative(r: int) -> int:
    r = checks.integer(r, "r", "tokens to remove from each item")
    return 0 if r < 0 else r


def _origin(generator: torch.Generator | None, device: torch.device) -> torch.device:
    """Return where random numbers are drawn."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    return device if generator is None else generator.device


def _cells(
    w: int, h: int, sx: int, sy: int, no_rand: bool, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return sources and destinations of an image: their counts follow from the sizes alone, so nothing waits for a
    GPU."""
    rows, columns = h // sy, w // sx
    grid = torch.arange(h * w, device=device).view(h, w)
    corner = grid[: rows * sy : sy, : columns * sx : sx].reshape(-1, 1)
    if no_rand:
        chosen = torch.zeros_like(corner)
    else:
        origin = _origin(generator, device)
        chosen = torch.randint(sx * sy, (rows * columns, 1), generator=generator, device=origin).to(device)
    others = torch.arange(sx * sy - 1, device=device)
    others = others + (others >= chosen)  # (cells, sx·sy - 1): every place of a cell but the chosen one
    dst, inner = (corner + (place // sx * w + place % sx) for place in (chosen, others))
    border = grid[: rows * sy, columns * sx :].flatten(), grid[rows * sy :].flatten()
    return torch.cat([inner.flatten(), *border]), dst[:, 0]
