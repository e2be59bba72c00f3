# SPDX-License-Identifier: Apache-2.0
"""Measured rows, and the work that was measured in each: what the model of a launch's time is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import prod

import triton.language as tl

from . import shapes, variants
from .kernel_work import Counted, NotCounted, Sizes, attend_work, match_work, merge_norm_work, merge_work
from .roofline import DEVICES, EVENTS_US, LAUNCH_US, Device, Work, elementwise, flash, layer_norm, product, time_us
from .workloads.attention import CASES
from .workloads.fused import FRAMES, PREFIX

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
OURS = {  # of tune.py; of merge.py and fused.py by operator and implementation
    "reduce_rows": "merge", "norm_rows": "merge_norm", "match": "match", "attend": "attention",
}  # fmt: skip
KERNEL = {op: kernel for kernel, op in OURS.items()}


@dataclass(frozen=True)
class Measured:
    """A measurement: its row in few words, and the launches that were timed."""

    op: str
    shape: str
    n: int
    impl: str
    device: str
    how: str  # it was timed: between ``events``, in a ``graph``, by a ``profiler``
    measured_us: float
    works: tuple[Work, ...]

    @property
    def modelled_us(self) -> float:
        us = sum(time_us(work, DEVICES[self.device]) for work in self.works)
        if self.how == "profiler":  # kernels without their launches
            return us - LAUNCH_US * len(self.works)
        return us + (EVENTS_US if self.how == "events" else 0.0)

    @property
    def ratio(self) -> float:
        """Modelled ÷ measured."""
        return self.modelled_us / self.measured_us

    def columns(self) -> dict:
        """Return a row of a file."""
        return {**asdict(self), "works": [asdict(work) for work in self.works]}


def from_columns(row: dict) -> Measured:
    return Measured(**{**row, "works": tuple(Work(**work) for work in row["works"])})


# QKV and the MLP of STOP's blocks without merging, 128 videos: 76800 tokens in 11 layers, of the last one keys and
# values alone; keys and values of 6656 prompts. µs of all calls together, from the profile in
# bench/results/gpu/2026-11-28-second, which times kernels without their launches
_PROFILED = (
    ("QKV, MLP up", 9928.0, ((11, 768, 2304, 76800), (1, 768, 1536, 76800), (11, 768, 3072, 76800))),
    ("projection, keys and values of prompts", 1836.0, ((11, 768, 768, 76800), (11, 768, 1536, 6656))),
    ("MLP down", 4870.0, ((11, 3072, 768, 76800),)),
)


def profiled() -> list[Measured]:
    """Return the products that were profiled."""
    found = []
    for name, us, products in _PROFILED:
        works = [
            product(name, rows, inner, columns, DEVICES["H200"])
            for times, inner, columns, rows in products
            for _ in range(times)
        ]
        found.append(Measured("product", "stop r 0", 1536, name, "H200", "profiler", us, tuple(works)))
    return found


def device_of(row: dict) -> Device | None:
    """Return the device that a row was measured on, None for one that is not described, or none at all."""
    return next((found for name, found in DEVICES.items() if name in row["device"].split()), None)


def sizes_of(row: dict) -> Sizes | None:
    """Return the shape of a row, None for one that is not modelled."""
    if case := CASES.get(row["shape"]):
        ahead = (PREFIX, FRAMES) if case.prefix else (0, 1)
        return Sizes(row["n"], case.tokens, case.heads * case.channels, case.heads, 0, 0, *ahead)
    shape = shapes.SHAPES.get(row["shape"])
    if shape is None or shape.metric != "keys" or shape.cell:
        return None
    return Sizes(row["n"], shape.tokens, shape.dim, shape.heads, shape.protected, shape.r)


def _ours(op: str, s: Sizes, impl: str, counted: Counted, case: bool) -> list[Work]:
    """Return the launches of one of the package's operators; ``case``: the sizes say whether there is a prefix, else
    it is fused.py's."""
    if op == "attention" and case:
        return attend_work(s, counted)
    if op == "attention":
        share = FRAMES if s.n % FRAMES == 0 else 1
        prefixed = Sizes(s.n, s.tokens, s.dim, s.heads, s.protected, s.r, PREFIX, share)
        return attend_work(s if impl == "attention, sizes alone" else prefixed, counted)
    return {"match": match_work, "merge": merge_work, "merge_norm": merge_norm_work}[op](s, counted)


def works_of(row: dict, counted: Counted, defaults: dict[str, dict]) -> list[Work] | None:
    """Return what was launched in a forward row of a command; None where it is not modelled.

    Args:
        row: the row.
        counted: counts of kernels.
        defaults: configuration of each kernel when the row was measured, if not today's.

    Raises:
        NotCounted: a kernel's counts are missing.
    """
    s, device = sizes_of(row), device_of(row)
    if s is None or device is None or row["dtype"] != "bfloat16" or not row["direction"].startswith("forward"):
        return None
    if "+" in row["direction"]:
        return None
    op, impl, rows = row["op"], row["impl"], s.n * s.tokens
    if op in OURS and "config" in row:
        if row.get("n_spills") or row.get("reason"):
            return None  # registers in memory are not modelled
        with _as(op, row["config"]):
            return _ours(OURS[op], s, impl, counted, False)
    if impl in ("triton", "merge_norm", "attention", "attention, sizes alone"):
        found: list[Work] = []
        for part in op.split("+"):
            if part not in KERNEL:
                return None
            with _as(KERNEL[part], defaults.get(KERNEL[part])):
                found += _ours(part, s, impl, counted, row["shape"] in CASES)
        return found
    plain = [elementwise("add", rows * s.dim, 3), layer_norm(rows, s.dim)]
    if impl == "add + layer_norm":
        return plain
    if impl in ("sdpa, no sizes", "flash, no sizes"):
        return [flash(s.n, s.heads, s.tokens, s.tokens, s.channels, device)]
    return None


def _as(kernel: str, config: dict | None) -> AbstractContextManager:
    """Let the kernels' config be what it was in a row."""
    if config is None:
        return nullcontext()
    changes = {name: TYPES[value] if name == "TYPE" else value for name, value in config.items()}
    return variants.configured(variants.KERNELS[kernel], changes)


def defaults_of(rows: Iterable[dict]) -> dict[tuple[str, str, str], dict]:
    """Return the default configurations that tune.py measured, by commit, kernel and shape."""
    tuned = (row for row in rows if row["op"] in OURS and "config" in row and row["impl"] == "default")
    return {(row["commit"], row["op"], row["shape"]): row["config"] for row in tuned}


def measurements(rows: list[dict], counted: Counted, every_variant: bool = False) -> Iterator[Measured]:
    """Return what the model can be held against, of rows of merge.py, fused.py, attention.py and tune.py.

    A row of an operator has the configuration that tune.py measured as the default of the same commit, if that is among
    the rows, else today's. Rows of what is not modelled, or can't be compiled, are left out.
    """
    defaults = defaults_of(rows)
    for row in rows:
        if row["p50_us"] is None or ("config" in row and row["impl"] != "default" and not every_variant):
            continue
        own = {kernel: config for kernel in OURS if (config := _default(defaults, row, kernel))}
        try:
            works = works_of(row, counted, own)
        except NotCounted:
            continue
        if works:
            device = device_of(row)
            assert device is not None
            said = row["op"], row["shape"], row["n"], row["impl"], device.name
            if row.get("graph_us"):
                yield Measured(*said, "graph", row["graph_us"], tuple(works))
            yield Measured(*said, "events", row["p50_us"], tuple(works))


def _default(defaults: dict[tuple[str, str, str], dict], row: dict, kernel: str) -> dict | None:
    """Return the default configuration of a kernel in a row's commit: at its shape, or at one as wide; attention and
    matching depend on the number of tokens, too."""
    shape = shapes.SHAPES.get(row["shape"])
    for (commit, name, other), config in defaults.items():
        known = shapes.SHAPES.get(other)
        if (commit, name) != (row["commit"], kernel) or shape is None or known is None:
            continue
        same = (known.tokens, known.metric) == (shape.tokens, shape.metric) or kernel not in ("match", "attend")
        if same and known.dim == shape.dim:
            return config
    return None


def error_of(found: Iterable[Measured]) -> float:
    """Return by which factor the model is off in the mean: the geometric mean of the larger of ratio and 1 ÷ ratio."""
    factors = [max(m.ratio, 1 / m.ratio) for m in found]
    return prod(factors) ** (1 / len(factors)) if factors else 1.0
