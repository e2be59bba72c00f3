# SPDX-License-Identifier: Apache-2.0
"""The command line of the benchmarks: options that they share, and the main of them all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from . import measure, no_gpu
from .rows import environment, rows_file, write_rows
from .shapes import SHAPES, Shape
from .verify import WrongResult
from .workloads import DIRECTIONS

DTYPES = ("float32", "bfloat16", "float16")
HEADING = "{device}, {threads} threads, torch {torch}, {dtype}"

# -- options ----------------------------------------------------------------------------------------------------------


def one_of(what: str, allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return an argparse type: a comma-separated list of the allowed values."""

    def parse(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",") if part.strip()]
        wrong = [part for part in chosen if part not in allowed]
        if wrong or not chosen:
            named = ", ".join(wrong) or "is empty"
            raise argparse.ArgumentTypeError(f"{what} {named}: choose from {', '.join(allowed)}")
        return chosen

    return parse


def positive(kind: type) -> Callable[[str], int | float]:
    """Return an argparse type: a positive int or float."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return parse


def bare_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that say where rows go and how the machine is set up: see ``configure``."""
    p = bare_parser(description)
    add = p.add_argument
    add("--json", type=Path, metavar="FILE", help="add the rows to FILE; in a folder: to a file named by device")
    add("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's)")
    add("--pages", choices=("reused", "fresh"), default="reused", help="CPU: where blocks of 16 MiB and more come from")
    add_commit(p)
    add_dry(p)
    return p


def add_commit(p: argparse.ArgumentParser) -> None:
    """Add the option that names the commit."""
    p.add_argument("--commit", metavar="HASH", help="the commit to write in the rows, where the checkout has no .git")


def add_dry(p: argparse.ArgumentParser) -> None:
    """Add the option of a run that measures nothing."""
    p.add_argument(
        "--dry",
        action="store_true",
        help="go through all of a GPU's steps on a CPU, with few items and a driver that launches nothing; no results",
    )


def add_dtype(p: argparse.ArgumentParser, choices: Sequence[str] = DTYPES, cast: str = "") -> None:
    """Add the option of a dtype."""
    p.add_argument("--dtype", choices=choices, help=f"default: bfloat16{cast} on a GPU, float32 on a CPU")


def add_seconds(p: argparse.ArgumentParser, default: float, each: str) -> None:
    """Add the option of the time to measure for."""
    said = f"for {each} (default: {default:g})"
    p.add_argument("--seconds", type=positive(float), default=default, metavar="S", help=said)


def add_models(p: argparse.ArgumentParser, directions: Sequence[str], seconds: float, each: str) -> None:
    """Add the options of benchmarks of whole models."""
    p.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(directions))
    p.add_argument("--layers", type=positive(int), default=12, metavar="N", help="blocks (default: 12)")
    add_dtype(p, DTYPES[:2], " (autocast)")
    add_seconds(p, seconds, each)


# -- the machine ------------------------------------------------------------------------------------------------------


def choose_device(args: argparse.Namespace) -> None:
    """Set ``device``, and a ``dtype`` where none was asked for; with ``--dry`` a device that is not there."""
    if args.dry:
        no_gpu.install()
        no_gpu.pretend()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":  # a backward runs on the stream of its forward, and the default one can't be captured
        torch.cuda.set_stream(torch.cuda.Stream())
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


def configure(args: argparse.Namespace) -> argparse.Namespace:
    """Choose the device, the threads, and where memory comes from, as the options of ``parser`` say."""
    choose_device(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.pages = measure.configure_heap(args.pages) if args.device == "cpu" else None
    return args


def report(rows: list[dict], file: Path | None, table: Callable[[list[dict]], str] | None) -> None:
    """Print a table of rows, unless there is no function for it, and add them to their file, if there is one."""
    if table:
        print(table(rows))
    if file:
        write_rows(file, rows)
        print(f"rows: {file}")


# -- main -------------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A reason to end a run: what to say, and the exit status."""

    def __init__(self, text: str, status: int = 1):
        super().__init__(text)
        self.status = status


@contextmanager
def measuring(what: str, smaller: str) -> Iterator[None]:
    """Name what takes too much memory, and the option that makes it smaller."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Failure(f"not enough GPU memory for {what}: use a smaller {smaller}") from error


def main(
    args: argparse.Namespace,
    batches: Generator[list[dict], None, None],
    table: Callable[[list[dict]], str],
    heading: str = HEADING,
    *,
    live: bool = False,
    suffix: str = "",
    after: Callable[[list[dict]], None] = lambda rows: None,
) -> int:
    """Measure, write the rows as they come, print their table; return the exit status.

    Args:
        args: parsed and configured, with what ``parser`` adds.
        batches: gives the rows of one measurement after the other; raises WrongResult before anything wrong is timed.
        table: makes text of rows.
        heading: printed first, with the columns of ``environment`` and the arguments in braces.
        live: print the table of each batch as it comes, in place of one of all.
        suffix: of the file's name, where ``--json`` is a folder.
        after: what else to do with the rows.
    """
    where = environment(args.device, args.commit) | {"pages": args.pages}
    try:
        file = rows_file(args.json, where, suffix)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(heading.format_map({**vars(args), **where}), flush=True)
    rows: list[dict] = []
    status = 0
    try:
        with closing(batches):  # before the table, so that what it holds is freed
            for batch in batches:
                new = [where | row for row in batch]
                rows += new
                if file and new:
                    write_rows(file, new)
                if live:
                    print(table(new), flush=True)
    except WrongResult as error:
        print(f"error: wrong result, nothing more is timed: {error}", file=sys.stderr)
        status = 1
    except torch.OutOfMemoryError as error:
        print(f"error: not enough GPU memory: {str(error).partition('. ')[0]}", file=sys.stderr)
        status = 1
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        print("stopped" if live else "stopped; what was measured so far:", file=sys.stderr)
        status = 130
    if rows:
        report(rows, file, None if live else table)  # an interrupt may have come while the last were written
        after(rows)
    return status


def main_by_shape(
    argv: list[str] | None,
    description: str | None,
    rows_of: Callable[[Shape, argparse.Namespace], list[dict]],
    table: Callable[[list[dict]], str],
    *,
    allowed: Sequence[str],
    default: Sequence[str],
    seconds: float,
    each: str,
) -> int:
    """Run the main of a benchmark that goes shape by shape.

    Args:
        argv: as ``parser.parse_args`` takes it.
        description: the command's docstring.
        rows_of: measures one shape.
        table: makes text of rows.
        allowed: shapes to choose from.
        default: shapes that are measured if none is named.
        seconds: default of ``--seconds``.
        each: what those seconds are for.
    """
    p = parser(description)
    said = ", ".join(allowed) + ("" if default == allowed else f" (default: {','.join(default)})")
    p.add_argument("--shapes", type=one_of("shape", allowed), default=list(default), metavar="NAME,NAME", help=said)
    add_dtype(p)
    add_seconds(p, seconds, each)
    args = configure(p.parse_args(argv))
    return main(args, (rows_of(SHAPES[name], args) for name in args.shapes), table)
