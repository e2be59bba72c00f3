# SPDX-License-Identifier: Apache-2.0
"""Sizes as channels of the keys: scores, masking, attention by torch's own function without a mask, and when ``auto``
takes it."""

import math

import pytest
import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from stoptome_kernels._backends import TRITON, choose_attention
from stoptome_kernels.ops import augment, direct
from stoptome_kernels.reference import AttentionInputs

from support.attention import assert_close, assert_exact, eager, exactly, leaves, make, packed
from support.helpers import DTYPES, ROUNDOFF

# queries, keys of the item, keys of the prefix, channels
SHAPES = [
    (54, 54, 4, 64), (197, 197, 0, 64), (20, 577, 3, 20), (9, 20, 0, 6), (7, 1, 2, 8), (5, 0, 3, 8), (3, 15, 0, 1),
]  # fmt: skip
SCALES = [None, 0.01, 3.0, -0.3]
AUGMENTED = {"backend": "augmented"}


def split(q, k, size, scale=None):
    """Return the scores that a kernel computes of what augment_qk gives, and those of the definition; float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide_q, wide_k, factor = stk.augment_qk(q, k, size, scale)
    products = q.double() @ k.double().mT * scale
    return wide_q.double() @ wide_k.double().mT * factor, products, size.double().log()[:, None, None]


def flash(q, k, v, scale):
    """Attention as flash kernels compute it, in float32: the largest product is the largest score, for them."""
    products = q.float() @ k.float().mT
    factor = scale * math.log2(math.e)
    weights = torch.exp2(products * factor - products.amax(-1, keepdim=True) * factor)
    return ((weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape, dtype):
    """With sizes, a prefix, both or neither; gradients too."""
    for sized in (True, False):
        if shape[1] or sized:
            assert_exact(make(*shape, "cpu", dtype, n=2, m=1, sized=sized), "augmented")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale, dtype):
    for shape in ((17, 30, 3, 16), (6, 9, 0, 64)):
        assert_exact(make(*shape, "cpu", dtype), "augmented", scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [*SCALES, 2e-6, 2.6e5, -1e-4])
@pytest.mark.parametrize("channels", [64, 6])
def test_scores(channels, scale, dtype):
    """Twice the bits of the dtype; and those of float32, in which the logarithms are."""
    q, k, _ = packed(2, 20, 3, channels, dtype, "cpu")
    size = torch.randint(1, 4097, (2, 20)).float()
    size[0, :2] = torch.tensor([3e38, 1e-38])
    got, products, log = split(q, k, size, scale)
    steps = 2.0**-24 if dtype == torch.float16 else 0  # between its smallest numbers, over c · scale
    exact = max(ROUNDOFF[dtype] ** 2, ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32] * 4)
    bound = exact * log.abs() + 16 * steps + 1e-12 * products.abs()
    assert ((got - products - log).abs() <= bound).all()
    if dtype == torch.bfloat16:
        assert exact == 2**-16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 61, 62, 80, 1])
def test_layout(channels, dtype):
    """Heads of a token side by side; channels to a multiple of 8, of which whatever the keys have none counts."""
    q, k, _ = packed(3, 20, 4, channels, dtype, "cpu")
    forms = [(x, x.contiguous(), x.mT.contiguous().mT, x[:, :1].expand_as(x)) for x in (q, k)]
    width = math.ceil((channels + 2) / 8) * 8
    for given in (*zip(*forms, strict=True), (q[:, :, :1], k)):
        wide_q, wide_k, _ = stk.augment_qk(*given, torch.rand(3, 20) + 1)
        for wide, x in zip((wide_q, wide_k), given, strict=True):
            assert wide.shape == (*x.shape[:3], width)
            assert wide.dtype == dtype
            assert wide.transpose(1, 2).is_contiguous()
            assert torch.equal(wide[..., :channels], x)
        assert wide_k[..., channels + 2 :].abs().sum() == 0


def test_the_scale_is_that_of_the_given_width():
    q, k, _ = packed(2, 9, 2, 64, torch.float32, "cpu")
    size = torch.ones(2, 9)
    assert [stk.augment_qk(q, k, size, scale)[2] for scale in SCALES] == [0.125, 0.01, 3.0, 0.3]
    assert all(type(stk.augment_qk(q, k, size, scale)[2]) is float for scale in (None, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_may_share_keys(dtype):
    q = packed(2, 15, 6, 16, dtype, "cpu")[0]
    k, v = packed(2, 20, 2, 16, dtype, "cpu")[1:]
    size = torch.randint(1, 30, (2, 20)).float()
    wide_q, wide_k, scale = stk.augment_qk(q, k, size)
    assert wide_k.shape == (2, 2, 20, 24)
    out = F.scaled_dot_product_attention(wide_q, wide_k, v, scale=scale, enable_gqa=True)
    all_of = [x.repeat_interleave(3, 1) for x in (k, v)]
    assert_close(out, eager(q, *all_of, size), exactly(*(x.double() for x in (q, *all_of)), size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [None, -0.2, 3.0, 1e-5, 1e4])
def test_kernels_that_scale_after_the_maximum(dtype, scale):
    """FlashAttention takes the maximum of products before they are scaled: a negative scale, a mask that overflows or
    one whose rounding error is exponentiated would end in a NaN."""
    q, k, v = packed(3, 20, 2, 64, dtype, "cpu")
    q = q * min(1.0, 1 / abs(scale or 1))
    size = torch.randint(0, 4, (3, 20)).float()
    size[:, 0], size[1] = 5.0, 0.0
    wide_q, wide_k, factor = stk.augment_qk(q, k, size, scale)
    got = flash(wide_q, wide_k, v, factor)
    assert got.isfinite().all()
    want = exactly(q.double(), k.double(), v.double(), size, scale=scale)
    largest_score = (q.double() @ k.double().mT).abs().max() * abs(scale or 0.125)
    bound = ROUNDOFF[dtype] * 2 + 2.0**-22 * (4 + largest_score)
    for item in (0, 2):
        assert (got[item] - want[item]).abs().max() <= bound * v.abs().max()
    assert (got[1].abs() <= v[1].float().abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(54, 54, 4, 64), (5, 140, 0, 16)])
def test_keys_of_size_0_are_not_there(shape, dtype):
    q, k, v, size, *prefix = make(*shape, "cpu", dtype, n=2, m=1)
    gone = torch.rand_like(size) < 0.5
    gone[:, 0] = False
    got, changed = leaves((q, k, v)), leaves((q, k, v))
    with torch.no_grad():
        for x in changed[1:]:
            x.copy_(torch.where(gone[:, None, :, None], torch.full_like(x, 1000.0), x))
    outs = [stk.attention(*x, size.masked_fill(gone, 0.0), *prefix, **AUGMENTED) for x in (got, changed)]
    assert torch.equal(*outs)
    outs[0].float().square().sum().backward()
    for x in got[1:]:
        assert x.grad.isfinite().all()
        assert x.grad.transpose(1, 2)[gone].abs().sum() == 0
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_attend_to_gives_0(dtype):
    q, k, v, size, *prefix = leaves(make(5, 20, 3, 8, "cpu", dtype, n=4, m=1))
    size[1] = 0.0
    out = stk.attention(q, k, v, size, **AUGMENTED)
    assert out[1].abs().max() == 0
    assert out[[0, 2, 3]].abs().amin() > 0
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad[1].abs().max() == 0
        assert x.grad.isfinite().all()
    alone = [x.detach() for x in (q[1:2], *prefix)]  # all that is left of item 1 where there is a prefix
    ahead = stk.attention(q, k, v, size, *prefix, **AUGMENTED)[1:2]
    assert_close(ahead, eager(*alone), exactly(*(x.double() for x in alone)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_sizes(dtype):
    q, k, v, _, *prefix = make(9, 40, 3, 16, "cpu", dtype)
    size = torch.full((4, 40), 4096.0)
    size[:, ::3] = 1
    assert_exact((q, k, v, size, *prefix), "augmented")
    out = stk.attention(q, k, v, size * 1e30, *prefix, **AUGMENTED)
    assert out.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, -1.0, torch.inf])
def test_a_size_without_a_logarithm_makes_its_item_nan(bad):
    q, k, v, size, *_ = make(5, 20, 0, 8, "cpu")
    want = stk.attention(q, k, v, size, **AUGMENTED)
    for sizes in (size, size * 0):
        wrong = sizes.clone()
        wrong[1, 3] = bad
        got = stk.attention(q, k, v, wrong, **AUGMENTED)
        assert got[1].isnan().all()
        assert stk.attention(q, k, v, wrong, backend="reference")[1].isnan().all()
        if sizes is size:
            assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_without_sizes_it_is_torchs_own_function():
    for ahead in (0, 3):
        arguments = make(9, 20, ahead, 16, "cpu", sized=False)
        assert torch.equal(stk.attention(*arguments, **AUGMENTED), stk.ops.attention.sdpa(AttentionInputs(*arguments)))
    assert stk.attention(*arguments, scale=0.0, **AUGMENTED).isfinite().all()


def test_empty():
    for n, queries, tokens, ahead in ((0, 5, 6, 0), (0, 5, 6, 2), (4, 0, 6, 2), (4, 5, 6, 0)):
        arguments = leaves(make(queries, tokens, ahead, 8, "cpu", n=n))
        out = stk.attention(*arguments, **AUGMENTED)
        assert out.shape == (n, 2, queries, 8)
        out.sum().backward()
    q = torch.randn(2, 3, 5, 8)
    wide_q, wide_k, _ = stk.augment_qk(q, q[:, :, :0], torch.ones(2, 0))
    assert (wide_q.shape, wide_k.shape) == ((2, 3, 5, 16), (2, 3, 0, 16))


@pytest.mark.parametrize("ahead", [2, 0])
def test_gradcheck(ahead):
    q, k, v, size, *prefix = leaves(make(3, 5, ahead, 4, "cpu", torch.float64))
    inputs = [x for x in (q, k, v, *prefix) if x is not None]

    def run(q, k, v, *prefix):
        return stk.attention(q, k, v, size, *(prefix or (None, None)), **AUGMENTED)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(lambda q, k: stk.augment_qk(q, k, size, -0.3)[:2], inputs[:2])


def test_no_gradient_for_size():
    q, k, v, size, *_ = leaves(make(3, 5, 0, 4, "cpu"))
    size.requires_grad_()
    stk.attention(q, k, v, size, **AUGMENTED).sum().backward()
    assert size.grad is None
    assert not stk.augment_qk(q.detach(), k.detach(), size)[1].requires_grad


def kernel(q, k, v, size, scale=None):
    """Attend as users of a kernel write it."""
    channels = v.shape[3]
    q, k, scale = stk.augment_qk(q, k, size, scale)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, q.shape[3] - channels)), scale=scale)[..., :channels]


class Layer(torch.nn.Module):
    def __init__(self, scale=None):
        super().__init__()
        self.scale = scale

    def forward(self, q, k, v, size):
        return stk.attention(q, k, v, size, scale=self.scale, **AUGMENTED), kernel(q, k, v, size, self.scale)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_compile_fullgraph(dynamic, scale):
    torch._dynamo.reset()
    compiled = torch.compile(Layer(scale), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, tokens in ((4, 20), (6, 31)):
        results = []
        arguments = make(9, tokens, 0, 16, "cpu", n=n)[:4]
        for run in (Layer(scale), compiled):
            ours = leaves(arguments)
            out = run(*ours)
            sum(x.square().sum() for x in out).backward()
            results.append([*out, *(x.grad for x in ours[:3])])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
        assert results[1][0].transpose(1, 2).is_contiguous()
    torch._dynamo.reset()


@pytest.mark.compiled
def test_compile_with_a_prefix():
    torch._dynamo.reset()
    arguments = make(9, 20, 3, 16, "cpu", torch.bfloat16)
    compiled = torch.compile(stk.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, **AUGMENTED), stk.attention(*arguments, **AUGMENTED))
    torch._dynamo.reset()


@pytest.mark.compiled
def test_export_with_dynamic_batch():
    n = torch.export.Dim("n", min=2, max=100)
    arguments = make(6, 9, 0, 8, "cpu")[:4]
    program = torch.export.export(Layer(), arguments, dynamic_shapes=[{0: n}] * 4)
    assert not any("stoptome" in str(node.target) for node in program.graph.nodes)
    arguments = make(6, 9, 0, 8, "cpu", n=7)[:4]
    torch.testing.assert_close(program.module()(*arguments), Layer()(*arguments))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_casts_before_logarithms_are_split(autocast):
    """Autocast of what was split in float32 would leave one part of 8 bits, and nothing in the other."""
    q, k, v, size, *prefix = leaves(make(6, 20, 3, 16, "cpu"))
    narrow = [x.detach().to(autocast).requires_grad_() for x in (q, k, v, *prefix)]
    want = stk.attention(*narrow[:3], size, *narrow[3:], **AUGMENTED)
    parts = stk.augment_qk(*narrow[:2], size)
    with torch.autocast("cpu", dtype=autocast):
        assert torch.equal(stk.attention(q, k.to(autocast), v, size, *prefix, **AUGMENTED), want)
        assert torch.equal(stk.attention(*narrow[:3], size, *narrow[3:], **AUGMENTED), want)
        out = stk.attention(q, k, v, size, *prefix, **AUGMENTED)
        assert all(map(torch.equal, stk.augment_qk(q, k, size)[:2], parts[:2]))
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (q, k, v, *prefix))


def test_meta_tensors():
    q, k, v, size, *prefix = (x.to("meta") for x in make(6, 9, 3, 8, "cpu"))
    out = stk.attention(q, k, v, size, *prefix, **AUGMENTED)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    assert stk.augment_qk(q, k, size)[1].shape == (4, 2, 9, 16)


# what takes it


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "channels", "plain", "want"),
    [
        ("cuda", torch.bfloat16, True, True, False, "operator"),
        ("cuda", torch.bfloat16, False, True, False, "augmented"),  # too wide for Triton
        ("cuda", torch.float16, False, True, False, "augmented"),
        ("cuda", torch.float32, False, True, False, "sdpa"),  # no flash kernel takes it
        ("cuda", torch.float64, True, True, False, "sdpa"),
        ("cuda", torch.bfloat16, False, False, False, "sdpa"),  # too wide, no scale, or no sizes
        ("cuda", torch.bfloat16, True, False, True, "sdpa"),
        ("xpu", torch.bfloat16, True, True, False, "augmented"),
        ("mps", torch.float16, True, True, False, "augmented"),
        ("mps", torch.float32, True, True, False, "sdpa"),
        ("cpu", torch.bfloat16, True, True, False, "sdpa"),  # a CPU's kernel takes a mask
    ],
)
def test_auto(monkeypatch, device, dtype, triton, channels, plain, want):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(device, dtype, explicit):
        return None if device == "cuda" and dtype != torch.float64 else "no"

    monkeypatch.setattr(TRITON, "unavailable_reason", reason)
    assert choose_attention("auto", device, dtype, triton, False, channels, plain) == want
    monkeypatch.setattr(TRITON, "unavailable_reason", lambda *_, **__: "built for ROCm")
    want = "augmented" if want == "operator" else want
    assert choose_attention("auto", device, dtype, triton, False, channels, plain) == want
    assert choose_attention("augmented", device, dtype, triton, False, channels, plain) == "augmented"


@pytest.mark.parametrize("channels", [64, 254, 255])
@pytest.mark.parametrize("scale", [None, 0.0, 1e-9])
def test_auto_where_triton_can_not_run(monkeypatch, channels, scale):
    """Both ways to attend ask the same: on a device without Triton, and past the dispatcher on a pretended one."""
    ran = []
    for name in ("sdpa", "augmented"):
        run = getattr(stk.ops.attention, name)
        monkeypatch.setattr(stk.ops.attention, name, lambda inputs, name=name, run=run: ran.append(name) or run(inputs))
    want = "augmented" if channels <= 254 and scale is None else "sdpa"
    arguments = make(6, 9, 3, channels, "cpu", torch.bfloat16)
    stk.attention(*(x.to("meta") for x in arguments), scale=scale)
    assert ran == [want]
    with monkeypatch.context() as patch:
        patch.setattr(direct, "device_if_unseen", lambda _: "cuda")
        patch.setattr(direct, "are_on", lambda *_: True)
        patch.setattr(direct, "are_none_or_on", lambda *_: True)
        patch.setattr(TRITON, "unavailable_reason", lambda *_, **__: "no")
        stk.attention(*arguments, scale=scale)
        stk.attention(*(x if x is None or x.dim() == 2 else x.float() for x in arguments), scale=scale)
        stk.attention(*arguments[:3], None, *arguments[4:], scale=scale)
    assert ran == [want, want, "sdpa", "sdpa"]
    stk.attention(*arguments, scale=scale)
    assert ran.count("augmented") == 2 * (want == "augmented")


# what is refused

Q = torch.randn(4, 2, 5, 8)
K = torch.randn(4, 2, 6, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": [1]}, TypeError, ["q", "torch.Tensor", "(N, H, Tq, d)", "list"]),
        ({"q": Q[0]}, ValueError, ["q", "(N, H, Tq, d)", "(2, 5, 8)"]),
        ({"q": Q.long()}, TypeError, ["q", "float32, float64, bfloat16 or float16", "int64"]),
        ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, ["q", "channel"]),
        ({"k": K[0]}, ValueError, ["k", "(N, Hk, T, d)", "(2, 6, 8)"]),
        ({"k": K[:3]}, ValueError, ["k", "N = 4", "(3, 2, 6, 8)"]),
        ({"k": K[..., :7]}, ValueError, ["k", "d = 8", "(4, 2, 6, 7)"]),
        ({"k": torch.cat([K, K[:, :1]], 1)}, ValueError, ["k", "Hk", "H = 2", "(4, 3, 6, 8)"]),
        ({"k": K[:, :0]}, ValueError, ["k", "Hk"]),
        ({"k": K.bfloat16()}, TypeError, ["k", "q's dtype torch.float32", "bfloat16"]),
        ({"k": K.to("meta")}, ValueError, ["k is on meta, but q is on cpu"]),
        ({"size": None}, TypeError, ["size", "torch.Tensor", "NoneType"]),
        ({"size": torch.ones(4, 5)}, ValueError, ["size", "(4, 6)", "(4, 5)"]),
        ({"size": torch.ones(4, 6).bfloat16()}, TypeError, ["size", "float32", "256"]),
        ({"size": torch.ones(4, 6).to("meta")}, ValueError, ["size is on meta"]),
        ({"scale": 0.0}, ValueError, ["scale", "2e-06", "0.0", "scale=1.0", "'auto'"]),
        ({"scale": -1e-7}, ValueError, ["scale", "-1e-07"]),
        ({"scale": 1e6}, ValueError, ["scale", "1000000.0"]),
        ({"scale": float("nan")}, ValueError, ["scale", "nan"]),
        ({"scale": float("-inf")}, ValueError, ["scale", "-inf"]),
        ({"scale": "2"}, TypeError, ["scale", "float", "str"]),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error) as caught:
        stk.augment_qk(**({"q": Q, "k": K, "size": torch.ones(4, 6)} | change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_scale_without_channels():
    """Asked for by name it is refused; ``auto`` computes it by a mask."""
    arguments = make(5, 6, 0, 8, "cpu")[:4]
    for scale in (0.0, 1e-9, 1e9):
        with pytest.raises(ValueError, match="scale must be from 2e-06"):
            stk.attention(*arguments, scale=scale, **AUGMENTED)
        inputs = AttentionInputs(*arguments, scale=scale)
        assert not augment.takes(inputs)
        assert stk.attention(*arguments, scale=scale).isfinite().all()


def test_other_operators_and_the_environment_refuse_the_name(monkeypatch):
    metric = torch.randn(2, 9, 4)
    plan = stk.match(metric, 2)
    for call in (
        lambda: stk.match(metric, 2, **AUGMENTED),
        lambda: stk.match(metric, 2, sets=([0], [1]), **AUGMENTED),
        lambda: stk.merge(metric, plan, **AUGMENTED),
        lambda: stk.unmerge(metric[:, :7], plan, **AUGMENTED),
        lambda: stk.merge_norm(metric, metric, plan, **AUGMENTED),
        lambda: stk.fft_conv3d(torch.randn(1, 1, 2, 4, 4), torch.ones(1, 1, 1, 1, 1), **AUGMENTED),
        lambda: torch.ops.stoptome.attention(Q, K, K, None, None, None, None, "augmented"),
    ):
        with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'native', 'reference', got"):
            call()
    assert "augmented" not in stk.backends()
    with pytest.raises(ValueError, match=r"backend must be one of .*'augmented', got 'flash'"):
        stk.attention(Q, K, K, backend="flash")
    monkeypatch.setenv("STOPTOME_BACKEND", "augmented")
    with pytest.raises(ValueError, match=r"STOPTOME_BACKEND must be one of 'auto', .*'reference', got 'augmented'"):
        stk.attention(Q, K, K)
    with pytest.raises(ValueError, match="STOPTOME_BACKEND must be one of"):
        stk.match(metric, 2)
    assert stk.attention(Q, K, K, torch.ones(4, 6), **AUGMENTED).shape == Q.shape
