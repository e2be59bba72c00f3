# SPDX-License-Identifier: Apache-2.0
"""Small models for sweeps over r."""

import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel
from torch import nn

TOKENS = torch.randn(3, 21, 16, generator=torch.Generator().manual_seed(1))
CLIPS = stk.ToMeConfig(
    tome_r=1, merge_layers=(1,), merge_frame_nums=(2,), merge_token_proportions=(20, 10), frame_pos=1
)


def encoder(**changes) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True, **changes)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def stop_model() -> StopModel:
    torch.manual_seed(0)
    return StopModel(
        StopConfig(
            image_size=32, patch_size=8, width=64, layers=3, embed_dim=24, frames=4, global_prompts=3, frame_prompts=2,
            text_prompts=4, text_width=64, text_heads=1, text_layers=1, vocab_size=50, context_length=16, max_words=10,
            temporal_prompt="DGL",
        )
    )  # fmt: skip


def video() -> torch.Tensor:
    return torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
