# SPDX-License-Identifier: Apache-2.0
"""Small models for sweeps over r, and all of a model that a sweep must put back."""

import stoptome_kernels as stk
import torch
from torch import nn

from support import families

TOKENS = torch.randn(3, 21, 16, generator=torch.Generator().manual_seed(1))
CLIPS = stk.ToMeConfig(
    tome_r=1, merge_layers=(1,), merge_frame_nums=(2,), merge_token_proportions=(20, 10), frame_pos=1
)


def encoder(**changes) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True, **changes)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def stop_model() -> nn.Module:
    return families.stop_model().train()


def video() -> torch.Tensor:
    return torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def looks(model: nn.Module) -> list:
    """All that a sweep may change of a model, and must put back: the objects by their addresses."""
    own = [name for name, value in nn.Module().__dict__.items() if isinstance(value, dict)]
    seen: list = []
    for name, module in model.named_modules():
        held = module.__dict__
        contents = {key: [(k, id(v)) for k, v in held[key].items()] for key in own}
        seen.append((name, type(module), module.training, {key: id(value) for key, value in held.items()}, contents))
    seen.append({key: value.clone() for key, value in model.state_dict().items()})
    return seen


def same_looks(a: list, b: list) -> bool:
    *modules_a, numbers_a = a
    *modules_b, numbers_b = b
    numbers = numbers_a.keys() == numbers_b.keys() and all(torch.equal(numbers_a[k], numbers_b[k]) for k in numbers_a)
    return numbers and modules_a == modules_b
