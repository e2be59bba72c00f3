# SPDX-License-Identifier: Apache-2.0
"""What is special to torchvision's vision transformer and to torch.nn.TransformerEncoder."""

import copy
from functools import partial

import pytest
import stoptome_kernels as stk
import torch
import torch.distributed as dist
from torch import nn
from torchvision.models import VisionTransformer, swin_t, vit_b_16
from torchvision.models.vision_transformer import EncoderBlock

from support.vit import Slow, build, torch_encoder, torchvision
from support.vit.timm import images
from support.vit.torch_encoder import make, tokens

VIT, ENCODERS = torchvision.CASES[0], torch_encoder.CASES
RATES = (0, 9, 3, 5)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=ENCODERS, ids=lambda case: case.name)
def case(request):
    return request.param


def patched(model) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "tome")]


# -- torchvision ------------------------------------------------------------------------------------------------------


def test_a_model_by_its_name():
    with torch.device("meta"):
        model = vit_b_16()
    stk.apply_tome_patch(model, 16)
    assert patched(model)[1:] == [f"encoder.layers.encoder_layer_{layer}" for layer in range(12)]
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


class Mean(VisionTransformer):
    """A model of somebody's own that reads all tokens."""

    def forward(self, x):
        x = torch.cat([self.class_token.expand(len(x), -1, -1), self._process_input(x)], 1)
        return self.heads(self.encoder(x).mean(1))


def test_a_forward_of_a_derived_class():
    """It may read any token, so each must have a row."""
    model, inputs = build(VIT), images(2)
    model.__class__ = Mean
    x = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(*inputs)], 1) + model.encoder.pos_embedding
    state = Slow(x, 1)
    for block, r in zip(model.encoder.layers, RATES, strict=True):
        out, keys = torch_encoder.masked(block.self_attention, block.ln_1(x), state)
        x = state.merge(x + out, keys, r)
        x = x + block.mlp(block.ln_2(x))
    want = model.heads(state.spread(model.encoder.ln(x)).mean(1))
    close(stk.apply_tome_patch(model, list(RATES))(*inputs), want)


class Wider(EncoderBlock):
    pass


def test_other_models_and_blocks_are_refused():
    with torch.device("meta"):
        other = swin_t()
    with pytest.raises(TypeError, match="torchvision's SwinTransformer"):
        stk.apply_tome_patch(other, 2)
    model = build(VIT)
    model.encoder.layers[1] = Wider(4, 48, 96, 0.0, 0.0)
    with pytest.raises(TypeError, match="with Wider as a block"):
        stk.apply_tome_patch(model, 2)
    with pytest.raises(ValueError, match="VisionTransformer defines 1 leading tokens"):
        stk.apply_tome_patch(build(VIT), 2, protected=0)


class Changed(nn.MultiheadAttention):
    def forward(self, *args, **options):
        return super().forward(*args, **options)


@pytest.mark.parametrize(
    ("attention", "error", "says"),
    [
        (partial(nn.MultiheadAttention, add_bias_kv=True), ValueError, "with add_bias_kv set"),
        (partial(nn.MultiheadAttention, add_zero_attn=True), ValueError, "with add_zero_attn set"),
        (partial(nn.MultiheadAttention, kdim=24), ValueError, "with kdim or vdim set"),
        (Changed, TypeError, "with the attention Changed"),
        (lambda *_, **__: nn.Identity(), TypeError, "with the attention Identity"),
    ],
)
def test_attention_that_is_refused(attention, error, says):
    for model in (build(VIT), build(ENCODERS[0])):
        block = model.encoder.layers[2] if model.__class__ is VisionTransformer else model.layers[2]
        name = "self_attention" if hasattr(block, "self_attention") else "self_attn"
        setattr(block, name, attention(48, 4, batch_first=True))
        with pytest.raises(error, match=says):
            stk.apply_tome_patch(model, 2)
        assert patched(model) == []


# -- training: both ---------------------------------------------------------------------------------------------------


def dropping(model, p: float, attention: float):
    """In training, with these rates of dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = attention
    return model.train()


@pytest.mark.parametrize("case", [VIT, *ENCODERS], ids=lambda case: case.name)
@pytest.mark.parametrize(("p", "attention"), [(0.4, 0.0), (0.0, 1.0)])
def test_dropout(case, p, attention):
    """The same elements as the slow way drops; of attention weights, whose random numbers differ, all."""
    model, inputs, rates = dropping(build(case), p, attention), case.inputs(2), (5, 9, 3, 5)
    torch.manual_seed(1)
    want = case.slow(model, inputs, rates)
    stk.apply_tome_patch(model, list(rates))
    torch.manual_seed(1)
    close(model(*inputs), want)
    assert not torch.allclose(model.eval()(*inputs), want, rtol=1e-2, atol=1e-2)


# -- torch.nn.TransformerEncoder --------------------------------------------------------------------------------------


def test_inference_without_gradients(case):
    """Where torch runs a whole layer as one operator, if it can; of tokens from an embedding that is trained, too."""
    model, inputs = build(case), case.inputs(2)
    inputs[0].requires_grad_()
    for inference in (torch.no_grad(), torch.inference_mode()):
        with inference:
            before, want = model(*inputs), case.slow(model, inputs, RATES)
            assert torch.equal(stk.apply_tome_patch(model, 0)(*inputs), before)
            close(stk.apply_tome_patch(model, list(RATES))(*inputs), want)
            stk.remove_tome_patch(model)


def test_a_layer_alone(case):
    """Merges inside itself; its caller gets every token."""
    model = build(case).layers[0]
    batch_first = model.self_attn.batch_first
    x = case.inputs(2)[0]
    before = model(x)
    rows = x if batch_first else x.transpose(0, 1)
    state = Slow(rows, 1)
    want = state.spread(torch_encoder.layer(model, rows, state, 20))
    assert torch.equal(stk.apply_tome_patch(model, 0)(x), before)
    stk.apply_tome_patch(model, 20, trace_source=True)
    for each in (model, copy.deepcopy(model)):
        got = each(x)
        close(got if batch_first else got.transpose(0, 1), want)
        assert stk.tome_trace(each).tokens == (45,)
    assert not torch.allclose(got, before, rtol=1e-2, atol=1e-2)
    stk.remove_tome_patch(model)
    assert type(model) is nn.TransformerEncoderLayer
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("protected", [0, 1, 4])
def test_protected(protected):
    model, inputs = build(ENCODERS[0]), tokens(2)
    want = torch_encoder.slow(model, inputs, RATES, protected)
    stk.apply_tome_patch(model, list(RATES), protected=protected, trace_source=True)
    close(model(*inputs), want)
    assert stk.tome_trace(model).protected == protected
    for wrong, error in ((-1, ValueError), (True, TypeError), (1.0, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="protected must be"):
            stk.apply_tome_patch(model, 2, protected=wrong)


def masks(case, model) -> list[dict]:
    padding = torch.zeros(2, 65, dtype=torch.bool)
    padding[1, 60:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(65)
    mask = "mask" if isinstance(model, nn.TransformerEncoder) else "src_mask"
    return [{"src_key_padding_mask": padding}, {mask: causal}, {mask: causal, "is_causal": True}]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("gradients", [True, False])  # without them, torch makes nested tensors of padded ones
@pytest.mark.parametrize("alone", [False, True])
def test_masks(case, alone, gradients):
    """Nothing but an error while tokens are merged; as before otherwise."""
    model, inputs = build(case), case.inputs(2)
    model = model.layers[0] if alone else model
    with torch.set_grad_enabled(gradients):
        for options in masks(case, model):
            before = model(*inputs, **options)
            stk.apply_tome_patch(model, [0, 0, 4, 0] if not alone else 4)
            with pytest.raises(ValueError, match=r"(got (src_|is_)|nested tensor).*remove_tome_patch"):
                model(*inputs, **options)
            stk.apply_tome_patch(model, 0)
            assert torch.equal(model(*inputs, **options), before)
            stk.remove_tome_patch(model)


def test_no_batch(case):
    model, x = build(case), torch.randn(65, 48)
    before = model(x)
    stk.apply_tome_patch(model, 3)
    with pytest.raises(ValueError, match=r"without a batch dimension.*unsqueeze"):
        model(x)
    assert torch.equal(stk.apply_tome_patch(model, 0)(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("case", [ENCODERS[0], ENCODERS[3]], ids=lambda case: case.name)
def test_wrapped_models(case):
    model, inputs = build(case), case.inputs(2)
    want = case.slow(model, inputs, RATES)
    compiled = torch.compile(model, backend="eager")
    stk.apply_tome_patch(compiled, list(RATES))
    close(compiled(*inputs), want)
    stk.remove_tome_patch(compiled)
    assert patched(model) == []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        close(stk.apply_tome_patch(parallel, list(RATES))(*inputs), want)
    finally:
        dist.destroy_process_group()


class Repeated(nn.TransformerEncoder):
    def forward(self, src):
        return super().forward(super().forward(src))


class Layer(nn.TransformerEncoderLayer):
    pass


def test_encoders_that_are_refused():
    def sharing():
        model = make()
        model.layers = nn.ModuleList([model.layers[0]] * 4)
        return model

    layer = partial(nn.TransformerEncoderLayer, 48, 4, 96, batch_first=True)
    for model, error, says in (
        (nn.Sequential(make()), TypeError, "can't merge tokens in Sequential"),
        (nn.Transformer(48, 4, 1, 1, 96, batch_first=True), TypeError, "can't merge tokens in Transformer"),
        (Repeated(layer(), 2), TypeError, "Repeated, whose forward"),
        (nn.TransformerEncoder(Layer(48, 4, 96, batch_first=True), 2), TypeError, "in Layer: supported is"),
        (Layer(48, 4, 96, batch_first=True), TypeError, "in Layer: supported is"),
        (sharing(), ValueError, "same block several times"),
    ):
        with pytest.raises(error, match=says):
            stk.apply_tome_patch(model, 2)
        assert patched(model) == []
