# SPDX-License-Identifier: Apache-2.0
"""Distance of a model's outputs from those of the unpatched model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

_POOLED = ("image_embeds", "pooler_output")  # of transformers' outputs, where hidden states or logits come first


def _comparable(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating tensors of an output that have items of two numbers or more, by name.

    The cosine of single numbers is 1, whatever they are.
    """
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim() > 1 and output.shape[0] and output[0].numel() > 1:
            yield name, output
        return
    if isinstance(output, Mapping):
        parts = list(output.items())
    elif isinstance(output, (tuple, list)):
        parts = list(enumerate(output))
    elif is_dataclass(output):
        parts = [(field.name, getattr(output, field.name)) for field in fields(output)]
    else:
        return
    for key, part in parts:
        yield from _comparable(part, f"{name}.{key}")


class Outputs:
    """The outputs of a model under each setting, to compare with the unpatched model's, which are added first."""

    def __init__(self) -> None:
        self._plain: dict[str, Tensor] = {}
        self._cosines: dict[str, dict[str, tuple[float, float]]] = {}

    def add(self, name: str, output: Any) -> None:
        """Add the output under the setting of this name."""
        found = dict(_comparable(output))
        if not self._cosines:
            self._plain = found
        self._cosines[name] = {
            key: _cosines(found[key], want)
            for key, want in self._plain.items()
            if key in found and found[key].shape == want.shape
        }

    def compare(self) -> dict[str, tuple[float, float]]:
        """Return mean and least cosine by the settings' names.

        Raises:
            ValueError: there is nothing to compare.
        """
        keys = [key for key in self._plain if all(key in found for found in self._cosines.values())]
        if not keys:
            what = (
                "change their shape" if self._plain else "have no floating-point tensor (items, two channels or more)"
            )
            raise ValueError(
                f"outputs can't be compared, since they {what}: give evaluate=…, or call=lambda model: … that returns "
                "such a tensor of one shape"
            )
        pooled = [key for last in _POOLED for key in keys if key.rpartition(".")[2] == last]
        chosen = (pooled or keys)[0]
        for name, found in self._cosines.items():
            if math.isnan(found[chosen][0]):
                raise ValueError(
                    f"outputs can't be compared, since some are zero or not finite at r = {name}: give evaluate=…, or "
                    "call=lambda model: … that returns others"
                )
        return {name: found[chosen] for name, found in self._cosines.items()}


def _cosines(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Return mean and least of the cosines of two tensors' items; NaN where one has no direction."""
    a, b = (tensor.detach().flatten(1).cpu().double() for tensor in (got, want))
    cosines = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).clamp(-1, 1)
    return cosines.mean().item(), cosines.min().item()
