# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md, all tables; and the README's summary, a line for each claim. Nothing in them is typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import accuracy, blocks, common, host, launches, models, operators, stop
from .common import Draw, find

MARKERS = ("<!-- summary:start -->", "<!-- summary:end -->")
IMAGES = Path("docs/images")


class Chart(NamedTuple):
    """A chart: its name, what it shows in words, and how it is drawn."""

    name: str
    shows: str
    draw: Draw


class Kind(NamedTuple):
    """One kind of rows: the folder they are in, what makes them, and what is made of them."""

    folder: str  # below bench/results
    command: str
    tables: Callable[[list[dict]], list[str]]
    charts: tuple[Chart, ...] = ()
    load: Callable[[Iterable[Path]], list[dict]] = common.load


KINDS = {
    "operators": Kind(
        ".", "python bench/merge.py --json bench/results", operators.tables,
        (Chart("operators", "Speed of match and merge over eager PyTorch", operators.chart),),
    ),
    "fused": Kind("fused", "python bench/fused.py --json bench/results/fused", operators.fused_tables),
    "blocks": Kind(
        "blocks", "python bench/blocks.py --json bench/results/blocks", blocks.tables,
        (Chart("blocks", "Time of a transformer block, part by part", blocks.chart),),
    ),
    "models": Kind(
        "models", "python bench/models.py --json bench/results/models", models.tables,
        (Chart("models", "Speed-up of whole vision transformers", models.chart),),
    ),
    "stop": Kind(
        "stop", "python bench/stop.py --json bench/results/stop", stop.tables,
        (Chart("speedup", "Speed-up of STOP's blocks against r", stop.speedup_chart),
         Chart("stop", "Time and memory of STOP's blocks", stop.memory_chart)),
    ),
    "accuracy": Kind(
        "accuracy", "python examples/stop_retrieval/accuracy.py --json bench/results/accuracy", accuracy.tables,
        (Chart("accuracy", "R@1 with merging against R@1 without", accuracy.chart),),
    ),
    "host": Kind("host", "python bench/host.py --json", host.tables),
    "launches": Kind("launches", "python bench/launches.py --json", launches.tables, load=launches.load),
}  # fmt: skip

INTRO = """# Benchmarks

`python bench/plot.py` makes all tables and charts on this page from the rows in `bench/results`; no number is typed,
and a test compares the page with the rows. **slower** marks every row in which this package loses to what it is
compared with. [How the rows are measured](dev/performance.md#how-to-read), and what was tried.
"""

TEXTS = {
    "operators": """## Match and merge

Median time of a call, and how many times as fast it is as the same in eager PyTorch, in `torch.compile` of that, and in
ToMe where it is installed, alternating in one run. Shapes: N items of T tokens and D channels. The last table divides
the time of a merge by that of copying its result: 1.00 is the speed of memory.""",
    "fused": """## merge_norm and attention

`merge_norm` adds, merges and normalises; it is compared with the add and the LayerNorm of a block that merges nothing.
`attention` takes sizes and a prefix of four shared keys; it is compared with `scaled_dot_product_attention` without
either. The first number is the time of what is compared with; the others are multiples of it, so less is better.""",
    "blocks": """## Where a block's time goes

One transformer block without merging, with merging in eager PyTorch and with this package, each part timed by itself.
In the blocks that merge, attention weighs keys by size, and the MLP has fewer tokens; it is the same in both, and timed
once. This is one layer, in which attention still sees all tokens: the next ones have fewer from the start.""",
    "models": """## Vision transformers

Images per second of whole models with random weights (a video of VideoMAE's counts as one image). Speed-up: over the
same model unpatched in the same mode; η: that divided by the ideal speed-up, by FLOPs of patch embedding and blocks.
*Eager merging* is the same merging in eager operations with `scaled_dot_product_attention`.""",
    "stop": """## STOP

ViT-B/32 with DGL prompts. *Upstream* is how STOP's code computes its blocks; *eager* is that with merging in eager
operations. Memory: on a GPU the allocator's peak; on a CPU what training keeps for backward, and in inference the most
that lives at one time. In brackets: what the ToMe guide for STOP promises its users. η: speed-up divided by the ideal
one.""",
    "accuracy": """## Accuracy

**A synthetic set of videos and a small model, not MSR-VTT and CLIP.** R@1 in per cent, text to video. *Lost*: points of
R@1 against r = 0 of the same seed, mean ± deviation over seeds; with merging in training, against a model trained as
long without. *Sizes off*: merging without proportional attention. *Dropped* and *pooled*: as many tokens fewer in every
layer, chosen blindly. Differences smaller than their deviation say nothing. A model this small
gains less time than its FLOPs promise, since most of a call is overhead; STOP's own size is [above](#stop).""",
    "host": """## The host's time

What a call costs before any number is computed: tensors of two items, 9 tokens and 32 channels, one thread, its own CPU
time. *With gradient*: a forward that records its graph; *backward*: that alone. With Triton everything is real but the
driver's launch; torch's own operations run on the CPU.""",
    "launches": """## Launches on a GPU

Counted without a GPU, by Triton's own binder, cache and compiler over a driver that launches nothing. One video or one
image, 12 layers, autocast to bfloat16, compiled for sm_90. *Training*: forward and gradients of all parameters.
*Variants*: kernels that a new process compiles, or reads from Triton's cache. *Other operations*: torch's that run a
kernel on a GPU. Registers, shared memory and occupancy of all kernels: `bench/results/aot`.""",
}
REFERENCE = """## The reference implementation is not meant to be fast

`backend="reference"` is there to be read, to be compared with, and for machines where nothing else runs."""


def rows_of(kind: str, results: Path) -> list[dict]:
    """Return the committed rows of a kind.

    Raises:
        ValueError: there are none, or they are a dry run's, in which nothing was measured.
    """
    folder = results / KINDS[kind].folder
    rows = KINDS[kind].load(sorted(folder.glob("*.json")))
    if not rows:
        raise ValueError(f"no rows in {folder}: run `{KINDS[kind].command}` first")
    if any(row.get("device_kind") == "none" for row in rows):
        raise ValueError(f"rows in {folder} are a dry run's, in which nothing was measured: they are not published")
    return rows


def picture(chart: Chart, folder: str) -> str:
    """Return a chart as Markdown that follows the reader's light or dark page."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{chart.name}-dark.svg">'
        f'<img alt="{chart.shows}" src="{folder}/{chart.name}-light.svg"></picture>'
    )


def benchmarks(rows: dict[str, list[dict]]) -> str:
    """Return the text of docs/benchmarks.md."""
    parts = [INTRO.rstrip(), f"GPU: {gpu_state(rows)}"]
    for name, text in TEXTS.items():
        parts += [text, *(picture(chart, "images") for chart in KINDS[name].charts), *KINDS[name].tables(rows[name])]
    parts += [REFERENCE, *operators.reference_tables(rows["operators"])]
    return "\n\n".join(parts) + "\n"


# -- the README's summary ---------------------------------------------------------------------------------------------


def gpu_state(rows: dict[str, list[dict]]) -> str:
    """Say which GPUs were measured, or that none was."""
    names = dict.fromkeys(row["device"] for found in rows.values() for row in found if row.get("device_kind") == "cuda")
    if names:
        return f"measured on {' and '.join(names)}"
    return (
        "**not measured yet**; the kernels compile for sm_80, sm_90 and sm_100 and pass their tests in Triton's "
        "interpreter"
    )


def summary(rows: dict[str, list[dict]]) -> str:
    """Return the README's chart and table: one line for each claim and machine."""
    lines = [[claim, result, where] for claim, result, where in _claims(rows)]
    lines.append(["GPU", gpu_state(rows), ""])
    table = common.markdown_table(["", "geometric mean (lowest to highest)", "measured on"], lines, words=3)
    charts = [picture(chart, IMAGES.as_posix()) for kind in ("stop", "blocks") for chart in KINDS[kind].charts[:1]]
    caption = (
        "*Above: twelve blocks. Below: one layer, in which attention still sees all tokens; match and merge are the "
        "thin bands between attention and MLP.*"
    )
    return "\n\n".join([table, *charts, caption])


def _claims(rows: dict[str, list[dict]]) -> Iterator[tuple[str, str, str]]:
    for own in common.machines(rows["operators"]):
        yield from _operator_claims(own)
    for own in common.machines(rows["fused"]):
        for op, against in (
            ("merge_norm", "add + LayerNorm that merge nothing"),
            ("attention", "attention without sizes"),
        ):
            ratios = [
                1 / row["times_base"] for row in own
                if row["op"] == op and row["impl"] == op and row["direction"] == "forward"
            ]  # fmt: skip
            if ratios:
                yield f"`{op}`, over {against}", common.span(ratios), common.short_machine(own[0])
    for own in common.machines(rows["models"]):
        found = [row for row in own if row["direction"] == "inference"]
        gains = [row["speedup"] for row in found if row["impl"] == "package"]
        eager = [ratio for _, ratio in models.over_eager(found)]
        ideal = [row["speedup_ideal"] for row in found if row["impl"] == "package"]
        yield (
            f"{len(common.distinct(found, 'shape'))} whole vision transformers, plain and compiled, over unpatched",
            f"{common.span(gains)}; ideal {common.geometric_mean(ideal):.2f}×", common.short_machine(own[0]),
        )  # fmt: skip
        yield "the same, over merging in eager PyTorch", common.span(eager), common.short_machine(own[0])
    for own in common.machines(rows["stop"], "n"):
        yield from _stop_claims(own)
    for own in common.machines(rows["accuracy"]):
        row = find(own, shape="r=4", direction="inference", impl="merge")
        if row:
            what = "R@1 lost by r = 4 without training (small model, synthetic videos)"
            yield what, f"{accuracy.lost(row)} points", common.short_machine(own[0])


def _operator_claims(rows: list[dict]) -> Iterator[tuple[str, str, str]]:
    for impl, name in (("eager", "eager PyTorch"), ("compile", "`torch.compile` of that")):
        texts, shapes = [], 0
        for direction, words in (("forward", "forward"), ("forward+backward", "with backward")):
            own = [row for row in rows if row["op"] == "match+merge" and row["direction"] == direction]
            found = [operators.over(own, impl, shape=shape) for shape in common.distinct(own, "shape")]
            ratios = [ratio for ratio in found if ratio]
            shapes = max(shapes, len(ratios))
            if ratios:
                texts.append(f"{common.span(ratios)} {words}")
        if texts:
            yield f"`match` + `merge`, over {name}, {shapes} shapes", "; ".join(texts), common.short_machine(rows[0])


def _stop_claims(rows: list[dict]) -> Iterator[tuple[str, str, str]]:
    where = f"{common.short_machine(rows[0])}, {rows[0]['n']} videos"
    texts = []
    for direction in stop.DIRECTIONS:
        row = find(rows, op="blocks", direction=direction, shape="r=4", impl="package")
        if row and row["speedup_vs_upstream"]:
            texts.append(f"{row['speedup_vs_upstream']:.2f}× {direction}")
            if direction == "training":
                texts.append(f"{common.less(row['memory_vs_r0'])} less memory than r = 0")
    if texts:
        yield "STOP's blocks at r = 4, over upstream without merging", ", ".join(texts), where
