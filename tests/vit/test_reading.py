# SPDX-License-Identifier: Apache-2.0
"""Layers that are read one by one, in every family that hands them out: threads, hooks, shards."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from support.families import Family, families, same, tensors

READ = [family for family in families() if family.layers]


@pytest.mark.parametrize("family", READ, ids=lambda family: family.name)
def test_threads(family):
    """Layers of one image are read while another thread does the same, or asks for the answer alone."""
    model = family.patch(family.make())
    with torch.no_grad():
        layers, answer, wrong = family.layers(model), family.run(model), []
    start = threading.Barrier(3)

    def work(call: Callable, want) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(8):
                if not same(call(model), want):
                    wrong.append(call)

    threads = [
        threading.Thread(target=work, args=task) for task in [(family.layers, layers)] * 2 + [(family.run, answer)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch looks for tensors alone in what is given
@pytest.mark.parametrize("family", READ, ids=lambda family: family.name)
def test_layers_that_are_read_through_hooks(family):
    """A full backward hook wraps what a block gives once more, and sees its gradient."""
    model = family.patch(family.make())
    want, calls = family.layers(model), []
    plain = torch.autograd.grad(sum(x.double().sin().sum() for x in tensors(want)), weights(family, model))
    for block in family.blocks(model):
        block.register_full_backward_hook(lambda *_: calls.append(1))
    got = family.layers(model)
    assert same(got, want)
    grads = torch.autograd.grad(sum(x.double().sin().sum() for x in tensors(got)), weights(family, model))
    for one, other in zip(grads, plain, strict=True):
        torch.testing.assert_close(one, other)


def weights(family: Family, model) -> list[torch.Tensor]:
    return [p for p in family.blocks(model)[0].parameters() if p.requires_grad and p.dim() > 1]


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", READ, ids=lambda family: family.name)
def test_layers_that_are_read_from_sharded_blocks(family, mesh):
    model = family.patch(family.make())
    want = family.layers(model)
    for block in family.blocks(model):
        fully_shard(block, mesh=mesh)
    got = family.layers(model)
    assert same(got, want)
    sum(x.sin().sum() for x in tensors(got)).backward()
