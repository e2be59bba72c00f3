# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: one, or as many as torchrun starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from .errors import UsageError

_TORCHRUN = "start them by torchrun --nproc_per_node=N main.py …, or unset WORLD_SIZE, RANK and LOCAL_RANK"


class Together(UsageError):
    """One that all processes know of, so that the first alone needs to say it."""


class Processes:
    """This process among the others.

    Attributes:
        rank, world: its number and how many there are.
        device: the one it drives.
        working: settings are checked, the same in all processes; from here on an error may be one process's alone.
    """

    def __init__(self) -> None:
        self.world = _number("WORLD_SIZE", 1, least=1)
        self.rank = _number("RANK", 0, most=self.world - 1)
        local = _number("LOCAL_RANK", 0)
        self.working = False
        cuda = torch.cuda.is_available()
        if cuda and local >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun --nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs of this machine"
            )
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # shares of a corpus may take very different times; a process that dies ends the others by torchrun
            try:
                dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
            except (ValueError, dist.DistError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UsageError(f"the {self.world} processes can't meet ({reason}): {_TORCHRUN}") from error

    @property
    def first(self) -> bool:
        """The process that writes and prints."""
        return self.rank == 0

    @property
    def silent(self) -> bool | None:
        """For tqdm's ``disable``: the first process shows its progress, if anybody looks."""
        return None if self.first else True

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """For all the others to come this far."""
        if self.world > 1:
            dist.barrier()

    def first_does(self, what: Callable[[], Any]) -> Any:
        """Return what the first process makes of ``what``, in all of them; a UsageError of it is raised in all."""
        if self.world == 1:
            return what()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = what()
            except UsageError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, 0)
        if told[1] is not None:
            raise Together(told[1])
        return told[0]

    def all_know(self, value: Any) -> list[Any]:
        """The ``value`` of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def can_shard(self) -> None:
        """Raise UsageError where there is one process alone."""
        if self.world == 1:
            raise UsageError("--fsdp shards over processes: torchrun --nproc_per_node=N main.py … --fsdp")

    def wrap(self, model: nn.Module, shard: bool, unused: bool) -> nn.Module:
        """The model as all processes train it together.

        Args:
            model: on this process's device, with ``blocks()`` to shard and ``unsharded()`` parameters to leave whole.
            shard: FSDP in place of DDP.
            unused: parameters may get no gradient in a step.
        """
        if shard:
            self.can_shard()
            for block in model.blocks():  # type: ignore[operator]
                fully_shard(block)
            fully_shard(model, ignored_params=set(model.unsharded()))  # type: ignore[operator]
            for name in ("encode_text", "encode_video"):
                register_fsdp_forward_method(model, name)
            return model
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=unused)
        return model


def _number(name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
    """An environment variable of torchrun."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise UsageError(
            f"the environment variable {name} must be an integer from {least} to {most}, got {text[:40]!r}: {_TORCHRUN}"
        )
    return int(text)


class _Gather(torch.autograd.Function):
    """Every process's rows one below the other; the gradient of each row is the sum of what all processes want."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """``(n, …)`` of this process → ``(world · n, …)``, differentiable; all processes must have the same n."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model
