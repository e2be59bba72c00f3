# SPDX-License-Identifier: Apache-2.0
"""A data set as the rest of the program sees it: videos, and captions that belong to them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Video:
    """One video file, or the part of one between two times.

    Attributes:
        id: its name in the data set.
        path: of the file.
        span: seconds from and to; None: all of it.
    """

    id: str
    path: str
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Split:
    """Videos and their captions.

    Attributes:
        name: ``train`` or ``val``.
        videos: each once, only those whose file is there.
        captions: (index into ``videos``, text), those of one video side by side, in the order of ``videos``.
        missing: paths of the videos that the annotations name and that are not there.
        captions_of_missing: how many captions these have.
        silent: names of the videos of the split that have no captions.
    """

    name: str
    videos: tuple[Video, ...]
    captions: tuple[tuple[int, str], ...]
    missing: tuple[str, ...] = ()
    captions_of_missing: int = 0
    silent: tuple[str, ...] = ()
