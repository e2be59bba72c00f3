# SPDX-License-Identifier: Apache-2.0
"""Calls without their Python: the same side in a CUDA graph, and compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .. import no_gpu
from . import Side

IMPLS = {"graph": ("package", "upstream"), "compile": ("package",)}  # to compile one takes most of a minute


def _in_a_graph(call: Callable) -> Any:
    # the stream is named so that it is the current one again if the capture fails
    with torch.cuda.stream(torch.cuda.current_stream()):
        return torch.cuda.make_graphed_callables(call, ())


def _compiled(call: Callable) -> Any:
    if no_gpu.pretending():  # the compiler asks the GPU too much
        return call
    return torch.compile(call, fullgraph=True, mode="reduce-overhead")


def in_way(found: list[Side], way: str) -> list[Side]:
    """Return what is measured in a way; what can't be run in it is said and left out."""
    if way == "eager":
        return found
    make, sides = {"graph": _in_a_graph, "compile": _compiled}[way], []
    for side in found:
        if side.impl not in IMPLS[way]:
            continue
        try:
            with torch.no_grad():
                call = make(side.call)
                for _ in range(3):  # torch.compile runs a graph the first time, captures it the second
                    call()
        except RuntimeError as error:
            print(f"{side.name}, {way}: left out: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        else:
            sides.append(replace(side, call=call))
    return sides
