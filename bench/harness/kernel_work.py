# SPDX-License-Identifier: Apache-2.0
"""The work of the package's own launches, for the model of their time: bytes from their arguments, instructions from
their machine code.

Launches come from the launchers themselves, called with tensors on the meta device.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch
import triton
from stoptome_kernels._backends.triton import attention, match, merge, norm
from stoptome_kernels.reference import AttentionInputs, Groups
from torch import Tensor

from .roofline import MATCH_INTERVAL, MATCH_ISSUE, Work

DTYPE = torch.bfloat16
Launch = tuple  # (kernel, grid, arguments, constants and options), as the launchers return it
ALL_LOOPS = ("attend", "match_item", "score_blocks", "plan_blocks")  # the others' loops are for groups of many tokens
HALVINGS = 18  # of the range of similarities, to find the r-th best: 15 to 22 for the tokens of harness/shapes.py


class NotCounted(Exception):
    """A kernel that nobody has counted the instructions of, with these constants."""


@dataclass(frozen=True)
class Sizes:
    """N items of T tokens of width D, of which r are merged; in attention ``prefix`` keys more, the same for ``share``
    items."""

    n: int
    tokens: int
    dim: int
    heads: int
    protected: int
    r: int
    prefix: int = 0
    share: int = 1

    @property
    def channels(self) -> int:
        return self.dim // self.heads

    @property
    def out(self) -> int:
        return self.tokens - min(self.r, (self.tokens - self.protected) // 2)

    @property
    def sets(self) -> tuple[int, int]:
        """Sources and targets of the matching."""
        free = self.tokens - self.protected
        first_is_target = self.protected % 2
        return (free + 1 - first_is_target) // 2, (free + first_is_target) // 2


# -- instructions -----------------------------------------------------------------------------------------------------


def key(launch: Launch) -> str:
    """Return what tells a compiled kernel apart: its name, constants and options."""
    kernel, _, _, meta = launch
    return " ".join([kernel.__name__, *(f"{name}={value}" for name, value in sorted(meta.items()))])


def digest(launch: Launch) -> str:
    """Return a number for the text of a kernel and of all the functions that it calls."""
    texts, waiting = {}, [launch[0].fn]
    while waiting:
        function = waiting.pop()
        if function.__qualname__ not in texts:
            texts[function.__qualname__] = inspect.getsource(function)
            called = (function.__globals__.get(name) for name in function.__code__.co_names)
            waiting += [other.fn for other in called if isinstance(other, triton.runtime.JITFunction)]
    return hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:12]


@dataclass
class Counted:
    """Counted kernels, by name and constants: those of a file, and what is compiled besides.

    Attributes:
        rows: ``registers``, ``resident`` programs of a multiprocessor, ``outside`` and ``loops`` of sass.executed.
        compile: counts a launch that is not there; None: it is an error.
        used: keys of what was asked for.
    """

    rows: dict[str, dict] = field(default_factory=dict)
    compile: Callable[[Launch, bool], dict] | None = None
    used: set[str] = field(default_factory=set)

    def __call__(self, launch: Launch) -> dict:
        self.used.add(key(launch))
        found = self.rows.get(key(launch))
        if found is None or found["source"] != digest(launch):
            if self.compile is None:
                raise NotCounted(key(launch))
            counts = self.compile(launch, launch[0].__name__ in ALL_LOOPS)
            found = self.rows[key(launch)] = {"key": key(launch), "source": digest(launch), **counts}
        return found


def read_counted(file: Path, compiler: Callable[[Launch, bool], dict] | None = None) -> Counted:
    """Return the counts of a file, none if it isn't there."""
    rows = json.loads(file.read_text()) if file.exists() else []
    return Counted({row["key"]: row for row in rows}, compiler)


def _work(launch: Launch, counted: Counted, nbytes: int, trips: Callable[[int], list[int]], **more) -> Work:
    """Return a launch's work; ``trips`` says of so many loops how often each runs, in the order of the code."""
    row, name = counted(launch), launch[0].__name__
    times = trips(len(row["loops"]))
    instructions, shared = (
        row["outside"][column] + sum(n * body[column] for n, body in zip(times, row["loops"], strict=True))
        for column in (0, 1)
    )
    return Work(
        name, nbytes, programs=launch[1][0], warps=launch[3]["num_warps"], resident=row["resident"],
        instructions=instructions, shared=shared, **more,
    )  # fmt: skip


def _expected(*alternatives: list[int]) -> Callable[[int], list[int]]:
    """Return the trips of the loops that a kernel has by its source, or where compilers have unrolled some of them.

    Raises:
        NotCounted: when called with another number of loops, which a compiler has made of them.
    """

    def trips(loops: int) -> list[int]:
        for times in alternatives:
            if loops == len(times):
                return times
        raise NotCounted(f"{loops} loops where {' or '.join(str(len(times)) for times in alternatives)} were expected")

    return trips


def moved(launch: Launch) -> int:
    """Return the bytes of all tensors of a launch: inputs are read once, outputs are written once."""
    tensors = {id(t): t for t in launch[2] if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# -- launches ---------------------------------------------------------------------------------------------------------


def _meta(*sizes: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def _plan(s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    dest, members, offsets = (_meta(s.n, count, dtype=torch.int32) for count in (s.tokens, s.tokens, s.out + 1))
    return dest, members, offsets


def _groups(s: Sizes) -> Groups:
    return Groups(*_plan(s)[1:], _meta(s.n, s.tokens, dtype=torch.float32))


def match_work(s: Sizes, counted: Counted) -> list[Work]:
    """Return the launches of a matching by the keys of all heads."""
    keys = _meta(s.n, s.tokens, 3, s.heads, s.channels)[:, :, 1].transpose(1, 2)
    sources, targets = s.sets
    unread = s.n * s.protected * s.dim * DTYPE.itemsize  # keys of protected tokens
    found = []
    r = s.tokens - s.out
    for launch in match.launches(keys, r, s.protected, _plan(s)):
        name, meta = launch[0].__name__, launch[3]
        if name == "plan_blocks":  # halvings until r sources are left; then all sources, and the merges
            spans, chunks = ceil(sources / meta["SPAN"]), ceil(r / meta["CHUNK"])
            trips, rounds = _expected([HALVINGS, spans, chunks, 1]), 5.0
        else:
            blocks = ceil(targets / meta["BLOCK_B"])
            trips, rounds = _expected([blocks]), 2.0 + blocks
            if name == "match_item":  # what the counting loop reads is in the cache
                trips = _expected([blocks, ceil(r / meta["CHUNK"]), ceil(s.protected / meta["BLOCK_A"])])
        nbytes = moved(launch) - (0 if name == "plan_blocks" else unread)
        own = {"rounds": rounds, "interval": MATCH_INTERVAL, "issue": MATCH_ISSUE}
        found.append(_work(launch, counted, nbytes, trips, **own))
    return found


def merge_work(s: Sizes, counted: Counted) -> list[Work]:
    """Return the launch of a merge by mean: offsets, members, rows, the store."""
    x, y = _meta(s.n, s.tokens, s.dim), _meta(s.n, s.out, s.dim)
    launch = merge.reduce_launch(x, _groups(s), y, _meta(s.n, s.out, dtype=torch.float32), "mean")
    return [_work(launch, counted, moved(launch), lambda loops: [0] * loops, rounds=4.0)]


def merge_norm_work(s: Sizes, counted: Counted) -> list[Work]:
    """Return the launch of an add, merge and LayerNorm: offsets, members, rows, weight and bias, the store."""
    x, residual, y, normed = (_meta(s.n, count, s.dim) for count in (s.tokens, s.tokens, s.out, s.out))
    weight, bias = (_meta(s.dim, dtype=torch.float32) for _ in range(2))
    outputs = (y, normed, *(_meta(s.n, s.out, dtype=torch.float32) for _ in range(3)))
    launch = norm.norm_launch(x, residual, _groups(s), weight, bias, 1e-5, outputs)
    return [_work(launch, counted, moved(launch), lambda loops: [0] * loops, rounds=5.0)]


def attend_work(s: Sizes, counted: Counted) -> list[Work]:
    """Return the launch of attention with sizes."""
    q, k, v = _meta(s.n, s.tokens, 3, s.heads, s.channels).permute(2, 0, 3, 1, 4)
    prefix = [_meta(s.n // s.share, s.prefix, s.heads, s.channels).transpose(1, 2) for _ in range(2)]
    size, lse = (_meta(*shape, dtype=torch.float32) for shape in ((s.n, s.tokens), (s.n, s.heads, s.tokens)))
    out = _meta(s.n, s.tokens, s.heads, s.channels).transpose(1, 2)
    inputs = AttentionInputs(q, k, v, size, *(prefix if s.prefix else (None, None)), s.channels**-0.5)
    launch = attention.attend_launch(inputs, out, lse)
    meta = launch[3]
    whole = s.tokens // meta["BLOCK_K"] if meta["MANY"] else 0
    last = ceil((s.tokens + s.prefix - whole * meta["BLOCK_K"]) / meta["BLOCK_K"])
    trips = _expected([whole, last] if meta["MANY"] else [last])
    # keys and values of a block are waited for together; with more stages the first of the whole blocks' are
    rounds = 2.0 + last + (whole if meta["STAGES"] == 1 else min(whole, 1))
    tile = launch[1][0] * meta["BLOCK_Q"] * (whole + last) * meta["BLOCK_K"]
    flops = 4.0 * tile * meta["BLOCK_D"]
    return [_work(launch, counted, moved(launch), trips, rounds=rounds, flops=flops, exponentials=float(tile))]
