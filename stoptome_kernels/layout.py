# SPDX-License-Identifier: Apache-2.0
"""What the kernels ask of a tensor's memory."""

from __future__ import annotations

from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """``x`` with neighbouring elements of its last axis next to each other: the kernels take all other strides as they
    are, and this is the one case that copies."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
