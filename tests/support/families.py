# SPDX-License-Identifier: Apache-2.0
"""A small model for each class of blocks that is known, and a block's parts by the names that libraries give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel
from torch import Tensor, nn

from harness.baselines import stop as upstream
from support import clip4clip, slow_tempme
from support.vit import build, cases

CASES = {case.name: case for case in cases()}
CLIPS = {"merge_layers": (1,), "merge_frame_nums": (2,), "merge_token_proportions": (20, 10)}


@dataclass(frozen=True)
class Family:
    """Models whose blocks are of one class.

    Attributes:
        name: in the table.
        make: the model, the same each time, in eval mode.
        run: what it answers, one tensor.
        blocks: from first to last.
        patch: merges tokens in every block.
        layers: ``layers(model)``, what each layer gives, as the model itself hands it out; None: it doesn't.
    """

    name: str
    make: Callable[[], Any]
    run: Callable[[Any], Tensor]
    blocks: Callable[[Any], list]
    patch: Callable[[Any], Any] = lambda model: stk.apply_tome_patch(model, 5)
    layers: Callable[[Any], Any] | None = None

    def block(self, model: Any) -> Any:
        """The second block, whose tokens are merged ones."""
        return self.blocks(model)[1]


def families() -> Iterator[Family]:
    """Yield a family for each class of blocks that is known."""
    for case in CASES.values():
        if case.compiled:
            torch.manual_seed(3)
            inputs = case.inputs(2)
            yield Family(
                case.name, partial(build, case), lambda model, case=case, inputs=inputs: case.answer(model(*inputs)),
                case.blocks, layers=layer_reader(case, inputs),
            )  # fmt: skip
    torch.manual_seed(3)
    patches, video = torch.randn(8, 12, 64), torch.randn(8, 3, 16, 16)
    deep, clip = torch.randn(3, 2, 16, 64), torch.randn(2, 4, 3, 32, 32)
    two = partial(stk.apply_tome_patch, tome_r=2)
    yield Family("STOP, DGL", stop_tower, lambda tower: tower(patches, deep)[:, :5], resblocks, two)
    yield Family("CLIP4Clip", clip4clip_tower, lambda tower: tower(patches, 4)[:, 0], resblocks, two)
    yield Family(
        "TempMe", tempme_model, lambda model: model.get_video_feat(video, torch.ones(2, 4)),
        lambda model: resblocks(model.clip.visual), two,
    )  # fmt: skip
    yield Family(
        "StopModel", stop_model, lambda model: model.encode_video(clip), lambda model: resblocks(model.visual), two
    )


def layer_reader(case: Any, inputs: tuple) -> Callable | None:
    """How a case's model hands out its layers."""
    if case.name.startswith("timm") or case.name in ("open_clip-vit", "open_clip-custom"):
        return lambda model: model.forward_intermediates(*inputs)
    if case.name.startswith("open_clip"):
        return lambda model: model.visual.forward_intermediates(*inputs)
    if case.name.startswith("transformers") and "siglip" not in case.name and case.name != "transformers-clip":
        return lambda model: model(*inputs, output_hidden_states=True).hidden_states
    return None


def resblocks(tower: Any) -> list:
    return list(tower.transformer.resblocks)


def stop_tower() -> Any:
    torch.manual_seed(1)
    return upstream.StopTower(64, 3, 12, 4, 4).eval()


def clip4clip_tower(patches: int = 12, layers: int = 3) -> Any:
    torch.manual_seed(1)
    return clip4clip.Clip4ClipTower(64, layers, patches).eval()


def tempme_model() -> Any:
    torch.manual_seed(1)
    return slow_tempme.Model(slow_tempme.settings(), apply=slow_tempme.merge_eagerly).eval()


def stop_model() -> Any:
    torch.manual_seed(1)
    return StopModel(
        StopConfig(
            image_size=32, patch_size=8, width=64, layers=3, embed_dim=24, frames=4, global_prompts=3, frame_prompts=2,
            text_prompts=4, text_width=64, text_heads=1, text_layers=2, vocab_size=50, context_length=16, max_words=10,
            temporal_prompt="DGL",
        )
    ).eval()  # fmt: skip


# parts of a block


def first_of(module: Any, *names: str) -> Any:
    """The first of these modules that there is, and where: ``(owner, name)``."""
    for name in names:
        owner, last = module, name
        for step in name.split(".")[:-1]:
            owner, last = getattr(owner, step, None), name.rsplit(".", 1)[-1]
        if isinstance(getattr(owner, last, None), nn.Module):
            return owner, last
    raise LookupError(names)


def attention(block: Any) -> tuple[Any, str]:
    return first_of(block, "attn", "self_attn", "self_attention", "attention")


def norm(block: Any) -> tuple[Any, str]:
    """The one that is computed together with the merge, where one is."""
    if isinstance(block, nn.TransformerEncoderLayer) and not block.norm_first:
        return block, "norm1"
    return first_of(block, "norm2", "ln_2", "layer_norm2", "layernorm_after")


def mlp_out(block: Any) -> tuple[Any, str]:
    """The last linear layer of the MLP."""
    return first_of(
        block, "mlp.fc2", "mlp.w3", "mlp.c_proj", "mlp.3", "linear2", "output.dense", "mlp.down_proj", "mlp.weights_out"
    )


def out(block: Any) -> Any:
    """The projection of the attention's output."""
    owner, name = attention(block)
    owner, name = first_of(getattr(owner, name), "proj", "out_proj", "o_proj", "output.dense")
    return getattr(owner, name)


def get(place: tuple[Any, str]) -> Any:
    return getattr(*place)


def in_weights(block: Any) -> list[tuple[Any, str]]:
    """The weights, not the biases, that make queries, keys and values."""
    attn = get(attention(block))
    attn = getattr(attn, "attention", attn)
    if hasattr(attn, "in_proj_weight"):
        return [(attn, "in_proj_weight")]
    names = [("qkv",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value")]
    chosen = next(some for some in names if isinstance(getattr(attn, some[0], None), nn.Module))
    return [(getattr(attn, name), "weight") for name in chosen]


@torch.no_grad()
def scale(module: Any, factor: float, bias: bool = True) -> None:
    module.weight.mul_(factor)
    if bias and module.bias is not None:
        module.bias.mul_(factor)


@torch.no_grad()
def scale_in(block: Any) -> None:
    for owner, name in in_weights(block):
        getattr(owner, name).mul_(0.5)


# answers


def tensors(given: Any) -> list[Tensor]:
    """All tensors in an answer."""
    return [x for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, Tensor)]


def same(got: Any, want: Any) -> bool:
    """Return whether two answers have the same tensors, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True))
