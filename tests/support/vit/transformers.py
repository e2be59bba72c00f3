# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's models as cases; see ``support.vit``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import stoptome_kernels as stk
import torch
import transformers as hf
from stoptome_kernels.vit.towers import installed_below
from torch import Tensor, nn

from support.vit import Case, Slow, recorded
from support.vit import timm as timm_cases

SIZE = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 8, "projection_dim": 24, "projection_size": 48,
}  # fmt: skip
DINO = SIZE | {"mlp_ratio": 2, "layerscale_value": 0.5}
NAFLEX = {name: value for name, value in SIZE.items() if name != "image_size"} | {"num_patches": 64}
# Of SigLIP2's images. The first two are those that are compared with the slow way: which of several equal paddings a
# patch merges with is up to rounding, so one has only two paddings, and the other so many that they merge alone.
GRIDS = [(2, 31), (4, 8), (8, 8), (7, 8), (1, 8), (6, 8), (7, 9), (3, 8)]
VIDEO = SIZE | {"num_frames": 4, "tubelet_size": 2}


def since(*version: int) -> bool:
    """Return whether the installed transformers is of this version or later. Older ones do less, patched or not."""
    return not installed_below("transformers", version)


class Paired(nn.Module):
    """A model of images and texts, with three texts of its own: one composite model inside another."""

    def __init__(self, config: Any, kind: Any):
        super().__init__()
        self.model = kind(config)
        self.register_buffer("texts", torch.arange(24).reshape(3, 8) % 97, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        out = self.model(input_ids=self.texts, pixel_values=images)
        return torch.cat([out.logits_per_image, out.vision_model_output.last_hidden_state.flatten(1)], 1)


class Flexible(nn.Module):
    """SigLIP2 on images of 64 patches or fewer: its processor gives patches, a mask, and the grid."""

    def __init__(self, kind: Any = hf.Siglip2ForImageClassification, **options):
        super().__init__()
        vision = hf.Siglip2VisionConfig(**NAFLEX | options)
        whole = hf.Siglip2Config(vision_config=vision.to_dict(), num_labels=5)
        self.model = kind(whole if kind is hf.Siglip2ForImageClassification else vision)
        height = torch.ones(65, dtype=torch.int64)  # by the number of patches
        height[[rows * columns for rows, columns in GRIDS]] = torch.tensor([rows for rows, _ in GRIDS])
        self.register_buffer("height", height, persistent=False)

    def forward(self, images: Tensor, mask: Tensor | None = None, **options) -> Any:
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        grid = torch.full((len(images), 2), 8, device=images.device)
        if mask is not None:
            count = mask.long().sum(1)
            height = self.height[count]
            patches, grid = patches * mask[..., None], torch.stack([height, count // height], 1)
        return self.model(patches, mask, grid, **options)


def clip(kind: Any, **options) -> Any:
    vision = hf.CLIPVisionConfig(**SIZE | {"projection_dim": 24} | options)
    if kind in (hf.CLIPModel, hf.CLIPForImageClassification):
        text = hf.CLIPTextConfig(**TEXT, eos_token_id=96, bos_token_id=95, pad_token_id=1).to_dict()
        config = hf.CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=24, num_labels=5)
        return Paired(config, kind) if kind is hf.CLIPModel else kind(config)
    return kind(vision)


def siglip(kind: Any, **options) -> Any:
    vision = hf.SiglipVisionConfig(**SIZE | options)
    if kind is hf.SiglipVisionModel:
        return kind(vision)
    text = hf.SiglipTextConfig(**TEXT, eos_token_id=96, bos_token_id=95, pad_token_id=1).to_dict()
    config = hf.SiglipConfig(text_config=text, vision_config=vision.to_dict(), num_labels=5)
    return Paired(config, kind) if kind is hf.SiglipModel else kind(config)


def vit(kind: Any, **options) -> Any:
    return kind(hf.ViTConfig(**SIZE | {"num_labels": 5, "encoder_stride": 4} | options))


def dinov2(kind: Any, **options) -> Any:
    return kind(hf.Dinov2Config(**DINO | {"num_labels": 5} | options))


def registers(kind: Any, **options) -> Any:
    return kind(hf.Dinov2WithRegistersConfig(**DINO | {"num_register_tokens": 4, "num_labels": 5} | options))


def videomae(kind: Any, **options) -> Any:
    return kind(hf.VideoMAEConfig(**VIDEO | {"num_labels": 5} | options))


def videos(batch: int) -> tuple:
    return (torch.randn(batch, 4, 3, 32, 32),)


def padded(batch: int) -> tuple:
    """Images of all grids, and which patches there are."""
    count = torch.tensor([rows * columns for rows, columns in GRIDS]).repeat(batch // len(GRIDS) + 1)[:batch]
    return (*timm_cases.images(batch), (torch.arange(64) < count[:, None]).to(torch.int64))


def attended(block: Any, x: Tensor, state: Slow) -> tuple[Tensor, Tensor]:
    """Return what the layer's attention gives, with the sizes as its mask, and the keys."""
    if hasattr(block, "self_attn") or not hasattr(block.attention, "output"):
        attn = block.self_attn if hasattr(block, "self_attn") else block.attention
        (out, _), keys = recorded(attn.k_proj, lambda: attn(x, attention_mask=state.bias))
        return out, heads(keys)
    inner = block.attention.attention  # which takes no mask
    q, k, v = (
        heads(getattr(inner, name)(x) + (0 if (bias := getattr(inner, f"{name[0]}_bias", None)) is None else bias))
        for name in ("query", "key", "value")
    )
    weights = (q @ k.mT / q.shape[3] ** 0.5 + state.bias).softmax(3)
    weights = nn.functional.dropout(weights, inner.dropout_prob, inner.training)
    return block.attention.output((weights @ v).transpose(1, 2).flatten(2), x), k


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (SIZE["num_attention_heads"], -1)).transpose(1, 2)


def slow_layer(block: Any, x: Tensor, state: Slow, r: int) -> Tensor:
    kind = type(block).__name__
    if kind.startswith("Dino"):
        out, keys = attended(block, block.norm1(x), state)
        x = state.merge(x + block.drop_path(block.layer_scale1(out)), keys, r)
        return x + block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))
    if hasattr(block, "layer_norm1"):
        out, keys = attended(block, block.layer_norm1(x), state)
        x = state.merge(x + out, keys, r)
        return x + block.mlp(block.layer_norm2(x))
    out, keys = attended(block, block.layernorm_before(x), state)
    if hasattr(block, "intermediate"):
        x = state.merge(x + out, keys, r)
        return block.output(block.intermediate(block.layernorm_after(x)), x)
    x = state.merge(x + block.dropout(out), keys, r)
    return x + block.dropout(block.mlp(block.layernorm_after(x)))


def slow_layers(
    blocks: list, x: Tensor, protected: int, rates: tuple[int, ...], real: Tensor | None = None
) -> list[Tensor]:
    """Return what the layers give, each of ``(N, T, D)``: every original token's row."""
    state, out = Slow(x, protected, real), []
    first = next(index for index, r in enumerate(rates) if r)
    for index, (block, r) in enumerate(zip(blocks, rates, strict=True)):
        if real is not None and index == first:  # padding is made the same, so that it matches padding
            x = x * real[..., None].to(x.dtype)
        x = slow_layer(block, x, state, r)
        out.append(state.spread(x))
    return out


def slow(case: Case, model: Any, inputs: tuple, rates: tuple[int, ...], **options) -> Any:
    """The model's own way into its layers and out of them, with merging in between."""
    blocks = case.blocks(model)
    x = first_input(blocks, model, *inputs, **options)
    last = slow_layers(blocks, x, case.protected, rates, real_tokens(model, inputs))[-1]
    hook = blocks[-1].register_forward_hook(lambda *_: last)
    try:
        return case.answer(model(*inputs, **options))
    finally:
        hook.remove()


def real_tokens(model: Any, inputs: tuple) -> Tensor | None:
    """Which tokens are no padding; None: all."""
    return inputs[1] if isinstance(model, Flexible) and len(inputs) == 2 else None


def first_input(blocks: list, model: Any, *inputs, **options) -> Tensor:
    """Return what the first layer is given."""
    given: list[Tensor] = []
    hook = blocks[0].register_forward_pre_hook(lambda _block, args: given.append(args[0]))
    model(*inputs, **options)
    hook.remove()
    return given[0]


def both(result: Any) -> Tensor:
    """Return what is pooled of all tokens, and all tokens."""
    return torch.cat([result.pooler_output.flatten(1), result.last_hidden_state.flatten(1)], 1)


def build(make: Callable, kind: Any, attn_implementation: str, **options) -> Any:
    model = make(kind, **options)
    for module in model.children() if isinstance(model, (Paired, Flexible)) else (model,):
        module.set_attn_implementation(attn_implementation)
    return model


def layers_at(model: Any, path: str) -> nn.ModuleList:
    """A model's layers, also where they were before transformers 5.6: one module deeper in some families."""
    for name in path.split("."):
        if not hasattr(model, name):
            deeper = "encoder" if name == "layers" else "vision_model"
            model, name = getattr(model, deeper), "layer" if name == "layers" else name
        model = getattr(model, name)
    return model


def case(
    name: str,
    blocks: str,
    protected: int,
    make: Callable,
    kind: Any,
    answer: Any = lambda result: result if isinstance(result, Tensor) else result.logits,
    attn_implementation: str = "sdpa",
    compiled: bool = False,
    inputs: Callable[[int], tuple] = timm_cases.images,
    **options,
) -> Case:
    tokens, inputs = (128, videos) if make is videomae else (64 + protected, inputs)
    model = partial(build, make, kind, attn_implementation, **options)
    layers = partial(layers_at, path=blocks)

    def reference(model: Any, given: tuple, rates: tuple[int, ...]) -> Any:
        return slow(made, model, given, rates)

    made = Case(
        f"transformers-{name}", model, inputs, lambda model: list(layers(model)), protected, reference, answer, tokens,
        compiled, make is not Flexible or since(5, 24),
    )  # fmt: skip
    return made


EAGER = {"attn_implementation": "eager"}
CLIP, SIGLIP = ("vision_model.encoder.layers", 1, clip), ("vision_model.encoder.layers", 0, siglip)
# answers are pooled: where rounding makes other tokens merge, as autocast may, rows of single tokens jump
CASES = [
    case(
        "clip", "model.vision_model.encoder.layers", 1, clip, hf.CLIPModel, lambda result: result[:, :3], compiled=True
    ),
    case("clip-classifier", *CLIP, hf.CLIPForImageClassification),
    case("siglip", "encoder.layers", 0, siglip, hf.SiglipVisionModel, attrgetter("pooler_output")),
    case("siglip2", "model.vision_model.encoder.layers", 0, Flexible, hf.Siglip2ForImageClassification),
    case(
        "siglip2-padded", "model.encoder.layers", 0, Flexible, hf.Siglip2VisionModel, attrgetter("pooler_output"),
        compiled=True, inputs=padded,
    ),
    case("vit", "vit.layers", 1, vit, hf.ViTForImageClassification, compiled=True),
    case(
        "dinov2", "dinov2.encoder.layer", 1, dinov2, hf.Dinov2ForImageClassification, compiled=True,
        use_swiglu_ffn=True, **EAGER,
    ),
    case(
        "registers", "encoder.layer", 5, registers, hf.Dinov2WithRegistersModel, attrgetter("pooler_output")
    ),
    case("videomae", "videomae.encoder.layer", 0, videomae, hf.VideoMAEForVideoClassification, compiled=True),
]  # fmt: skip
# more of the same layers, for which one forward is enough; all tokens are looked at
MORE = [
    case("clip-vision", "encoder.layers", 1, clip, hf.CLIPVisionModel, both, **EAGER),
    case("clip-projection", *CLIP, hf.CLIPVisionModelWithProjection, attrgetter("last_hidden_state")),
    case("clip-both", "model.vision_model.encoder.layers", 1, clip, hf.CLIPModel),
    case("siglip-both", "model.vision_model.encoder.layers", 0, siglip, hf.SiglipModel),
    case("siglip-vision", "encoder.layers", 0, siglip, hf.SiglipVisionModel, both),
    case("siglip-classifier", *SIGLIP, hf.SiglipForImageClassification),
    case("siglip2-vision", "model.encoder.layers", 0, Flexible, hf.Siglip2VisionModel, both),
    case(
        "siglip2-padded-eager", "model.vision_model.encoder.layers", 0, Flexible, hf.Siglip2ForImageClassification,
        inputs=padded, **EAGER,
    ),
    case("vit-pooler", "layers", 1, vit, hf.ViTModel, both, qkv_bias=False, **EAGER),
    case("vit-masked", "vit.layers", 1, vit, hf.ViTForMaskedImageModeling, attrgetter("reconstruction")),
    case("dinov2-model", "encoder.layer", 1, dinov2, hf.Dinov2Model, both),
    case("registers-model", "encoder.layer", 5, registers, hf.Dinov2WithRegistersModel, both),
    case(
        "registers-classifier", "dinov2_with_registers.encoder.layer", 5, registers,
        hf.Dinov2WithRegistersForImageClassification,
    ),
    case(
        "videomae-model", "encoder.layer", 0, videomae, hf.VideoMAEModel, attrgetter("last_hidden_state"),
        use_mean_pooling=False, qv_bias=False,
    ),
    case(
        "videomae-first", "videomae.encoder.layer", 0, videomae, hf.VideoMAEForVideoClassification,
        use_mean_pooling=False,
    ),
]  # fmt: skip


# for the tests of what is special to these models

BY_NAME = {case.name.removeprefix("transformers-"): case for case in CASES + MORE}
FAMILIES = [BY_NAME[name] for name in ("clip-classifier", "siglip", "vit", "dinov2", "videomae")]
RATES = (0, 7, 3, 2)


def patched(model: Any, tome_r: tuple[int, ...] = RATES, **options) -> Any:
    return stk.apply_tome_patch(model, list(tome_r), **options)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
