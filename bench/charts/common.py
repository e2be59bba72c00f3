# SPDX-License-Identifier: Apache-2.0
"""The base of all tables and charts: rows by machine, units, Markdown, and one look in light and dark."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

SLOWER = "slower"

# -- rows -------------------------------------------------------------------------------------------------------------


def machines(rows: list[dict], *more: str) -> list[list[dict]]:
    """Split rows by machine, versions, memory and dtype, and by the keys in ``more``; GPUs come first."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        gpu = row["device_kind"] == "cuda"
        versions = (row["torch"], row["triton"], row["driver"]) if gpu else (row["torch"], "", "")
        key = (not gpu, row["device"], *versions, row["threads"], row["pages"] or "", row["dtype"])
        found.setdefault((*key, *(row[name] for name in more)), []).append(row)
    return [found[key] for key in sorted(found)]


def distinct(rows: list[dict], *keys: str) -> list[Any]:
    """Return the values of a key, or tuples of several, each once, in order."""
    return list(dict.fromkeys(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys) for row in rows))


def find(rows: list[dict], **values: object) -> dict | None:
    """Return the one row with these values, or None."""
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)


def machine(row: dict) -> str:
    """Name the device of a row and what ran on it."""
    if row["device_kind"] == "cuda":
        return f"{row['device']}, torch {row['torch']}, Triton {row['triton']}, {row['dtype']}"
    return f"{row['device']}, {row['threads']} of {row['cpus']} cores, torch {row['torch']}, {row['dtype']}"


def short_machine(row: dict) -> str:
    """Name the device of a row, and what ran on it, in a few words."""
    threads = "" if row["device_kind"] == "cuda" else f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    device = row["device"].replace("(R)", "").replace("Processor", "").strip()
    return f"{device}{threads}, torch {row['torch'].partition('+')[0]}, {row['dtype']}"


def dates(rows: list[dict]) -> str:
    """Return the day of the rows, or the first and the last."""
    days = sorted({row["date"][:10] for row in rows})
    return " to ".join(dict.fromkeys((days[0], days[-1])))


def commits(rows: list[dict]) -> str:
    """Name the commits of rows."""
    found = sorted({(row["commit"] or "unknown")[:9] + (" (changed)" if row["dirty"] else "") for row in rows})
    *most, last = found
    return f"Commits {', '.join(most)} and {last}" if most else f"Commit {last}"


def conditions(rows: list[dict]) -> str:
    """Say which commits the rows are of, where memory came from, and how far samples of one row differ."""
    said = [commits(rows)]
    if pages := distinct([row for row in rows if row.get("pages")], "pages"):
        said.append(f"{' and '.join(pages)} pages")
    if rows[0]["device_kind"] == "cuda":
        said.append(f"driver {rows[0]['driver']}, CUDA {rows[0]['cuda']}")
    if spreads := [row["p80_us"] / row["p20_us"] for row in rows if row.get("p20_us")]:
        said.append(f"in the median row the 80th percentile is {median(spreads):.2f} times the 20th")
    return "; ".join(said) + "."


# -- text -------------------------------------------------------------------------------------------------------------


def microseconds(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g} s"
    return f"{value / 1e3:.3g} ms" if value >= 1000 else f"{value:.3g} µs"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.0f} MiB"


def per_cent_less(ratio: float) -> str:
    """Return a ratio to something as per cent less than it, marked where it is more."""
    share = 100 * (1 - ratio)
    return f"**{-share:.0f} % more**" if round(share) < 0 else f"{abs(share):.0f} %"


def change(before: float, after: float) -> str:
    """Return bytes before and after, marked where they become more."""
    text = f"{mebibytes(before)} → {mebibytes(after)}"
    return f"**{text}, more**" if after > 1.005 * before else text


def speedup(ratio: float | None) -> str:
    """Return how many times as fast, marked where it is slower; an empty cell for None."""
    return "" if ratio is None else _marked(ratio, round(ratio, 2) < 1)


def multiple(ratio: float | None) -> str:
    """Return a time as a multiple of a competitor's, marked where it is longer; an empty cell for None."""
    return "" if ratio is None else _marked(ratio, round(ratio, 2) > 1)


def _marked(ratio: float, loses: bool) -> str:
    return f"**{ratio:.2f}×, {SLOWER}**" if loses else f"{ratio:.2f}×"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def span(values: Sequence[float]) -> str:
    """Return the geometric mean of speed-ups, their range, and how many of them are none; of one value that alone."""
    mean = speedup(geometric_mean(values))
    if len(values) == 1:
        return mean
    lost = sum(SLOWER in speedup(value) for value in values)
    counted = f"; slower in {lost} of {len(values)}" if lost else ""
    return f"{mean} ({min(values):.2f} to {max(values):.2f}×{counted})"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a table in Markdown, of which the first ``words`` columns are words and the others numbers.

    A column of numbers that is empty in every line is left out.
    """
    cells = [list(line) for line in lines]
    kept = [place for place in range(len(head)) if place < words or any(line[place] for line in cells)]
    rule = ["---" if place < words else "---:" for place in kept]
    text = [[head[place] for place in kept], rule, *([line[place] for place in kept] for line in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


def section(
    title: str, rows: list[dict], head: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1, where: str = ""
) -> list[str]:
    """Return a heading with machine and date (``where`` is added to them), the conditions, and a table; nothing of no
    lines."""
    cells = list(lines)
    if not cells:
        return []
    table = markdown_table(head, cells, words)
    return [f"### {title}: {machine(rows[0])}{where}, {dates(rows)}\n\n{conditions(rows)}\n\n{table}"]


def columns(cells: list[list[str]]) -> str:
    """Return lines of cells as text for a terminal."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in cells)


# -- charts -----------------------------------------------------------------------------------------------------------

THEMES = {
    "light": {"paper": "white", "ink": "#1f2328", "faint": "#d1d9e0", "ours": "#0b6e99", "theirs": "#8c959f",
              "other": "#5fb7d9", "third": "#b08968", "ideal": "#c8553d"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#3d444d", "ours": "#58b5e1", "theirs": "#8b949e",
             "other": "#2f7fa6", "third": "#c9a27e", "ideal": "#f0883e"},
}  # fmt: skip
WIDTH = 8.6  # inches; a page shows about 860 pixels, so that a point is a pixel and a third
Draw = Callable[[list[dict], dict[str, str]], Any]  # rows and the colours of a theme → a figure


def digest(rows: list[dict]) -> str:
    """Return what tells whether a chart is of these rows."""
    return f"rows {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"


def draw(make: Draw, rows: list[dict], file: Path, theme: str = "light") -> None:
    """Draw a chart into a file whose suffix says the format; an .svg names its rows, and is the same bytes for them.

    Raises:
        ValueError: there is nothing in the rows that the chart shows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = THEMES[theme]
    style = {
        "figure.facecolor": colours["paper"], "axes.facecolor": colours["paper"], "savefig.facecolor": colours["paper"],
        "text.color": colours["ink"], "axes.labelcolor": colours["ink"], "axes.edgecolor": colours["ink"],
        "xtick.color": colours["ink"], "ytick.color": colours["ink"], "axes.titlecolor": colours["ink"],
        "font.size": 9.5, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "stoptome",
        "figure.constrained_layout.use": True,
    }  # fmt: skip
    with plt.rc_context(style):
        figure = make(rows, colours)
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Description": digest(rows)} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=160, metadata=metadata)
        plt.close(figure)


def panels(lines: int, across: int, height: float, **options: Any) -> tuple[Any, Any]:
    """Make a figure of ``lines × across`` panels, each line ``height`` inches; return it and its axes.

    Raises:
        ValueError: there are none.
    """
    from matplotlib import pyplot as plt

    if not lines:
        raise ValueError("there is nothing to draw in these rows")
    return plt.subplots(lines, across, figsize=(WIDTH, height * lines), squeeze=False, **options)


def legend(figure: Any, axes: Any, columns: int) -> None:
    """Put one legend above a figure, of whatever any of its panels shows; hide panels that show nothing."""
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
        axis.set_visible(axis.has_data())
    figure.legend(handles.values(), handles, loc="outside upper left", ncol=columns)


def title(axis: Any, text: str, rows: list[dict], several: bool) -> None:
    """Write a title over a panel, with the machine of its rows where there are several."""
    axis.set_title(f"{short_machine(rows[0])}\n{text}" if several else text)


def caption(figure: Any, lines: Sequence[str]) -> None:
    """Write under a figure where its rows are from, once each."""
    figure.supxlabel("\n".join(dict.fromkeys(lines)), size=8)


def label(axis: Any, text: str, at: tuple[float, float], shift: tuple[float, float], **options: Any) -> None:
    """Write a value ``shift`` points away from where it belongs."""
    axis.annotate(text, at, shift, textcoords="offset points", size=8.5, **options)
