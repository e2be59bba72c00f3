# SPDX-License-Identifier: Apache-2.0
"""The kernels that are tuned, each alone: what it is launched with, what it must write, how else to configure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from stoptome_kernels import reference
from stoptome_kernels._backends.triton import attention, attention_grad, config, match, merge, norm
from stoptome_kernels.layout import empty_heads_last
from stoptome_kernels.reference import AttentionInputs, Groups, MergedRows
from torch import Tensor

from . import shapes
from .verify import SINGLE
from .workloads.fused import FRAMES, PREFIX

OPTIONS = {"num_warps", "num_stages", "maxnreg"}  # the compiler's: every build has them
Changes = dict[str, object]  # of a configuration: constants and options


@dataclass(frozen=True)
class Job:
    """A kernel's work on one set of inputs."""

    launches: Callable[[], list[tuple]]  # (kernel, grid, arguments, constants and options), made by the launchers
    written: Callable[[list[tuple]], dict[str, Tensor]]  # the outputs of such launches by name
    right: Callable[[], dict[str, Tensor]]  # what the reference writes there
    bounds: Callable[[dict[str, Tensor]], dict[str, float]]  # how far off each may be; what is not in it: bit for bit
    nbytes: int  # that must be moved: every input read once, every output written once


@dataclass(frozen=True)
class Kernel:
    """A line of the table."""

    name: str
    config: str  # the function of the kernels' config that configures it
    part: Callable[[dict], str | None]  # which of the configurations that the function returns
    job: Callable[[shapes.Inputs], Job]
    variants: Callable[[dict], list[Changes]]  # of a default configuration
    flags: tuple[str, ...] = ()  # orders of loads: constants that are tried the other way round
    direction: str = "forward"


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _most(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _metric(i: shapes.Inputs) -> Tensor:
    return i.metric if i.metric.dim() == 4 else i.metric[:, None]


def _groups(i: shapes.Inputs) -> Groups:
    r = i.shape.tokens - i.shape.tokens_out
    return Groups(*reference.match(_metric(i), r, i.shape.protected)[1:], i.size)


# -- jobs -------------------------------------------------------------------------------------------------------------


def match_job(i: shapes.Inputs) -> Job:
    """Return the matching of all items. What is right depends on rounding: tune.py asks verify.Truth, not bounds."""
    n, tokens, out = i.x.shape[0], i.shape.tokens, i.shape.tokens_out
    metric, r, protected = _metric(i), tokens - out, i.shape.protected
    dest, members = (i.x.new_empty((n, tokens), dtype=torch.int32) for _ in range(2))
    plan = dest, members, i.x.new_empty((n, out + 1), dtype=torch.int32)
    return Job(
        lambda: match.launches(metric, r, protected, plan),
        lambda steps: dict(zip(("dest", "members", "offsets"), plan, strict=True)),
        lambda: dict(zip(("dest", "members", "offsets"), reference.match(metric, r, protected), strict=True)),
        lambda want: {},
        _bytes(metric[:, :, protected:], *plan),
    )


def reduce_job(i: shapes.Inputs) -> Job:
    groups = _groups(i)
    y, size = torch.empty_like(i.grad), i.size.new_empty(i.grad.shape[:2])
    return Job(
        lambda: [merge.reduce_launch(i.x, groups, y, size, "mean")],
        lambda steps: {"y": y, "size": size},
        lambda: dict(zip(("y", "size"), reference.reduce(i.x, groups, "mean"), strict=True)),
        lambda want: {},
        _bytes(i.x, *groups, y, size),
    )


def spread_job(i: shapes.Inputs) -> Job:
    groups, out = _groups(i), torch.empty_like(i.x)
    return Job(
        lambda: [merge.spread_launch(i.grad, groups, out, "mean", None, None)],
        lambda steps: {"out": out},
        lambda: {"out": reference.spread(i.grad, groups, "mean")},
        lambda want: {},
        _bytes(i.grad, *groups, out),
    )


def _norm_inputs(i: shapes.Inputs) -> tuple[Tensor, ...]:
    """residual, weight, bias."""
    rng = torch.Generator().manual_seed(0)
    weight, bias = (torch.rand(i.x.shape[2], generator=rng).to(i.x.device) for _ in range(2))
    return i.x.flip(0) * 0.5, weight, bias


def _norm_noise(i: shapes.Inputs) -> float:
    """Of a sum over a row, or over all rows, as a share of the largest result: rounding errors add up as a walk."""
    return 4 * (i.x.shape[2] ** 0.5 + i.x[..., 0].numel() ** 0.5) * SINGLE


def norm_job(i: shapes.Inputs) -> Job:
    groups, (residual, weight, bias) = _groups(i), _norm_inputs(i)
    names = ("y", "normed", "size", "mean", "rstd")
    y, normed = (torch.empty_like(i.grad) for _ in range(2))
    outputs = y, normed, *(i.size.new_empty(i.grad.shape[:2]) for _ in range(3))

    def bounds(want: dict[str, Tensor]) -> dict[str, float]:
        noise = _norm_noise(i)
        return {
            "normed": (2 * _unit(y.dtype) + noise) * _most(want["normed"]),
            "mean": noise * _most(want["y"]),
            "rstd": noise * _most(want["rstd"]),
        }

    return Job(
        lambda: [norm.norm_launch(i.x, residual, groups, weight, bias, 1e-5, outputs)],
        lambda steps: dict(zip(names, outputs, strict=True)),
        lambda: dict(
            zip(names, reference.merge_norm(i.x, residual, groups, weight, bias, 1e-5), strict=True)
        ),
        bounds,
        _bytes(i.x, residual, *groups, weight, bias, *outputs),
    )  # fmt: skip


def norm_grad_job(i: shapes.Inputs) -> Job:
    groups, (residual, weight, bias) = _groups(i), _norm_inputs(i)
    y, _, _, mean, rstd = reference.merge_norm(i.x, residual, groups, weight, bias, 1e-5)
    grads, out = (i.grad, i.grad.flip(0)), torch.empty_like(i.x)
    rows = MergedRows(y, mean, rstd)
    given = (*grads, rows, groups, weight)

    def right() -> dict[str, Tensor]:
        return dict(zip(("out", "affine"), reference.merge_norm_backward(*given, True), strict=True))

    def bounds(want: dict[str, Tensor]) -> dict[str, float]:
        noise, unit = _norm_noise(i), _unit(out.dtype)
        return {"out": (2 * unit + noise) * _most(want["out"]), "affine": (2 * SINGLE + noise) * _most(want["affine"])}

    return Job(
        lambda: [norm.norm_grad_launch(*given, out, norm.norm_partial(given[0]))],
        lambda steps: {"out": out, "affine": steps[0][2][10]},  # the programs' parts: read() sums them
        right,
        bounds,
        _bytes(*grads, *rows, *groups, weight, out),
    )


def _attention_inputs(i: shapes.Inputs) -> AttentionInputs:
    """Return inputs laid out as in a block of STOP's."""
    n, heads, rng = i.x.shape[0], max(1, i.shape.heads), torch.Generator(i.x.device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, heads, shapes.HEAD_DIM, generator=rng, device=i.x.device).to(i.x.dtype)

    q, k, v = random(n, i.shape.tokens, 3).permute(2, 0, 3, 1, 4)
    share = FRAMES if n % FRAMES == 0 else 1
    prefix = [random(n // share, PREFIX).transpose(1, 2) for _ in range(2)]
    return AttentionInputs(q, k, v, i.size, *prefix)


def attend_job(i: shapes.Inputs) -> Job:
    inputs = q, k, v, size, _, prefix_v, _ = _attention_inputs(i)
    scale = shapes.HEAD_DIM**-0.5
    out = empty_heads_last(q, *q.shape[:3])
    lse = size.new_empty(q.shape[:3])

    def bounds(want: dict[str, Tensor]) -> dict[str, float]:
        # a score is off by the rounding of its sum, a weight by that and its rounding to the dtype, as the output is
        reach = scale * _most(q.float().norm(dim=-1)) * _most(k.float().norm(dim=-1))
        noise = 8 * (shapes.HEAD_DIM**0.5 + k.shape[2] ** 0.5) * SINGLE * (1 + reach)
        return {"out": (4 * _unit(q.dtype) + noise) * max(_most(v), _most(prefix_v)), "lse": noise}

    return Job(
        lambda: [attention.attend_launch(inputs, out, lse)],
        lambda steps: {"out": out, "lse": lse},
        lambda: dict(zip(("out", "lse"), reference.attention(inputs), strict=True)),
        bounds,
        _bytes(*inputs[:6], out, lse),
    )


def attend_grad_job(i: shapes.Inputs) -> Job:
    inputs = q, k, v, size, prefix_k, prefix_v, _ = _attention_inputs(i)
    out, lse = reference.attention(inputs)
    grad = torch.ones_like(out) * out.flip(0)
    rows = [empty_heads_last(x, *x.shape[:3]) for x in (q, k, v)]
    parts = [size.new_empty((q.shape[0], *prefix_k.shape[1:])) for _ in range(2)]
    names = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")

    def right() -> dict[str, Tensor]:
        each = [p.repeat_interleave(q.shape[0] // len(p), 0) for p in (prefix_k, prefix_v)]  # an item's own part
        return dict(zip(names, reference.attention_backward(grad, AttentionInputs(*inputs[:4], *each)), strict=True))

    def bounds(want: dict[str, Tensor]) -> dict[str, float]:
        return {name: 64 * _unit(q.dtype) * _most(want[name]) for name in names}  # as in fused.py: sums over keys

    return Job(
        lambda: attention_grad.grad_launches(grad, inputs, out, lse, (*rows, *parts)),
        lambda steps: dict(zip(names, (*rows, *parts), strict=True)),
        right,
        bounds,
        _bytes(grad, *inputs[:6], lse, *rows, *parts),
    )


# -- configurations ---------------------------------------------------------------------------------------------------


def norm_variants(c: dict) -> list[Changes]:
    """Rows on one to four warps, two rows together, and other limits of registers."""
    limits: list[Changes] = [{"maxnreg": limit} for limit in (80, 96, 128)]
    shapes = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]
    return [*limits, *({"ROWS": rows, "num_warps": warps} for rows, warps in shapes)]


def norm_grad_variants(c: dict) -> list[Changes]:
    """With as many programs a multiprocessor as their registers let it hold, and with more."""
    limited = [(1, 168, 12), (1, 224, 9), (2, 128, 8), (4, 80, 6)]
    shapes = [(1, 1, 8), (1, 1, 16), (1, 2, 4), (1, 4, 4), (2, 2, 4), (2, 4, 2)]
    found: list[Changes] = [
        {"num_warps": warps, "maxnreg": limit, "programs": each} for warps, limit, each in limited
    ]  # fmt: skip
    return [*found, *({"ROWS": rows, "num_warps": warps, "programs": each} for rows, warps, each in shapes)]


def merge_variants(c: dict) -> list[Changes]:
    """Whole rows on one, two and four warps, two rows together, and pieces of rows."""
    whole = max(8, config._pow2(c["D"]))
    half, quarter = (max(8, whole // part) for part in (2, 4))
    tiles = [
        (1, whole, 1), (1, whole, 2), (1, whole, 4), (2, whole, 1), (2, whole, 2), (2, half, 1), (2, half, 2),
        (4, quarter, 1), (4, quarter, 2), (8, quarter, 4),
    ]  # fmt: skip
    return [{"ROWS": r, "BLOCK_D": b, "CHUNKS": max(1, -(-c["D"] // b)), "num_warps": w} for r, b, w in tiles]


def match_variants(c: dict) -> list[Changes]:
    warps, block_b, block_c = c["num_warps"], c["BLOCK_B"], c["BLOCK_C"]
    found: list[Changes] = [
        {"num_warps": warps // 2}, {"num_warps": warps * 2}, {"BLOCK_B": max(16, block_b // 2)},
        {"BLOCK_B": min(c["BLOCK_A"], block_b * 2)}, {"BLOCK_B": max(16, block_b // 2), "num_warps": warps // 2},
        {"BLOCK_C": max(16, block_c // 2)}, {"BLOCK_C": min(64, block_c * 2)},
    ]  # fmt: skip
    if "CHUNK" in c:
        found += [{"CHUNK": 32}, {"CHUNK": max(8, c["CHUNK"] // 2)}]
    if c["BLOCK_A"] == 128:
        # two programs of 256 threads a multiprocessor; twice the targets spill on sm_80 and sm_100
        found += [{"maxnreg": 128}, {"BLOCK_B": min(c["BLOCK_A"], block_b * 2), "maxnreg": 128}]
    return found


def attend_variants(c: dict) -> list[Changes]:
    """With keys prefetched, other blocks, and a block of two warp groups."""
    wide = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8}
    stages: list[Changes] = [{"STAGES": 2}, {"STAGES": 3}] if c.get("MANY") else []  # one block has no loop
    return [
        *stages, {"BLOCK_K": 16}, {"BLOCK_K": 32}, {"BLOCK_K": 64}, {"BLOCK_K": 128},
        {"BLOCK_K": 32, "STAGES": 3}, {"BLOCK_K": 64, "STAGES": 3}, {"BLOCK_Q": 128}, {"BLOCK_Q": 128, "BLOCK_K": 32},
        {**wide, "STAGES": 2, "maxnreg": 128}, {**wide, "STAGES": 3, "maxnreg": 128}, {"num_warps": 2}, {"maxnreg": 96},
    ]  # fmt: skip


def attend_grad_variants(c: dict) -> list[Changes]:
    """By queries or keys: with rows prefetched, and other blocks; in one block: other limits of registers."""
    if "STAGES" not in c:
        return [{"maxnreg": 128}, {"maxnreg": 168}, {"num_warps": 8}]
    rows, columns = c["BLOCK_Q"], c["BLOCK_K"]
    return [
        {"STAGES": 2}, {"STAGES": 3}, {"BLOCK_Q": rows * 2}, {"BLOCK_Q": max(16, rows // 2)},
        {"BLOCK_K": columns * 2}, {"BLOCK_K": max(16, columns // 2)}, {"num_warps": 8}, {"maxnreg": 128},
        {"BLOCK_Q": 128, "num_warps": 8}, {"BLOCK_K": 128, "num_warps": 8},
    ]  # fmt: skip


def _only(found: dict) -> None:
    return None


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("norm_rows", "norm", _only, norm_job, norm_variants, ("EARLY",)),
        Kernel("norm_grad_rows", "norm", _only, norm_grad_job, norm_grad_variants, ("EARLY",), "backward"),
        Kernel("reduce_rows", "merge", _only, reduce_job, merge_variants),
        Kernel("match", "match", lambda found: "item" if found["item"] else "score", match_job, match_variants),
        Kernel("attend", "attention", lambda found: "attend", attend_job, attend_variants),
        Kernel("spread_rows", "merge", _only, spread_job, merge_variants, direction="backward"),
        # each time is that of the whole gradient
        Kernel("grad_keys", "attention", lambda found: "item" if found["item"] else "keys",
               attend_grad_job, attend_grad_variants, direction="backward"),
        Kernel("grad_queries", "attention", lambda found: "item" if found["item"] else "queries",
               attend_grad_job, attend_grad_variants, direction="backward"),
    )
}  # fmt: skip
STOP, VIT, LONG = "stop-b32-train", "vit-b16-r16", "vit-l16-384"
ORDER = (  # what is measured if no shape is named
    ("norm_rows", STOP), ("norm_grad_rows", STOP), ("reduce_rows", STOP), ("match", VIT), ("match", STOP),
    ("attend", STOP), ("attend", VIT), ("attend", LONG), ("grad_keys", STOP), ("grad_keys", VIT), ("grad_queries", VIT),
    ("spread_rows", STOP),
)  # fmt: skip
ORDERS = {flag for kernel in KERNELS.values() for flag in kernel.flags}


def default_of(kernel: Kernel, job: Job) -> dict:
    """Return the configuration that the kernel is launched with here."""
    seen: list[dict] = []

    def remember(found: dict) -> dict:
        seen.append(found)
        return found

    with _replaced(kernel.config, remember):
        job.launches()
    part = kernel.part(seen[0])
    return dict(seen[0] if part is None else seen[0][part])


def variants_of(kernel: Kernel, default: dict) -> tuple[dict[str, Changes], list[str]]:
    """Return the configurations to try, by label, and the orders of loads that this build has no choice of. Another
    tile or number of warps is tried without the default's limit of registers, under which it might spill."""
    flags = dict.fromkeys((*kernel.flags, *(key for key in default if key in ORDERS)))
    tried = [{flag: not default[flag]} for flag in flags if flag in default]
    if default.get("maxnreg"):
        tried.append({"maxnreg": None})
    tried += kernel.variants(default)
    found = {}
    for changes in tried:
        different = {key: value for key, value in changes.items() if default.get(key) != value}
        if default.get("maxnreg") and {*different} - {"programs", "maxnreg", *flags}:
            different.setdefault("maxnreg", None)
        if different:
            found[" ".join(f"{key}={value}" for key, value in different.items())] = different
    return found, [flag for flag in flags if flag not in default]


@contextmanager
def configured(kernel: Kernel, changes: Changes) -> Iterator[None]:
    """Let the kernels' config return another configuration of a kernel. ``programs`` is what a multiprocessor gets of
    norm_grad_rows."""
    constants = {key: value for key, value in changes.items() if key != "programs"}

    def changed(found: dict) -> dict:
        part = kernel.part(found)
        return {**found, **constants} if part is None else {**found, part: {**found[part], **constants}}

    with _replaced(kernel.config, changed), _replaced("norm_resident", lambda fits: changes.get("programs", fits)):
        yield


def _replaced(name: str, change: Callable) -> AbstractContextManager:
    """Put what ``change`` makes of it in place of what a function of the kernels' config returns."""
    original = getattr(config, name)
    return patch.object(config, name, lambda *args: change(original(*args)))


def launch(steps: list[tuple]) -> list:
    """Launch steps; return what Triton compiled for each, None in the interpreter."""
    return [kernel[grid](*given, **meta) for kernel, grid, given, meta in steps]


def reason_of(error: Exception) -> str:
    """Say in one line why a variant can't run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
