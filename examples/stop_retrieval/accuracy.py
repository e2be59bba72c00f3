#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure what token merging costs in accuracy, and what it gives: R@1, throughput and memory on the synthetic set.

For each seed a small STOP learns the synthetic videos without merging. Then, at every setting: merging put into it as
it is (inference only), and trained a little further with it (training). Each against fewer tokens without looking for
similar ones: as many dropped at random, or pooled with their neighbour. Everything is done by the command
line of main.py on mp4 files; every figure of a table is a row of the JSON file. Losses are paired: each is against the
same seed's model at r = 0 on the same videos, and told with a 95 % interval of their mean over seeds (Student's t).

python accuracy.py                       six seeds, an hour on two cores; goes on where it was stopped
python accuracy.py --quick               one seed, a few settings, under three minutes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import stoptome_kernels as stk
import torch

from retrieval import loader, lock, model, options, recipes, results, run, side_by_side, synthetic
from retrieval.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from charts import accuracy as page  # noqa: E402
from harness import cli, measure  # noqa: E402
from harness.baselines import matching  # noqa: E402
from harness.intervals import loss_columns  # noqa: E402
from harness.memory import memory  # noqa: E402
from harness.rows import environment, rows_file  # noqa: E402
from harness.workloads import Side  # noqa: E402

SETTINGS: dict[str, stk.ToMeConfig] = {
    "r=0": stk.ToMeConfig(0),
    "r=2": stk.ToMeConfig(2),
    "r=4": stk.ToMeConfig(4),
    "r=8": stk.ToMeConfig(8),
    "clips": recipes.CLIPS,
}
BY = {name: make for name, make in matching.METHODS.items() if name != matching.PAIRS}
WHEN = ("inference", "training")
FIGURES = ("r1", "r5", "r10", "median_rank", "mean_rank")
SEEDS = 6


@dataclass(frozen=True)
class Case:
    """One line of the study: a setting, whether the model was trained with it, and how tokens are chosen."""

    setting: str
    when: str
    by: str

    @property
    def config(self) -> stk.ToMeConfig:
        config = SETTINGS[self.setting]
        return stk.ToMeConfig(**vars(config) | {"prop_attn": self.by != matching.SIZES_OFF})

    @property
    def name(self) -> str:
        return "-".join((self.setting, self.when, self.by)).replace(", ", "-").replace(" ", "-").replace("=", "")


def cases(quick: bool, whens: Sequence[str] = WHEN) -> Iterator[Case]:
    """All of the study, or what is asked for of it; quick: r = 0 and 4."""
    for when in whens:
        for setting in ("r=0", "r=4") if quick else SETTINGS:
            # without merging there is nothing to choose
            for by in ("merge",) if setting == "r=0" or (quick and when == "training") else BY:
                yield Case(setting, when, by)


def flags(config: stk.ToMeConfig) -> list[str]:
    """Token merging as the command line has it."""
    dashed = {name: "-".join(map(str, getattr(config, name))) for name in
              ("merge_layers", "merge_frame_nums", "merge_token_proportions")}  # fmt: skip
    given = [part for name, value in dashed.items() if value for part in (f"--{name}", value)]
    given += ["--tome_r", str(config.tome_r), "--tome_prop_attn", str(int(config.prop_attn))]
    return [*given, "--frame_pos", str(config.frame_pos)]


class Study:
    """The runs of a study, each in a folder of its own; one that is done is not run again."""

    def __init__(self, work: Path, quick: bool):
        self.work, self.quick = work, quick
        self.recipe = recipes.STUDY["quick" if quick else "full"]
        paths = synthetic.write(
            work / "videos", train=self.recipe["train"], val=self.recipe["val"], processes=2, **recipes.VIDEOS
        )  # fmt: skip
        self.data = [part for name, path in paths._asdict().items() for part in (f"--{name}", path)]

    def base(self, seed: int) -> Path:
        """The folder of the model that learnt without merging."""
        self._run(f"{seed}/base", seed, ["--do_train", *_flags(self.recipe["base"])])
        return self.work / f"{seed}/base"

    def result(self, case: Case, seed: int) -> dict:
        """R@1 and its kin, text to video."""
        begin = ["--init_model", os.fspath(self.base(seed) / "ckpt.pth.tar"), *flags(case.config)]
        if case.when == "inference":
            argv = ["--do_eval", *begin]
        else:
            argv = ["--do_train", *begin, *_flags(self.recipe["tune"])]
        with matching.matching(BY[case.by](seed)):
            return self._run(f"{seed}/{case.name}", seed, argv)["text_to_video"]

    def _run(self, name: str, seed: int, argv: list[str]) -> dict:
        out, done = self.work / name, self.work / name / "done"
        argv = [*argv, *self.data, *_flags(recipes.SETTING), "--seed", str(seed), "--output_dir", os.fspath(out)]
        made_by = json.dumps([argv, recipes.MODEL, recipes.POSITIONS])  # by another recipe is not done
        found = _results(out)
        if found is None or not done.exists() or done.read_bytes() != made_by.encode():
            shutil.rmtree(out, ignore_errors=True)
            begun = time.perf_counter()
            if code := run.main(argv):
                raise KeyboardInterrupt if code == 130 else UsageError(f"this failed: main.py {' '.join(argv)}")
            print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
            done.write_text(made_by)
            found = _results(out)
        assert found is not None
        return found


def _results(out: Path) -> dict[str, Any] | None:
    """Return what a run has measured last; None: nothing yet, or its file is damaged."""
    try:
        found = results.read(out)
    except UsageError:
        return None
    return found[-1] if found else None


def of_seed(work: Path, quick: bool, lines: Sequence[Case], seed: int) -> list[dict]:
    """Return the results of all cases with one seed."""
    torch.set_num_threads(1)
    with loader.sharing_frames():
        study = Study(work, quick)
        return [study.result(case, seed) for case in lines]


def of_seeds(work: Path, quick: bool, lines: Sequence[Case], seeds: Sequence[int], processes: int) -> list[list[dict]]:
    """Return the results of all cases, seed by seed. Seeds run side by side in processes of one thread: these models
    are so small that two threads take as long as one."""
    each = partial(of_seed, work, quick, lines)
    Study(work, quick)  # the videos, before anybody needs them
    if processes == 1:
        threads = torch.get_num_threads()
        try:
            return [each(seed) for seed in seeds]
        finally:
            torch.set_num_threads(threads)
    return side_by_side.call([partial(each, seed) for seed in seeds], processes)


def _flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def costs(settings: list[str], device: str, seconds: float, videos: int) -> dict[str, dict[str, Any]]:
    """Time and memory of the visual tower at each setting, in alternating runs, with random weights."""
    given = options.complete(options.read(["--output_dir", "", *_flags(recipes.SETTING), "--datatype", "synthetic"]))
    sides = {}
    for setting in settings:
        torch.manual_seed(0)
        tower = model.build(given, SETTINGS[setting])[0].to(device).eval()
        size = tower.clip.config.image_size
        pixels = torch.randint(0, 256, (videos, given.max_frames, 3, size, size), dtype=torch.uint8, device=device)
        mask = torch.ones(videos, given.max_frames, dtype=torch.bool, device=device)

        def call(tower=tower, pixels=pixels, mask=mask) -> torch.Tensor:
            return tower.encode_video(pixels, mask)

        used = tuple(tower.clip.visual.parameters())
        sides[setting] = Side("package", setting, call, used, tower.clip.visual.tome.schedule)
    found: dict[str, dict[str, Any]] = {name: {} for name in sides}
    for direction in WHEN:
        calls = {name: [side.run(direction)] for name, side in sides.items()}
        for name, times in measure.measure(calls, device, seconds, set()).items():
            middle = measure.percentile(times["samples"], 0.5)
            found[name][f"{direction}_us"] = middle
            found[name][f"{direction}_videos_per_s"] = videos / middle * 1e6
    for name, side in sides.items():
        for direction in WHEN:
            bytes_used = memory(side, direction, device)
            found[name][f"{direction}_bytes"] = bytes_used["saved_bytes"] or bytes_used["peak_bytes"]
        found[name] |= {
            "speedup_ideal": side.schedule.speedup, "tokens": side.schedule.tokens,
            "items": side.schedule.items, "tokens_in": side.schedule.tokens_in, "batch": videos,
        }  # fmt: skip
    return found


def row(case: Case, found: dict[Case, list[dict]], seeds: list[int], cost: dict, where: dict) -> dict:
    """Return a line of the results file; the cost of the tower is measured, and told, for merging as it is meant."""
    figures = found[case]
    told = {name: [figure[name] for figure in figures] for name in FIGURES}
    control, merged = (found[Case(setting, case.when, "merge")] for setting in ("r=0", case.setting))
    before, after, merging = ([figure["r1"] for figure in each] for each in (control, figures, merged))
    return where | (cost if case.by == "merge" else {}) | told | {
        "pages": "reused", "shape": case.setting, "n": figures[0]["candidates"], "dtype": "float32", "op": "retrieval",
        "direction": case.when, "impl": case.by, "seeds": seeds,
        "r1_mean": statistics.mean(told["r1"]),
        "r1_spread": statistics.stdev(told["r1"]) if len(seeds) > 1 else None,
        **loss_columns(before, after, merging),
        "guide": page.GUIDE.get(case.setting),
    }  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one seed, r = 0 and 4, few steps")
    p.add_argument("--when", choices=WHEN, nargs="+", default=WHEN, help="merging at inference alone, in training too")
    p.add_argument("--seeds", type=int, help=f"models trained (default: {SEEDS}, quick: 1)")
    p.add_argument("--processes", type=int, help="seeds side by side (default: one for each core)")
    p.add_argument("--work", type=Path, default=Path("output/accuracy"), help="folder of videos and runs")
    p.add_argument(
        "--json", type=Path, metavar="PATH", help="add the rows to this file, or to this machine's in a folder"
    )
    p.add_argument("--seconds", type=float, help="of each timing (default: 30, quick: 5)")
    p.add_argument("--threads", type=int, help="of torch on a CPU, for timing; training takes one for each seed")
    p.add_argument("--commit", help="named in the rows, where there is no .git")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.processes is not None and args.processes < 1:
        print(f"error: --processes must be 1 or more, got {args.processes}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seeds = list(range(args.seeds or (1 if args.quick else SEEDS)))
    lines = list(cases(args.quick, args.when))
    cores = 1 if device == "cuda" else os.cpu_count() or 1
    work = args.work / ("quick" if args.quick else "full")
    try:
        where = environment(device, args.commit)
        file = rows_file(args.json, where)
        work.mkdir(parents=True, exist_ok=True)
        alone = lock.hold(work)
        by_seed = of_seeds(work, args.quick, lines, seeds, min(args.processes or cores, len(seeds)))
        used = list(dict.fromkeys(case.setting for case in lines))
        cost = costs(used, device, args.seconds or (5 if args.quick else 30), 16)
    except (ValueError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("note: stopped; the same call goes on after the runs that are done", file=sys.stderr)
        return 130
    if alone is not None:
        alone.release()
    found = dict(zip(lines, map(list, zip(*by_seed, strict=True)), strict=True))
    rows = [row(case, found, seeds, cost[case.setting], where) for case in lines]
    cli.report(rows, file, page.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
