# SPDX-License-Identifier: Apache-2.0
"""Pictures of videos with what merged in them."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import stoptome_kernels as stk
import torch

from . import atomic
from .corpus import Video
from .errors import UsageError
from .loader import video_loader
from .model import Retrieval
from .parallel import Processes
from .terminal import counted

log = logging.getLogger("stop_retrieval")
FOLDER = "traces"


def draw(
    models: Mapping[str, tuple[Retrieval, stk.ToMeConfig]], args: argparse.Namespace, videos: Sequence[Video],
    folder: Path, processes: Processes,
) -> None:  # fmt: skip
    """Draw videos, spread over those given, and which of their patches became one token: for each video and model a
    PNG, frames as they are above and merged ones below.

    Args:
        models: on the process's device, with the settings by which they merge, then and afterwards; by the names of
            these settings, which are in the names of the files.
        videos: to choose from, which can be read; ``args.draw_trace`` of them are drawn.
        folder: of the run, where ``traces`` is made.

    Raises:
        UsageError: a file can't be written.
    """
    count = min(args.draw_trace, len(videos))
    chosen = [videos[n * len(videos) // count] for n in range(count)]
    where, drawn, total = folder / FOLDER, 0, 0
    size = next(iter(models.values()))[0].clip.config.image_size
    for model, config in models.values():
        _merge(model.eval(), dataclasses.replace(config, trace_source=True))
    try:
        where.mkdir(exist_ok=True)
        for batch in video_loader(args, chosen, size, processes):
            _, video, mask = batch.to(processes.device)
            for name, (model, _) in models.items():
                with torch.inference_mode():
                    model.encode_video(video, mask)
                trace = stk.tome_trace(model.clip)
                for number in batch.readable.nonzero().flatten().tolist():
                    file = f"{drawn + number:03d}-{_cleaned(chosen[drawn + number].id)}-{_cleaned(name)}.png"
                    picture = stk.visualize(batch.video[number], trace, video=number, beside=True)
                    atomic.replace(where / file, picture.save)
                    total += 1
            drawn += len(video)
        log.info("%s of what merged: %s", counted(total, "picture"), where)
    except OSError as error:
        raise UsageError(f"{where} can't be written: {error.strerror or error}") from error
    finally:
        for model, config in models.values():
            _merge(model, config)


def _merge(model: Retrieval, config: stk.ToMeConfig) -> None:
    """Patch a model whose warnings were said when it was built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        stk.apply_tome_patch(model.clip, config=config)


def _cleaned(text: str) -> str:
    """Return a text as a part of a file's name anywhere."""
    return re.sub(r"[^\w.]+", "-", os.path.basename(text), flags=re.ASCII).strip("-.")[:100]
