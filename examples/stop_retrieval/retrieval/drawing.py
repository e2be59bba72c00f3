# SPDX-License-Identifier: Apache-2.0
"""The frames of a synthetic scene: shapes over a photograph that is panned and zoomed."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
from PIL import Image

from .errors import UsageError
from .scenes import COUNTS, HUES, Event, Scene

# of the pictures in scikit-image's wheel the photographs in colour
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
_LONGEST = 240  # pixels of their longer side; crops of larger ones take longer, and are made smaller anyway


def render(scene: Scene, rng: np.random.Generator, size: int = 64, frames: int = 24) -> np.ndarray:
    """The frames of a scene.

    What captions don't tell (background, places, sizes, brightness, when the second event begins) is drawn from
    ``rng``, in the same way for every scene: two scenes from equal generators differ in nothing but what is told.

    Args:
        size: pixels a side.
        frames: of the video.

    Returns:
        ``(frames, size, size, 3)`` uint8, RGB.

    Raises:
        UsageError: see ``photographs``.
    """
    half = round(frames * rng.uniform(0.48, 0.52))
    film = _background(rng, size, frames)
    _play(scene.first, rng, film[:half])
    _play(scene.second, rng, film[half:])
    return np.rint(film).astype(np.uint8)


def photographs() -> tuple[Image.Image, ...]:
    """The pictures behind the shapes, from the files that scikit-image is installed with.

    They are read as files because ``skimage.data`` imports SciPy to give them, and downloads those that it lacks.

    Raises:
        UsageError: scikit-image is not installed, or lacks one of them.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UsageError("synthetic videos have photographs of scikit-image behind them: pip install scikit-image")
    return _read(os.path.join(os.path.dirname(spec.origin), "data"))


@lru_cache
def _read(folder: str) -> tuple[Image.Image, ...]:
    pictures = []
    for name in PHOTOGRAPHS:
        path = os.path.join(folder, name)
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except OSError as error:
            raise UsageError(f"{path} can't be read: pip install --force-reinstall scikit-image") from error
        picture.thumbnail((_LONGEST, _LONGEST))
        pictures.append(picture)
    return tuple(pictures)


def _background(rng: np.random.Generator, size: int, frames: int) -> np.ndarray:
    """``(frames, size, size, 3)`` float32 in 0..255, dark, so that every colour stands out."""
    pictures = photographs()
    picture = pictures[rng.integers(len(pictures))]
    whole = np.array(picture.size)
    sides = whole.min() * rng.uniform(0.4, 0.9, 2)  # of the crop, at the beginning and at the end
    places = rng.random((2, 2))
    film = np.empty((frames, size, size, 3), np.float32)
    for number, t in enumerate(np.linspace(0, 1, frames)):
        side = sides @ (1 - t, t)
        left, top = (whole - side) * ((1 - t, t) @ places)
        crop = picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        film[number] = np.asarray(crop)
    film *= np.float32(rng.uniform(0.2, 0.45))
    return film


def _play(event: Event, rng: np.random.Generator, film: np.ndarray) -> None:
    """Draw an event over all frames of ``film``. Moving shapes go from one side to the other, which way is by lot."""
    frames, size = film.shape[:2]
    radius = rng.uniform(0.14, 0.175)  # of the frame's side, like all lengths here
    there = rng.random() < 0.5  # which way it moves first
    side_by_side, along, lanes = rng.random() < 0.5, rng.random(3), rng.random(3)
    hue, saturation, bright = HUES[event.colour] + rng.uniform(-0.02, 0.02), rng.uniform(0.8, 1), rng.uniform(0.8, 1, 3)

    t = np.linspace(0, 1, frames)
    sizes, way, steps = np.full(frames, radius), 0.0, np.zeros(frames)
    if event.motion.startswith("moves"):
        way = 1 - 2.8 * radius
        steps = way / 2 * np.cos(np.pi * t) * (1 if there else -1)  # from one side to the other
        side_by_side = event.motion == "moves up and down"
    else:
        sizes *= 0.4 + 0.9 * t

    # each shape has a lane of its own, so that none covers another
    number, margin, apart = COUNTS.index(event.count) + 1, 1.4 * radius, 2.4 * radius
    free = 1 - 2 * margin - (number - 1) * apart
    lanes = margin + np.arange(number) * apart + np.sort(lanes[:number]) * free
    middles = margin + way / 2 + along * (1 - 2 * margin - way)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    column = (slice(None), None, None)
    for lane, middle, value in zip(lanes, middles, bright, strict=False):
        x, y = (middle + steps).astype(np.float32)[column], np.float32(lane)
        if side_by_side:
            x, y = y, x
        outside = _OUTSIDE[event.shape](grid - x, grid[:, None] - y, sizes.astype(np.float32)[column])
        cover = np.clip(0.5 - size * outside, 0, 1)[..., None]  # of each pixel
        film += cover * (255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) - film)


def _circle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - r


def _triangle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.66 * r


def _cross(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1.1 * r, np.minimum(x, y) - 0.38 * r)


# how far a point (x, y) is outside of a shape of size r, negative inside
_OUTSIDE: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "triangle": _triangle,
    "cross": _cross,
}
