# SPDX-License-Identifier: Apache-2.0
"""Reading weights: STOP's checkpoints and plain CLIP's, and the half-precision form that upstream trains with."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import StopConfig

_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # beside the weights in OpenAI's archives
_UNUSED = ("visual.frame_embedding",)  # upstream has it with time_embedding, and never reads it


class Loaded(NamedTuple):
    """What loading found: parameters of the model that the weights don't have, and weights that it has no use for."""

    missing: tuple[str, ...]
    left_over: tuple[str, ...]


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in a file: a state_dict, a dictionary that holds one, or a TorchScript archive (OpenAI's CLIP)."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        found = _archive(path, error)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no weights, but a {type(found).__name__}")
    return own_names({name: value for name, value in found.items() if isinstance(value, Tensor)})


def _archive(path: str, error: Exception) -> Mapping:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; these files are what OpenAI gives out
        try:
            return torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path} can't be read as weights ({reason}); save the state_dict alone, not the model"
            ) from error


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without those of wrappers (``module.``, ``_orig_mod.``, ``clip.``) and what is no weight of CLIP's."""
    found = {}
    for name, value in state.items():
        for prefix in ("module.", "_orig_mod.", "module.", "clip.", "_orig_mod."):
            name = name.removeprefix(prefix)
        if name not in (*_NUMBERS, *_UNUSED):
            found[name] = value
    return found


def config_of(state: Mapping[str, Tensor], **changes) -> StopConfig:
    """The configuration that weights were made with; ``changes`` take precedence.

    Raises:
        ValueError: weights of something else; the message names what is missing.
    """

    def of(name: str) -> Tensor:
        if name not in state:
            raise ValueError(f"these weights are no CLIP with a vision transformer: {name} is missing")
        return state[name]

    def layers(prefix: str) -> int:
        names = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
        return len(names)

    width, _, patch, _ = of("visual.conv1.weight").shape
    patches = of("visual.positional_embedding").shape[0] - 1
    text_width = of("ln_final.weight").shape[0]
    found: dict = {
        "patch_size": patch,
        "image_size": patch * round(patches**0.5),
        "width": width,
        "layers": layers("visual.transformer.resblocks."),
        "embed_dim": of("text_projection").shape[1],
        "text_width": text_width,
        "text_heads": text_width // 64,
        "text_layers": layers("transformer.resblocks."),
        "vocab_size": of("token_embedding.weight").shape[0],
        "context_length": of("positional_embedding").shape[0],
        "lora": "visual.transformer.resblocks.0.LoRA.0.weight" in state or "visual.prompt_embeddings" not in state,
        "temporal_prompt": "group2-2" if "visual.TemporalPrompt.Cal_Net.weight" in state else "DGL",
    }
    if "visual.prompt_embeddings" not in state and (patch, patches, width) == (32, 49, 768):
        found["temporal_prompt"] = "group2-2"  # plain CLIP, to become STOP proper
    if "visual.prompt_embeddings" in state:
        found["global_prompts"] = state["visual.prompt_embeddings"].shape[1]
    if "visual_prompt_embedding" in state:
        _, prompts, deep = state["visual_prompt_embedding"].shape
        found |= {
            "shared_latent_space": "linear", "frame_prompts": prompts, "text_prompts": 2 * prompts,
            "prompt_layers": deep // width,
        }  # fmt: skip
    elif "unified_prompt_embedding.weight" in state:
        table = state["unified_prompt_embedding.weight"]
        # text_prompts + frames · frame_prompts rows: two of the three must be known, and STOP's are 8 and 4
        prompts, text = changes.get("frame_prompts", 4), changes.get("text_prompts", 8)
        frames, rest = divmod(table.shape[0] - text, prompts)
        if rest or frames < 1:
            raise ValueError(
                f"unified_prompt_embedding has {table.shape[0]} rows, which are not {text} text prompts and {prompts} "
                "for each frame; give text_prompts=… and frame_prompts=…"
            )
        found |= {"frames": frames, "prompt_layers": table.shape[1] // width}
    found["max_words"] = min(32, found["context_length"])
    return StopConfig(**found | changes)


def load_clip(model: nn.Module, state: Mapping[str, Tensor]) -> Loaded:
    """Load what the model has; see :meth:`StopModel.load_clip`."""
    state, own = own_names(state), model.state_dict()
    for name, value in state.items():
        if name in own and own[name].shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} in the weights and {tuple(own[name].shape)} in the model: they were "
                "made for another StopConfig; StopModel.from_checkpoint reads it off the weights"
            )
    known = {name: value for name, value in state.items() if name in own}
    if not known:
        raise ValueError("none of these weights has the name of a parameter of the model")
    nn.Module.load_state_dict(model, known, strict=False)
    missing = tuple(name for name in own if name not in state and not name.endswith("position_ids"))
    if "visual.prompt_embeddings" not in state:  # plain CLIP
        for name, parameter in model.named_parameters():
            if name in known:
                parameter.requires_grad_(False)
    return Loaded(missing, tuple(name for name in state if name not in own))


def convert_weights(model: nn.Module) -> nn.Module:
    """Make matrices and biases of products float16 and leave LayerNorms, embeddings and prompts float32, as CLIP's
    weights are distributed. Works on any model; returns it."""
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
