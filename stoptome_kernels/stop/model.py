# SPDX-License-Identifier: Apache-2.0
"""STOP: text-video retrieval with prompts in CLIP's two towers (Liu et al., CVPR 2025, arXiv 2503.15973)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patch import apply_tome_patch
from ..patching.guards import may_read_weights
from ..tome.config import ToMeConfig
from . import checkpoint
from .archive import one_line
from .config import StopConfig
from .layers import LayerNorm, QuickGELU, TextBlock, Transformer
from .tower import VisualTransformer


class StopModel(nn.Module):
    """STOP with upstream's parameter names and visual blocks that use this package's operators.

    ``state_dict()`` has the names and shapes of upstream's CLIP, and ``load_state_dict`` takes a STOP checkpoint with
    or without the prefix ``clip.``; see ``from_checkpoint`` and ``load_clip``. With ``activation="gelu"``, which
    upstream doesn't have, there is one entry more, ``uses_gelu``, by which such weights are known again. Token merging
    is switched on by ``stoptome_kernels.apply_tome_patch``.

    Args:
        config: sizes of the model; None for those of STOP on ViT-B/32.
    """

    loaded: checkpoint.Loaded  # of from_checkpoint

    def __init__(self, config: StopConfig | None = None):
        super().__init__()
        config = config or StopConfig()
        if not isinstance(config, StopConfig):
            raise TypeError(f"config must be a StopConfig, got {type(config).__name__}")
        self.config = c = config
        self.visual = VisualTransformer(config)
        self.transformer = Transformer(
            [TextBlock(c.text_width, c.text_heads, c.lora, c.activation) for _ in range(c.text_layers)]
        )
        if c.activation == "gelu":  # in the state_dict, which would not tell otherwise
            self.register_buffer(checkpoint.GELU, torch.ones((), dtype=torch.int64))
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.text_width))
        self.ln_final = LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.empty(c.text_width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.ones([]))
        if c.shared_latent_space == "transformer":
            self.unified_prompt_mlp = nn.Sequential(
                OrderedDict(
                    c_fc=nn.Linear(c.width, 2 * c.width), gelu=QuickGELU(), c_proj=nn.Linear(2 * c.width, c.text_width)
                )
            )
            self.PromptTransformer = Transformer([TextBlock(c.width, c.width // 64)])
            self.unified_prompt_embedding = nn.Embedding(c.text_prompts + c.frames * c.frame_prompts, c.width * c.deep)
        else:
            self.visual_prompt_embedding = nn.Parameter(torch.empty(1, c.frame_prompts, c.deep * c.width))
            bound = (6 / (3 * c.patch_size**2 + c.width)) ** 0.5
            nn.init.uniform_(self.visual_prompt_embedding, -bound, bound)
            self.prefix_text_prompt_proj_layer = nn.Linear(c.width, c.text_width)
            self.postfix_text_prompt_proj_layer = nn.Linear(c.width, c.text_width)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise the text tower as CLIP does (Radford et al., 2021)."""
        width, layers = self.config.text_width, self.config.text_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        block: Any
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def encode_prompts(self) -> tuple[Tensor, Tensor]:
        """Compute the deep prompts of both towers, which are the same for every sample.

        Returns:
            Text prompts ``(layers, text_prompts, text_width)`` and visual prompts ``(layers, 1, T, P, width)``, or
            ``(layers, 1, 1, P, width)`` where all frames share them (``shared_latent_space="linear"``).
        """
        c, dtype = self.config, self.visual.conv1.weight.dtype
        if c.shared_latent_space == "linear":
            visual = self.visual_prompt_embedding.to(dtype).view(c.frame_prompts, c.deep, c.width).transpose(0, 1)
            sides = [self.prefix_text_prompt_proj_layer(visual), self.postfix_text_prompt_proj_layer(visual)]
            return torch.cat(sides, 1), visual[:, None, None]
        embedding = self.unified_prompt_embedding
        rows = embedding.weight  # the whole table: a call, which adapters and hooks want, would copy it
        if type(embedding) is not nn.Embedding or not may_read_weights(embedding):
            rows = embedding(torch.arange(c.text_prompts + c.frames * c.frame_prompts, device=rows.device))
        table = rows.to(dtype).view(-1, c.deep, c.width).transpose(0, 1)
        mixed = self.PromptTransformer.resblocks[0](table, causal=False)
        text = self.unified_prompt_mlp(mixed[:, : c.text_prompts])
        return text, mixed[:, c.text_prompts :].unflatten(1, (1, c.frames, c.frame_prompts))

    # -- towers -------------------------------------------------------------------------------------------------------

    def encode_video(self, video: Tensor) -> Tensor:
        """Return the feature of each video.

        Args:
            video: ``(B, T, 3, H, W)``, floating dtype, with CLIP's normalisation and T = ``config.frames``.

        Returns:
            Depending on ``config.visual_output``: ``(B, 1, E)`` for ``global_prompt0``; ``(B, 1 + T, E)``, the first
            global prompt and the class tokens, for ``global-local-feature``; ``(B, E)`` for the averages over global
            prompts, class tokens, or both.

        Raises:
            TypeError, ValueError: ``video`` has another type, dtype or shape.
        """
        c = self.config
        if not isinstance(video, Tensor) or not video.is_floating_point():
            what = f"{video.dtype} tensor" if isinstance(video, Tensor) else type(video).__name__
            raise TypeError(f"video must be a floating-point tensor (B, T, 3, H, W), got {what}")
        if (
            video.dim() != 5
            or video.shape[0] == 0
            or tuple(video.shape[1:]) != (c.frames, 3, c.image_size, c.image_size)
        ):
            raise ValueError(
                f"video must have shape (B, {c.frames}, 3, {c.image_size}, {c.image_size}), got {tuple(video.shape)}"
            )
        seen = self.visual(video, self.encode_prompts()[1])
        prompts, classes = seen[:, : c.global_prompts], seen[:, c.global_prompts :]
        if c.visual_output == "global_prompt0":
            return prompts[:, :1]
        if c.visual_output == "global-local-feature":
            return torch.cat([prompts[:, :1], classes], 1)
        if c.visual_output == "average_global_prompt":
            return prompts.mean(1)
        return classes.mean(1) if c.visual_output == "average_frame_cls_token" else seen.mean(1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return the feature of each text.

        Args:
            ids: ``(B, W)`` integers from CLIP's tokenizer: start token, words, end token (the largest id), then 0.

        Returns:
            ``(B, E)``, taken at the end token.

        Raises:
            TypeError, ValueError: ``ids`` has another type, dtype or shape.
        """
        c = self.config
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
            what = f"{ids.dtype} tensor" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids must be an integer tensor (B, W), got {what}")
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= c.context_length:
            raise ValueError(f"ids must have shape (B, W) with 1 <= W <= {c.context_length}, got {tuple(ids.shape)}")
        deep, half, words = self.encode_prompts()[0], c.text_prompts // 2, ids.shape[1]
        dtype = self.visual.conv1.weight.dtype
        x = self.token_embedding(ids).to(dtype) + self.positional_embedding[:words].to(dtype)
        first, rest = x[:, :1], x[:, 1:]
        for layer, block in enumerate(self.transformer.resblocks):
            prompts = deep[layer].to(x.dtype).expand(x.shape[0], -1, -1)
            x = block(torch.cat([first, prompts[:, :half], rest, prompts[:, half:]], 1))
            first, rest = x[:, :1], x[:, 1 + half : half + words]
        # the end token is the largest id; the prompts stand before it, unless it is the first token
        place = ids.argmax(1)
        place = torch.where(place > 0, place + half, place)
        x = layer_norm_at(self.ln_final, x, place)
        return x @ self.text_projection

    def similarity(self, text: Tensor, video: Tensor) -> Tensor:
        """Return ``exp(logit_scale)`` times the cosine similarity of every text and every video.

        Args:
            text: ``(A, E)``, features of texts.
            video: ``(B, E)``, features of videos, or ``(B, k, E)``, whose k features are normalised, then averaged.

        Returns:
            ``(A, B)``.

        Raises:
            ValueError: the last axis of an argument is not E.
        """
        for value, name in ((text, "text"), (video, "video")):
            if value.shape[-1] != self.config.embed_dim:
                raise ValueError(f"{name} must have {self.config.embed_dim} channels, got shape {tuple(value.shape)}")
        wide = torch.float64 if torch.float64 in (text.dtype, video.dtype) else torch.float32
        text, video = F.normalize(text.to(wide), dim=-1), F.normalize(video.to(wide), dim=-1)
        if video.dim() == 3:
            video = F.normalize(video.mean(1), dim=-1)
        return self.logit_scale.exp() * text @ video.t()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Load weights as ``nn.Module`` does; names may have upstream's prefixes ``clip.`` and ``module.``.

        Args:
            state_dict: weights by name.
            strict: as in ``nn.Module.load_state_dict``.
            assign: as in ``nn.Module.load_state_dict``.
        """
        state = checkpoint.strip_wrapper_prefixes(state_dict)
        if checkpoint.GELU in state and self.config.activation != "gelu":
            raise ValueError("the weights are for StopConfig(activation='gelu')")
        return super().load_state_dict(state, strict, assign)

    def load_clip(self, state_dict: Mapping[str, Tensor], activation: str | None = None) -> checkpoint.Loaded:
        """Load the weights whose names the model has; they may be OpenAI's, open_clip's or those of transformers.

        Plain CLIP weights (without prompts) become the frozen backbone: loaded parameters get
        ``requires_grad=False``, all others keep their initial values and are trained.

        Args:
            state_dict: weights by name.
            activation: of plain weights that don't tell theirs, see ``from_checkpoint``.

        Returns:
            Names of parameters that were missing in the weights, and of weights that were not used.

        Raises:
            ValueError: a weight has another shape, or none has the name of a parameter; the message names the first.
                Or the weights are of another activation than the model, or don't tell theirs.
        """
        return checkpoint.load_clip(self, state_dict, activation)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, tome: ToMeConfig | None = None, **changes) -> StopModel:
        """Return a model with the weights of a STOP checkpoint or of plain CLIP weights.

        The configuration is inferred from the weights; ``changes`` are fields of ``StopConfig`` that they don't
        determine (``frames``, ``visual_output``, ``max_words`` …). Nothing in the file is run.

        CLIP may be OpenAI's, open_clip's (``CLIP`` and ``CustomTextCLIP``) or transformers' ``CLIPModel``, with vision
        transformers whose heads have 64 channels: those up to ViT-L. Their MLPs have one of two activations, which
        weights alone don't tell. It is known of STOP's checkpoints and of OpenAI's archives, which hold
        ``input_resolution``, ``context_length`` and ``vocab_size`` too. Of others ``open_clip_config.json`` or
        ``config.json`` next to the file must tell it, or ``activation`` in ``changes``. A state_dict of OpenAI's names
        without those three numbers may be of either kind, since open_clip uses the same names.

        Args:
            path: file of ``torch.save`` or safetensors, a TorchScript archive such as OpenAI's, or a folder as
                ``save_pretrained`` writes it.
            tome: settings to patch the model with before the weights are loaded, so that frame embeddings are loaded,
                too.

        Returns:
            The model; ``model.loaded`` has the names of missing parameters and of unused weights.

        Raises:
            FileNotFoundError, ValueError: no such file, no such weights in it, or weights that don't tell their
                activation; the message includes the path.
        """
        state = checkpoint.read_state_dict(path)
        try:
            model = cls(checkpoint.infer_config(state, **checkpoint.with_settings_beside(path, state, changes)))
            if tome is not None:
                apply_tome_patch(model, config=tome)
            model.loaded = model.load_clip(state, model.config.activation)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)}: {one_line(error)}") from error
        return model


def layer_norm_at(norm: LayerNorm, x: Tensor, place: Tensor) -> Tensor:
    """Apply LayerNorm to one token of each row: ``(B, L, D), (B,) → (B, D)``."""
    return norm(x[torch.arange(x.shape[0], device=x.device), place])
