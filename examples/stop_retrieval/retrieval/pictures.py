# SPDX-License-Identifier: Apache-2.0
"""Pictures of videos with what merged in them."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import stoptome_kernels as stk
import torch

from .corpus import Video
from .errors import UsageError
from .loader import Broken, video_loader
from .model import Retrieval
from .parallel import Processes

log = logging.getLogger("stop_retrieval")
FOLDER = "traces"


def draw(
    model: Retrieval, args: argparse.Namespace, config: stk.ToMeConfig, videos: Sequence[Video], folder: Path,
    processes: Processes, name: str = "",
) -> None:  # fmt: skip
    """Draw videos, spread over those given, and which of their patches became one token: a PNG for each, frames as
    they are above and merged ones below.

    Args:
        model: on the process's device; afterwards it merges by ``config``, as before.
        videos: to choose from; ``args.draw_trace`` of them are drawn.
        folder: of the run, where ``traces`` is made.
        name: of the setting, in the names of the files.

    Raises:
        UsageError: the model merges nothing, or a file can't be written.
    """
    if config.off:
        raise UsageError("--draw_trace draws what merged: give --tome_r or --tome_preset")
    count = min(args.draw_trace, len(videos))
    chosen = [videos[n * len(videos) // count] for n in range(count)]
    names, where = _file_names([video.id for video in chosen]), folder / FOLDER
    _merge(model, dataclasses.replace(config, trace_source=True))
    try:
        where.mkdir(exist_ok=True)
        model.eval()
        broken, drawn = Broken(), 0
        for batch in video_loader(args, chosen, model.clip.config.image_size, processes):
            broken.note(batch)
            _, video, mask = batch.to(processes.device)
            with torch.inference_mode():
                model.encode_video(video, mask)
            trace = stk.tome_trace(model.clip)
            for number, readable in enumerate(batch.readable.tolist()):
                if readable:
                    path = where / f"{names[drawn + number]}{name and f'-{_cleaned(name)}'}.png"
                    frames = batch.video[number]
                    stk.visualize(frames, trace, path, video=number, beside=True)
            drawn += len(video)
        log.info("pictures of what merged are in %s", where)
    except OSError as error:
        raise UsageError(f"{where} can't be written: {error.strerror or error}") from error
    finally:
        _merge(model, config)


def _merge(model: Retrieval, config: stk.ToMeConfig) -> None:
    """Patch a model whose warnings were said when it was built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        stk.apply_tome_patch(model.clip, config=config)


def _file_names(ids: Sequence[str]) -> list[str]:
    """Return a name for each video that is a file's anywhere, no two the same."""
    found: list[str] = []
    for number, text in enumerate(ids):
        name = _cleaned(os.path.basename(text)) or "video"
        found.append(f"{name}-{number}" if name in found else name)
    return found


def _cleaned(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text, flags=re.ASCII).strip("-.")[:100]
