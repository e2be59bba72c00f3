# SPDX-License-Identifier: Apache-2.0
"""STOP's dynamic prompts in space and time (Liu et al., CVPR 2025, section 3), ``temporal_prompt="group2-2"``.

Parameter names are upstream's, so that its checkpoints load. Upstream's sizes are those of ViT-B/32: a grid of 7 × 7
patches, width 768 and 4 prompts of a frame. They follow from the model here, which of that size computes the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api import fft_conv3d
from ..layout import accumulator_dtype
from ..patching.guards import calls_only_class_forward, may_read_weights

_STRENGTH = 0.05  # of what is added to pixels and prompts
SALIENT = 6  # this many cells of a frame are above the threshold, however many there are


class _Conv(nn.Conv3d):
    """Convolution over (time, height, width) that keeps the size, in the frequency domain unless ``fast`` is False."""

    fast = True

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int, int]):
        time, height, width = kernel
        super().__init__(channels_in, channels_out, kernel, padding=(time // 2, height // 2, width // 2))

    def forward(self, input: Tensor) -> Tensor:
        return fft_conv3d(input, self.weight, self.bias) if self.fast else super().forward(input)


class _PReLU(nn.PReLU):
    """In its input's dtype: with float16 matrices its one weight is still float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight.to(input.dtype))


class Prompted(NamedTuple):
    """The frames with their prompt added, and which cells are salient, (B, T, grid, grid) bool."""

    frames: Tensor
    salient: Tensor


class TemporalPrompt(nn.Module):
    """Adds a learnt pattern to the pixels, twice as strong where a cell is salient, and makes prompts for the layers
    from the patches of all frames.

    Args:
        fast: see the attribute.
        grid: cells, and patches, on each side of a frame.
        width: embedding dimension of the patches.
        prompts: prompts of a frame and layer (P).

    Attributes:
        fast: convolve in the frequency domain, and compute what follows a convolution without what it doesn't read;
            False for torch's ``conv3d`` and the published steps one by one, the same up to rounding.
    """

    def __init__(self, fast: bool = True, grid: int = 7, width: int = 768, prompts: int = 4) -> None:
        super().__init__()
        self.grid = grid
        pixels, frames = (3, 11, 11), (5, 11, 11)
        self.Conv = nn.Sequential(
            _Conv(3, 9, pixels), _Conv(9, 9, pixels), _PReLU(), _Conv(9, 9, pixels), _PReLU(), _Conv(9, 16, pixels)
        )
        self.MLP = nn.Sequential(nn.Linear(16, 16), _PReLU(), nn.Linear(16, 3))
        self.dropout1, self.dropout2 = nn.Dropout(), nn.Dropout()
        self.Cal_Net = _Conv(3, 1, frames)
        self.Attention = nn.MultiheadAttention(width, width // 64)
        hidden = (3, 15, 25)
        self.InterConv = nn.Sequential(_Conv(1, 9, hidden), _PReLU(), _Conv(9, 1, hidden))
        self.InterMLP = nn.Sequential(nn.Linear(grid**2, 16), _PReLU(), nn.Linear(16, prompts))
        self.Cal_Net_Inter = _Conv(1, 1, frames)
        self.fast = fast

    @property
    def fast(self) -> bool:
        """Whether the fast path is on, see the class."""
        return self.Cal_Net.fast

    @fast.setter
    def fast(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, _Conv):
                module.fast = bool(value)

    def forward(self, video: Tensor) -> Prompted:
        """Return ``video (B, T, 3, H, W)`` with its prompt added, and the salient cells."""
        channels_first = video.transpose(1, 2)
        salient = self._salient(channels_first)
        hidden = self.dropout1(self.Conv(channels_first))
        strength = _STRENGTH * (1 + salient.to(video.dtype))
        strength = strength.repeat(1, 1, *(side // self.grid for side in video.shape[-2:]))[:, :, None]
        if not (self.fast and self._reads_mlp()):
            pattern = self._drop(self.MLP(hidden.movedim(1, -1)).movedim(-1, 2))
            return Prompted(video + pattern * strength, salient)
        drops = self.training or type(self.dropout2) is not nn.Dropout or not calls_only_class_forward(self.dropout2)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if drops or traced or torch.is_grad_enabled() or video.device.type != "cpu":
            return Prompted(video + self._drop(self._pattern(hidden)) * strength, salient)
        frames = torch.empty_like(video, memory_format=torch.contiguous_format)
        for t in range(video.shape[1]):  # what one frame takes stays in the cache
            at = slice(t, t + 1)
            torch.addcmul(video[:, at], self._drop(self._pattern(hidden[:, :, at])), strength[:, at], out=frames[:, at])
        return Prompted(frames, salient)

    def _reads_mlp(self) -> bool:
        """Return whether ``MLP`` is what it was made as, and its weights may be read."""
        layers: Any = self.MLP
        kinds = [type(layer) for layer in layers]
        return (
            type(layers) is nn.Sequential
            and kinds == [nn.Linear, _PReLU, nn.Linear]
            and layers[0].bias is not None
            and layers[2].bias is not None
            and may_read_weights(layers, *layers)
        )

    def _pattern(self, hidden: Tensor) -> Tensor:
        """Apply ``MLP`` to ``(B, 16, T, H, W)`` where its channels are → ``(B, T, 3, H, W)``."""
        layers: Any = self.MLP
        first, activation, last = layers
        rows = _linear(last, activation(_linear(first, hidden.flatten(2))))
        return rows.unflatten(2, hidden.shape[2:]).transpose(1, 2)

    def _drop(self, pattern: Tensor) -> Tensor:
        return self.dropout2(self.dropout2(pattern))  # twice, as the published model was trained

    def _salient(self, channels_first: Tensor) -> Tensor:
        if self.fast and _reads_conv(self.Cal_Net):
            score = _grid_means(self.Cal_Net, channels_first, self.grid)
        else:
            score = self.Cal_Net(channels_first).squeeze(1)
            # upstream's grid, of 7: a pixel (y, x) belongs to cell (y mod 7, x mod 7), not to the patch that it lies in
            score = score.unflatten(3, (-1, self.grid)).unflatten(2, (-1, self.grid)).mean((2, 4))
        threshold = score.flatten(2).sort(2, descending=True).values[:, :, SALIENT]
        return score > threshold[..., None, None]

    def between_frames(self, tokens: Tensor, salient: Tensor) -> Tensor:
        """Return the prompts that all layers add to their own: ``(B, T·P, D)``.

        Args:
            tokens: ``(B, T, 1 + grid², D)`` after ``ln_pre``, class token first.
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
        if self.fast and _reads_conv(self.Cal_Net_Inter):
            score = _row_means(self.Cal_Net_Inter, mixed)
        else:
            score = self.Cal_Net_Inter(mixed).squeeze(1).mean(3)
        score = (score * (1 + salient.flatten(2).to(score.dtype))).mean(2)
        low, high = score.min(), score.max()
        return (score - low) / (high - low).clamp_min(torch.finfo(score.dtype).tiny)  # one video of one frame: 0


def _linear(layer: Any, columns: Tensor) -> Tensor:
    """Apply a linear layer to the channels of ``(B, C, N)``, which stay where they are."""
    weight = layer.weight.expand(columns.shape[0], -1, -1)
    return torch.baddbmm(layer.bias[:, None], weight, columns)


def _reads_conv(conv: nn.Module) -> bool:
    """Return whether a convolution is what it was made as, and its weights may be read."""
    return type(conv) is _Conv and conv.bias is not None and may_read_weights(conv)


# The two scores below are means of a convolution, which is linear: the means of its inputs are taken first, and the
# kernel is applied to those. Taps reach over the edges, so that the means of each tap differ by what lies there.


@torch.no_grad()  # of a decision there is no gradient
def _grid_means(conv: Any, video: Tensor, grid: int) -> Tensor:
    """Return the mean of ``conv(video)``, ``video (B, C, T, H, W)`` → ``(B, T, grid, grid)``, over the pixels of each
    cell: those of equal y mod grid and x mod grid."""
    reach = conv.kernel_size[1] // 2
    span = grid + 2 * reach  # from the first cell's first tap to the last cell's last
    with torch.autocast(video.device.type, enabled=False):
        x = F.pad(video.to(accumulator_dtype(video.dtype)), (reach,) * 4)
        x = x.unfold(3, span, grid).mean(3)  # (B, C, T, W', span)
        x = x.unfold(3, span, grid).mean(3)
        weight, bias = conv.weight.double(), conv.bias.double()  # never tf32
        return F.conv3d(x.double(), weight, bias, padding=(conv.kernel_size[0] // 2, 0, 0)).squeeze(1)


def _row_means(conv: Any, rows: Tensor) -> Tensor:
    """Return the mean of ``conv(rows)``, ``rows (B, 1, T, n, D)`` → ``(B, T, n)``, over the last axis."""
    time, tall, wide = conv.kernel_size
    reach, channels = wide // 2, rows.shape[-1]
    with torch.autocast(rows.device.type, enabled=False):
        x = rows.squeeze(1).to(accumulator_dtype(rows.dtype))
        before, after = x[..., :reach].cumsum(-1), x[..., -reach:].flip(-1).cumsum(-1)
        missed = torch.cat([after.flip(-1), torch.zeros_like(x[..., :1]), before], -1)
        x = ((x.sum(-1, keepdim=True) - missed) / channels).permute(0, 3, 1, 2)  # (B, taps, T, n)
        weight = conv.weight[0, 0].double().permute(2, 0, 1)[None].contiguous()
        score = F.conv2d(x.double(), weight, conv.bias.double(), padding=(time // 2, tall // 2))
        return score.squeeze(1).to(rows.dtype)
