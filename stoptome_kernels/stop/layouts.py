# SPDX-License-Identifier: Apache-2.0
"""CLIP as other libraries save it: the names of its weights, and the settings that lie next to them.

Weights don't tell what they compute. open_clip and transformers build CLIP with QuickGELU or with GELU, with heads of
64 channels or of 80, and keep that in a file of settings. Whatever of it ``StopModel`` can't compute is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..normalization import CLIP

_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_INDEX = ".index.json"
_LARGEST = 1 << 20  # bytes of a file of settings
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}  # hidden_act of transformers, as StopConfig has them

# -- names ------------------------------------------------------------------------------------------------------------

_TRANSFORMERS = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.(weight|bias)", r"visual.ln_pre.\1"),  # spelled so there
    (r"vision_model\.post_layernorm\.(weight|bias)", r"visual.ln_post.\1"),
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(weight|bias)", r"ln_final.\1"),
    (r"vision_model\.encoder\.layers\.(\d+\..+)", r"visual.transformer.resblocks.\1"),
    (r"text_model\.encoder\.layers\.(\d+\..+)", r"transformer.resblocks.\1"),
)
_IN_A_BLOCK = (
    (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."), (".self_attn.out_proj.", ".attn.out_proj."),
)  # fmt: skip
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def to_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of open_clip or transformers by OpenAI's names; weights that have these stay as they are."""
    if "text.token_embedding.weight" in state:  # open_clip's CustomTextCLIP
        return {name.removeprefix("text."): value for name, value in state.items()}
    if "text_model.embeddings.token_embedding.weight" in state:
        return _of_transformers(state)
    return dict(state)


def _of_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        if name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.t()
        elif projection := re.fullmatch(r"(.+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [f"{projection[1]}.self_attn.{part}_proj.{projection[2]}" for part in "qkv"]
            if all(part in state for part in parts):
                found[_renamed(f"{projection[1]}.attn.in_proj_{projection[2]}")] = torch.cat([state[p] for p in parts])
        elif not re.search(r"\.self_attn\.[kv]_proj\.|\.position_ids$", name):
            found[_renamed(name)] = value
    return found


def _renamed(name: str) -> str:
    for theirs, ours in _IN_A_BLOCK:
        name = name.replace(theirs, ours)
    for pattern, ours in _TRANSFORMERS:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return name


# -- files ------------------------------------------------------------------------------------------------------------


def weights_file(path: str | os.PathLike) -> str:
    """Return the file of weights in a folder as transformers and open_clip save it; a path to none is returned as it
    is.

    Raises:
        ValueError: no weights in the folder, or weights in several files.
    """
    path = os.fspath(path)
    if path.endswith(_INDEX):
        raise _in_parts(path)
    if not os.path.isdir(path):
        return path
    for name in _FILES:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
        if os.path.isfile(os.path.join(path, name + _INDEX)):
            raise _in_parts(os.path.join(path, name + _INDEX))
    raise ValueError(f"{path} can't be read as weights (a folder without {', '.join(_FILES)}); give a file of weights")


def _in_parts(path: str) -> ValueError:
    return ValueError(
        f"{path} can't be read as weights (it lists the parts of a sharded checkpoint); save it as one file, in "
        "transformers by model.save_pretrained(folder, max_shard_size='100GB')"
    )


# -- settings ---------------------------------------------------------------------------------------------------------


def settings_beside(path: str | os.PathLike, vocabulary: int) -> dict[str, Any]:
    """Return what ``open_clip_config.json`` or ``config.json`` next to a file of weights tell: the fields
    ``activation`` and ``text_heads`` of ``StopConfig``; nothing where there is neither.

    Args:
        path: of the weights.
        vocabulary: number of tokens that they have.

    Raises:
        ValueError: settings that ``StopModel`` can't compute, or that contradict each other; the message names the file
            and the setting.
    """
    folder = os.path.dirname(os.fspath(path))
    found: dict[str, Any] = {}
    for name in ("open_clip_config.json", "config.json"):
        settings = _read(os.path.join(folder, name))
        try:
            told: dict[str, Any] = {}
            if name != "config.json" and settings is not None:
                told = _of_open_clip(settings)
            elif settings is not None and "model_type" in settings:  # others, such as timm's, have no such key
                told = _of_clip_config(settings, vocabulary)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{name} next to the weights: {error}") from error
        if found and told and found != told:
            raise ValueError(
                f"{folder}: open_clip_config.json and config.json next to the weights contradict each other; leave the "
                "one that is theirs"
            )
        found = found or told
    images = _read(os.path.join(folder, "preprocessor_config.json"))
    if found and images is not None:
        _check_images(images.get("image_mean"), images.get("image_std"), "preprocessor_config.json")
    return found


def _read(path: str) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is no such file."""
    try:
        with open(path, "rb") as file:
            settings = json.loads(file.read(_LARGEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}, next to the weights, can't be read; repair it or take it away") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}, next to the weights, holds no settings; repair it or take it away")
    return settings


def _of_clip_config(settings: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return what the config.json of a model of transformers tells; what it leaves out has CLIPConfig's defaults."""
    if settings["model_type"] != "clip":
        raise ValueError(f"model_type is {settings['model_type']!r}; only 'clip' can be read")
    # files of old have the settings of a tower twice; transformers prefers these
    vision, text = (
        settings.get(f"{of}_config_dict") or settings.get(f"{of}_config") or {} for of in ("vision", "text")
    )
    acts = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    if len(acts) > 1 or not acts <= _ACTIVATIONS.keys():
        raise ValueError(
            f"hidden_act is {', '.join(map(repr, sorted(acts)))}; both towers must have 'gelu' or 'quick_gelu'"
        )
    for tower in (vision, text):
        if tower.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"layer_norm_eps is {tower['layer_norm_eps']!r}; only 1e-5 can be computed")
    _check_heads(vision.get("hidden_size", 768), vision.get("num_attention_heads", 12))
    end = text.get("eos_token_id", vocabulary - 1)
    if end not in (2, vocabulary - 1):  # 2 was written into files in which the last token ends a text
        raise ValueError(f"eos_token_id is {end!r}; only the last token, {vocabulary - 1}, can end a text")
    return {"activation": _ACTIVATIONS[acts.pop()], "text_heads": text.get("num_attention_heads", 8)}


# settings of open_clip's towers that shapes tell or that change no feature, and what others must be
_FREE = {
    "image_size", "layers", "width", "patch_size", "mlp_ratio", "patch_dropout", "output_tokens", "context_length",
    "vocab_size", "heads", "pad_id", "attn_pooler_queries", "attn_pooler_heads", "embed_dim", "quick_gelu",
    "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "output_dict", "cast_dtype",
}  # fmt: skip
_VISION = {"head_width": 64, "pool_type": "tok", "pos_embed_type": "learnable"}
_TEXT = {"pool_type": "argmax", "proj_type": "linear"}


def _of_open_clip(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an open_clip_config.json tells."""
    model, images = settings.get("model_cfg", settings), settings.get("preprocess_cfg", {})
    vision, text = model["vision_cfg"], model["text_cfg"]
    for tower, plain in ((model, {}), (vision, _VISION), (text, _TEXT)):
        for name, value in tower.items():
            if name not in _FREE and (value != plain[name] if name in plain else value):
                raise ValueError(f"{name} is {value!r:.60}; only a plain CLIP of OpenAI's form can be computed")
    _check_images(images.get("mean"), images.get("std"), "preprocess_cfg")
    return {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu", "text_heads": text.get("heads", 8)}


def _check_heads(width: int, heads: int) -> None:
    if width != 64 * heads:
        raise ValueError(f"num_attention_heads is {heads} at width {width}; only heads of 64 channels can be computed")


def _check_images(mean: Any, deviation: Any, where: str) -> None:
    """Raise ValueError where images were normalised in another way than CLIP's, which videos are for StopModel."""
    for told, ours in ((mean, CLIP[0]), (deviation, CLIP[1])):
        if told is not None and any(abs(a - b) > 1e-4 for a, b in zip(told, ours, strict=True)):
            raise ValueError(
                f"images were normalised by {told}, as {where} says, and not by CLIP's {ours}; give weights that were "
                "trained so"
            )
