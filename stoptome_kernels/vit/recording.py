# SPDX-License-Identifier: Apache-2.0
"""How transformers records what its layers and attentions give, in each of its versions.

From 5.2 on, by forward hooks that stay where they are and ask who listens. In 5.0 and 5.1, by other forwards in front
of the modules' own. They stay if the call fails; if it doesn't, the module's own method stays as an attribute of the
module, where it would hide a patch. Before 5.4 DINOv2's encoder collects itself what its layers give.
"""

from __future__ import annotations

import os
from types import FunctionType
from typing import Any

from torch import nn

from ..patching.guards import instance_forward
from ..patching.subclass import PatchedModule
from .tokens import Tokens, unmerge_tokens
from .towers import installed_below

_FORWARDS = os.path.join("transformers", "utils", "generic.py")  # torch.compile knows it of nested functions


def is_recorded(module: Any, what: str) -> bool:
    """Return whether what this module gives is recorded in the present call, by the library itself.

    Args:
        module: a layer, for hidden_states, or an attention module, for attentions.
        what: hidden_states or attentions.
    """
    if "forward" in module.__dict__ and _is_recorder(module.forward):
        return True
    if not module._forward_hooks:
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ModuleNotFoundError:
        return False
    return what in (_active_collector.get() or ())


def remove_stale_recorders(root: nn.Module) -> None:
    """Take out what recording left on modules: forwards of recorders, and modules' own methods as their attributes."""
    for module in root.modules():
        forward: Any = module.__dict__.get("forward")
        kept = forward
        while _is_recorder(kept):
            kept = kept.__wrapped__
        if kept is not forward:
            module.forward = kept
        instance_forward(module)


def _is_recorder(forward: Any) -> bool:
    """Return whether it is a function that was put on a module, not a method (some of which come from the same
    file)."""
    return isinstance(forward, FunctionType) and forward.__code__.co_filename.endswith(_FORWARDS)


class RecordingEncoder(PatchedModule):
    """An encoder of transformers 5.0 or 5.1: a call that fails leaves no recorders."""

    def forward(self, *args, **options):
        try:
            return super().forward(*args, **options)  # type: ignore[misc]
        except Exception:
            remove_stale_recorders(self)  # type: ignore[arg-type]
            raise


class CollectingEncoder(RecordingEncoder):
    """``Dinov2Encoder`` and ``Dinov2WithRegistersEncoder`` before 5.4: hidden states have all tokens."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        if out.hidden_states is not None:
            out.hidden_states = tuple(unmerge_tokens(x) if isinstance(x, Tokens) else x for x in out.hidden_states)
        return out


def encoder_mixin(collects: bool) -> type[RecordingEncoder] | None:
    """Return what the encoder of the installed version is patched with.

    Args:
        collects: it is one of those that used to collect hidden states themselves.
    """
    if collects and installed_below("transformers", (5, 4)):
        return CollectingEncoder
    return RecordingEncoder if installed_below("transformers", (5, 2)) else None
