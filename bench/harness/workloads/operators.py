# SPDX-License-Identifier: Apache-2.0
"""match, merge and unmerge, and what goes through them: calls of one implementation, sets of inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import no_gpu
from ..baselines.operators import Peer
from ..shapes import Inputs, Shape, make


def calls(peer: Peer, i: Inputs) -> dict[tuple[str, str], Callable[[], object]]:
    """Return what is timed of one implementation on one set of inputs."""
    leaf = i.x.detach().requires_grad_()

    def back(y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, leaf, i.grad)[0]

    found = {
        ("match+merge", "forward"): lambda: peer.both(i, i.x),
        ("match+merge", "forward+backward"): lambda: back(peer.both(i, leaf)[0]),
    }
    if not peer.only_both:
        plan = peer.match(i)
        y, tracked = peer.merge(i, i.x, plan)[0], peer.merge(i, leaf, plan)[0]
        found |= {
            ("match", "forward"): lambda: peer.match(i),
            ("merge", "forward"): lambda: peer.merge(i, i.x, plan),
            ("merge", "forward, out="): peer.into(i, plan) if peer.into else lambda: peer.merge(i, i.x, plan),
            ("merge", "backward"): lambda: torch.autograd.grad(tracked, leaf, i.grad, retain_graph=True),
            ("merge", "forward+backward"): lambda: back(peer.merge(i, leaf, plan)[0]),
            ("unmerge", "forward"): lambda: peer.unmerge(i, y, plan),
        }
    return found


def input_sets(shape: Shape, device: str, dtype: torch.dtype) -> list[Inputs]:
    """Return one set on a CPU, whose caches are as warm in real use; on a GPU enough of them to outlast the L2."""
    first = make(shape, device, dtype)
    if device == "cpu":
        return [first]
    touched = first.x.nbytes * (2 if shape.metric == "keys" else 1)
    count = max(2, min(64, 2 * torch.cuda.get_device_properties(0).L2_cache_size // touched + 1))
    count = 2 if no_gpu.pretending() else count
    return [first, *(make(shape, device, dtype, seed) for seed in range(1, count))]
