#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make charts and tables from rows of results; nothing in them is typed.

python bench/plot.py                    all charts (docs/images), docs/benchmarks.md, parts of README and docs/models.md
python bench/plot.py stop               the charts of one kind of rows alone, and both pages
python bench/plot.py --check            write nothing; exit status 1 if a page is not what the rows give
python bench/plot.py stop FILE.json --chart stop.png --table stop.md    of one kind of rows, from files of yours
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

from charts import common, fidelity, page
from harness import cli
from harness.rows import ROOT

README, BENCHMARKS, MODELS = Path("README.md"), Path("docs/benchmarks.md"), Path("docs/models.md")


def replace_between(text: str, block: str, file: Path, markers: tuple[str, str] = page.MARKERS) -> str:
    """Return ``text`` with ``block`` between the markers.

    Raises:
        ValueError: the markers are not in the text, once each and in order.
    """
    start, end = markers
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{file} must hold the markers {start} and {end} once each, in this order")
    return text[: text.index(start) + len(start)] + f"\n\n{block}\n\n" + text[text.index(end) :]


def pages(root: Path, rows: dict[str, list[dict]]) -> dict[Path, str]:
    """Return the pages below ``root`` that hold numbers, as the rows give them."""
    readme, models = root / README, root / MODELS
    return {
        readme: replace_between(readme.read_text(), page.summary(rows), README),
        models: replace_between(models.read_text(), fidelity.advice(rows["fidelity"]), MODELS, page.ADVICE),
        root / BENCHMARKS: page.benchmarks(rows),
    }


def publish(root: Path, kinds: Collection[str], check: bool) -> int:
    """Write, or check, the charts of some kinds below ``root``, and its pages, from the rows below it; return the exit
    status."""
    rows = {kind: page.rows_of(kind, root / "bench/results") for kind in page.KINDS}
    wanted = pages(root, rows)
    charts = [
        (chart, rows[kind], theme, root / page.IMAGES / f"{chart.name}-{theme}.svg")
        for kind in kinds for chart in page.KINDS[kind].charts for theme in common.THEMES
    ]  # fmt: skip
    if check:
        wrong = [file for file, text in wanted.items() if not file.exists() or file.read_text() != text]
        # charts differ from one matplotlib to the next, but each names the rows that it is of
        wrong += [file for _, own, _, file in charts if not file.exists() or common.digest(own) not in file.read_text()]
        for file in wrong:
            said = f"{file.relative_to(root)} is not what the rows give: run `python bench/plot.py`"
            print(f"error: {said}", file=sys.stderr)
        return int(bool(wrong))
    for chart, own, theme, file in charts:
        common.draw(chart.draw, own, file, theme)
        print(f"chart: {file.relative_to(root)}")
    for file, text in wanted.items():
        file.write_text(text)
        print(f"page: {file.relative_to(root)}")
    return 0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.bare_parser(__doc__)
    add = p.add_argument
    add("kind", choices=(*page.KINDS, "all"), nargs="?", default="all", help="one kind of rows (default: all)")
    add("files", type=Path, nargs="*", metavar="FILE.json", help="rows of that kind (default: those in bench/results)")
    add("--chart", type=Path, metavar="FILE", help="draw its chart into FILE (.png, .svg, .pdf)")
    add("--table", type=Path, metavar="FILE", help="write its tables to FILE in Markdown")
    add("--check", action="store_true", help="only compare the pages with the rows")
    args = p.parse_args(argv)
    if args.kind == "all":
        if args.files or args.chart or args.table:
            p.error("arguments FILE.json, --chart and --table: say of which kind of rows")
    elif args.check:
        p.error("argument --check: is of all pages: leave the kind out")
    elif args.chart and not page.KINDS[args.kind].charts:
        p.error(f"argument --chart: there is no chart of {args.kind}")
    return args


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    args = arguments(argv)
    try:
        if not (args.files or args.chart or args.table):
            return publish(root, page.KINDS if args.kind == "all" else [args.kind], args.check)
        kind = page.KINDS[args.kind]
        rows = page.read(args.kind, args.files) if args.files else page.rows_of(args.kind, root / "bench/results")
        sections = kind.tables(rows)
        if not sections:
            raise ValueError(f"there is nothing to show in {', '.join(map(str, args.files)) or args.kind}")
        text = "\n\n".join(sections) + "\n"
        if args.chart:
            common.draw(kind.charts[0].draw, rows, args.chart)
            print(f"chart: {args.chart}")
        if args.table:
            args.table.write_text(text)
            print(f"table: {args.table}")
        elif not args.chart:
            print(text, end="")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
