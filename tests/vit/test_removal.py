# SPDX-License-Identifier: Apache-2.0
"""Removal and patching again around other libraries, loops of one's own, shared blocks, jit and fx."""

import copy

import pytest
import stoptome_kernels as stk
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from stoptome_kernels.patching.subclass import PatchedModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from support.families import Family, families

FAMILIES = list(families())
TIMM = [family for family in FAMILIES if family.name.startswith("timm")]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


def test_removal_around_accelerate(family):
    """Its hooks on blocks call the patched forward: refused. What it leaves when it goes is taken away."""
    model = family.make()
    with torch.no_grad():
        plain = family.run(model)
        merged = family.run(family.patch(model))
        for block in family.blocks(model):
            add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        assert torch.equal(family.run(model), merged)
        if any(isinstance(block, PatchedModule) for block in family.blocks(model)):  # StopModel's need no other class
            with pytest.raises(RuntimeError, match=r"forward of its own after it was patched.*remove_hook_from_module"):
                stk.remove_tome_patch(model)
            assert torch.equal(family.run(model), merged)
        remove_hook_from_module(model, recurse=True)
        assert any("forward" in block.__dict__ for block in family.blocks(model))
        stk.remove_tome_patch(model)
        assert torch.equal(family.run(model), plain)
        assert torch.equal(family.run(family.patch(model)), merged)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda block: torch.compile(block, backend="eager")])
def test_removal_behind_wrappers(family, wrap):
    model = family.make()
    before = {id(module): type(module) for module in model.modules()}
    family.patch(model)
    blocks = family.blocks(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in blocks:
                module._modules[name] = wrap(child)
    assert stk.remove_tome_patch(model) is model
    assert all(type(module) is before[id(module)] for module in model.modules() if id(module) in before)
    assert not stk.is_patched(model)


def test_removal_of_nothing(family):
    model = family.make()
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    for untouched in (model, nn.Linear(2, 2)):
        assert stk.remove_tome_patch(untouched) is untouched
        assert not stk.is_patched(untouched)
    assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before


def test_a_forward_that_another_library_left(family):
    """A bound method of the block itself is no reason to refuse the model."""
    model = family.make()
    with torch.no_grad():
        want = family.run(family.patch(family.make()))
        for block in family.blocks(model):
            block.forward = block.forward
        assert torch.equal(family.run(family.patch(model)), want)


@pytest.mark.parametrize("family", TIMM, ids=lambda family: family.name)
def test_loops_over_blocks(family):
    model = family.patch(family.make())
    rope = [] if not hasattr(model, "rope") or model.rope is None else [model.rope.get_embed((8, 8))]
    if rope and rope[0].dim() == 3:
        rope = [rope[0][0]]
    x = torch.randn(2, model.pos_embed.shape[1] if model.pos_embed is not None else 64 + model.num_prefix_tokens, 48)
    says = r"got merged tokens \(Tokens\).*remove_tome_patch"
    tokens = model.blocks[1](model.blocks[0](x, *rope), *rope)
    for use in (
        nn.LayerNorm(48), nn.Linear(48, 2), torch.mean, lambda x: x + 1.0, lambda x: torch.ones(1) + x, lambda x: 2 * x,
        lambda x: x[:, 0], lambda x: x @ torch.ones(48),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=says):
            use(tokens)
    with pytest.raises(AttributeError, match=r"Tokens have no attribute shape: merged tokens.*remove_tome_patch"):
        tokens.shape  # noqa: B018
    with pytest.raises(RuntimeError, match=r"block 2 got a plain tensor.*remove_tome_patch"):
        model.blocks[2](x, *rope)
    blocks = model.blocks
    for others in (blocks[:-1], nn.ModuleList([*blocks, copy.deepcopy(blocks[-1])])):
        model.blocks = others
        with pytest.raises(RuntimeError, match=r"but was patched with 4 and .*patch again"):
            family.run(model)


def test_blocks_of_two_models(family):
    model = family.make()
    other = nn.Sequential(*family.blocks(model))
    with pytest.warns(UserWarning, match=r"also in another module.*deepcopy"):
        family.patch(model)
    del other


def test_patched_blocks_in_another_model():
    family = TIMM[0]
    model, other = family.patch(family.make()), family.make()
    other.blocks = model.blocks
    with pytest.raises(ValueError, match=r"belong to another model, which is already patched.*deepcopy"):
        family.patch(other)


@pytest.mark.parametrize("family", FAMILIES[:-1], ids=lambda family: family.name)  # StopModel's classes stay
def test_jit_script(family):
    model = family.patch(family.make())
    with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile.*remove_tome_patch"):
        torch.jit.script(model)


@pytest.mark.parametrize("family", TIMM[:1], ids=lambda family: family.name)
def test_fx(family):
    with pytest.raises(TypeError, match=r"torch.fx can't trace merging.*torch.export"):
        torch.fx.symbolic_trace(family.patch(family.make()))
