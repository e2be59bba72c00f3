# SPDX-License-Identifier: Apache-2.0
"""The source map: the token of the last layer that every original token of a video ended in."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..onnx import group_tokens
from .table import table


@dataclass(frozen=True, eq=False)
class Trace:
    """Source map of a forward. ``str()`` of it is a table.

    Attributes:
        layers: one ``(B, T, L)`` int32 tensor per layer: the token that each of the L tokens of a frame (class token,
            prompts, patches) is part of after that layer. Tokens of a video are numbered item after item,
            ``item · tokens + token``; an item contains the class tokens of its frames, their prompts, then patches.
        tokens: number of tokens of an item after each layer.
        items: number of items of a video after each layer.
        protected: number of class tokens and prompts of a frame.
    """

    layers: tuple[Tensor, ...]
    tokens: tuple[int, ...]
    items: tuple[int, ...]
    protected: int

    @property
    def dest(self) -> Tensor:
        """Map after the last layer, ``(B, T, L)`` int32."""
        return self.layers[-1]

    @property
    def sizes(self) -> Tensor:
        """Number of original tokens in each token after the last layer, ``(B, items · tokens)`` float32.

        Counted in ``dest``: padding and tokens merged with weight 0 count as all others do; a token that never appears
        in ``dest`` counts 0.
        """
        return self._counts(-1).float()

    def _counts(self, layer: int) -> Tensor:
        dest = self.layers[layer].flatten(1)
        _, offsets = group_tokens(
            dest, torch.zeros_like(dest, dtype=torch.bool), self.items[layer] * self.tokens[layer]
        )
        return offsets.diff(dim=1)  # by a sort: a sum by index would be in no order on a GPU, bincount wait for it

    @property
    def _line(self) -> str:
        batch, frames, tokens = self.dest.shape
        several = frames > 1
        before, behind = f"{frames} × " if several else "", f"{self.items[-1]} × " if several else ""
        return f"{before}{tokens} → {behind}{self.tokens[-1]} tokens, batch of {batch}"

    def __repr__(self) -> str:
        return f"Trace({self._line}, {len(self.layers)} layers)"

    def __str__(self) -> str:
        counts = [self._counts(layer) for layer in range(len(self.layers))]
        largest = [int(count.max()) if count.numel() else 0 for count in counts]
        columns = {"items": self.items, "tokens": self.tokens, "largest group": largest}
        head = f"{self._line}, {self.protected} protected"
        return "\n".join([head, *table({"layer": range(len(largest)), **columns})])


def is_torch_exporting() -> bool:
    """Return whether torch.export captures the program: its graph has no values that could be kept. Constant in a
    traced graph, see docs/dev/architecture.md."""
    # in torch 2.6 the flag alone, which torch.export sets
    asked = getattr(torch.compiler, "is_exporting", lambda: torch.compiler._is_compiling_flag)
    if asked():
        return True
    translator = sys.modules.get("torch._dynamo.symbolic_convert")  # of strict export and of torch.compile
    tracing = getattr(getattr(translator, "tls", None), "current_tx", None)
    if tracing is not None:
        return tracing.export
    # torch 2.6's strict export takes torch's own modules as a whole and runs them once more by itself
    return not hasattr(torch.compiler, "is_exporting") and torch._guards.detect_fake_mode() is not None


is_torch_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
