# SPDX-License-Identifier: Apache-2.0
"""Token merging in Hugging Face's models: what is special to them."""

import importlib.metadata
from functools import partial

import pytest
import torch
import transformers as hf
import vit_transformers as cases
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from vit_cases import build
from vit_transformers import layers_at

import stoptome_kernels as stk

BY_NAME = {case.name.removeprefix("transformers-"): case for case in cases.CASES + cases.MORE}
RATES = (0, 7, 3, 2)


@pytest.fixture(params=["clip-classifier", "siglip", "vit", "dinov2", "videomae"])
def family(request):
    return BY_NAME[request.param]


def patched(model, tome_r=RATES, **options):
    return stk.apply_tome_patch(model, list(tome_r), **options)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", cases.MORE, ids=lambda case: case.name)
def test_like_the_slow_way(case):
    model, inputs = build(case), case.inputs(2)
    plain, want = case.answer(model(*inputs)), case.slow(model, inputs, RATES)
    close(case.answer(patched(model)(*inputs)), want)
    assert not torch.allclose(want, plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(case.answer(patched(model, [0])(*inputs)), plain)


def test_only_layers_of_the_vision_tower_change_their_class():
    for name in ("clip", "siglip-both"):
        case = BY_NAME[name]
        model, inputs = build(case), case.inputs(2)
        kinds = {module: type(module) for module in model.modules()}
        text = model.model.get_text_features(model.texts).pooler_output
        patched(model)
        layers = case.blocks(model)
        assert all((type(module) is kind) == (module not in layers) for module, kind in kinds.items())
        assert all(type(layer).__name__ in model.model._no_split_modules for layer in layers)
        model(*inputs)
        assert torch.equal(model.model.get_text_features(model.texts).pooler_output, text)


# hidden states, attentions, backbones, composite models


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
    patched(model, [9])
    stk.remove_tome_patch(model)
    assert torch.equal(family.answer(model(*inputs)), plain)
    assert torch.equal(family.answer(patched(model)(*inputs)), merged)


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


# masks, sizes of images


def test_masks_are_refused():
    x = torch.randn(2, 3, 32, 32)
    for case, tokens in ((BY_NAME["vit"], 65), (BY_NAME["dinov2"], 65)):
        model = patched(build(case))
        want = case.answer(model(x))
        mask = torch.ones(2, tokens)
        assert torch.equal(case.answer(model(x, attention_mask=mask)), want)
        mask[1, -3:] = 0
        with pytest.raises(ValueError, match=r"got attention_mask.*remove_tome_patch"):
            model(x, attention_mask=mask)
        with pytest.raises(ValueError, match=r"got a object.*sdpa"):
            case.blocks(model)[1](torch.randn(2, 65, 48), object())
        with pytest.raises(ValueError, match="got is_causal"):
            case.blocks(model)[1](torch.randn(2, 65, 48), None, is_causal=True)


def test_siglip2_of_full_and_padded_images():
    case = BY_NAME["siglip2"]
    model, (x,) = patched(build(case)), case.inputs(2)
    want, mask = case.answer(model(x)), torch.ones(2, 64, dtype=torch.int64)
    assert torch.equal(case.answer(model(x, mask)), want)
    program = torch.export.export(model, (x, mask)).module()
    close(case.answer(program(x, mask)), want)
    mask = cases.padded(2)[1]
    close(case.answer(program(x, mask)), case.answer(model(x, mask)))
    program = torch.export.export(model, (x,)).module()
    close(case.answer(program(x)), want)


@pytest.mark.parametrize("prop_attn", [True, False])
def test_padding_of_siglip2_goes_first(prop_attn):
    """And takes nothing with it, whatever is in it: the last eight of 64 patches merge before anything else does."""
    case = BY_NAME["siglip2-padded-eager"]
    model, (x, mask) = build(case), case.inputs(2)
    mask[:] = torch.arange(64) < 56
    model.model.vision_model.embeddings.register_forward_hook(
        lambda _module, _args, out: out + (1 - mask[..., None]) * torch.randn_like(out)
    )
    plain = case.answer(model(x, mask))
    for tome_r in ((4, 2), (0, 0, 4, 0)):
        close(case.answer(patched(model, tome_r, prop_attn=prop_attn)(x, mask)), plain)
    assert not torch.allclose(case.answer(patched(model, (5,), prop_attn=prop_attn)(x, mask)), plain, 1e-3, 1e-3)


def test_masks_that_are_no_padding():
    case = BY_NAME["siglip2-padded"]
    model, x = patched(build(case), (3, 3, 3, 3)), torch.randn(2, 64, 48)
    layer, mask = case.blocks(model)[0], torch.ones(2, 1, 64, 64, dtype=torch.bool)
    for wrong in (mask[..., :63], mask[:, :, :3], mask[:, 0, 0], mask.expand(2, 4, 64, 64), mask.repeat(2, 1, 1, 1)):
        with pytest.raises(
            ValueError, match=r"Siglip2EncoderLayer got an attention_mask of shape .* need \(2, 1, 64, 64\)"
        ):
            layer(x, wrong)
    with pytest.raises(TypeError, match=r"got an attention_mask of torch.int64"):
        layer(x, mask.long())
    assert torch.equal(layer(x, mask[:, :, :1]).x, layer(x, mask).x)
    for wrong in (mask.tril(), torch.zeros(2, 1, 64, 64).index_fill(3, torch.tensor(3), 0.5)):
        with pytest.raises(RuntimeError, match="only say which patches are padding"):
            layer(x, wrong)
    with pytest.raises(ValueError, match=r"got a object.*sdpa"):
        layer(x, object())


@pytest.mark.parametrize("size", [48, 8])
def test_images_of_other_sizes(size):
    images = (torch.randn(2, 3, size, size),)
    for name in ("clip-projection", "siglip-classifier", "vit", "dinov2", "registers-classifier"):
        case = BY_NAME[name]
        model, options = (
            build(case),
            {} if case.make.args[0] in (cases.dinov2, cases.registers) else {"interpolate_pos_encoding": True},
        )
        for tome_r in (RATES, (40, 40, 40, 40)):
            want = cases.slow(case, model, images, tome_r, **options)
            close(case.answer(patched(model, tome_r)(*images, **options)), want)
            stk.remove_tome_patch(model)


def test_masked_patches():
    """Masked image modelling reads the grid, VideoMAE's decoder the visible tokens: each has a row."""
    case = BY_NAME["vit-masked"]
    model, (x,) = build(case), case.inputs(2)
    mask = torch.rand(2, 64) < 0.5
    want = cases.slow(case, model, (x, mask), RATES)
    out = patched(model)(x, mask)
    close(out.reconstruction, want)
    out.loss.backward()

    case = BY_NAME["videomae"]
    model, (x,) = case.make.args[0](hf.VideoMAEForPreTraining, decoder_num_attention_heads=4).eval(), case.inputs(2)
    mask = torch.stack([torch.randperm(128) < 96 for _ in x])
    want = cases.slow(case, model, (x, mask), RATES)
    close(patched(model)(x, mask).logits, want)
    assert not any(hasattr(layer, "tome") for layer in model.decoder.decoder_layers)


# training


def gradients(model, case, inputs, **options):
    torch.manual_seed(3)
    model.zero_grad()
    out = model(*inputs, **options)
    loss = case.answer(out).sin().sum()
    if options:
        loss = loss + out.hidden_states[2].cos().sum()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def checkpointing(model):
    """What turns checkpointing on, under its present name and the former one."""
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}], ids=["plain", "recorded"])
def test_gradient_checkpointing(family, options):
    if options and family.name == "transformers-videomae":
        options = {}
    model, inputs = patched(build(family)).train(), family.inputs(2)
    want = gradients(model, family, inputs, **options)
    calls = []
    family.blocks(model)[1].register_forward_pre_hook(lambda *_: None)  # hooks of others change nothing
    mlp = [
        module
        for name, module in family.blocks(model)[1].named_modules()
        if name.endswith(("fc1", "gate_proj", "intermediate", "weights_in"))
    ]
    mlp[0].register_forward_hook(lambda *_: calls.append(1))
    checkpointing(model)()
    got = gradients(model, family, inputs, **options)
    assert len(calls) == 2, "a layer runs once, and once more in the backward"
    for ours, plain in zip(got, want, strict=True):
        assert torch.equal(ours, plain)
    model.eval()
    family.answer(model(*inputs)).sum().backward()
    assert len(calls) == 3, "outside of training nothing is checkpointed"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(family):
    model, inputs = patched(build(family), [2]).train(), family.inputs(2)
    checkpointing(model)({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(*inputs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(*inputs)


def test_recording_that_checkpoints_could_not_repeat():
    case = BY_NAME["videomae"]
    model, inputs = patched(build(case)).train(), case.inputs(2)
    checkpointing(model)()
    with pytest.raises(RuntimeError, match="VideoMAELayer is checkpointed while hidden_states are recorded"):
        model(*inputs, output_hidden_states=True)
    with torch.no_grad():
        assert len(model(*inputs, output_hidden_states=True).hidden_states) == 5
    assert len(model.eval()(*inputs, output_hidden_states=True).hidden_states) == 5


DROPOUTS = [
    ("clip-classifier", {"attention_dropout": 1.0}),
    ("siglip", {"attention_dropout": 1.0}),
    ("vit", {"attention_probs_dropout_prob": 1.0}),
    ("vit", {"hidden_dropout_prob": 0.5}),
    ("dinov2", {"attention_probs_dropout_prob": 1.0}),
    ("dinov2", {"drop_path_rate": 0.5}),
    ("videomae", {"attention_probs_dropout_prob": 1.0}),
    ("videomae", {"hidden_dropout_prob": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), DROPOUTS, ids=str)
def test_dropout(name, options):
    """Of all weights, or the same of both: the layers draw their random numbers in the same order."""
    case = BY_NAME[name]
    model = build(case)
    fresh = cases.build(*case.make.args, **case.make.keywords | options)
    fresh.load_state_dict(model.state_dict())
    inputs = case.inputs(3)
    blocks = case.blocks(fresh)
    x = cases.first_input(blocks, fresh.eval(), *inputs)
    fresh.train()
    torch.manual_seed(7)
    want = cases.slow_layers(blocks, x, case.protected, (3, 3, 3, 3))[-1]
    patched(fresh, [3, 3, 3, 3])
    torch.manual_seed(7)
    got = x
    for block in blocks:
        got = block(got, None) if hasattr(block, "layer_norm1") else block(got)
    close(got, want)
    fresh.eval()
    for block in blocks:
        x = block(x, None) if hasattr(block, "layer_norm1") else block(x)
    assert not torch.allclose(x, got, rtol=1e-2, atol=1e-2)


def test_training_learns(family):
    model, inputs = patched(build(family)).train(), family.inputs(4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        out = model(*inputs)
        loss = (
            out.pooler_output.square().mean()
            if "pooler_output" in out
            else nn.functional.cross_entropy(out.logits, torch.arange(4))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


# adapters, files, other libraries


def lora(model):
    targets = r".*\.layers?\.\d+\..*\.(q_proj|k_proj|v_proj|out_proj|o_proj|query|key|value|fc1|gate_proj)"
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.1)
    wrapped = get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which peft asks for
@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_adapters(family, first):
    inputs = family.inputs(2)
    reference = lora(build(family))
    want = cases.slow(family, reference.base_model.model, inputs, RATES)
    without = cases.slow(family, build(family), inputs, RATES)
    assert not torch.allclose(want, without, rtol=1e-2, atol=1e-2)
    model = lora(patched(build(family))) if first == "patch" else patched(lora(build(family)))
    close(family.answer(model(*inputs)), want)

    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    family.answer(model(*inputs)).sin().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name

    model.eval()
    want = family.answer(model(*inputs))
    merged = model.merge_and_unload()
    close(family.answer(merged(*inputs)), want)
    assert not any("lora" in name for name, _ in merged.named_modules())
    stk.remove_tome_patch(merged)
    assert not any(hasattr(module, "tome") for module in merged.modules())


def test_files(family, tmp_path):
    """As if the model were not patched."""
    model, inputs = build(family), family.inputs(2)
    plain = family.answer(model(*inputs))
    model.save_pretrained(tmp_path / "plain")
    patched(model).save_pretrained(tmp_path / "patched")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes()
    attention = model.config._attn_implementation  # which the library doesn't write
    again = type(model).from_pretrained(tmp_path / "patched", attn_implementation=attention).eval()
    assert torch.equal(family.answer(again(*inputs)), plain)
    assert torch.equal(family.answer(patched(again)(*inputs)), family.answer(model(*inputs)))


def test_accelerate(family):
    """Its hooks are kept, where they come after the patch; before it they would hide the patch."""
    hook = partial(AlignDevicesHook, execution_device="cpu", io_same_device=True)
    model, inputs = patched(build(family)), family.inputs(2)
    want = family.answer(model(*inputs))
    for block in family.blocks(model):
        add_hook_to_module(block, hook())
    assert torch.equal(family.answer(model(*inputs)), want)
    model = build(family)
    add_hook_to_module(family.blocks(model)[0], hook())
    with pytest.raises(RuntimeError, match=r"accelerate.*patch first"):
        patched(model)


# refusals


def test_other_models():
    for model in (
        hf.BeitModel(hf.BeitConfig(**cases.SIZE)),
        hf.CLIPTextModel(hf.CLIPTextConfig(**cases.TEXT)),
    ):
        with pytest.raises(TypeError, match=f"transformers' {type(model).__name__}: known are CLIPVisionModel, "):
            patched(model)
    two = nn.ModuleList([build(BY_NAME["vit"]), build(BY_NAME["siglip"])])
    with pytest.raises(
        ValueError, match=r"2 vision transformers \(SiglipVisionModel, ViTModel\): patch them one by one"
    ):
        patched(two)


def test_images_of_one_patch():
    with pytest.raises(ValueError, match="an image has 2 tokens of which 1 are protected"):
        patched(cases.vit(hf.ViTModel, image_size=4))


def test_other_layers(family):
    model = build(family)
    block = family.blocks(model)[2]
    kind = type(block)
    block.__class__ = type("Mine", (kind,), {})
    with pytest.raises(TypeError, match=f"merge tokens in Mine.*known is transformers' {kind.__name__}"):
        patched(model)


def test_attention_that_would_not_be_called(family):
    for spoil in (
        lambda attn: attn.register_forward_hook(lambda *_: None),
        lambda attn: attn.register_forward_pre_hook(lambda *_: None),
        lambda attn: setattr(attn, "forward", attn.forward),
    ):
        model = build(family)
        block = family.blocks(model)[1]
        attn = block.self_attn if hasattr(block, "self_attn") else block.attention
        spoil(getattr(attn, "attention", attn))
        with pytest.raises(ValueError, match=r"Attention has hooks or a forward of its own.*before patching"):
            patched(model)
        assert not any(hasattr(module, "tome") for module in model.modules())
    model = patched(build(family))
    for module in family.blocks(model)[1].modules():
        module.register_forward_hook(lambda *_: None)
    stk.remove_tome_patch(model)  # what comes later is no reason to keep a patch
    assert not any(hasattr(module, "tome") for module in model.modules())


def test_another_attention_is_found_out(family):
    """One that the library was told to use, and that computes something else."""
    name = "half"
    hf.AttentionInterface.register(name, lambda module, q, k, v, *_, **__: (0.5 * v.transpose(1, 2), None))
    model = build(family)
    for block in family.blocks(model):
        attn = block.self_attn if hasattr(block, "self_attn") else block.attention
        getattr(attn, "attention", attn).config._attn_implementation = name
    with pytest.raises(ValueError, match="computes something else"):
        patched(model)


def test_an_old_version(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "5.3.9" if name == "transformers" else version(name)
    )
    with pytest.raises(ImportError, match=r"ViTModel needs transformers 5\.4 or later, found 5\.3\.9"):
        patched(build(BY_NAME["vit"]))
