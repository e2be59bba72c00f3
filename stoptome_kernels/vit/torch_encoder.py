# SPDX-License-Identifier: Apache-2.0
"""torch.nn.TransformerEncoder, and a TransformerEncoderLayer alone: where one of them is the model, not a part of it.

Both give every token back, since anybody may read any of them. A layer alone merges inside itself: MLP, and whatever
follows it, see fewer tokens, its caller doesn't.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..patching.guards import check_method_not_replaced
from ..patching.subclass import PatchedModule
from . import multihead
from .block import BlockMixin, TowerMixin
from .guards import reject_masks, reject_replaced_method
from .tokens import Tokens
from .towers import VitTower, class_path, has_overridden_method, is_instance_of

_HOME = "torch.nn.modules.transformer"
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
}


class _TorchBlock(BlockMixin):
    """``TransformerEncoderLayer``, pre-norm or post-norm."""

    tome_batch_first = True

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):  # type: ignore[override]
        """Run the layer on ``src``: tokens, or ``(B, T, D)``."""
        masks = {"src_mask": src_mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        if not self.tome.merging.idle:
            _check(self, src, masks)
        return super().forward(src, **masks)

    def tome_forward(self, tokens: Tokens, **masks) -> Tokens:
        block: Any = self
        reject_replaced_method(block, "_sa_block")
        first = block.norm_first
        x = block.norm1(tokens.x) if first else tokens.x
        residual, keys = multihead.call_attention(block, block.self_attn, x, tokens, block.tome_batch_first)
        norm = block.norm2 if first else block.norm1  # before the MLP of merged tokens, after the attention's sum
        merged, normed = block.tome.merge(tokens, block.dropout1(residual), keys, norm)
        changed = block._ff_block(normed)
        return merged.but(x=merged.x + changed if first else block.norm2(normed + changed))


class _TorchEncoder(TowerMixin):
    """``TransformerEncoder``."""

    def forward(self, *args, **options):
        self.tome_check_unchanged(self.layers)  # type: ignore[attr-defined]
        return super().forward(*args, **options)  # type: ignore[misc]


class _SequenceFirstAdapter:
    """Torch's layer, which wants ``(T, B, D)``, given ``(B, T, D)``."""

    def forward(self, src, **masks):
        return super().forward(src.transpose(0, 1), **masks).transpose(0, 1)  # type: ignore[misc]


class _SequenceFirstBlock(_TorchBlock, _SequenceFirstAdapter):
    """``TransformerEncoderLayer`` with ``batch_first=False``; between layers tokens are batch first all the same."""

    tome_batch_first = False

    def forward(self, src, *args, **options):  # type: ignore[override]
        """Run the layer on ``src``: tokens, or ``(T, B, D)``."""
        out = super().forward(src.transpose(0, 1) if isinstance(src, Tensor) else src, *args, **options)
        return out.transpose(0, 1) if isinstance(out, Tensor) else out


def _check(block: Any, src: Any, masks: dict[str, Any]) -> None:
    """Raise what merged tokens can't do.

    Raises:
        ValueError: a mask; tokens without a batch dimension, or nested ones.
    """
    reject_masks(block, **masks)
    if isinstance(src, Tensor) and src.is_nested:  # what a padding mask becomes in TransformerEncoder's fast path
        raise ValueError(
            f"{type(block).__name__} got a nested tensor (from src_key_padding_mask), which is not supported while "
            "tokens are merged: call the model without it, or remove_tome_patch() first"
        )
    if isinstance(src, Tensor) and src.dim() != 3:
        raise ValueError(
            f"{type(block).__name__} got tokens without a batch dimension, which is required while tokens are merged: "
            f"call unsqueeze({0 if block.tome_batch_first else 1}) first"
        )


def find(model: nn.Module) -> VitTower | None:
    """Return torch's encoder or encoder layer, if the model is one.

    Raises:
        TypeError, ValueError: one with a part with which its tokens can't be merged.
    """
    path = [model]
    while (
        name := next((inner for kind, inner in _WRAPPERS.items() if is_instance_of(path[-1], *kind)), None)
    ) is not None:
        path.append(path[-1]._modules[name])  # type: ignore[arg-type]
    tower: Any = path[-1]
    if is_instance_of(tower, _HOME, "TransformerEncoderLayer"):
        blocks = (tower,)
    elif is_instance_of(tower, _HOME, "TransformerEncoder"):
        check_method_not_replaced(tower, "forward")
        if has_overridden_method(tower, _HOME, "forward"):
            raise TypeError(
                f"can't merge tokens in {type(tower).__name__}, whose forward is not that of TransformerEncoder"
            )
        blocks = tuple(tower.layers)
    else:
        return None
    mixins = tuple(_mixin(block) for block in blocks)
    # the first token is the class token where there is one; where there is none, keeping it does no harm
    return VitTower(
        tower, blocks, mixins, 1, True, blocks[0].linear1.in_features, protected_is_default=True, around=tuple(path),
        runner_mixin=None if tower is blocks[0] else _TorchEncoder,
        attentions=tuple(((block.self_attn, multihead.MultiheadMixin),) for block in blocks),
    )  # fmt: skip


def _mixin(block: Any) -> type[BlockMixin]:
    if isinstance(block, PatchedModule):
        return block.tome_parts[0]
    if class_path(block) != (_HOME, "TransformerEncoderLayer"):
        raise TypeError(
            f"can't merge tokens in {type(block).__name__}: supported is torch.nn.TransformerEncoderLayer itself, not "
            "a subclass"
        )
    multihead.check_supported(block, block.self_attn)
    return _TorchBlock if block.self_attn.batch_first else _SequenceFirstBlock
