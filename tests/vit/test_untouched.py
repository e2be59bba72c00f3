# SPDX-License-Identifier: Apache-2.0
"""Patching tries blocks out: nothing of the user's is called, changed or refused for it, in any family."""

import copy
import gc
import random
import threading
from functools import partial

import pytest
import stoptome_kernels as stk
import torch
from torch import nn

from support.families import Family, attention, families, get, mlp_out, norm, same
from support.vit import build, cases

FAMILIES = list(families())
READ_ATTENTION = ("STOP, DGL", "CLIP4Clip", "TempMe", "StopModel")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


class Folding(nn.Linear):
    """As adapters do: ``eval()`` folds something into the weight, ``train()`` takes it out again."""

    folded = False

    def train(self, mode: bool = True):
        if mode == self.folded:
            self.weight.data += -1.0 if mode else 1.0
            self.folded = not mode
        return super().train(mode)


class Observer(nn.Module):
    """Counts calls in a buffer and in an attribute, and keeps what it saw; noise, too, in training."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.lock = [], threading.Lock()

    def forward(self, x):
        with self.lock:
            self.calls += 1
            self.seen.append(x)
        return self.inner(x) + (0.1 * torch.randn_like(x[..., :1]) if self.training else 0)


def folding(linear: nn.Linear) -> Folding:
    new = Folding(linear.in_features, linear.out_features, linear.bias is not None)
    new.load_state_dict(linear.state_dict())
    return new


def test_the_trial_leaves_no_trace(family):
    model, calls = family.make(), []
    for block in family.blocks(model):
        owner, name = mlp_out(block)
        setattr(owner, name, Observer(folding(getattr(owner, name))))
        for module in block.modules():
            module.register_forward_hook(lambda *_: calls.append(1))
            if family.name in READ_ATTENTION:  # which refuse hooks on their attention
                get(attention(block))._forward_hooks.clear()
                get(attention(block)).out_proj._forward_hooks.clear()
    get(norm(family.block(model))).train()  # modes of the user's own, part by part
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    rng = torch.get_rng_state(), random.getstate()
    family.patch(model)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert calls == []
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert same(model.state_dict(), state)
    assert not any(module.seen for module in model.modules() if isinstance(module, Observer))
    family.run(model)
    assert calls


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[-4]], ids=lambda family: family.name)  # both ways to try
def test_the_trial_frees_its_copies(family):
    model = family.make()
    gc.collect()
    before = sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())
    family.patch(model)
    gc.collect()
    assert sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects()) == before


def test_the_trial_of_what_can_not_be_copied():
    """Locks, in attributes and in hooks of every sort, are no reason to refuse a model."""
    family = FAMILIES[0]
    model, lock = family.make(), threading.Lock()
    block = family.block(model)
    block.mlp.lock, block.mlp.table = lock, {"lock": lock}
    block.register_state_dict_post_hook(partial(lambda _lock, *_: None, lock))
    block.register_load_state_dict_pre_hook(partial(lambda _lock, *_: None, lock))
    assert torch.equal(family.run(family.patch(model)), family.run(family.patch(family.make())))
    assert block.mlp.lock is lock


def test_the_trial_under_another_default_device():
    family = FAMILIES[0]
    model = family.make()
    with torch.device("meta"):
        family.patch(model)
    assert torch.equal(family.run(model), family.run(family.patch(family.make())))


def test_the_trial_calls_what_training_calls():
    """In inference torch reads the weights of a whole layer: adapters in it are none of that path's."""
    for name in ("torch-post-norm", "torch-pre-norm"):
        case = next(case for case in cases() if case.name == name)
        model, inputs = build(case), case.inputs(2)
        model.layers[1].linear1 = Observer(model.layers[1].linear1).eval()
        model.layers[1].linear1.in_features = 48
        with torch.no_grad():
            got = case.answer(stk.apply_tome_patch(model, 5)(*inputs))
            assert torch.equal(got, case.answer(stk.apply_tome_patch(build(case), 5)(*inputs)))
        model = build(case)
        model.layers[1]._sa_block = lambda x, *_, **__: 0 * x
        with pytest.raises(RuntimeError, match="_sa_block of its own"):
            stk.apply_tome_patch(model, 5)
    assert torch.backends.mha.get_fastpath_enabled()


class QuantizedLinear(nn.Linear):
    """Rounds what it gets to 8 bits a token, as dynamic quantisation does: a step more or less is rounding."""

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


def test_quantised_layers_are_no_other_computation(family):
    """One step of rounding is far more than float32 differs by."""
    model = family.make()
    for block in family.blocks(model):
        owner, name = mlp_out(block)
        new = QuantizedLinear(getattr(owner, name).in_features, getattr(owner, name).out_features)
        new.load_state_dict(getattr(owner, name).state_dict())
        setattr(owner, name, new)
    assert torch.isfinite(family.run(family.patch(model))).all()
