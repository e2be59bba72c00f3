# SPDX-License-Identifier: Apache-2.0
"""The convolutions of STOP's temporal prompts in upstream's model, which cost more than its blocks do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..api import fft_conv3d
from ..patching.guards import check_unsharded
from ..patching.subclass import PatchedModule, check_can_unpatch, original_class, patch_class, unpatch_class
from .towers import VideoTower

# smaller planes of taps, or more channels, are fast enough as they are
_LEAST_TAPS, _MOST_CHANNELS = 81, 32


class FrequencyConv3d(PatchedModule):
    """A ``torch.nn.Conv3d`` that convolves in the frequency domain."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 5:  # without a batch
            return super().forward(input)  # type: ignore[misc]
        return fft_conv3d(input, self.weight, self.bias)  # type: ignore[attr-defined]


def check_convolutions(tower: VideoTower) -> None:
    """Raise what keeps the convolutions of a tower from being patched, or from getting their class back.

    Raises:
        RuntimeError: one was sharded before, or given another class or forward after an earlier patch.
    """
    for module in tower.runner.modules():
        if isinstance(module, FrequencyConv3d):
            check_can_unpatch(module)
        elif isinstance(module, nn.Conv3d):
            check_unsharded(module)


def set_fast(tower: VideoTower, fast: bool) -> None:
    """Let the large convolutions inside a tower run in the frequency domain, or as their class does."""
    for module in tower.runner.modules():
        if isinstance(module, FrequencyConv3d):
            if not fast:
                unpatch_class(module)
        elif fast and _keeps_size(module):
            patch_class(module, FrequencyConv3d)


def _keeps_size(module: Any) -> bool:
    """Return whether a module is a large convolution of torch's that keeps the size of its input. Its hooks are called
    as before; a forward that was put on it stays the one that is called."""
    if original_class(module) is not nn.Conv3d or "forward" in module.__dict__:
        return False
    time, tall, wide = module.kernel_size
    return (
        all(taps % 2 for taps in module.kernel_size)
        and tall * wide >= _LEAST_TAPS
        and max(module.in_channels, module.out_channels) <= _MOST_CHANNELS
        and module.padding in ("same", (time // 2, tall // 2, wide // 2))
        and module.padding_mode == "zeros"
        and module.stride == module.dilation == (1, 1, 1)
        and module.groups == 1
    )
