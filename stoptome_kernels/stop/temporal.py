# SPDX-License-Identifier: Apache-2.0
"""STOP's dynamic prompts in space and time (Liu et al., CVPR 2025, section 3), ``temporal_prompt="group2-2"``.

Parameter names are upstream's, so that its checkpoints load; the sizes are fixed to its backbone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STRENGTH = 0.05  # of what is added to pixels and prompts
_SALIENT = 6  # this many cells of a frame are above the threshold


class _Conv(nn.Conv3d):
    """Convolution over (time, height, width) that keeps the size."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int, int]):
        time, height, width = kernel
        super().__init__(channels_in, channels_out, kernel, padding=(time // 2, height // 2, width // 2))


class _PReLU(nn.PReLU):
    """In its input's dtype: with float16 matrices its one weight is still float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight.to(input.dtype))


class Prompted(NamedTuple):
    """The frames with their prompt added, and which cells are salient, (B, T, 7, 7) bool."""

    frames: Tensor
    salient: Tensor


class TemporalPrompt(nn.Module):
    """Adds a learnt pattern to the pixels, twice as strong where a cell is salient, and makes prompts for the layers
    from the patches of all frames."""

    def __init__(self) -> None:
        super().__init__()
        pixels, frames = (3, 11, 11), (5, 11, 11)
        self.Conv = nn.Sequential(
            _Conv(3, 9, pixels), _Conv(9, 9, pixels), _PReLU(), _Conv(9, 9, pixels), _PReLU(), _Conv(9, 16, pixels)
        )
        self.MLP = nn.Sequential(nn.Linear(16, 16), _PReLU(), nn.Linear(16, 3))
        self.dropout1, self.dropout2 = nn.Dropout(), nn.Dropout()
        self.Cal_Net = _Conv(3, 1, frames)
        self.Attention = nn.MultiheadAttention(768, 12)
        hidden = (3, 15, 25)
        self.InterConv = nn.Sequential(_Conv(1, 9, hidden), _PReLU(), _Conv(9, 1, hidden))
        self.InterMLP = nn.Sequential(nn.Linear(49, 16), _PReLU(), nn.Linear(16, 4))
        self.Cal_Net_Inter = _Conv(1, 1, frames)

    def forward(self, video: Tensor) -> Prompted:
        """Return ``video (B, T, 3, 224, 224)`` with its prompt added, and the salient cells."""
        channels_first = video.transpose(1, 2)
        pattern = self.dropout1(self.Conv(channels_first))
        pattern = self.dropout2(self.MLP(pattern.movedim(1, -1))).movedim(-1, 2)
        pattern = self.dropout2(pattern)  # twice, as the published model was trained
        salient = self._salient(channels_first)
        everywhere = salient.repeat(1, 1, *(side // 7 for side in video.shape[-2:]))[:, :, None]
        return Prompted(video + _STRENGTH * pattern * (1 + everywhere.to(pattern.dtype)), salient)

    def _salient(self, channels_first: Tensor) -> Tensor:
        score = self.Cal_Net(channels_first).squeeze(1)
        # upstream's grid: a pixel (y, x) belongs to cell (y mod 7, x mod 7), not to the patch that it lies in
        score = score.unflatten(3, (-1, 7)).unflatten(2, (-1, 7)).mean((2, 4))
        threshold = score.flatten(2).sort(2, descending=True).values[:, :, _SALIENT]
        return score > threshold[..., None, None]

    def between_frames(self, tokens: Tensor, salient: Tensor) -> Tensor:
        """Return the prompts that all layers add to their own: ``(B, T·4, 768)``.

        Args:
            tokens: ``(B, T, 50, 768)`` after ``ln_pre``, class token first.
            salient: salient cells, as ``forward`` returns them.

        The weights of the frames are scaled by the smallest and the largest of the batch: as upstream, a video's
        features depend a little on the other videos of a batch.
        """
        batch, frames = tokens.shape[:2]
        rows = tokens[:, :, 1:].flatten(1, 2).transpose(0, 1)
        # upstream asks for the weights too, which keeps torch on the plain path; the numbers are the same without
        mixed = self.Attention(rows, rows, rows, need_weights=False)[0].transpose(0, 1)
        mixed = mixed.unflatten(1, (frames, -1))[:, None]
        weight = self._frame_weights(mixed, salient)
        prompts = self.InterMLP(self.InterConv(mixed).squeeze(1).transpose(2, 3)).transpose(2, 3)
        return _STRENGTH * (prompts * (1 + weight[..., None, None])).reshape(batch, -1, tokens.shape[3])

    def _frame_weights(self, mixed: Tensor, salient: Tensor) -> Tensor:
        score = self.Cal_Net_Inter(mixed).squeeze(1)
        score = (score * (1 + salient.flatten(2)[..., None].to(score.dtype))).mean((2, 3))
        low, high = score.min(), score.max()
        return (score - low) / (high - low).clamp_min(torch.finfo(score.dtype).tiny)  # one video of one frame: 0
