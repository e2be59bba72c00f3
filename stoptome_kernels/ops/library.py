# SPDX-License-Identifier: Apache-2.0
"""How an operator is registered, and what autocast makes of its arguments.

By ``define`` and ``impl`` rather than by ``custom_op``, which costs twice as much a call. Under autocast an op has no
rule of its own, which means the input's dtype is kept: matching computes in float32 whatever it is given, and a merge
changes no precision. For attention and convolution the public functions cast by ``as_autocast``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("stoptome", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register ``torch.ops.stoptome.<name>``: its schema, what it does and what shapes it gives."""
    name = schema.split("(")[0]
    # the dispatcher leaves out arguments that have their schema's default: implementations repeat the defaults
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stoptome::{name}", fake, lib=LIBRARY)


def gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Register the gradient of ``torch.ops.stoptome.<name>``."""
    torch.library.register_autograd(f"stoptome::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def no_gradient(name: str, says: str) -> None:
    """Register that ``torch.ops.stoptome.<name>``, a backward, has no gradient of its own: asking for one raises."""

    def refuse(ctx, *_):
        raise NotImplementedError(says)

    gradient(name, refuse, lambda ctx, inputs, output: None)


def autocasts(device: str) -> bool:
    """Return whether autocast is on for a type of devices."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def _has_autocast(device: str) -> bool:
    """Return whether autocast exists on such a device; elsewhere ``torch.is_autocast_enabled`` raises."""
    return torch.amp.is_autocast_available(device)


# old compilers can't trace torch's function, see docs/dev/architecture.md; its answer is a constant
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """Return, under autocast, tensors in the dtype in which torch would multiply them; else as given."""
    device = next(t for t in tensors if t is not None).device.type
    if not autocasts(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return [t if t is None or t.dtype not in narrow else t.to(dtype) for t in tensors]
