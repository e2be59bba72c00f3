# SPDX-License-Identifier: Apache-2.0
"""Masks in Hugging Face's models whose tokens are merged: SigLIP2's padded images, and refusals of others."""

import inspect

import pytest
import torch
import transformers as hf
from stoptome_kernels.vit.tokens import Tokens

from support.vit import build
from support.vit import transformers as cases
from support.vit.transformers import BY_NAME, close, patched


def test_masks_are_refused():
    x = torch.randn(2, 3, 32, 32)
    for case, kind in ((BY_NAME["vit"], hf.ViTModel), (BY_NAME["dinov2"], hf.Dinov2Model)):
        model = patched(build(case))
        want = case.answer(model(x))
        if "attention_mask" in inspect.signature(kind.forward).parameters:  # older versions know none
            mask = torch.ones(2, 65)
            assert torch.equal(case.answer(model(x, attention_mask=mask)), want)
            mask[1, -3:] = 0
            with pytest.raises(ValueError, match=r"got attention_mask.*remove_tome_patch"):
                model(x, attention_mask=mask)
        with pytest.raises(ValueError, match=r"got a object as mask.*sdpa"):
            case.blocks(model)[1](Tokens(torch.randn(2, 65, 48)), object())
        with pytest.raises(ValueError, match="got is_causal"):
            case.blocks(model)[1](Tokens(torch.randn(2, 65, 48)), None, is_causal=True)


@pytest.mark.compiled
@pytest.mark.slow
def test_siglip2_of_full_and_padded_images():
    case = BY_NAME["siglip2"]
    model, (x,) = patched(build(case)), case.inputs(2)
    want, mask = case.answer(model(x)), torch.ones(2, 64, dtype=torch.int64)
    assert torch.equal(case.answer(model(x, mask)), want)
    if not case.traced:
        return
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
            ValueError, match=r"Siglip2EncoderLayer got an attention_mask of shape .* need \(2, 1, 64, 64\) or"
        ):
            layer(x, wrong)
    with pytest.raises(TypeError, match=r"got an attention_mask of torch.int64"):
        layer(x, mask.long())
    assert torch.equal(layer(x, mask[:, :, :1]).x, layer(x, mask).x)
    for wrong in (mask.tril(), torch.zeros(2, 1, 64, 64).index_fill(3, torch.tensor(3), 0.5)):
        with pytest.raises(RuntimeError, match="attention_mask can only mark padding patches"):
            layer(x, wrong)
    with pytest.raises(ValueError, match=r"got a object as mask.*sdpa"):
        layer(x, object())
