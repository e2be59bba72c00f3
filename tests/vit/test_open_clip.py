# SPDX-License-Identifier: Apache-2.0
"""What is special to open_clip's models."""

import copy
from functools import partial

import pytest
import stoptome_kernels as stk
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import nn

from support.vit import Slow, build
from support.vit import open_clip as cases
from support.vit.open_clip import SIZE, TEXT, attended, merged, slow
from support.vit.timm import images

CASES = {case.name.removeprefix("open_clip-"): case for case in cases.CASES}
RATES = (0, 9, 3, 5)


def tower(**options) -> VisionTransformer:
    return VisionTransformer(**SIZE | {"heads": 4, "mlp_ratio": 2.0, "output_dim": 24} | options)


def clip(**vision) -> CLIP:
    return CLIP(24, SIZE | {"head_width": 12} | vision, TEXT)


def patched(model) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "tome")]


@pytest.mark.parametrize("name", ["clip", "custom-text", "coca"])
def test_the_text_side_is_untouched(name):
    model = build(CASES[name])
    text = torch.randint(1, 100, (2, 16))
    before = model.encode_text(text)
    stk.apply_tome_patch(model, 5)
    assert patched(model) == ["visual", *(f"visual.transformer.resblocks.{layer}" for layer in range(4))]
    assert torch.equal(model.encode_text(text), before)


def test_captions_see_every_token():
    model, (image,), text = build(CASES["coca"]), images(2), torch.randint(1, 100, (2, 16))
    features, tokens = slow(model.visual, (image,), RATES)
    _, words = model.text(text)
    want = model.text_decoder(tokens, words[:, :-1])
    result = stk.apply_tome_patch(model, list(RATES))(image, text)
    torch.testing.assert_close(result["logits"], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result["image_features"], nn.functional.normalize(features, dim=-1))


@pytest.mark.parametrize("name", ["clip", "coca"])
def test_checkpointing_of_its_own(name):
    """``set_grad_checkpointing``: the same gradients, bit for bit."""
    model, inputs = stk.apply_tome_patch(build(CASES[name]).train(), 5), images(2)
    got = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        CASES[name].answer(model(*inputs)).sin().sum().backward()
        got.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, two in zip(*got, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["vit", "custom", "avg"])
def test_intermediates_are_dense(name):
    """Every layer's tokens in their places on the grid, and the features as in a forward."""
    model, inputs = build(CASES[name]), images(2)
    x = model._embeds(*inputs)
    state, want = Slow(x, 1), []
    for block, r in zip(model.transformer.resblocks, RATES, strict=True):
        out, keys = attended(block, block.ln_1(x), state)
        x = state.merge(x + block.ls_1(out), keys, r)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        want.append(state.spread(x))
    features = slow(model, inputs, RATES)
    stk.apply_tome_patch(model, list(RATES))
    result = model.forward_intermediates(*inputs, output_fmt="NLC", output_extra_tokens=True)
    for index, layer in enumerate(want):
        torch.testing.assert_close(result["image_intermediates"][index], layer[:, 1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["image_intermediates_prefix"][index], layer[:, :1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result["image_features"], features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(*inputs), features, rtol=1e-4, atol=1e-4)
    result = model.forward_intermediates(*inputs, indices=[1], stop_early=True, intermediates_only=True)
    grid = want[1][:, 1:].mT.unflatten(2, (8, 8))
    torch.testing.assert_close(result["image_intermediates"], [grid], rtol=1e-4, atol=1e-4)


def test_intermediates_of_the_whole_model():
    model, inputs = build(CASES["clip"]), images(2)
    stk.apply_tome_patch(model, 5)
    result = model.forward_intermediates(*inputs, image_indices=2)
    assert [x.shape for x in result["image_intermediates"]] == [(2, 48, 8, 8)] * 2
    torch.testing.assert_close(result["image_features"], model(*inputs)[0])


def test_intermediates_are_not_computed_twice():
    model, inputs = stk.apply_tome_patch(build(CASES["clip"]), 5), images(2)
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match=r"set_grad_checkpointing\(False\)"):
        model.forward_intermediates(*inputs)
    with torch.no_grad():
        got = model.forward_intermediates(*inputs)["image_features"]
    torch.testing.assert_close(got, model(*inputs)[0])


def test_layers_are_not_pruned_under_the_patch():
    with pytest.raises(RuntimeError, match="remove_tome_patch"):
        stk.apply_tome_patch(tower(), 5).prune_intermediate_layers(1)


def test_tokens_asked_for_after_the_patch():
    model, inputs = build(CASES["vit"]), images(2)
    stk.apply_tome_patch(model, 5)
    pooled = model(*inputs)
    model.output_tokens = True
    again, tokens = model(*inputs)
    torch.testing.assert_close(again, pooled)
    assert tokens.shape == (2, 64, 48)


class Mean(VisionTransformer):
    """A pool of somebody's own: of all tokens, whatever pool_type says."""

    def _global_pool(self, x):
        return x.mean(1), x


def test_a_pool_of_a_derived_class():
    """It may read any token, so each must have a row."""
    model, inputs = build(CASES["vit"]), images(2)
    model.__class__ = Mean
    x, state = merged(model, inputs, RATES)
    want = model.ln_post(state.spread(x).mean(1)) @ model.proj
    torch.testing.assert_close(stk.apply_tome_patch(model, list(RATES))(*inputs), want, rtol=1e-4, atol=1e-4)


def test_patch_dropout():
    """Fewer patches come in training, the class token first as ever."""
    model, inputs = build(CASES["vit"]).train(), images(2)
    model.patch_dropout = tower(patch_dropout=0.5).patch_dropout
    torch.manual_seed(1)
    want = slow(model, inputs, RATES)
    stk.apply_tome_patch(model, list(RATES), trace_source=True)
    torch.manual_seed(1)
    torch.testing.assert_close(model(*inputs), want, rtol=1e-4, atol=1e-4)
    assert stk.tome_trace(model).tokens == (33, 24, 21, 16)


def test_dropout_of_attention_weights():
    """Open_clip builds its blocks without, but the modules have it. All dropped, nothing is left to chance."""
    for name in ("vit", "custom"):
        model, inputs = build(CASES[name]).train(), images(2)
        for block in model.transformer.resblocks:
            if isinstance(block.attn, nn.MultiheadAttention):
                block.attn.dropout = 1.0
            else:
                block.attn.attn_drop.p = 1.0
        want = slow(model, inputs, RATES)
        stk.apply_tome_patch(model, list(RATES))
        torch.testing.assert_close(model(*inputs), want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model.eval()(*inputs), want, rtol=1e-2, atol=1e-2)


def mixed(model, dtype):
    """As open_clip loads a model with precision fp16 or bf16: weights of 16 bits, but norms of 32."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = cases.open_clip.transformer.LayerNormFp32
    convert_weights_to_lp(model, dtype)
    return model


def pure(model, dtype):
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("convert", [mixed, pure])
def test_weights_of_16_bits(convert, dtype):
    """As near to float32 as the model that merges nothing."""
    exact, (image,) = build(CASES["clip"]), images(2)
    model = convert(copy.deepcopy(exact), dtype)

    def error() -> float:
        want = exact.visual(image)
        got = model.visual(image.to(dtype))
        assert got.dtype == dtype
        return ((got - want).abs().max() / want.abs().max()).item()

    with torch.no_grad():
        plain = error()
        for each in (exact, model):
            stk.apply_tome_patch(each, [0, 5])
        assert 0 < error() < 4 * plain  # rounding may choose other tokens, but such that are nearly as similar


def crossing():
    model = tower()
    model.transformer.resblocks[2] = ResidualAttentionBlock(48, 4, is_cross_attention=True)
    return model


def sequence_first():
    model = tower()
    model.transformer.batch_first = False
    return model


class Wider(ResidualAttentionBlock):
    pass


def derived():
    model = tower()
    model.transformer.resblocks[0] = Wider(48, 4)
    return model


def strange_attention():
    model = tower(qk_norm=True)
    model.transformer.resblocks[3].attn = nn.Identity()
    return model


RESNET = {"layers": (1, 1, 1, 1), "width": 8}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: clip(**RESNET), TypeError, "open_clip's CLIP with a ModifiedResNet"),
        (lambda: clip(**RESNET).visual, TypeError, "open_clip's ModifiedResNet"),
        (lambda: clip(timm_model_name="resnet18"), TypeError, "open_clip's CLIP with a ResNet"),
        (lambda: clip(timm_model_name="resnet18").visual, TypeError, "open_clip's TimmModel with a ResNet"),
        (partial(TextTransformer, **TEXT), TypeError, "open_clip's TextTransformer"),
        (lambda: nn.ModuleList([tower(), tower()]), ValueError, "2 vision transformers"),
        (partial(tower, scaled_cosine_attn=True), ValueError, "scaled_cosine_attn"),
        (crossing, TypeError, "cross attention"),
        (sequence_first, ValueError, "batch_first"),
        (derived, TypeError, "open_clip's Wider"),
        (strange_attention, TypeError, "CustomResidualAttentionBlock with the attention Identity"),
    ],
)
def test_refused(make, error, says):
    model = make()
    with pytest.raises(error, match=says):
        stk.apply_tome_patch(model, 2)
    assert patched(model) == []


def test_masks_are_refused():
    model, x, mask = tower(), torch.randn(2, 65, 48), torch.zeros(65, 65)
    custom = tower(scale_heads=True)
    before = model.transformer(x, attn_mask=mask)
    for each in (model, custom):
        stk.apply_tome_patch(each, 4)
        with pytest.raises(ValueError, match=r"ResidualAttentionBlock got attn_mask.*remove_tome_patch"):
            each.transformer(x, attn_mask=mask)
    with pytest.raises(ValueError, match="got k_x"):
        model.transformer.resblocks[0](x, x)
    stk.apply_tome_patch(model, 0)
    assert torch.equal(model.transformer(x, attn_mask=mask), before)


def test_it_says_itself_what_is_protected():
    model = stk.apply_tome_patch(tower(), 2, protected=1)
    with pytest.raises(ValueError, match="VisionTransformer defines 1 leading tokens"):
        stk.apply_tome_patch(model, 2, protected=2)


def test_an_open_clip_too_old(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.32.0")
    with pytest.raises(ImportError, match=r"VisionTransformer needs open_clip_torch 3\.0 or later, found 2\.32\.0"):
        stk.apply_tome_patch(tower(), 2)
