# SPDX-License-Identifier: Apache-2.0
"""Attention by sizes as an implementation of transformers: with it models compute what they do with ``sdpa``, until
they are given sizes."""

import subprocess
import sys

import pytest
import stoptome_kernels as stk
import torch
import transformers as hf
from stoptome_kernels.vit.interface import NAME, attention_forward

from support.vit.transformers import SIZE, patched, since

LAYERS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones(2, 9, dtype=torch.long)
PADDED[1, 6:] = 0  # behind
AHEAD = PADDED.flip(1)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = torch.tensor([[1, 2, 1, 3, 1, 1, 4, 1, 1], [2, 1, 1, 1, 5, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def registered():
    assert stk.register_attention() == NAME == "stk_tome"


def clip_vision():
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZE)), (IMAGES,), {}


def vit():
    return hf.ViTModel(hf.ViTConfig(**SIZE), add_pooling_layer=False), (IMAGES,), {}


def bert():
    return hf.BertModel(hf.BertConfig(**LAYERS), add_pooling_layer=False), (IDS,), {"attention_mask": PADDED}


def clip_text():
    return hf.CLIPTextModel(hf.CLIPTextConfig(**LAYERS)), (IDS,), {"attention_mask": PADDED}


def llama(**mask):  # its queries share keys
    config = hf.LlamaConfig(**LAYERS, num_key_value_heads=2)
    return hf.LlamaModel(config), (IDS,), {"use_cache": False, **mask}


def llama_padded():
    return llama(attention_mask=AHEAD)


def answers(made, name, **options):
    model, inputs, more = made
    model.set_attn_implementation(name)
    return model(*inputs, **more, **options).last_hidden_state


@pytest.mark.parametrize("make", [clip_vision, vit, bert, clip_text, llama, llama_padded])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_as_sdpa(make, mode):
    """Masks of padding and causal ones, shared keys, dropout."""
    made = make()
    getattr(made[0], mode)()
    if mode == "train" and hasattr(made[0].config, "attention_dropout"):
        made[0].config.attention_dropout = 0.2
    results = []
    for name in ("sdpa", NAME):
        torch.manual_seed(1)
        results.append(answers(made, name))
    assert torch.equal(*results)


def test_without_a_mask_of_ours_padding_would_be_attended_to():
    """For a name without masks of its own transformers makes none; with ours the mask counts."""
    hf.AttentionInterface.register("stk_no_mask", attention_forward)
    made = bert()
    made[0].eval()
    want, ours, wrong = (answers(made, name)[1, :6] for name in ("sdpa", NAME, "stk_no_mask"))
    assert torch.equal(ours, want)
    assert (wrong - want).abs().max() > 1e-3


def repeated(x, sizes):
    """Every token as often as it counts, items padded behind; and where the first of each is."""
    rows = [item.repeat_interleave(count, 0) for item, count in zip(x, sizes, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), sizes.cumsum(1) - sizes


@pytest.mark.parametrize("masked", [False, True])
def test_sizes_are_numbers_of_copies(masked):
    """An encoder on tokens with sizes gives what it gives on the sequence in which each stands size times."""
    model = hf.BertModel(hf.BertConfig(**LAYERS), add_pooling_layer=False).eval().encoder.double()
    x = torch.randn(2, 9, 32).double()
    keep = PADDED.bool() if masked else torch.ones(2, 9, dtype=torch.bool)
    long, first = repeated(x, SIZES)
    there = repeated(keep, SIZES)[0]  # padding behind the shorter item is False too
    model.config._attn_implementation = "sdpa"
    want = model(long, attention_mask=there[:, None, None].expand(-1, 1, long.shape[1], -1))[0]
    model.config._attn_implementation = NAME
    mask = keep[:, None, None].expand(-1, 1, 9, -1) if masked else None
    for form in (mask, None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        got = model(x, attention_mask=form, tome_size=SIZES.float())[0]
        for item in range(2):
            torch.testing.assert_close(got[item], want[item, first[item]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got, model(x, attention_mask=mask)[0])


@pytest.mark.parametrize("make", [clip_vision, *([vit] if since(5, 4) else [])])  # older ones keep them from attentions
def test_through_the_arguments_of_a_model(make):
    """Sizes reach the attentions of whole models; with all ones nothing changes."""
    made = make()
    made[0].eval()
    plain = answers(made, NAME)
    size = torch.ones(2, 65)
    torch.testing.assert_close(answers(made, NAME, tome_size=size), plain)
    size[:, 7] = 50
    out = answers(made, NAME, tome_size=size)
    assert not torch.allclose(out, plain, rtol=1e-3, atol=1e-3)
    out.sum().backward()


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(share, masked):
    module = torch.nn.Identity()
    module.is_causal = False
    q = torch.randn(2, 4, 9, 16, requires_grad=True)
    k, v = (torch.randn(2, 4 // share, 9, 16, requires_grad=True) for _ in range(2))
    seen = PADDED.bool()[:, None, None] if masked else None
    out, weights = attention_forward(module, q, k, v, seen, scaling=0.3, tome_size=SIZES.float())
    assert weights is None
    assert out.shape == (2, 9, 4, 16)
    assert out.is_contiguous()
    all_of = [x.repeat_interleave(share, 1) for x in (k, v)]
    sizes = SIZES.float() * (PADDED if masked else 1)
    want = stk.attention(q, *all_of, sizes, scale=0.3, backend="reference").transpose(1, 2)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    for got, right in zip(*(torch.autograd.grad(y, (q, k, v), grad) for y in (out, want)), strict=True):
        torch.testing.assert_close(got, right)


def test_dropout_drops():
    module, q = torch.nn.Identity(), torch.randn(2, 4, 9, 16)
    a, b = (
        attention_forward(module, q, q, q, None, dropout=p, is_causal=False, tome_size=SIZES.float())[0]
        for p in (0.5, 1e-9)
    )
    assert not torch.allclose(a, b)
    torch.testing.assert_close(b, stk.attention(q, q, q, SIZES.float()).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.compiled
def test_compile_fullgraph():
    torch._dynamo.reset()
    model = clip_vision()[0].eval()
    model.set_attn_implementation(NAME)
    size = torch.randint(1, 5, (2, 65)).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(IMAGES, tome_size=size).last_hidden_state
    torch.testing.assert_close(compiled(IMAGES, tome_size=size).last_hidden_state, want)
    torch._dynamo.reset()


def test_patched_towers_take_the_name():
    model, inputs, _ = clip_vision()
    model.eval()
    model.set_attn_implementation("sdpa")
    want = patched(model)(*inputs).last_hidden_state
    model.set_attn_implementation(NAME)
    assert torch.equal(model(*inputs).last_hidden_state, want)


def test_refused():
    module, q = torch.nn.Identity(), torch.randn(2, 4, 9, 16)
    for options, words in (
        ({"tome_size": torch.ones(2, 8)}, r"tome_size must be float32 of shape \(N, T\) = \(2, 9\).*\(2, 8\)"),
        ({"tome_size": torch.ones(2, 9).int()}, r"tome_size must be float32 .*int32"),
        ({"tome_size": torch.ones(2, 9), "is_causal": True}, "Identity is causal.*tome_size.*is_causal=False"),
        ({"tome_size": torch.ones(2, 9)}, "Identity is causal"),  # as transformers takes a module that does not say
        ({"tome_size": torch.ones(2, 9), "position_bias": q}, "position_bias.* with tome_size"),
        ({"s_aux": torch.ones(4)}, "s_aux, which attn_implementation='stk_tome' does not support: take 'eager'"),
        ({"softcap": 20.0}, "softcap"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_forward(module, q, q, q, None, **options)
    made = llama()
    with pytest.raises(ValueError, match="LlamaAttention is causal"):
        answers(made, NAME, tome_size=torch.ones(2, 9))


@pytest.mark.skipif(not since(5, 5), reason="an older transformers lacks the model")
def test_models_that_sdpa_does_not_support():
    """transformers refuses ``sdpa`` for a model with attention sinks, but not a name that it doesn't know."""
    config = hf.GptOssConfig(
        **LAYERS, head_dim=8, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0
    )
    model = hf.GptOssModel(config)
    with pytest.raises(ValueError, match="GptOssAttention attends with s_aux"):
        answers((model, (IDS,), {"use_cache": False}), NAME)


@pytest.mark.slow
def test_importing_the_package_imports_no_transformers():
    code = "import sys, stoptome_kernels; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
