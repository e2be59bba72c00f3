# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of timm, open_clip and transformers: as they are, patched, and with eager merging."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import stoptome_kernels as stk
import torch
from torch import Tensor, nn

from ..baselines import vit as eager_vit
from . import Side, casting

IMPLS = ("unpatched", "package", "eager")
MODES = ("plain", "compiled")


@dataclass(frozen=True)
class Model:
    """A model that is measured."""

    library: str
    make: Callable[[int], nn.Module]  # of so many layers
    answer: Callable[[Any], Tensor]  # what of its result is compared and trained
    blocks: Callable[[Any], list]  # first to last
    parts: eager_vit.Parts  # what they are made of
    shape: tuple[int, ...]  # of one input
    tokens: int
    protected: int
    width: int
    r: int  # in each layer
    batch: tuple[int, int]  # on a CPU, and on a GPU
    mean: bool = False  # its head averages over all tokens


def _timm(name: str) -> Callable[[int], nn.Module]:
    def make(layers: int) -> nn.Module:
        import timm

        return timm.create_model(name, depth=layers)

    return make


def _open_clip(layers: int) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(224, 32, 768, layers, 12, 4.0, output_dim=512)


def _clip(layers: int) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=layers, patch_size=32
        )
    )


def _videomae(layers: int) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    return VideoMAEForVideoClassification(VideoMAEConfig(num_hidden_layers=layers, num_labels=400))


_IMAGE = (3, 224, 224)
MODELS = {
    "ViT-S/16": Model(
        "timm", _timm("vit_small_patch16_224"), lambda y: y, lambda m: list(m.blocks), eager_vit.TIMM, _IMAGE,
        197, 1, 384, 13, (16, 256),
    ),
    "ViT-B/16": Model(
        "timm", _timm("vit_base_patch16_224"), lambda y: y, lambda m: list(m.blocks), eager_vit.TIMM, _IMAGE,
        197, 1, 768, 13, (16, 256),
    ),
    "CLIP ViT-B/32 (open_clip)": Model(
        "open_clip", _open_clip, lambda y: y, lambda m: list(m.transformer.resblocks), eager_vit.OPEN_CLIP, _IMAGE,
        50, 1, 768, 4, (16, 512),
    ),
    "CLIP ViT-B/32 (transformers)": Model(
        "transformers", _clip, lambda y: y.image_embeds, lambda m: list(m.vision_model.encoder.layers),
        eager_vit.CLIP, _IMAGE, 50, 1, 768, 4, (16, 512),
    ),
    "VideoMAE-B": Model(
        "transformers", _videomae, lambda y: y.logits, lambda m: list(m.videomae.encoder.layer), eager_vit.VIDEOMAE,
        (16, *_IMAGE), 1568, 0, 768, 65, (1, 16), mean=True,
    ),
}  # fmt: skip


def random_weights(built: nn.Module) -> dict[str, Tensor]:
    """Return weights with which every token matters: libraries start with such small ones that blocks hardly change a
    token, and a result could not tell right merging from wrong."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if len(parameter) > 1 else 1
                parameter.normal_(0, fan_in**-0.5)
    return built.state_dict()


def batch_of(model: Model, args: argparse.Namespace) -> int:
    return args.batch or (1 if args.dry else model.batch[args.device == "cuda"])


def sides(model: Model, args: argparse.Namespace) -> list[Side]:
    """Return every implementation of a model, with the same weights and inputs."""
    weights = random_weights(model.make(args.layers))
    x = torch.randn(batch_of(model, args), *model.shape, device=args.device)
    found = []
    for impl in args.impls:
        built = model.make(args.layers).to(args.device).eval()
        built.load_state_dict(weights)
        if impl == "package":
            stk.apply_tome_patch(built, model.r)
        if impl == "eager":
            eager_vit.merge_eagerly(model.blocks(built), model.parts, model.r, model.protected, model.mean)
        for mode in args.modes:
            run = built if mode == "plain" else torch.compile(built, dynamic=False)

            def call(run=run) -> Tensor:
                with casting(args):
                    return model.answer(run(x))

            found.append(Side(impl, mode, call, tuple(built.parameters())))
    return found


def installed(library: str) -> bool:
    """Return whether a library can be imported here."""
    if importlib.util.find_spec(library) is None:
        return False
    from .. import libraries  # noqa: F401  (first, see there)

    importlib.import_module(library)
    return True
