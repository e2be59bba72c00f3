# SPDX-License-Identifier: Apache-2.0
"""The sizes of a STOP model."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from .temporal import SALIENT

TEMPORAL_PROMPTS = ("group2-2", "DGL")
LATENT_SPACES = ("transformer", "linear")
VISUAL_OUTPUTS = (
    "global_prompt0",
    "average_global_prompt",
    "average_frame_cls_token",
    "average_global_prompt_and_frame_cls_token",
    "global-local-feature",
)
ACTIVATIONS = ("quick_gelu", "gelu")
_CHOICES = {
    "activation": ACTIVATIONS,
    "temporal_prompt": TEMPORAL_PROMPTS,
    "shared_latent_space": LATENT_SPACES,
    "visual_output": VISUAL_OUTPUTS,
}


@dataclass(frozen=True)
class StopConfig:
    """Sizes of a STOP model; the defaults are those of STOP on CLIP's ViT-B/32.

    Attributes:
        image_size: side of an image in pixels.
        patch_size: side of a patch in pixels.
        width: embedding dimension of the visual transformer, which has ``width // 64`` heads.
        layers: number of layers of the visual transformer.
        embed_dim: dimension of the common space of texts and videos (E).
        frames: number of frames of a video (T).
        global_prompts: number of prompts of a video (G).
        frame_prompts: number of prompts of each frame and layer (P).
        text_prompts: number of prompts of each text and layer, half of them before the words and half after.
        text_width: embedding dimension of the text transformer.
        text_heads: number of heads of the text transformer.
        text_layers: number of layers of the text transformer.
        vocab_size: number of tokens in the vocabulary.
        context_length: number of positions of the text transformer.
        max_words: number of tokens of a text.
        temporal_prompt: ``group2-2`` is STOP as published; ``DGL`` omits the dynamic prompts. STOP was published with
            ViT-B/32's image_size, patch_size and width and 4 frame prompts; other sizes are this package's extension.
        shared_latent_space: source of the deep prompts, a small ``transformer`` or ``linear`` layers.
        visual_output: feature of a video, see ``StopModel.encode_video``.
        lora: whether blocks have a low-rank branch next to the MLP.
        activation: of the MLPs of CLIP's blocks, ``quick_gelu`` as OpenAI trained CLIP, or ``gelu``, as many of
            open_clip's weights want. With the wrong one weights load and compute something else.
        prompt_layers: number of layers with prompts of their own; None for that of the deeper tower.
        fast_prompts: whether the dynamic prompts of ``group2-2`` are computed by ``fft_conv3d`` and what is read of it;
            False for torch's ``conv3d`` and the published steps one by one. The same up to rounding.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    embed_dim: int = 512
    frames: int = 12
    global_prompts: int = 4
    frame_prompts: int = 4
    text_prompts: int = 8
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    max_words: int = 32
    temporal_prompt: str = "group2-2"
    shared_latent_space: str = "transformer"
    visual_output: str = "global_prompt0"
    lora: bool = True
    activation: str = "quick_gelu"
    prompt_layers: int | None = None
    fast_prompts: bool = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name, value in list(vars(self).items()):
            least = 0 if name == "text_prompts" else 1
            if name in (*_CHOICES, "lora", "fast_prompts") or value is None:
                continue
            number = checks.count(value, name, "a size of the model", least)
            object.__setattr__(self, name, number)  # NumPy's ints are held as Python's
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size = {self.patch_size}, got {self.image_size}")
        if self.width % 64:
            raise ValueError(f"width must be a multiple of 64, the head dimension, got {self.width}")
        if self.text_width % self.text_heads:
            raise ValueError(f"text_width must be a multiple of text_heads = {self.text_heads}, got {self.text_width}")
        if self.text_prompts % 2:
            raise ValueError(f"text_prompts must be even (half before, half after the words), got {self.text_prompts}")
        if self.max_words > self.context_length:
            raise ValueError(f"max_words must be at most context_length = {self.context_length}, got {self.max_words}")
        deepest = max(self.layers, self.text_layers)
        if self.prompt_layers is not None and self.prompt_layers < deepest:
            raise ValueError(f"prompt_layers must be at least {deepest}, one for each layer, got {self.prompt_layers}")
        if self.shared_latent_space == "linear" and self.text_prompts != 2 * self.frame_prompts:
            raise ValueError(
                f"with shared_latent_space='linear' each frame prompt gives one text prompt before the words and one "
                f"after: text_prompts must be {2 * self.frame_prompts}, got {self.text_prompts}"
            )
        if self.temporal_prompt == "group2-2" and self.patches <= SALIENT:
            raise ValueError(
                f"temporal_prompt='group2-2' tells {SALIENT} salient patches of a frame from the rest, and image_size "
                f"and patch_size give {self.patches}; use temporal_prompt='DGL'"
            )

    @property
    def patches(self) -> int:
        """Number of patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def deep(self) -> int:
        """Number of layers with prompts of their own."""
        return self.prompt_layers or max(self.layers, self.text_layers)
