# SPDX-License-Identifier: Apache-2.0
"""Pictures of videos with what merged in them."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
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
    where = folder / FOLDER
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
                    own = chosen[drawn + number]
                    path = where / f"{_file_name(own.id)}{name and f'-{_file_name(name)}'}.png"
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


def _file_name(text: str) -> str:
    """Return a name that is a file's anywhere: other characters than letters and digits become dashes."""
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in os.path.basename(text))
