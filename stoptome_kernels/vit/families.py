# SPDX-License-Identifier: Apache-2.0
"""The libraries whose vision transformers are known, and which of them a model is from."""

from __future__ import annotations

from torch import nn

from . import open_clip, timm, torch_encoder, torchvision, transformers
from .towers import VitTower

_FAMILIES = (timm, open_clip, torchvision, transformers, torch_encoder)


def find(model: nn.Module) -> VitTower | None:
    """Return the vision transformer in a model; None if there is none of a library's that is known.

    Raises:
        TypeError, ValueError: one that is known, with a part or setting with which its tokens can't be merged.
        ImportError: of a library too old.
    """
    for family in _FAMILIES:
        found = family.find(model)
        if found is not None:
            return found
    return None
