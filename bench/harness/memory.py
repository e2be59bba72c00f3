# SPDX-License-Identifier: Apache-2.0
"""Bytes that a call takes: on a GPU its allocator's, on a CPU those of the tensors that live and are kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .workloads import Side


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def memory(side: Side, direction: str, device: str) -> dict[str, int | None]:
    """Return bytes of one call beyond weights and inputs."""
    run = side.run(direction)
    if device == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "saved_bytes": None, "largest_bytes": None}
    own = {leaf.untyped_storage()._cdata for leaf in side.leaves}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    if direction == "training":
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = side.call()
        del result
    with LiveBytes() as live:
        run()
    return {"peak_bytes": live.peak, "saved_bytes": sum(saved.values()) or None, "largest_bytes": live.largest}
