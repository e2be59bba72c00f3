#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the chart and the tables of the README from the rows in bench/results; nothing in them is typed.

python bench/plot.py                          bench/results/*.json → bench/results/chart.png
python bench/plot.py --readme README.md       and the text between its two bench markers
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from measure import ROOT, read_rows

MARKERS = ("<!-- bench:start -->", "<!-- bench:end -->")
COLOURS = {  # dark enough for white paper; the package's fast backends first and in the strongest
    "triton": "#2a9d5c",
    "native": "#0b6e99",
    "compile": "#7f8fa6",
    "tome": "#b08968",
    "reference": "#c9ced6",
}
SHARES = {"forward": "#0b6e99", "backward": "#8ec3d8"}
SPEEDUP = "match + merge: speed-up over eager PyTorch"
OURS = ("triton", "native", "reference")  # best first
DIRECTIONS = ("forward", "forward+backward")
BOUNDS = (  # like with like: existing memory against existing memory, fresh against fresh
    ("merge, `out=` ÷ `copy_`", "forward, out=", "times_copy_of_result"),
    ("merge ÷ `clone`", "forward", "times_clone_of_result"),
    ("backward ÷ `clone`", "backward", "times_clone_of_result"),
)
Cells = dict[tuple[str, str, str, str], dict]  # (shape, op, direction, impl) -> row


def groups(rows: list[dict]) -> dict[tuple, Cells]:
    """The rows of each machine and dtype."""
    found: dict[tuple, Cells] = {}
    for row in rows:
        pages = row["pages"] or ""
        key = (row["device_kind"] != "cuda", row["device"], row["torch"], row["threads"], pages, row["dtype"])
        found.setdefault(key, {})[row["shape"], row["op"], row["direction"], row["impl"]] = row
    return dict(sorted(found.items()))


def distinct(cells: Cells, place: int) -> list[str]:
    return list(dict.fromkeys(key[place] for key in cells))


def title(row: dict) -> str:
    """Device and conditions in a line."""
    if row["device_kind"] == "cuda":
        where = f"{row['device']}, driver {row['driver']}, CUDA {row['cuda']}, Triton {row['triton']}"
    else:
        where = f"{row['device']}, {row['threads']} of {row['cpus']} cores"
        where += f", {row['pages']} pages" if row["pages"] else ""
    return f"{where}, torch {row['torch']}, {row['dtype']}"


def chart(rows: list[dict], file: Path) -> None:
    """A line of three panels for each machine and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = groups(rows)
    heights = [2 + 0.45 * len(distinct(cells, 0)) for cells in found.values()]  # inches
    figure, axes = plt.subplots(
        len(found), 3, figsize=(13, sum(heights)), squeeze=False, facecolor="white", layout="constrained",
        gridspec_kw={"width_ratios": (3, 3, 2), "height_ratios": heights},
    )  # fmt: skip
    for line, cells in zip(axes, found.values(), strict=True):
        for axis, direction in zip(line, DIRECTIONS, strict=False):
            _speedups(axis, cells, direction)
        _copy_shares(line[2], cells)
        shapes = distinct(cells, 0)
        for axis in line:
            axis.set_yticks(range(len(shapes)), shapes[::-1] if axis is line[0] else [])
            axis.set_ylim(-0.6, len(shapes) - 0.4)
            axis.spines[["top", "right"]].set_visible(False)
        # a title may run over the panel's edge, other text would push the panels apart
        line[0].annotate(SPEEDUP, (0, 1), (0, 5), "axes fraction", textcoords="offset points", size=9)
        line[0].set_title(title(next(iter(cells.values()))), size=11, weight="bold", loc="left", pad=24)
        line[1].set_title("the same with backward", size=9, loc="left")
        line[2].set_title("merge: % of the speed of copy_", size=9, loc="left")
    figure.get_layout_engine().set(hspace=0.08)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _speedups(axis, cells: Cells, direction: str) -> None:
    from matplotlib.ticker import LogLocator

    shapes = distinct(cells, 0)[::-1]
    impls = [name for name in COLOURS if any(key[1:] == ("match+merge", direction, name) for key in cells)]
    for height, shape in enumerate(shapes):
        present = [name for name in impls if (shape, "match+merge", direction, name) in cells]
        thick = min(0.3, 0.84 / max(1, len(present)))
        for place, impl in enumerate(present):
            ratio = cells[shape, "match+merge", direction, impl]["speedup_vs_eager"]
            y = height + ((len(present) - 1) / 2 - place) * thick
            # bars begin at 1: what loses to eager PyTorch points to the left
            axis.barh(y, ratio - 1, thick * 0.92, left=1, color=COLOURS[impl])
            axis.annotate(
                f"{ratio:.1f}×", (ratio, y), (3 if ratio >= 1 else -3, 0), textcoords="offset points", size=7,
                va="center", ha="left" if ratio >= 1 else "right",
            )  # fmt: skip
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.7) / 1.6, max(high, 2) * 1.6)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.axvline(1, color="black", linewidth=1)
    axis.xaxis.set_major_locator(LogLocator(4))
    if direction == "forward":
        _legend(axis, {name: COLOURS[name] for name in impls})


def _legend(axis, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    # under the panel, where no bar can be
    axis.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=2.2, ncol=5, fontsize=8, frameon=False
    )


def _copy_shares(axis, cells: Cells) -> None:
    shapes = distinct(cells, 0)[::-1]
    for place, (direction, colour) in enumerate(SHARES.items()):
        rows = [_ours(cells, shape, direction) for shape in shapes]
        heights = [height + 0.2 - 0.4 * place for height, row in enumerate(rows) if row]
        shares = [100 * row["share_of_copy"] for row in rows if row]
        axis.barh(heights, shares, 0.37, color=colour)
        for y, share in zip(heights, shares, strict=True):
            axis.annotate(f"{share:.0f} %", (share, y), (3, 0), textcoords="offset points", size=7, va="center")
    axis.axvline(100, color="black", linewidth=1)
    axis.set_xlim(0, max(125, axis.get_xlim()[1]))
    _legend(axis, SHARES)


def _ours(cells: Cells, shape: str, direction: str, op: str = "merge") -> dict | None:
    """The row of the package's best backend that was measured."""
    return next((cells[shape, op, direction, name] for name in OURS if (shape, op, direction, name) in cells), None)


def microseconds(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g} s"
    return f"{value / 1e3:.3g} ms" if value >= 1000 else f"{value:.3g} µs"


def table(rows: list[dict]) -> str:
    """A Markdown table for each machine and dtype, with its conditions above it."""
    parts = []
    for cells in groups(rows).values():
        impls = [name for name in COLOURS if name in distinct(cells, 3)]
        graphs = any(row["graph_us"] for row in cells.values())
        head = ["shape", "N × T → T′, D"]
        for what in ("", " + backward"):
            head += [f"eager{what}", *(f"{name}{what}" for name in impls)]
        head += [name for name, _, _ in BOUNDS] + ["in a CUDA graph"] * graphs
        lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
        for shape in distinct(cells, 0):
            lines.append("| " + " | ".join(_line(cells, shape, impls, graphs)) + " |")
        parts.append(f"**{title(next(iter(cells.values())))}** ({origin(list(cells.values()))})\n\n" + "\n".join(lines))
    note = (
        "match + merge of each shape: median time of a call, and in brackets the speed-up over eager PyTorch in the "
        "same run (slower is marked). Last columns: the merge alone against copying its result, both into memory that "
        "is there already, then both into fresh memory, and its backward likewise. Made by "
        "`python bench/plot.py --readme README.md` from the rows in "
        "`bench/results`."
    )
    return "\n\n".join([*parts, note])


def _line(cells: Cells, shape: str, impls: list[str], graphs: bool) -> list[str]:
    any_row = next(row for key, row in cells.items() if key[0] == shape)
    out = any_row["tokens"] - min(any_row["r"], (any_row["tokens"] - any_row["protected"]) // 2)
    line = [shape, f"{any_row['n']} × {any_row['tokens']} → {out}, {any_row['dim']}"]
    for direction in DIRECTIONS:
        for impl in ("eager", *impls):
            row = cells.get((shape, "match+merge", direction, impl))
            text = "" if row is None else microseconds(row["p50_us"])
            if row and impl != "eager":
                ratio = row["speedup_vs_eager"]
                text += f" ({ratio:.2g}×)" if ratio >= 1 else f" (**{ratio:.2g}×, slower**)"
            line.append(text)
    for _, direction, against in BOUNDS:
        row = _ours(cells, shape, direction)
        line.append(f"{row[against]:.2f}" if row else "")
    if graphs:
        theirs, ours = (
            cells.get((shape, "match+merge", "forward", "eager")),
            _ours(cells, shape, "forward", "match+merge"),
        )
        both = theirs and ours and theirs["graph_us"] and ours["graph_us"]
        text = f"{microseconds(theirs['graph_us'])} → {microseconds(ours['graph_us'])}" if both else ""
        line.append(text + (f" ({theirs['graph_us'] / ours['graph_us']:.2g}×)" if both else ""))
    return line


def origin(rows: list[dict]) -> str:
    commits = sorted({(row["commit"] or "no commit")[:9] + (", changed" if row["dirty"] else "") for row in rows})
    dates = sorted({row["date"][:10] for row in rows})
    return f"commit {' and '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def relative(image: Path, page: Path) -> str:
    """The way from a page to an image, as a link has it."""
    return os.path.relpath(image.resolve(), page.resolve().parent).replace(os.sep, "/")


def replace_between(text: str, block: str, file: Path, markers: tuple[str, str] = MARKERS) -> str:
    """``text`` with ``block`` between the markers; ValueError if they are not there, once, in order."""
    start, end = markers
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{file} must hold the markers {start} and {end} once each, in this order")
    return text[: text.index(start) + len(start)] + f"\n\n{block}\n\n" + text[text.index(end) :]


def columns(cells: list[list[str]]) -> str:
    """Lines of cells as text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def parser(doc: str | None, folder: Path, table: bool = True) -> argparse.ArgumentParser:
    """The arguments of a command that makes a chart and a README block from the rows in a folder."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = f"(default: {relative(folder, ROOT / 'here')}/*.json)"
    p.add_argument("files", type=Path, nargs="*", metavar="FILE.json", help=f"rows {default}")
    p.add_argument("--png", type=Path, default=folder / "chart.png", metavar="FILE")
    p.add_argument("--readme", type=Path, metavar="FILE", help="put chart and table between its markers")
    if table:
        p.add_argument("--table", type=Path, metavar="FILE", help="write the table to a file of its own")
    return p


def rows_in(files: list[Path], readme: Path | None) -> list[dict]:
    """Return the rows of files; raise ValueError for those of a dry run that are to go into a README."""
    rows = [row for file in files for row in read_rows(file)]
    if readme and any(row["device_kind"] == "none" for row in rows):
        raise ValueError("these rows are a dry run's, in which nothing was measured: they are not published")
    return rows


def publish(
    args: argparse.Namespace,
    folder: Path,
    none: str,
    markdown: Callable[[list[dict]], str],
    draw: Callable[[list[dict], Path], None],
    image: str,
    markers: tuple[str, str],
    more: Callable[[], str] = str,
) -> int:
    """Draw the chart and write the README block and the table that were asked for; all or nothing of the texts.

    Args:
        args: of :func:`parser`.
        folder: of the rows, where no files are named.
        none: what to say where there are no rows.
        markdown: the table of rows.
        draw: the chart of rows.
        image: what the chart shows.
        markers: of the block in the README.
        more: what follows the table in the README, and only there.

    Returns:
        The exit status.
    """
    try:
        rows = rows_in(args.files or sorted(folder.glob("*.json")), args.readme)
        if not rows:
            raise ValueError(none)
        table, text = markdown(rows), ""
        if args.readme:
            parts = [f"![{image}]({relative(args.png, args.readme)})", table, more()]
            block = "\n\n".join(part for part in parts if part)
            text = replace_between(args.readme.read_text(), block, args.readme, markers)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(rows, args.png)
    print(f"chart: {args.png}")
    for file, content in ((args.readme, text), (getattr(args, "table", None), table + "\n")):
        if file:
            file.write_text(content)
            print(f"table: {file}")
    return 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", type=Path, nargs="*", metavar="FILE.json", help="rows (default: bench/results/*.json)")
    p.add_argument("--png", type=Path, default=ROOT / "bench/results/chart.png", metavar="FILE", help="where to draw")
    p.add_argument("--readme", type=Path, metavar="FILE", help="put chart and tables between its bench markers")
    p.add_argument("--table", type=Path, metavar="FILE", help="write the tables to a file of their own")
    args = p.parse_args(argv)
    try:
        files = args.files or sorted((ROOT / "bench/results").glob("*.json"))
        if not files:
            raise ValueError("no rows in bench/results: run `python bench/merge.py --json bench/results` first")
        rows = rows_in(files, args.readme)
        if not rows:
            raise ValueError(f"no rows in {', '.join(map(str, files))}")
        text = args.readme.read_text() if args.readme else ""
        if args.readme:
            image = relative(args.png, args.readme)
            block = f"![Speed-up over eager PyTorch, and share of the copy bandwidth]({image})\n\n{table(rows)}"
            text = replace_between(text, block, args.readme)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chart(rows, args.png)
    print(f"chart: {args.png}")
    for file, content in ((args.readme, text), (args.table, table(rows) + "\n")):
        if file:
            file.write_text(content)
            print(f"tables: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
