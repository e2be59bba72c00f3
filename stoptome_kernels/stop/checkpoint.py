# SPDX-License-Identifier: Apache-2.0
"""Reading weights: STOP's checkpoints and plain CLIP's, and the half-precision form that upstream trains with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import checks
from . import archive, layouts
from .config import StopConfig

_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # next to the weights in OpenAI's archives
_UNUSED = ("visual.frame_embedding",)  # upstream has it with time_embedding, and never reads it
GELU = "uses_gelu"  # an entry of the state_dict of a StopModel of that activation
_WIDEST = 1024  # of CLIP's vision transformers, all that are wider have heads of 80 channels or more
_BLOCK = (
    "ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
    "attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)  # fmt: skip
_AROUND = (
    "visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight", "visual.ln_pre.weight",
    "visual.ln_pre.bias", "visual.ln_post.weight", "visual.ln_post.bias", "visual.proj", "token_embedding.weight",
    "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection", "logit_scale",
)  # fmt: skip


class ActivationUnknown(ValueError):
    """Weights that don't tell with which activation they were trained."""


class Loaded(NamedTuple):
    """Result of loading: names of parameters that were missing in the weights, and of weights that were not used."""

    missing: tuple[str, ...]
    left_over: tuple[str, ...]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the weights in a file by OpenAI's names: of a state_dict, a dictionary that holds one, or a TorchScript
    archive, of which the three numbers beside the weights are returned, too.

    Nothing in the file is run, see ``archive``; OpenAI's files of CLIP are TorchScript archives. Of a folder it is the
    file that ``layouts.weights_file`` finds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is of another kind, or holds no weights.
    """
    path = layouts.weights_file(path)
    found = archive.load(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no weights, but a {type(found).__name__}; give a saved state_dict")
    weights = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    for name in weights:
        if not isinstance(name, str):
            raise ValueError(f"{path} holds no state_dict: a key is {name!r:.80}, not a string")
    return _named(weights)


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by OpenAI's names, whoever wrapped and saved them."""
    return layouts.to_clip({_unwrapped(name): value for name, value in state.items()})


def _unwrapped(name: str) -> str:
    for prefix in ("module.", "_orig_mod.", "module.", "clip.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name


def strip_wrapper_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by their names without those of wrappers (``module.``, ``_orig_mod.``, ``clip.``), and without
    what is no weight of CLIP's."""
    named = {_unwrapped(name): value for name, value in state.items()}
    return {name: value for name, value in named.items() if name not in (*_NUMBERS, *_UNUSED)}


def told_activation(state: Mapping[str, Tensor]) -> str | None:
    """Return the activation that weights by OpenAI's names were trained with, or None where they don't tell."""
    if GELU in state:
        return "gelu"
    known = "visual.prompt_embeddings" in state or any(name in state for name in _NUMBERS)
    return "quick_gelu" if known else None  # STOP's and OpenAI's


def _activation(state: Mapping[str, Tensor], given: str | None) -> str:
    """Return the activation of weights, which must be told by them or given, and be the same if both."""
    told = told_activation(state)
    if told and given and told != given:
        raise ValueError(f"activation={given!r} was given, and the weights are of activation={told!r}: leave it out")
    if not told and not given:
        raise ActivationUnknown(
            "these weights may be of QuickGELU, as OpenAI's are, or of GELU, as many of open_clip's: give "
            "activation='quick_gelu' or activation='gelu'; a file without its config.json doesn't tell"
        )
    return told or given or ""


def with_settings_beside(
    path: str | os.PathLike, state: Mapping[str, Tensor], changes: dict[str, Any]
) -> dict[str, Any]:
    """Return ``changes`` with what a file of settings next to plain weights tells, see ``layouts.settings_beside``.

    Args:
        path: of the weights.
        state: of ``read_state_dict``.
        changes: fields of ``StopConfig``.

    Raises:
        ValueError: the settings can't be computed, or contradict ``changes``.
    """
    if told_activation(state) is not None or "token_embedding.weight" not in state:
        return changes
    told = layouts.settings_beside(layouts.weights_file(path), len(state["token_embedding.weight"]))
    for name, value in told.items():
        if changes.get(name, value) != value:
            raise ValueError(f"the settings next to it say {name}={value!r}, not {changes[name]!r}: leave that out")
    return told | changes


def _check_plain(state: Mapping[str, Tensor], layers: int, text_layers: int) -> None:
    """Raise ValueError unless weights are all that a CLIP has, with nothing more in its towers."""
    expected = {
        *_AROUND,
        *(f"visual.transformer.resblocks.{i}.{name}" for i in range(layers) for name in _BLOCK),
        *(f"transformer.resblocks.{i}.{name}" for i in range(text_layers) for name in _BLOCK),
    }
    for name in sorted(expected - {*state}):
        raise ValueError(f"not a CLIP ViT checkpoint: key {name!r} is missing")
    towers = ("visual.", "transformer.", "text", "vision")
    allowed = {*expected, *_UNUSED, "visual.position_ids"}
    for name in state:
        if name.startswith(towers) and name not in allowed:
            raise ValueError(f"not a CLIP ViT checkpoint: key {name!r} is none of CLIP's, and would be left out")


def infer_config(state: Mapping[str, Tensor], **changes) -> StopConfig:
    """Return the configuration that weights were made with; ``changes`` take precedence.

    Raises:
        ActivationUnknown: plain weights that don't tell theirs, without ``activation`` in ``changes``.
        ValueError: weights of something else; the message names what is missing.
    """
    state = _named(state)

    def of(name: str, dims: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"not a CLIP ViT checkpoint: key {name!r} is missing")
        shape = tuple(state[name].shape)
        if len(shape) != dims or 0 in shape:
            raise ValueError(f"not a CLIP ViT checkpoint: key {name!r} has shape {shape}, need {dims} axes, none empty")
        return shape

    def layers(prefix: str) -> int:
        names = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
        return len(names)

    width, _, patch, _ = of("visual.conv1.weight", 4)
    patches = of("visual.positional_embedding", 2)[0] - 1
    (text_width,) = of("ln_final.weight", 1)
    found: dict = {
        "patch_size": patch,
        "image_size": patch * round(patches**0.5),
        "width": width,
        "layers": layers("visual.transformer.resblocks."),
        "embed_dim": of("text_projection", 2)[1],
        "text_width": text_width,
        "text_heads": text_width // 64,
        "text_layers": layers("transformer.resblocks."),
        "vocab_size": of("token_embedding.weight", 2)[0],
        "context_length": of("positional_embedding", 2)[0],
        "lora": "visual.transformer.resblocks.0.LoRA.0.weight" in state or "visual.prompt_embeddings" not in state,
        "temporal_prompt": "group2-2" if "visual.TemporalPrompt.Cal_Net.weight" in state else "DGL",
    }
    if "visual.prompt_embeddings" not in state:
        _check_plain(state, found["layers"], found["text_layers"])
        if width > _WIDEST:
            raise ValueError(
                f"width is {width}, and CLIP's heads are of 64 channels only up to ViT-L, of width {_WIDEST}"
            )
        if text_width % 64 and "text_heads" not in changes:
            raise ValueError(f"ln_final.weight has {text_width} channels, no multiple of 64: give text_heads=…")
    found["activation"] = _activation(state, changes.get("activation"))
    if "visual.prompt_embeddings" not in state and (patch, patches, width) == (32, 49, 768):
        found["temporal_prompt"] = "group2-2"  # plain CLIP, to become STOP proper
    if "visual.prompt_embeddings" in state:
        found["global_prompts"] = of("visual.prompt_embeddings", 3)[1]
    if "visual_prompt_embedding" in state:
        _, prompts, deep = of("visual_prompt_embedding", 3)
        found |= {
            "shared_latent_space": "linear", "frame_prompts": prompts, "text_prompts": 2 * prompts,
            "prompt_layers": deep // width,
        }  # fmt: skip
    elif "unified_prompt_embedding.weight" in state:
        table = of("unified_prompt_embedding.weight", 2)
        # text_prompts + frames · frame_prompts rows: two of the three must be known, and STOP's are 8 and 4
        prompts = checks.count(changes.get("frame_prompts", 4), "frame_prompts", "a size of the model", 1)
        text = checks.count(changes.get("text_prompts", 8), "text_prompts", "a size of the model")
        frames, rest = divmod(table[0] - text, prompts)
        if rest or frames < 1:
            raise ValueError(
                f"unified_prompt_embedding has {table[0]} rows, which are not {text} text prompts plus {prompts} per "
                "frame; give text_prompts=… and frame_prompts=…"
            )
        found |= {"frames": frames, "prompt_layers": table[1] // width}
    found["max_words"] = min(32, found["context_length"])
    return StopConfig(**found | changes)


def load_clip(model: Any, state: Mapping[str, Tensor], activation: str | None = None) -> Loaded:
    """Load what the model has; see ``StopModel.load_clip``."""
    named, own = _named(state), model.state_dict()
    state = strip_wrapper_prefixes(named)
    for name, value in state.items():
        if name in own and own[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in the weights and {tuple(own[name].shape)} in the model: the "
                "weights are for another StopConfig; StopModel.from_checkpoint infers it from them"
            )
        if name in own and own[name].is_floating_point() != value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype} in the weights, {own[name].dtype} in the model; convert it")
    known = {name: value for name, value in state.items() if name in own}
    if not known:
        raise ValueError("none of these weights has the name of a parameter; give weights of CLIP or STOP")
    if (theirs := _activation(named, activation)) != model.config.activation:
        raise ValueError(f"the weights are for StopConfig(activation={theirs!r})")
    nn.Module.load_state_dict(model, known, strict=False)
    missing = tuple(name for name in own if name not in state and not name.endswith(("position_ids", GELU)))
    if "visual.prompt_embeddings" not in state:  # plain CLIP
        for name, parameter in model.named_parameters():
            if name in known:
                parameter.requires_grad_(False)
    return Loaded(missing, tuple(name for name in state if name not in own))


def convert_weights(model: nn.Module) -> nn.Module:
    """Convert a model to the half precision in which CLIP's weights are distributed, in place.

    Weights and biases of linear layers, convolutions, attention and projections become float16; LayerNorms, embeddings
    and prompts stay float32.

    Args:
        model: any module.

    Returns:
        The model itself.
    """
    halves = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    for module in model.modules():
        names = ["text_projection", "proj"]
        if isinstance(module, halves):
            names += ["weight", "bias"]
        if isinstance(module, nn.MultiheadAttention):
            names += ["in_proj_weight", "in_proj_bias", "bias_k", "bias_v"]
        for name in names:
            value = module._parameters.get(name)
            if value is not None:
                value.data = value.data.half()
    return model
