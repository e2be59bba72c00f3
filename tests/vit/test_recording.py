# SPDX-License-Identifier: Apache-2.0
"""Hidden states, attention weights and feature maps of Hugging Face's models whose tokens are merged."""

from functools import partial, wraps

import pytest
import stoptome_kernels as stk
import torch
import transformers as hf
from stoptome_kernels.vit.recording import is_recorded, remove_stale_recorders

from support.vit import build
from support.vit import transformers as cases
from support.vit.transformers import BY_NAME, RATES, close, layers_at, patched, since


@pytest.fixture(params=cases.FAMILIES, ids=lambda case: case.name)
def family(request):
    return request.param


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in ("clip", "clip-both", "siglip-both")])
def test_hidden_states_have_all_tokens(name):
    case = BY_NAME[name]
    model, inputs = build(case), case.inputs(2)
    layers, real = case.blocks(model), cases.real_tokens(model, inputs)
    want = cases.slow_layers(layers, cases.first_input(layers, model, *inputs), case.protected, RATES, real)
    patched(model)
    out = model(*inputs, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    for got, wanted in zip(out.hidden_states[1:], want, strict=True):
        close(got, wanted)
    assert torch.equal(case.answer(out), case.answer(model(*inputs)))


def test_hidden_states_by_number_and_by_config(family):
    model, inputs = patched(build(family)), family.inputs(2)
    want = model(*inputs, output_hidden_states=True).hidden_states
    some = model(*inputs, output_hidden_states=[-2]).hidden_states
    plain = build(family)(*inputs, output_hidden_states=[-2]).hidden_states  # older versions give all
    assert [state is None for state in some] == [state is None for state in plain]
    if since(5, 24):
        assert [state is None for state in some] == [True, True, True, False, True]
    assert torch.equal(some[-2], want[-2])
    for module in model.modules():
        if isinstance(module, hf.PreTrainedModel):
            module.config.output_hidden_states = True
    for got, wanted in zip(model(*inputs).hidden_states, want, strict=True):
        assert torch.equal(got, wanted)


def test_recorded_once_means_nothing_afterwards(family):
    """The library's hooks stay: they are no reason to refuse the model, nor to make all tokens."""
    model, inputs = build(family), family.inputs(2)
    plain = family.answer(model(*inputs, output_hidden_states=True))
    patched(model)
    seen = []
    family.blocks(model)[1].register_forward_hook(lambda _layer, _args, out: seen.append(type(out)))
    merged = family.answer(model(*inputs))
    assert seen == [stk.vit.tokens.Tokens]
    model(*inputs, output_hidden_states=True)
    assert torch.equal(family.answer(model(*inputs)), merged)
    assert seen[2] == stk.vit.tokens.Tokens
    patched(model, [9])
    stk.remove_tome_patch(model)
    assert torch.equal(family.answer(model(*inputs)), plain)
    assert torch.equal(family.answer(patched(model)(*inputs)), merged)


def test_what_recording_leaves_is_taken_out_and_nothing_else():
    """As transformers 5.0 records: by a function in front of a module's method, or of what accelerate put there."""
    library = {"wraps": wraps}
    source = "def recorder(inner):\n    return wraps(inner)(lambda *args, **options: inner(*args, **options))"
    exec(compile(source, "/lib/transformers/utils/generic.py", "exec"), library)
    model = build(BY_NAME["vit"])
    tower, (first, second, third, fourth) = model.vit, BY_NAME["vit"].blocks(model)
    tower.forward = tower.forward  # a method whose decorator is from the library's file
    first.forward = first.forward
    second.forward = library["recorder"](library["recorder"](second.forward))
    third.forward = others = partial(third.forward)
    fourth.forward = partial(fourth.forward)
    beneath, fourth.forward = fourth.forward, library["recorder"](fourth.forward)
    layers = (first, second, third, fourth)
    assert [is_recorded(layer, "hidden_states") for layer in layers] == [False, True, False, True]
    remove_stale_recorders(model)
    assert not any("forward" in module.__dict__ for module in (tower, first, second))
    assert third.forward is others
    assert fourth.forward is beneath
    assert not any(is_recorded(layer, "hidden_states") for layer in layers)


def test_attentions_are_refused(family):
    model, inputs = build(family), family.inputs(2)
    model.set_attn_implementation("eager")
    assert len(model(*inputs, output_attentions=True).attentions) == 4
    patched(model)
    with pytest.raises(ValueError, match=r"output_attentions.*remove_tome_patch"):
        model(*inputs, output_attentions=True)
    model(*inputs)
    for module in model.modules():
        if isinstance(module, hf.PreTrainedModel):
            module.config.output_attentions = True
    with pytest.raises(ValueError, match=r"output_attentions.*remove_tome_patch"):
        model(*inputs)
    assert len(patched(model, [0])(*inputs).attentions) == 4


@pytest.mark.parametrize("make", [cases.dinov2, cases.registers])
def test_backbones_give_grids(make):
    kind = {cases.dinov2: hf.Dinov2Backbone, cases.registers: hf.Dinov2WithRegistersBackbone}[make]
    name = {cases.dinov2: "dinov2-model", cases.registers: "registers"}[make]
    case = BY_NAME[name]
    model, inputs = make(kind, out_features=["stage2", "stage4"]).eval(), case.inputs(2)
    layers = case.blocks(model)
    states = cases.slow_layers(layers, cases.first_input(layers, model, *inputs), case.protected, RATES)
    maps = patched(model)(*inputs).feature_maps
    for got, state in zip(maps, (states[1], states[3]), strict=True):
        close(got, model.layernorm(state)[:, case.protected :].unflatten(1, (8, 8)).permute(0, 3, 1, 2))


def llava():
    text = hf.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(**cases.SIZE)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    ).eval()


def test_a_model_that_reads_grids_inside_a_language_model():
    case = BY_NAME["clip-vision"]
    model, images = llava(), case.inputs(2)
    layers = layers_at(model, "model.vision_tower.encoder.layers")
    states = cases.slow_layers(layers, cases.first_input(layers, model.model.vision_tower, *images), 1, RATES)
    want = model.model.multi_modal_projector(states[2][:, 1:])  # the layer before the last one
    ids = torch.cat([torch.full((2, 64), 99), torch.arange(10).reshape(2, 5) + 1], 1)
    plain = model(input_ids=ids, pixel_values=images[0]).logits
    patched(model)
    got = model.get_image_features(*images).pooler_output
    close(torch.cat([x.reshape(-1, 32) for x in got]), want.flatten(0, 1))
    merged = model(input_ids=ids, pixel_values=images[0]).logits
    assert merged.shape == plain.shape
    assert not torch.allclose(merged, plain, rtol=1e-3, atol=1e-3)
