# SPDX-License-Identifier: Apache-2.0
"""A DINOv2 of a few channels with random weights, and what it computes, in plain operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.trained import dinov2

WIDTH, HEADS, DECODED = 48, 6, (16, 8, 4)


def random_weights() -> dinov2.Weights:
    """Return weights by the names that ``dinov2.weights_of`` gives them, so large that every part of a layer counts."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(shape, generator=rng)

    found = {
        "backbone.embeddings.cls_token": normal(1, 1, WIDTH),
        "backbone.embeddings.position_embeddings": normal(1, 257, WIDTH),
        "backbone.embeddings.patch_embeddings.projection.weight": normal(WIDTH, 3, 14, 14, scale=0.05),
        "backbone.embeddings.patch_embeddings.projection.bias": normal(WIDTH),
    }
    linear = {"attention.attention.query": (WIDTH, WIDTH), "attention.attention.key": (WIDTH, WIDTH),
              "attention.attention.value": (WIDTH, WIDTH), "attention.output.dense": (WIDTH, WIDTH),
              "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}  # fmt: skip
    for layer in range(dinov2.LAYERS):
        at = f"backbone.encoder.layer.{layer}."
        for name, shape in linear.items():
            found[f"{at}{name}.weight"], found[f"{at}{name}.bias"] = normal(*shape, scale=0.15), normal(shape[0])
        for name in ("norm1", "norm2"):
            found[f"{at}{name}.weight"], found[f"{at}{name}.bias"] = 1 + normal(WIDTH), normal(WIDTH)
        for name in ("layer_scale1", "layer_scale2"):
            found[f"{at}{name}.lambda1"] = 0.5 + normal(WIDTH)
    found["backbone.layernorm.weight"], found["backbone.layernorm.bias"] = 1 + normal(WIDTH), normal(WIDTH)
    channels = [WIDTH, *DECODED]
    for place in (1, 2, 3):
        before, after = channels[place - 1 : place + 1]
        found[f"decoder.upconv{place}.weight"] = normal(before, after, 4, 4, scale=0.05)
        found[f"decoder.upconv{place}.bias"] = normal(after)
        found[f"decoder.bn{place}.weight"], found[f"decoder.bn{place}.bias"] = 1 + normal(after), normal(after)
        found[f"decoder.bn{place}.running_mean"] = normal(after)
        found[f"decoder.bn{place}.running_var"] = 1 + normal(after).abs()
    return found | {"decoder.final_conv.weight": normal(1, DECODED[-1], 1, 1), "decoder.final_conv.bias": normal(1)}


def run_plainly(weights: dinov2.Weights, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens ``(N, 257, D)`` and saliency ``(N, 224, 224)`` of pictures, operation by operation."""
    w = {name.replace("backbone.", "").replace("encoder.layer.", ""): value for name, value in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    projection = "embeddings.patch_embeddings.projection"
    x = F.conv2d(pictures, w[f"{projection}.weight"], w[f"{projection}.bias"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["embeddings.cls_token"].expand(len(x), 1, -1), x], 1) + w["embeddings.position_embeddings"]
    for layer in range(dinov2.LAYERS):
        normed = norm(x, f"{layer}.norm1")
        q, k, v = (
            linear(normed, f"{layer}.attention.attention.{name}").unflatten(2, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        weight = (q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).softmax(3)
        attended = linear((weight @ v).transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = x + w[f"{layer}.layer_scale1.lambda1"] * attended
        hidden = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + w[f"{layer}.layer_scale2.lambda1"] * linear(hidden, f"{layer}.mlp.fc2")
    tokens = norm(x, "layernorm")
    y = tokens[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
    for place in (1, 2, 3):
        y = F.conv_transpose2d(y, w[f"decoder.upconv{place}.weight"], w[f"decoder.upconv{place}.bias"], 2, 1)
        moments = w[f"decoder.bn{place}.running_mean"], w[f"decoder.bn{place}.running_var"]
        y = F.batch_norm(y, *moments, w[f"decoder.bn{place}.weight"], w[f"decoder.bn{place}.bias"]).relu()
    y = F.conv2d(y, w["decoder.final_conv.weight"], w["decoder.final_conv.bias"])
    return tokens, F.interpolate(y, (224, 224), mode="bilinear")[:, 0].sigmoid()
