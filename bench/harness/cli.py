# SPDX-License-Identifier: Apache-2.0
"""Options and main of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import measure, no_gpu, shapes
from .rows import environment, rows_file, write_rows
from .verify import WrongResult


def one_of(what: str, allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of the allowed values."""

    def parse(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",") if part.strip()]
        wrong = [part for part in chosen if part not in allowed]
        if wrong or not chosen:
            named = ", ".join(wrong) or "is empty"
            raise argparse.ArgumentTypeError(f"{what} {named}: choose from {', '.join(allowed)}")
        return chosen

    return parse


def positive(kind: type) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return parse


def add_options(p: argparse.ArgumentParser) -> None:
    """Where rows go and how the machine is set up; ``settle`` does as they say."""
    add = p.add_argument
    add("--json", type=Path, metavar="FILE", help="add the rows to FILE; in a folder: to a file named by device")
    add("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's)")
    add("--pages", choices=("reused", "fresh"), default="reused", help="CPU: where blocks of 16 MiB and more come from")
    add("--commit", metavar="HASH", help="the commit to write in the rows, where the checkout has no .git")
    add_dry(p)


def add_dry(p: argparse.ArgumentParser) -> None:
    """Add the option of a run that measures nothing."""
    p.add_argument(
        "--dry",
        action="store_true",
        help="go through all of a GPU's steps on a CPU, with few items and a driver that launches nothing; no results",
    )


def choose_device(args: argparse.Namespace) -> None:
    """Set ``device``, and a ``dtype`` where none was asked for; with ``--dry`` a device that is not there."""
    if args.dry:
        no_gpu.install()
        no_gpu.pretend()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":  # a backward runs on the stream of its forward, and the default one can't be captured
        torch.cuda.set_stream(torch.cuda.Stream())
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


def settle(args: argparse.Namespace) -> None:
    """Set ``device``, a ``dtype`` where none was asked for, the threads, and where memory comes from."""
    choose_device(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.pages = measure.settle_heap(args.pages) if args.device == "cpu" else None


def measure_shapes(
    args: argparse.Namespace,
    rows_of: Callable[[shapes.Shape, argparse.Namespace], list[dict]],
    table: Callable[[list[dict]], str],
) -> int:
    """Measure shape by shape, keep the rows as they come, print their table; return the exit status.

    Args:
        args: parsed arguments with ``shapes``, ``dtype`` and those of ``add_options``.
        rows_of: measures one shape; raises WrongResult before anything wrong is timed.
        table: makes text of all rows.
    """
    settle(args)
    where = environment(args.device, args.commit) | {"pages": args.pages}
    try:
        file = rows_file(args.json, where)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, {args.dtype}")
    rows: list[dict] = []
    status = 0
    try:
        for name in args.shapes:
            rows += [where | row for row in rows_of(shapes.SHAPES[name], args)]
            if file:
                write_rows(file, rows)
    except WrongResult as error:
        print(f"error: wrong result, nothing more is timed: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped; what was measured so far:", file=sys.stderr)
        status = 130
    print(table(rows))
    return status
