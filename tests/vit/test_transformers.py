# SPDX-License-Identifier: Apache-2.0
"""Token merging in Hugging Face's models: what is special to them."""

import importlib.metadata
from functools import partial

import pytest
import stoptome_kernels as stk
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from stoptome_kernels.patching.subclass import PatchedModule
from torch import nn

from support.vit import build
from support.vit import transformers as cases
from support.vit.transformers import BY_NAME, RATES, close, patched, since


@pytest.fixture(params=cases.FAMILIES, ids=lambda case: case.name)
def family(request):
    return request.param


@pytest.mark.parametrize("case", cases.MORE, ids=lambda case: case.name)
def test_like_the_slow_way(case):
    model, inputs = build(case), case.inputs(2)
    plain, want = case.answer(model(*inputs)), case.slow(model, inputs, RATES)
    close(case.answer(patched(model)(*inputs)), want)
    assert not torch.allclose(want, plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(case.answer(patched(model, [0])(*inputs)), plain)


def test_only_layers_of_the_vision_tower_and_their_attention_change_their_class():
    for name in ("clip", "siglip-both"):
        case = BY_NAME[name]
        model, inputs = build(case), case.inputs(2)
        kinds = {module: type(module) for module in model.modules()}
        text = model.model.get_text_features(model.texts).pooler_output
        patched(model)
        layers = case.blocks(model)
        changed = {module for module, kind in kinds.items() if type(module) is not kind}
        encoder = set() if since(5, 2) else {model.model.vision_model.encoder}
        attention = {layer.self_attn for layer in layers}
        assert (
            changed
            == {*layers, *attention, *encoder}
            == {module for module in kinds if isinstance(module, PatchedModule)}
        )
        assert all(type(layer).__name__ in model.model._no_split_modules for layer in layers)
        model(*inputs)
        assert torch.equal(model.model.get_text_features(model.texts).pooler_output, text)


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
    """Return what turns checkpointing on, under its present name and the former one."""
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable


# which don't tell their layers that hidden states are wanted
UNREPEATABLE = [BY_NAME[name] for name in (("videomae",) if since(5, 4) else ("videomae", "vit"))]


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}], ids=["plain", "recorded"])
def test_gradient_checkpointing(family, options):
    if options and family in UNREPEATABLE:
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


@pytest.mark.parametrize("case", UNREPEATABLE, ids=lambda case: case.name)
def test_recording_that_checkpoints_could_not_repeat(case):
    model, inputs = patched(build(case)).train(), case.inputs(2)
    checkpointing(model)()
    layer = type(case.blocks(model)[0]).__name__
    with pytest.raises(RuntimeError, match=f"{layer} is checkpointed while hidden_states are recorded"):
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
    if family.name == "transformers-videomae" and not since(5, 6):
        pytest.skip("VideoMAE reads the weights of its projections and calls no adapters")
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
    states = model(*inputs, output_hidden_states=True).hidden_states
    for got, wanted in zip(
        states, patched(build(family))(*inputs, output_hidden_states=True).hidden_states, strict=True
    ):
        assert torch.equal(got, wanted)
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
        with pytest.raises(TypeError, match=f"transformers' {type(model).__name__}: supported are CLIPVisionModel, "):
            patched(model)
    two = nn.ModuleList([build(BY_NAME["vit"]), build(BY_NAME["siglip"])])
    with pytest.raises(
        ValueError, match=r"2 vision transformers \(SiglipVisionModel, ViTModel\): patch them one by one"
    ):
        patched(two)


def test_images_of_one_patch():
    with pytest.raises(ValueError, match="an image has 2 tokens, of which 1 are protected"):
        patched(cases.vit(hf.ViTModel, image_size=4))


def test_other_layers(family):
    model = build(family)
    block = family.blocks(model)[2]
    kind = type(block)
    block.__class__ = type("Mine", (kind,), {})
    with pytest.raises(TypeError, match=f"merge tokens in Mine.*supported is transformers' {kind.__name__}"):
        patched(model)


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


def test_another_attention_after_the_patch(family):
    """Is refused where tokens are merged; the library's own compute the same, and are not."""
    name = "half"
    hf.AttentionInterface.register(name, lambda module, q, k, v, *_, **__: (0.5 * v.transpose(1, 2), None))
    model, inputs = patched(build(family)), family.inputs(2)
    want = family.answer(model(*inputs))
    for implementation in ("eager", name):
        for block in family.blocks(model):
            attn = block.self_attn if hasattr(block, "self_attn") else block.attention
            getattr(attn, "attention", attn).config._attn_implementation = implementation
        if implementation == "eager":
            close(family.answer(model(*inputs)), want)
        else:
            with pytest.raises(ValueError, match=r"'half' after it was patched.*set_attn_implementation"):
                model(*inputs)


def test_an_old_version(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.57.6" if name == "transformers" else version(name)
    )
    with pytest.raises(ImportError, match=r"ViTModel needs transformers 5\.0 or later, found 4\.57\.6"):
        patched(build(BY_NAME["vit"]))
