# SPDX-License-Identifier: Apache-2.0
"""Which weights of a block of upstream's kind are read in place of a call, and when the block is refused for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import merge_norm
from ..patching.guards import calls_only_class_forward, copy_without_hooks, has_plain_float_weights, may_read_weights
from ..patching.subclass import PatchedModule


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return what the norm computes, in x's dtype, whatever that of its parameters."""
    return merge_norm.layer_norm(x, norm.weight, norm.bias, norm.eps)


class WeightReadingBlock(PatchedModule):
    """A block of upstream's kind, whose attention's weights are read.

    Attributes:
        tome_classes: classes of the parts whose weights are read, see ``part_classes``.
        tome_step: step of a schedule, shown when the model is printed; absent with the model's own schedule.
    """

    tome_classes: tuple[type, ...]

    def extra_repr(self) -> str:
        """Describe the module, with what the block joins and merges."""
        own, step = super().extra_repr(), self.__dict__.get("tome_step")  # type: ignore[misc]
        joins = f"tome_join={step.join}, tome_inter={step.inter}" if step is not None and step.join > 1 else ""
        merges = "" if step is None else f"tome_r={step.r}"
        return ", ".join(part for part in (own, joins, merges) if part)

    def tome_undo(self) -> None:
        self.__dict__.pop("tome_classes", None)
        self.__dict__.pop("tome_step", None)
        self._parameters.pop("tome_frame_embedding", None)  # type: ignore[attr-defined]


def part_classes(block: Any) -> tuple[type, ...]:
    """Return the classes of a block's attention, activation and norms.

    Their weights are read, or they are fused, for as long as they have these classes.

    Of norms those alone that compute what torch's LayerNorm does, in whatever dtype: others are called.
    """
    norms = (type(norm) for norm in (block.ln_1, block.ln_2) if _computes_layer_norm(norm))
    return type(block.attn), type(getattr(block.mlp, "gelu", None)), *norms


@torch.no_grad()
def _computes_layer_norm(norm: nn.LayerNorm) -> bool:
    if type(norm) is nn.LayerNorm or norm.weight is None or not has_plain_float_weights(norm):
        return type(norm) is nn.LayerNorm
    twin = copy_without_hooks(norm)
    twin = twin.to_empty(device="cpu").float() if norm.weight.is_meta else twin.float()  # whose numbers don't matter
    x = torch.linspace(-2, 3, 2 * norm.weight.numel(), device="cpu").sin().view(2, -1).to(twin.weight)
    for part, low in ((twin.weight, 0.5), (twin.bias, -0.5)):
        if part is not None:
            part.copy_(torch.linspace(low, low + 1, part.numel(), device=part.device))
    return torch.allclose(twin(x), layer_norm(twin, x), rtol=1e-4, atol=1e-5)


def reads_norm_weights(block: Any, norm: Any) -> bool:
    """Return whether a norm's weights are read: it is of the class that was tried out, or torch's, and nothing is on
    it."""
    if type(norm) is not nn.LayerNorm and (
        type(norm) not in block.tome_classes or (isinstance(block, PatchedModule) and _has_state(norm))
    ):
        return False
    return may_read_weights(norm) and nn.LayerNorm.forward.__module__ == nn.LayerNorm.__module__


def _has_state(norm: Any) -> bool:
    """Return whether a norm of somebody's own keeps something in itself, which may change what it computes."""
    if torch.compiler.is_compiling() and _OLD:
        return True  # it can't be asked there, and is called
    return bool(norm.__dict__.keys() - _NORM)


_OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
_NORM = frozenset(nn.LayerNorm(1).__dict__) | {"weight", "bias"}


def apply_norm(block: Any, norm: Any, x: Tensor) -> Tensor:
    return layer_norm(norm, x) if reads_norm_weights(block, norm) else norm(x)


def check_attention(block: Any) -> None:
    """Raise if a block's attention is more than the weights that are read.

    Raises:
        RuntimeError: it, or its projection of the output, has hooks, another class, a forward of its own, other
            settings, or weights that are elsewhere; the message says which.
    """
    attn, theirs = block.attn, isinstance(block, PatchedModule)
    found = ""
    if type(attn) not in block.tome_classes:
        found = f"is now a {type(attn).__name__} of {type(attn).__module__}"
    elif not calls_only_class_forward(attn):
        found = "has hooks or a forward of its own"
    elif not may_read_weights(attn):
        found = "has weights that are offloaded or not plain tensors"
    elif isinstance(attn, nn.MultiheadAttention) and (
        attn.dropout or attn.bias_k is not None or attn.add_zero_attn or attn.batch_first
    ):
        found = "has dropout, bias_k, add_zero_attn or batch_first set"
    elif theirs and not _is_linear(attn.out_proj):  # a block of our own calls it, torch's attention reads it
        found = "has an out_proj with hooks, a forward of its own, or of another class"
    elif theirs and getattr(block, "attn_mask", None) is not None:
        found = "is given its block's attn_mask"
    elif theirs and (own := [name for name in ("attention", "attend", "feed_forward") if name in block.__dict__]):
        found = f"is bypassed by a method that was set on the block itself ({own[0]})"
    if found:
        raise RuntimeError(
            f"{type(block).__name__}.attn {found}, which would have no effect, since its weights are read instead of "
            "calling it: remove that, or merge it into the weights (PEFT: merge_and_unload)"
            f"{', or remove_tome_patch() first' if theirs else ''}"
        )


def _is_linear(out: Any) -> bool:
    return isinstance(out, nn.Linear) and type(out) in _LINEAR and calls_only_class_forward(out)


_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
