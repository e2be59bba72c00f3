# SPDX-License-Identifier: Apache-2.0
"""Launches of the GPU's tests and benchmarks, one job after the other, over no_gpu's driver: it costs only compiling.

The kernels are not specialised for the number of items, so few are enough; tokens, widths, heads and strides are those
of the real shapes. ``few=False`` takes the real number of items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import stoptome_kernels as stk
import torch
from stoptome_kernels.compat import bipartite_soft_matching_random2d

from . import no_gpu, shapes, variants
from .baselines.operators import package
from .workloads import fused, operators, stop

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ALONE = ("stop-b32-train", "stop-b32-video", "clip-b16", "tempme-68", "tempme-88", "tempme-168", "vit-l16-384", "long")
ATTENDED = (  # tokens, prefix, heads, channels of a head
    *((54, g, 12, 64) for g in (0, 4)), (101, 0, 12, 64), (168, 4, 12, 64), (197, 0, 12, 64), (257, 0, 16, 80),
    (577, 0, 16, 64), (577, 4, 8, 64), (577, 4, 8, 128), (1568, 0, 12, 64), (4096, 0, 4, 64),
    (4096, 0, 8, 64), (4096, 0, 4, 128),
)  # fmt: skip
ITEMS = 12  # one video
RESULTS = ("stop", "model")  # jobs in which torch's own operations read plans: these must be plans


def alone(name: str, dtype: str, few: bool) -> None:
    """As tests/ops/test_gpu.py: every mode with its gradient, merge_norm with and without gradients of its weights, and
    a second matching behind the first."""
    n, tokens, dim, heads, protected, r = shapes.COMPILED[name]
    n = min(n, ITEMS) if few else n
    x, size = torch.zeros(n, tokens, dim, dtype=DTYPES[dtype]), torch.ones(n, tokens)
    metric = x
    if heads:
        metric = torch.zeros(n, tokens, 3, heads, 64, dtype=x.dtype)[:, :, 1].transpose(1, 2)
    plan = stk.match(metric, r, protected)
    for sizes in (size, None):
        for mode in ("mean", "sum", "max"):
            leaf = x.clone().requires_grad_()
            y, size_out = stk.merge(leaf, plan, sizes, mode)
            y.backward(torch.zeros_like(y))
    y = y.detach().requires_grad_()
    stk.unmerge(y, plan).sum().backward()
    following = stk.match(y.detach(), r, protected)
    stk.merge(y, following, size_out)
    row = torch.ones(dim).requires_grad_()
    leaf = x.clone().requires_grad_()
    for weights in ((row, row), (row.detach(), row.detach())):
        outputs = stk.merge_norm(leaf, x, plan, size, *weights)[:2]
        torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs])


def attended(tokens: str, ahead: str, heads: str, channels: str, dtype: str, few: bool) -> None:
    """Attention with sizes and its gradient, as in tests/ops/test_gpu.py and bench/attention.py."""
    t, g, h, d = map(int, (tokens, ahead, heads, channels))
    leaf = torch.zeros(ITEMS, t, 3, h, d, dtype=DTYPES[dtype], requires_grad=True)
    prefix = torch.zeros(2, 1, h, g, d, dtype=leaf.dtype, requires_grad=True) if g else (None, None)
    q, k, v = (part.transpose(1, 2) for part in leaf.unbind(2))
    stk.attention(q, k, v, torch.ones(ITEMS, t), *prefix).sum().backward()


def image(side: str, dtype: str, few: bool) -> None:
    x = torch.zeros(2, int(side) ** 2, 320, dtype=DTYPES[dtype])
    together, apart = bipartite_soft_matching_random2d(x, int(side), int(side), 2, 2, int(side) ** 2 // 2, True)
    apart(together(x))


def sets(few: bool) -> None:
    """Of tests/ops/test_gpu.py: sets by index, and rows too many for 32 bits."""
    metric = torch.zeros(2, 3000, 64)
    stk.merge(metric, stk.match(metric, 900, sets=(torch.arange(2000), torch.arange(2000, 2500))))


def large(few: bool) -> None:
    row = torch.zeros(2, 1025, 1024, dtype=torch.bfloat16)
    plan = stk.match(row, 256, 1)
    stk.unmerge(stk.merge(row, plan)[0], plan)


def _inputs(name: str, few: bool) -> shapes.Inputs:
    """Of a benchmark, in bfloat16; the pictures' content does not matter."""
    shape = shapes.SHAPES[name]
    n = min(shape.n_gpu, ITEMS) if few else shape.n_gpu
    made = shapes.make(replace(shape, n_cpu=1), "cpu", torch.bfloat16)

    def repeat(t: torch.Tensor) -> torch.Tensor:
        return t.repeat(n, *[1] * (t.dim() - 1))

    metric = x = repeat(made.x)
    if shape.metric == "keys":
        metric = repeat(made.metric.transpose(1, 2)[:, :, None].expand(-1, -1, 3, -1, -1))[:, :, 1].transpose(1, 2)
    return shapes.Inputs(shape, metric, x, repeat(made.size), repeat(made.column), repeat(made.grad))


def bench_merge(name: str, few: bool) -> None:
    for call in operators.calls(package("auto", image=shapes.SHAPES[name].cell > 0), _inputs(name, few)).values():
        call()


def bench_fused(name: str, few: bool) -> None:
    inputs = _inputs(name, few)
    for sides in (fused.norm_sides(inputs), fused.attention_sides(inputs)):
        for side, (call, leaves) in sides.items():
            if side in ("merge_norm", "attention", "attention, sizes alone", "add, merge, layer_norm"):
                for direction in fused.DIRECTIONS:
                    fused.timed(call, leaves, direction)()


def bench_tune(kernel: str, name: str, few: bool) -> None:
    """Every variant; one that can't be compiled fails there as here."""
    line = variants.KERNELS[kernel]
    job = line.job(_inputs(name, few))
    tried, _ = variants.variants_of(line, variants.default_of(line, job))
    for changes in ({}, *tried.values()):
        with variants.configured(line, changes):
            try:
                variants.launch(job.launches())
            except Exception as error:
                print(f"tune: {kernel}, {name}, {changes}: {variants.reason_of(error)}")


def bench_stop(few: bool) -> None:
    """The blocks of bench/stop.py for one video; more of them are laid out alike."""
    args = SimpleNamespace(device="cpu", videos=1, layers=12, dtype="bfloat16", settings=list(stop.SETTINGS))
    with no_gpu.WithoutProducts():
        for side in stop.sides(*stop.prepare(args, "DGL"), "blocks", args):
            if side.impl == "package":
                side.infer()
                side.train()


def model(dtype: str, few: bool) -> None:
    """The tower of tests/ops/test_gpu.py, inference and training."""
    from stoptome_kernels.stop import StopConfig, StopModel

    config = StopConfig(layers=3, prompt_layers=3, text_layers=1, vocab_size=64, temporal_prompt="DGL")
    tower, video = stk.apply_tome_patch(StopModel(config), 4), torch.rand(2, 12, 3, 224, 224)
    for videos in (1, 2):
        with no_gpu.WithoutProducts(), torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
            tower.encode_video(video[:videos]).float().square().sum().backward()
            with torch.no_grad():
                tower.encode_video(video[:videos])


KINDS: dict[str, Callable] = {
    "alone": alone, "attended": attended, "image": image, "sets": sets, "large": large, "merge": bench_merge,
    "fused": bench_fused, "tune": bench_tune, "stop": bench_stop, "model": model,
}  # fmt: skip


def jobs() -> list[str]:
    """Return all jobs by name, those that take the longest first."""
    return [
        "stop",
        *(f"tune {kernel} {shape}" for kernel, shape in variants.ORDER),
        *(f"alone {shape} {dtype}" for dtype in DTYPES for shape in ALONE),
        *(f"attended {' '.join(map(str, sizes))} {dtype}" for sizes in ATTENDED for dtype in DTYPES),
        *(f"model {dtype}" for dtype in DTYPES),
        *(f"merge {shape.name}" for shape in shapes.SHAPES.values() if shape.default),
        *(f"fused {shape}" for shape in fused.SHAPES),
        *(f"image {side} {dtype}" for side in (16, 64, 128) for dtype in DTYPES),
        "sets",
        "large",
    ]


def run(job: str, gpu: no_gpu.Gpu, few: bool = True) -> None:
    """Run a job; ``no_gpu.install()`` must have been called, with results for the kinds in RESULTS."""
    kind, *rest = job.split()
    gpu.clear()
    KINDS[kind](*rest, few)
