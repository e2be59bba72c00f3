# SPDX-License-Identifier: Apache-2.0
"""From "which token goes where" to the lists that merging gathers by; where ONNX is asked for, by what ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import build_groups


def exporting() -> bool:
    """Whether ``torch.onnx.export`` is capturing the program."""
    return torch.onnx.is_in_onnx_export()


exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it is False whenever torch.compile traces


def group(dest: Tensor, weightless: Tensor, tokens_out: int) -> tuple[Tensor, Tensor]:
    """``members (N, T)`` and ``offsets (N, tokens_out + 1)`` of a plan, see ``reference.build_groups``.

    Args:
        dest: ``(N, T)`` integer, input token to output token.
        weightless: ``(N, T)`` bool, tokens that are merged with weight 0.
        tokens_out: number of output tokens.
    """
    if not exporting():
        return build_groups(dest, weightless, tokens_out)
    # a stable sort has no ONNX form: no two of these keys are equal
    dest, tokens = dest.long(), dest.shape[1]
    place = torch.arange(tokens, device=dest.device)
    members = (dest * tokens + place).topk(tokens, dim=-1, largest=False).indices
    members = torch.where(weightless.gather(1, members), ~members, members)
    counts = torch.zeros(dest.shape[0], tokens_out + 1, dtype=torch.int64, device=dest.device)
    return members.int(), counts.scatter_add(1, dest + 1, torch.ones_like(dest)).cumsum(1).int()
