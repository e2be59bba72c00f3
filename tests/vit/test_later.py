# SPDX-License-Identifier: Apache-2.0
"""Changes to attention, parts and towers after the patch: followed, or refused."""

from collections.abc import Callable
from functools import partial
from types import MethodType

import pytest
import stoptome_kernels as stk
import torch
from torch import nn

from support.families import Family, attention, families, get, norm, same, scale
from support.situations import Halved

FAMILIES = list(families())
READ_ATTENTION = ("STOP, DGL", "CLIP4Clip", "TempMe", "StopModel")
READ = [family for family in FAMILIES if family.layers]


MULTIHEAD = [
    family for family in FAMILIES if isinstance(get(attention(family.block(family.make()))), nn.MultiheadAttention)
]
MULTIHEAD = [family for family in MULTIHEAD if family.name not in READ_ATTENTION]


def given_to(family: Family, change: Callable) -> Callable:
    """Give a call of a patched model whose second attention gets other arguments."""

    def call():
        model = family.patch(family.make())
        get(attention(family.block(model))).register_forward_pre_hook(change, with_kwargs=True)
        return family.run(model)

    return call


@pytest.mark.parametrize("family", MULTIHEAD, ids=lambda family: family.name)
def test_keys_and_values_of_something_else(family):
    """A hook may hand attention other keys and values than queries: without values only the bias is left."""
    without = given_to(family, lambda _m, args, options: ((args[0], args[1], args[2] * 0), options))()
    model = family.make()
    attn = get(attention(family.block(model)))
    with torch.no_grad():
        attn.in_proj_weight[2 * attn.embed_dim :] = 0
    torch.testing.assert_close(without, family.run(family.patch(model)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without, family.run(family.patch(family.make())), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"), [("key_padding_mask", torch.zeros(2, 65)), ("need_weights", True), ("is_causal", True)]
)
@pytest.mark.parametrize("family", MULTIHEAD, ids=lambda family: family.name)
def test_more_than_a_block_asks_of_its_attention(family, name, value):
    with pytest.raises(ValueError, match=f"got {name}, which is not supported while .* merged.*remove_tome_patch"):
        given_to(family, lambda _m, args, options: (args, options | {name: value}))()


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name[:4] in ("timm", "tran")], ids=lambda family: family.name
)
def test_causal_attention(family):
    with pytest.raises(ValueError, match=r"is_causal.*remove_tome_patch"):
        given_to(family, lambda _m, args, options: (args, options | {"is_causal": True}))()


@pytest.mark.parametrize("family", MULTIHEAD, ids=lambda family: family.name)
def test_keys_that_are_added_later(family):
    model = family.patch(family.make())
    get(attention(family.block(model))).add_zero_attn = True
    with pytest.raises(ValueError, match=r"add_zero_attn.*remove_tome_patch"):
        family.run(model)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_layer_norm_of_another_make(family, monkeypatch):
    """torch's own forward may be replaced for all norms at once, and weights be put in the place of parameters."""
    model = family.patch(family.make())
    plain = family.run(model)
    forward = nn.LayerNorm.forward
    kind = type(get(norm(family.block(model))))
    if kind is nn.LayerNorm or family.name in (
        "STOP, DGL",
        "CLIP4Clip",
        "TempMe",
    ):  # others have a forward of their own
        with monkeypatch.context() as patched:
            patched.setattr(nn.LayerNorm, "forward", lambda self, x: 0.5 * forward(self, x))
            got = family.run(model)
        model = family.make()
        for module in model.modules():
            if type(module) in (nn.LayerNorm, kind):
                module.weight.data *= 0.5
                module.bias.data *= 0.5
        torch.testing.assert_close(got, family.run(family.patch(model)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, plain, rtol=1e-3, atol=1e-4)
    model = family.patch(family.make())
    module = get(norm(family.block(model)))
    for name in ("weight", "bias"):
        stored = getattr(module, name).detach().as_subclass(Halved)
        delattr(module, name)
        setattr(module, name, stored)
    got = family.run(model)
    model = family.make()
    scale(get(norm(family.block(model))), 0.5)
    torch.testing.assert_close(got, family.run(family.patch(model)), rtol=1e-4, atol=1e-5)


def mean_of_an_encoder(tower, x):
    return tower.encoder(tower._process_input(x).repeat(1, 2, 1)[:, :65]).mean(1)


def mean_of_tokens(tower, x, *_, **__):
    return x.mean(1)


def mean_for_all_tokens(encoder, x):
    x = type(encoder).forward(encoder, x)
    return x.mean(1, keepdim=True).expand_as(x)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "method", "reader"),
    [
        ("timm-res-post", "forward_head", mean_of_tokens),
        ("open_clip-clip", "visual._global_pool", lambda tower, x: (x.mean(1), x[:, 1:])),
        ("torchvision-vit", "forward", mean_of_an_encoder),
        ("torchvision-vit", "encoder.forward", mean_for_all_tokens),
    ],
)
def test_readers_of_somebody_elses_on_the_model(name, method, reader, when):
    """Whatever is put on the tower may read all tokens: each has a row then."""
    family = next(family for family in FAMILIES if family.name == name)

    def put(model):
        path, _, last = method.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, last, MethodType(reader, owner))
        return model

    model = family.patch(put(family.make())) if when == "before" else put(family.patch(family.make()))
    want = put(family.make())
    stk.apply_tome_patch(want, 5, unmerge=True)
    torch.testing.assert_close(family.run(model), family.run(want))


def test_methods_of_blocks_that_are_replaced():
    for name, method in (("torch-sequence-first-pre-norm", "_sa_block"), ("open_clip-clip", "attention")):
        family = next(family for family in FAMILIES if family.name == name)
        model = family.patch(family.make())
        block = family.block(model)
        setattr(block, method, partial(getattr(block, method)))
        with pytest.raises(RuntimeError, match=rf"has a {method} of its own.*remove_tome_patch"):
            family.run(model)


@pytest.mark.parametrize("change", [lambda x: x.mul_(0.3), lambda x: None], ids=["in place", "not at all"])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", [f for f in READ if f.name.startswith("trans")], ids=lambda family: family.name)
def test_hidden_states_that_a_hook_changes(family, change, inference):
    """The next layer works on merged tokens: what is done to the recorded rows would be lost."""
    model = family.patch(family.make())
    with inference():
        want = family.layers(model)
        hook = family.block(model).register_forward_hook(lambda _m, _a, out: (change(out[0]), None)[1])
        if change(torch.zeros(1)) is None:
            assert same(family.layers(model), want)
        else:
            with pytest.raises(RuntimeError, match=r"a hook changed the recorded hidden states.*remove_tome_patch"):
                family.layers(model)
        hook.remove()
        assert same(family.layers(model), want)
