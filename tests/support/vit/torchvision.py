# SPDX-License-Identifier: Apache-2.0
"""torchvision's vision transformer as cases; see ``support.vit``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig

from support.vit import Case, Slow
from support.vit import timm as timm_cases
from support.vit.torch_encoder import masked

SIZE = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}


def slow(model: Any, inputs: tuple, rates: tuple[int, ...]) -> Tensor:
    x = model._process_input(*inputs)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1)
    x = model.encoder.dropout(x + model.encoder.pos_embedding)
    state = Slow(x, 1)
    for block, r in zip(model.encoder.layers, rates, strict=True):
        out, keys = masked(block.self_attention, block.ln_1(x), state)
        x = state.merge(x + block.dropout(out), keys, r)
        x = x + block.mlp(block.ln_2(x))
    return model.heads(model.encoder.ln(x)[:, 0])


def case(name: str, compiled: bool = False, **options) -> Case:
    make = partial(VisionTransformer, **SIZE | options)
    return Case(
        f"torchvision-{name}",
        make,
        timm_cases.images,
        lambda model: list(model.encoder.layers),
        1,
        slow,
        compiled=compiled,
    )


CASES = [
    case("vit", compiled=True, num_classes=10, dropout=0.1, attention_dropout=0.1),
    case("odd-heads", num_heads=3, representation_size=20, conv_stem_configs=[ConvStemConfig(8, 3, 4)]),
]
