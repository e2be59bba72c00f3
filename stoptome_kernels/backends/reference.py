# SPDX-License-Identifier: Apache-2.0
"""The fallback: plain PyTorch, on any device."""

from __future__ import annotations

import torch

from ..reference import match, reduce, spread

__all__ = ["match", "reduce", "spread", "why_not"]


def why_not(device: str, dtype: torch.dtype, explicit: bool) -> str | None:
    """It always can."""
    return None
