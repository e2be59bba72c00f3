# SPDX-License-Identifier: Apache-2.0
"""Several settings of token merging on one checkpoint and one data set: their cost, their gain, and which to take."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import stoptome_kernels as stk
import torch
from stoptome_kernels.timing import measure_alternately, peak_cuda_bytes
from stoptome_kernels.tome.table import table

from . import atomic, metrics, options, results, sealed
from .errors import UsageError
from .evaluate import Evaluation
from .model import Retrieval, build
from .parallel import Processes
from .terminal import counted

log = logging.getLogger("stop_retrieval")
TABLE, CHART = "sweep.json", "sweep.png"
SECONDS = 20.0  # of timing, all settings together


@dataclass(frozen=True)
class Row:
    """The cost and the gain of one setting.

    Attributes:
        setting: ``r = 4``, or the name of a preset.
        tokens, items: of a video after the last layer.
        ideal: speed-up that the blocks' FLOPs promise.
        videos_per_second: that the visual tower encodes, frames on the device, by the median of calls.
        speedup: that over the first row's.
        peak_bytes: most that encoding a batch holds beyond weights and frames; None on a CPU.
        r1, r5, median_rank: text to video.
        lost: points of R@1 against the first row.
        lost_interval: 95 % interval of that, see ``metrics.paired_interval``.
    """

    setting: str
    tokens: int
    items: int
    ideal: float
    videos_per_second: float
    speedup: float
    peak_bytes: int | None
    r1: float
    r5: float
    median_rank: float
    lost: float
    lost_interval: tuple[float, float]


def settings(args: argparse.Namespace) -> dict[str, stk.ToMeConfig]:
    """Return the settings that are compared by their names, r = 0 first; at the others clips are merged as the flags or
    the run of the checkpoint say.

    Raises:
        UsageError: flags of clip merging that contradict each other.
    """
    given = {"prop_attn": args.tome_prop_attn} if "tome_prop_attn" in args.given else {}
    found = {"r = 0": stk.ToMeConfig(0, prop_attn=args.tome_prop_attn)}
    for one in args.sweep:
        if isinstance(one, str):
            found[one] = dataclasses.replace(stk.ToMeConfig.preset(one), **given)
        elif one:
            found[f"r = {one}"] = options.tome_config(argparse.Namespace(**vars(args) | {"tome_r": one}))
    return found


def models(
    args: argparse.Namespace, configs: Mapping[str, stk.ToMeConfig], weights_from: str | None, device: torch.device
) -> tuple[dict[str, Retrieval], list[str]]:
    """Return a model for each setting, all with the same weights in memory, and what there is to say about these.

    Raises:
        UsageError: see ``model.build``; the setting is named.
    """
    found: dict[str, Retrieval] = {}
    notes: list[str] = []
    for name, config in configs.items():
        try:
            model, told = build(args, config, weights_from)
        except UsageError as error:
            raise UsageError(f"--tome_r, {name}: {error}" if name else str(error)) from error
        if not found:
            weights, notes = model.to(device).state_dict(keep_vars=True), told
        else:
            model.to(device).load_state_dict(weights, strict=False, assign=True)  # frame embeddings are its own
        found[name] = model
    return found, notes


def rows(
    models: Mapping[str, Retrieval],
    evaluations: Sequence[Evaluation],
    speeds: Mapping[str, tuple[float, int | None]],
) -> list[Row]:
    """Return a row for each setting, in their order; ``speeds`` are of ``measure``."""
    hits = evaluations[0].ranks == 1
    first = next(iter(speeds.values()))[0]
    found: list[Row] = []
    for (name, model), each in zip(models.items(), evaluations, strict=True):
        schedule, told, (speed, peak) = model.clip.visual.tome.schedule, each.results["text_to_video"], speeds[name]
        lost = hits.double() - (each.ranks == 1).double()
        low, high = metrics.paired_interval(lost, each.owners) if found else (0.0, 0.0)
        found.append(Row(
            name, schedule.tokens[-1], schedule.items[-1], schedule.speedup, speed, speed / first, peak, told["r1"],
            told["r5"], told["median_rank"], 100 * float(lost.mean()), (100 * low, 100 * high),
        ))  # fmt: skip
    return found


def recommend(found: Sequence[Row], max_loss: float) -> tuple[Row, str]:
    """Return the fastest row that loses at most ``max_loss`` points of R@1, text to video, and the reason in a line.

    The first row, r = 0, loses nothing, so that it is chosen where none that loses so little is faster.
    """
    allowed = [row for row in found if row.lost <= max_loss + 1e-9]
    best = max(allowed, key=lambda row: row.videos_per_second)
    if best is found[0]:
        return best, f"take r = 0: nothing that loses at most {max_loss:g} of R@1 (--max_loss) is faster"
    reason = (
        f"take {best.setting}: the fastest that loses at most {max_loss:g} of R@1 (--max_loss): {best.lost:.1f} lost, "
        f"{best.speedup:.2f}× as fast"
    )
    if best.lost_interval[1] > max_loss:
        reason += f"; with this many captions the loss may be up to {best.lost_interval[1]:.1f} (95 %)"
    return best, reason


def show(found: Sequence[Row]) -> list[str]:
    """Return the rows as lines of text."""
    peaks = [f"{row.peak_bytes / 2**20:.0f}" for row in found if row.peak_bytes is not None]  # of all or of none
    columns: dict[str, Sequence[object]] = {
        "setting": [row.setting for row in found],
        "items × tokens": [f"{row.items} × {row.tokens}" for row in found],
        "ideal": [f"{row.ideal:.2f}×" for row in found],
        "videos/s": [f"{row.videos_per_second:.4g}" for row in found],
        "speed-up": [f"{row.speedup:.2f}×" for row in found],
        **({"peak MiB": peaks} if peaks else {}),
        "R@1": [f"{row.r1:.1f}" for row in found],
        "R@5": [f"{row.r5:.1f}" for row in found],
        "MdR": [f"{row.median_rank:.1f}" for row in found],
        "R@1 lost (95 %)": [
            f"{row.lost:.1f} ({row.lost_interval[0]:.1f} to {row.lost_interval[1]:.1f})" for row in found
        ],
    }
    return table(columns)


def draw(found: Sequence[Row], path: Path) -> None:
    """Draw R@1 against videos per second, with the intervals of what is lost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    base = found[0].r1
    across = [row.videos_per_second for row in found]
    # not below 0 by rounding
    below = [max(0.0, row.r1 - (base - row.lost_interval[1])) for row in found]
    above = [max(0.0, base - row.lost_interval[0] - row.r1) for row in found]
    axes.errorbar(across, [row.r1 for row in found], (below, above), fmt="o", capsize=3)
    for row in found:
        axes.annotate(row.setting, (row.videos_per_second, row.r1), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="videos per second (visual tower)", ylabel="R@1, text to video, and 95 % of its loss")
    axes.margins(0.2)
    atomic.replace(path, lambda file: figure.savefig(file, dpi=150))


@torch.inference_mode()
def measure(
    models: Mapping[str, Retrieval], args: argparse.Namespace, device: torch.device
) -> dict[str, tuple[float, int | None]]:
    """Return how many videos per second each visual tower encodes, timed in turn on a batch of --batch_size_val videos,
    and the bytes that this takes (see ``Row``); by their names."""
    size = next(iter(models.values())).clip.config.image_size
    shape = (args.batch_size_val, args.max_frames, 3, size, size)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=device)
    calls = {name: partial(model.eval().encode_video, video, mask) for name, model in models.items()}
    cuda = device.type == "cuda"
    times = measure_alternately(calls, SECONDS, synchronize=torch.cuda.synchronize if cuda else None)
    return {
        name: (len(video) / median(times[name]), peak_cuda_bytes(call, [device]) if cuda else None)
        for name, call in calls.items()
    }


def report(
    args: argparse.Namespace,
    configs: Mapping[str, stk.ToMeConfig],
    models: Mapping[str, Retrieval],
    evaluations: Sequence[Evaluation],
    folder: Path,
    processes: Processes,
    **weights: Any,
) -> None:
    """Print the table and what to take, and write both, a chart, and every setting's evaluation into the folder."""

    def write() -> None:
        log.info("timing %s in turn, %g s or more", counted(len(models), "setting"), SECONDS)
        found = rows(models, evaluations, measure(models, args, processes.device))
        best, reason = recommend(found, args.max_loss)
        of = {name: results.describe(args, config, "sweep", **weights) for name, config in configs.items()}
        results.append(folder, [of[name] | each.results for name, each in zip(models, evaluations, strict=True)])
        table_of = {"rows": [dataclasses.asdict(row) for row in found], "max_loss": args.max_loss}
        sealed.write_json(
            folder / TABLE, {**of[best.setting], **table_of, "recommended": best.setting, "reason": reason}
        )
        draw(found, folder / CHART)
        for line in (*show(found), reason, f"in {folder}: {TABLE}, {CHART}"):
            log.info("%s", line)

    processes.first_does(write)
