# SPDX-License-Identifier: Apache-2.0
"""The pure-PyTorch reference of token merging, installed as ``stoptome_kernels.reference``.

Written to be read beside the papers: Bolya et al., *Token Merging: Your ViT but Faster* (ICLR 2023, arXiv 2210.09461)
and Shen et al., *TempMe* (ICLR 2025, arXiv 2409.01156). It is the yardstick of every parity test and what runs where
nothing faster can. It needs torch alone, works on any device, never waits for the device and uses no atomics on floats.
"""

from .attention import AttentionInputs, attention, attention_backward, prefix_length, scale_of
from .conv import fft_conv3d, fft_conv3d_backward
from .matching import arrange, build_groups, cap_r, identity, match, match_sets, similarity
from .merging import Groups, reduce, spread, winners
from .norm import MergedRows, merge_norm, merge_norm_backward

__all__ = [
    "AttentionInputs",
    "Groups",
    "MergedRows",
    "arrange",
    "attention",
    "attention_backward",
    "build_groups",
    "cap_r",
    "fft_conv3d",
    "fft_conv3d_backward",
    "identity",
    "match",
    "match_sets",
    "merge_norm",
    "merge_norm_backward",
    "prefix_length",
    "reduce",
    "scale_of",
    "similarity",
    "spread",
    "winners",
]
