# SPDX-License-Identifier: Apache-2.0
"""Patched vision transformers in two processes: DistributedDataParallel and FSDP2 give the gradients of one process."""

import pytest
import stoptome_kernels as stk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from support.vit import build, cases

CASES = list(cases())


def gradients(model, case, inputs) -> dict:
    case.answer(model(*inputs)).double().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank: int, file: str, chosen: list[str]) -> None:
    """One of two processes: half of a batch, whose gradients are the mean of both halves'."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for case in (case for case in CASES if case.name in chosen):
        torch.manual_seed(0)
        inputs = case.inputs(4)
        half = tuple(mine(x, y, rank) for x, y in zip(inputs, case.inputs(3), strict=True))
        want = gradients(stk.apply_tome_patch(build(case), 5), case, inputs)
        parallel = nn.parallel.DistributedDataParallel(
            stk.apply_tome_patch(build(case), 5), find_unused_parameters=True
        )
        got = {name.removeprefix("module."): g for name, g in gradients(parallel, case, half).items()}
        compare(case.name, got, want)
        sharded = stk.apply_tome_patch(build(case), 5)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in case.blocks(sharded):
            fully_shard(block, mesh=mesh)
        scalars = {p for p in sharded.parameters() if p.dim() == 0}  # which fully_shard can't shard: CLIP's logit_scale
        fully_shard(sharded, mesh=mesh, ignored_params=scalars)
        got = {name: whole(g) for name, g in gradients(sharded, case, half).items()}
        ignored = {name for name, p in sharded.named_parameters() if p in scalars}  # each process has its own gradient
        compare(case.name, got, {name: g for name, g in want.items() if name not in ignored})
    dist.destroy_process_group()


def mine(x, other, rank: int):
    """A process's half of x, along the axis in which another batch is of another size."""
    axis = next(axis for axis, (a, b) in enumerate(zip(x.shape, other.shape, strict=True)) if a != b)
    return x.chunk(2, axis)[rank]


def compare(name: str, got: dict, want: dict) -> None:
    assert set(want) <= set(got), name
    for key, gradient in want.items():
        torch.testing.assert_close(
            got[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{name} {key}: {m}"
        )


# gradients meet in hooks on parameters and on blocks: a case for each class of blocks
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.full)])
def test_two_processes(tmp_path, compiled):
    chosen = [case.name for case in CASES if case.compiled == compiled]
    assert chosen
    mp.spawn(work, (str(tmp_path / "store"), chosen), nprocs=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sharded_before_the_patch(case):
    """Is refused; so is taking the patch out of a sharded model."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = build(case)
        fully_shard(case.blocks(model)[1], mesh=mesh)
        with pytest.raises(RuntimeError, match="patch first, then call fully_shard"):
            stk.apply_tome_patch(model, 2)
        model = stk.apply_tome_patch(build(case), 2)
        fully_shard(case.blocks(model)[1], mesh=mesh)
        with pytest.raises(RuntimeError, match="another class after it was patched"):
            stk.remove_tome_patch(model)
    finally:
        dist.destroy_process_group()
