# SPDX-License-Identifier: Apache-2.0
"""Proportional attention on every backend: the property it is made for, values, gradients, PyTorch around it."""

import hypothesis.strategies as st
import pytest
import stoptome_kernels as stk
import torch
import torch._dynamo.testing
from stoptome_kernels.reference import AttentionInputs

from support import GPU
from support.attention import assert_close, assert_exact, eager, exactly, leaves, make, packed
from support.helpers import assert_as_exact_as_eager, dtypes_of, examples

OP = torch.ops.stoptome.attention
# queries, keys of the item, keys of the prefix, channels: around the borders of tiles, and of the channels' limit
BORDERS = [
    (1, 1, 0, 16), (3, 15, 0, 1), (17, 16, 0, 5), (16, 17, 0, 33), (20, 0, 3, 8), (54, 54, 4, 64), (33, 60, 4, 16),
    (65, 64, 0, 8), (64, 65, 0, 80), (70, 68, 4, 16), (5, 128, 0, 16), (66, 125, 4, 16), (30, 197, 0, 8),
    (7, 252, 4, 128), (40, 256, 0, 3), (67, 517, 3, 8),
]  # fmt: skip
PAIR = {"n": 2, "m": 1}  # items, which share a prefix; with how many is test_any_shape's
FEW = [(54, 54, 4, 64), (17, 66, 3, 20), (5, 140, 0, 16)]  # one launch for the gradient, two, no prefix


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", BORDERS)
def test_as_exact_as_eager(backend, device, shape):
    for dtype in dtypes_of(backend):
        assert_exact(make(*shape, device, dtype, **PAIR), backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("call", [stk.attention, lambda *arguments: OP(*arguments)[0]], ids=["function", "operator"])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("ahead", [3, 0])
def test_with_and_without(backend, device, sized, ahead, call):
    for dtype in dtypes_of(backend):
        for tokens in (20, 70):
            assert_exact(make(9, tokens, ahead, 12, device, dtype, sized=sized, **PAIR), backend, 0.7, call)


@pytest.mark.interpreted
def test_any_shape(backend, device):
    most = 2 if backend == "triton" else 3  # each is a factor of what its interpreter takes

    @examples(
        backend,
        queries=st.integers(1, 40),
        tokens=st.integers(1, 70),
        ahead=st.integers(0, 6),
        channels=st.sampled_from([1, 7, 16, 24]),
        share=st.integers(1, most),
        m=st.integers(1, most),
        heads=st.integers(1, most),
        sized=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    def check(queries, tokens, ahead, channels, share, m, heads, sized, seed):
        torch.manual_seed(seed)
        for dtype in dtypes_of(backend):
            assert_exact(make(queries, tokens, ahead, channels, device, dtype, share * m, m, heads, sized), backend)

    check()


@pytest.mark.parametrize("shape", FEW)
def test_a_size_is_a_number_of_copies(backend, device, shape):
    """THE property: attention with sizes is plain attention over the sequence in which each key stands size times."""
    for dtype in dtypes_of(backend):
        q, k, v, _, *prefix = make(*shape, device, dtype, n=2)
        size = torch.randint(0, 4, k.shape[:1] + k.shape[2:3], device=device)
        size[:, 0] = 9
        got = stk.attention(q, k, v, size.float(), *prefix, backend=backend)
        for item in range(2):
            one = slice(item, item + 1)
            copies = [x[one].repeat_interleave(size[item], 2) for x in (k, v)]
            same = [q[one], *copies, None, *(p if p is None else p[one] for p in prefix)]
            wide = [x if x is None else x.double() for x in same]
            assert_close(got[one], eager(*same), exactly(*wide))


def test_merged_tokens_count_as_their_members(backend, device):
    """Merge keys and values by a plan; attend with sizes; equal to attending to what unmerge gives."""
    for dtype in dtypes_of(backend):
        q, k, v = packed(3, 30, 2, 16, dtype, device)
        plan = stk.match(k, 9, 1, backend)
        (k, size), (v, _) = (stk.merge(x.transpose(1, 2).flatten(2), plan, backend=backend) for x in (k, v))
        heads = [x.unflatten(2, (2, 16)).transpose(1, 2) for x in (k, v)]
        expanded = [stk.unmerge(x, plan, backend).unflatten(2, (2, 16)).transpose(1, 2) for x in (k, v)]
        got = stk.attention(q, *heads, size, backend=backend)
        assert_close(got, eager(q, *expanded), exactly(*(x.double() for x in (q, *expanded))))


def test_a_prefix_is_keys_of_size_1_in_front(backend, device):
    for dtype in dtypes_of(backend):
        q, k, v, size, prefix_k, prefix_v = make(11, 20, 5, 16, device, dtype, n=6, m=3)
        joined = [torch.cat([p.repeat_interleave(2, 0), x], 2) for p, x in ((prefix_k, k), (prefix_v, v))]
        sizes = torch.cat([size.new_ones(6, 5), size], 1)
        got = stk.attention(q, k, v, size, prefix_k, prefix_v, backend=backend)
        torch.testing.assert_close(got, stk.attention(q, *joined, sizes, backend=backend))


def test_items_share_a_prefix_in_turn(backend, device):
    """Item n has prefix n // (N / M); the gradient of a prefix is the sum over its items, of no other."""
    q, k, v, size, prefix_k, prefix_v = leaves(make(7, 10, 4, 16, device, n=6, m=3))
    out = stk.attention(q, k, v, size, prefix_k, prefix_v, backend=backend)
    for item in range(6):
        one = slice(item, item + 1)
        shared = slice(item // 2, item // 2 + 1)
        want = stk.attention(q[one], k[one], v[one], size[one], prefix_k[shared], prefix_v[shared], backend=backend)
        torch.testing.assert_close(out[one], want)
    out[2:4].square().sum().backward()
    for prefix in (prefix_k, prefix_v):
        assert (prefix.grad[1].abs().amax((1, 2)) > 0).all()
        assert prefix.grad[[0, 2]].abs().max() == 0


def test_four_queries_and_all_keys_of_a_video(backend, device):
    """As STOP's global prompts: few queries, 648 keys and a prefix."""
    for dtype in dtypes_of(backend):
        assert_exact(make(4, 648, 4, 64, device, dtype, n=2, m=1), backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("tokens", [577, 1568, 4096])
@pytest.mark.parametrize(("sized", "ahead"), [(True, 0), (True, 5), (False, 5)], ids=["sizes", "both", "prefix"])
def test_many_keys(backend, device, tokens, sized, ahead):
    """As in ViT-L/16 @384, VideoMAE and dense models: whole blocks of keys, and what is left of them."""
    for dtype in dtypes_of(backend):
        assert_exact(make(18, tokens, ahead, 16, device, dtype, n=2, m=1, heads=1, sized=sized), backend)


@pytest.mark.parametrize("tokens", [257, 4200])
def test_auto_takes_whatever_can_run(device, tokens):
    arguments = make(9, tokens, 4, 16, device)
    exact = exactly(*leaves(arguments, torch.float64))
    assert_as_exact_as_eager(stk.attention(*arguments), eager(*arguments), exact)
    composed = stk.ops.attention.sdpa(AttentionInputs(*arguments))
    assert composed.transpose(1, 2).is_contiguous()
    assert_as_exact_as_eager(composed, eager(*arguments), exact)


def test_a_prefix_may_have_no_keys(backend, device):
    for dtype in dtypes_of(backend):
        q, k, v, size = leaves(make(6, 20, 0, 16, device, dtype)[:4])
        prefix = [torch.empty(2, 2, 0, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
        ours, plain = (stk.attention(q, k, v, size, *given, backend=backend) for given in (prefix, ()))
        torch.testing.assert_close(ours, plain)  # the reference's products are laid out otherwise
        grads, right = (
            torch.autograd.grad(out.float().sin().sum(), [q, k, v, *more])
            for out, more in ((ours, prefix), (plain, []))
        )
        torch.testing.assert_close(grads[:3], right)
        assert [g.shape for g in grads[3:]] == [p.shape for p in prefix]


def test_backward_takes_results_of_any_strides(backend, device):
    q, k, v, size, *prefix = make(6, 20, 3, 16, device)
    out, lse = OP(q, k, v, size, *prefix, None, backend)
    spread = [torch.empty(*t.shape, 2, device=device).select(-1, 0).copy_(t) for t in (out.sin(), out, lse)]
    assert not any(t.is_contiguous() for t in spread)
    given = (q, k, v, size, *prefix)
    right = torch.ops.stoptome.attention_backward(out.sin(), *given, out, lse, None, backend)
    grads = torch.ops.stoptome.attention_backward(spread[0], *given, *spread[1:], None, backend)
    assert all(torch.equal(a, b) for a, b in zip(grads, right, strict=True))


def test_limits_of_the_kernels_are_told():
    device = "cuda" if GPU else "cpu"
    q = torch.randn(1, 1, 3, 129, device=device)
    for call in (stk.attention, OP):
        with pytest.raises(RuntimeError, match=r"at most 128 channels a head, not with 129; backend='auto'"):
            call(q, q, q, None, None, None, None, "triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", FEW)
def test_keys_of_size_0_are_not_there(backend, device, shape):
    for dtype in dtypes_of(backend):
        q, k, v, size, *prefix = make(*shape, device, dtype, **PAIR)
        gone = torch.rand_like(size) < 0.5
        gone[:, 0] = False
        got, changed = leaves((q, k, v)), leaves((q, k, v))
        with torch.no_grad():
            for x in changed[1:]:
                x.copy_(torch.where(gone[:, None, :, None], torch.full_like(x, 7.0), x))
        outs = [stk.attention(*x, size.masked_fill(gone, 0.0), *prefix, backend=backend) for x in (got, changed)]
        assert torch.equal(*outs)
        outs[0].float().square().sum().backward()
        for x in got[1:]:
            assert x.grad.isfinite().all()
            assert x.grad.transpose(1, 2)[gone].abs().sum() == 0
            assert x.grad.abs().sum() > 0


@pytest.mark.interpreted
@pytest.mark.parametrize("tokens", [20, 100])
def test_nothing_to_attend_to_gives_0(backend, device, tokens):
    q, k, v, size, *_ = leaves(make(5, tokens, 0, 8, device))
    size[1] = 0.0
    out = stk.attention(q, k, v, size, backend=backend)
    assert out[1].abs().max() == 0
    assert out[[0, 2, 3]].abs().amin() > 0
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad[1].abs().max() == 0
        assert x.grad.isfinite().all()


@pytest.mark.interpreted
def test_large_magnitudes_do_not_overflow(backend, device):
    for dtype in dtypes_of(backend):
        for tokens in (20, 100):
            arguments = make(5, tokens, 3, 16, device, dtype, **PAIR)
            q, k, v, size, *prefix = leaves(arguments)
            out = stk.attention(200 * q, 200 * k, v, size * 1e30, *prefix, backend=backend)
            assert out.isfinite().all()
            out.float().sum().backward()
            assert all(x.grad.isfinite().all() for x in (q, k, v, *prefix))


@pytest.mark.filterwarnings("ignore:All-NaN")  # of numpy, in Triton's interpreter
def test_bad_items_stay_alone(backend, device):
    """A NaN or an infinity in one item reaches no other."""
    q, k, v, size, *prefix = make(5, 20, 3, 16, device)
    want = stk.attention(q, k, v, size, *prefix, backend=backend)
    q[1, 0, 2, 3], k[1, 1, 4, 5], v[1, 1, 7, 0] = torch.nan, torch.inf, torch.nan
    got = stk.attention(q, k, v, size, *prefix, backend=backend)
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
    assert got[1, 0, 2].isnan().all()


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", FEW)
def test_deterministic(backend, device, shape):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        arguments = leaves(make(*shape, device, **PAIR))
        out = stk.attention(*arguments, backend=backend)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in arguments if x is not None and x.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", FEW)
def test_strides(backend, device, shape):
    """Any strides give the same bits: packed, sliced, transposed, expanded, and channels that are apart."""
    q, k, v, size, *prefix = make(*shape, device, **PAIR)

    def views(x):
        yield x.contiguous()
        yield x.transpose(2, 3).contiguous().transpose(2, 3)
        yield torch.zeros(*(n + 2 for n in x.shape), device=device)[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)

    def run(*tensors):
        ours = leaves(tensors)
        out = stk.attention(*ours, backend=backend)
        out.sum().backward()  # an expanded gradient
        return [out, *(x.grad for x in ours if x is not None and x.requires_grad)]

    want = run(q, k, v, size, *prefix)
    wide = torch.zeros(size.shape[0], 2 * size.shape[1], device=device)[:, ::2].copy_(size)
    for forms in zip(*map(views, (q, k, v)), strict=True):
        got = run(*forms, wide, *(p if p is None else p.transpose(1, 2).contiguous().transpose(1, 2) for p in prefix))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    row = q[:1].expand_as(q)
    same = stk.attention(row, k, v, size, *prefix, backend=backend)
    assert torch.equal(same, stk.attention(row.contiguous(), k, v, size, *prefix, backend=backend))


def test_empty(backend, device):
    for n, queries, tokens, ahead in ((0, 5, 6, 0), (0, 5, 6, 2), (4, 0, 6, 2)):
        arguments = leaves(make(queries, tokens, ahead, 8, device, n=n))
        out = stk.attention(*arguments, backend=backend)
        assert out.shape == (n, 2, queries, 8)
        out.sum().backward()
        for x in arguments:
            assert x is None or not x.requires_grad or torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.interpreted
def test_logarithm_of_the_sum(backend, device):
    """The operator's second output, whatever ran."""
    for dtype in dtypes_of(backend):
        for shape in FEW:
            arguments = make(*shape, device, dtype)
            lse, exact = (OP(*arguments, None, name)[1] for name in (backend, "reference"))
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert lse.is_contiguous()
            # torch's kernel approximates exp for 16-bit inputs
            torch.testing.assert_close(lse, exact, rtol=1e-6 if dtype.itemsize > 2 else 1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [2, 0])
@pytest.mark.parametrize("backend", ["reference", "native"])  # Triton has no float64
def test_gradcheck(backend, ahead):
    q, k, v, size, *prefix = leaves(make(3, 5, ahead, 4, "cpu", torch.float64))
    inputs = [x for x in (q, k, v, *prefix) if x is not None]

    def through(call):
        return lambda q, k, v, *prefix: call(q, k, v, size, *(prefix or (None, None)))

    public = through(lambda *a: stk.attention(*a, backend=backend))
    assert torch.autograd.gradcheck(public, inputs)
    assert torch.autograd.gradcheck(through(lambda *a: OP(*a, None, backend)[0]), inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(public, inputs)


def test_no_second_derivative_but_of_the_reference(backend, device):
    q, k, v, size, *prefix = leaves(make(3, 5, 2, 4, device))
    (grad,) = torch.autograd.grad(OP(q, k, v, size, *prefix, None, backend)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative here; backend='reference' has one"):
        grad.sum().backward()


def test_no_gradient_for_size(backend, device):
    q, k, v, size, *prefix = leaves(make(3, 5, 2, 4, device))
    size.requires_grad_()
    stk.attention(q, k, v, size, *prefix, backend=backend).sum().backward()
    assert size.grad is None
    assert not OP(q, k, v, size, *prefix, None, backend)[1].requires_grad
    assert not stk.attention(q.detach(), k.detach(), v.detach(), size, backend=backend).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("ahead", [3, 0])
def test_opcheck(backend, device, sized, ahead):
    arguments = leaves(make(6, 9, ahead, 8, device, sized=sized))
    torch.library.opcheck(OP.default, (*arguments, 0.3, backend))
    out, lse = (x.detach() for x in OP(*arguments, 0.3, backend))
    saved = [x if x is None else x.detach() for x in arguments]
    torch.library.opcheck(
        torch.ops.stoptome.attention_backward.default, (torch.randn_like(out), *saved, out, lse, 0.3, backend)
    )


@pytest.mark.slow
@pytest.mark.compiled
# inductor generates code for what stands around an operator, whichever backend it calls inside and with whatever sizes
@pytest.mark.parametrize(
    ("compiler", "sized", "how"),
    [
        ("aot_eager", True, "explicit"),
        ("aot_eager", False, "explicit"),
        ("aot_eager", True, "auto"),
        ("inductor", True, "explicit"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                ("aot_eager", False, "auto"),
                ("inductor", False, "explicit"),
                ("inductor", True, "auto"),
                ("inductor", False, "auto"),
            ]
        ),
    ],
)
def test_compile_fullgraph(backend, device, compiler, sized, how):
    torch._dynamo.reset()
    name = backend if how == "explicit" else "auto"

    def step(q, k, v, size, prefix_k, prefix_v):
        out = stk.attention(q * 2, k, v, size, prefix_k, prefix_v, backend=name)
        return out.transpose(1, 2).flatten(2) + 1

    for ahead in (3, 0):
        results = []
        arguments = make(6, 20, ahead, 16, device, sized=sized)
        for run in (step, torch.compile(step, fullgraph=True, backend=compiler)):
            ours = leaves(arguments)
            out = run(*ours)
            out.square().sum().backward()
            results.append([out, *(x.grad for x in ours if x is not None and x.requires_grad)])
        for eager_result, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager_result)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.compiled
def test_compile_with_dynamic_shapes_compiles_once(backend, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def step(q, k, v, size, prefix_k, prefix_v):
        return stk.attention(q, k, v, size, prefix_k, prefix_v, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n, queries, tokens, ahead in ((4, 6, 20, 5), (6, 5, 31, 9), (8, 9, 10, 7)):
        arguments = make(queries, tokens, ahead, 16, device, n=n)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    for tokens in (300, 310, 320):
        arguments = make(6, tokens, 5, 16, device)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count == 1
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, size):
        return stk.attention(q, k, v, size, backend=self.backend)


@pytest.mark.compiled
def test_export_with_dynamic_batch(backend, device):
    n = torch.export.Dim("n", min=2, max=100)
    arguments = make(6, 9, 0, 8, device)[:4]
    program = torch.export.export(Layer(backend), arguments, dynamic_shapes=[{0: n}] * 4)
    arguments = make(6, 9, 0, 8, device, n=7)[:4]
    torch.testing.assert_close(program.module()(*arguments), Layer(backend)(*arguments))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sized", [True, False])
def test_autocast_casts_as_torch_does(backend, device, autocast, sized):
    q, k, v, size, *prefix = leaves(make(6, 20, 3, 16, device, sized=sized))
    with torch.autocast(device, dtype=autocast):
        assert torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == autocast
        out = stk.attention(q, k.to(autocast), v, size, *prefix, backend=backend)
    assert out.dtype == autocast
    # with a gradient as above: torch's own function computes it on a CPU, and the native kernel without
    narrow = [None if x is None else x.detach().to(autocast).requires_grad_() for x in (q, k, v, *prefix)]
    want = stk.attention(*narrow[:3], size, *narrow[3:], backend=backend)
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (q, k, v, *prefix))


@pytest.mark.compiled
def test_compile_under_autocast(backend, device):
    torch._dynamo.reset()
    arguments = make(6, 20, 3, 16, device)

    def step(*arguments):
        return stk.attention(*arguments, backend=backend)

    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
        eager_out = step(*arguments)
    assert got.dtype == eager_out.dtype == torch.bfloat16
    narrow = [x if x is None or x.dim() == 2 else x.bfloat16() for x in arguments]
    exact = exactly(*(None if x is None else x.double() for x in narrow))
    for out in (got, eager_out):  # on a CPU the one is torch's own function, the other the native kernel
        assert_as_exact_as_eager(out, eager(*narrow), exact)
    torch._dynamo.reset()


def test_logarithms_keep_their_bits_under_autocast():
    """The composed path hands float32 logarithms to torch also where autocast would make them bfloat16."""
    inputs = AttentionInputs(*make(6, 20, 3, 16, "cpu", torch.bfloat16))
    want = stk.ops.attention.sdpa(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(stk.ops.attention.sdpa(inputs), want)


def test_fake_and_meta_tensors(backend):
    q, k, v, size, *prefix = (x.to("meta") for x in make(6, 9, 3, 8, "cpu"))
    assert stk.attention(q, k, v, size, *prefix).shape == q.shape
    out, lse = OP(q, k, v, size, *prefix, None, backend)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    assert lse.shape == q.shape[:3]
    grads = torch.ops.stoptome.attention_backward(out, q, k, v, size, *prefix, out, lse, None, backend)
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v, *prefix)]


def test_defaults_of_the_schema(device):
    q, k, v, *_ = make(6, 9, 3, 8, device)
    torch.testing.assert_close(OP(q, k, v)[0], stk.attention(q, k, v))


def test_the_environment_chooses(monkeypatch, device):
    arguments = make(6, 9, 3, 8, "cpu")
    monkeypatch.setenv("STOPTOME_BACKEND", "reference")
    assert torch.equal(stk.attention(*arguments), stk.attention(*arguments, backend="reference"))
    monkeypatch.setenv("STOPTOME_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="STOPTOME_BACKEND must be one of"):
        stk.attention(*arguments)


Q = torch.randn(4, 2, 5, 8)
K = torch.randn(4, 2, 6, 8)
P = torch.randn(2, 2, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": [1]}, TypeError, ["q", "torch.Tensor", "(N, H, Tq, d)", "list"]),
        ({"q": Q[0]}, ValueError, ["q", "(N, H, Tq, d)", "(2, 5, 8)"]),
        ({"q": Q.long()}, TypeError, ["q", "float32, float64, bfloat16 or float16", "int64"]),
        ({"q": Q[..., :0]}, ValueError, ["k", "d = 0"]),
        ({"q": Q[..., :0], "k": K[..., :0], "v": K[..., :0]}, ValueError, ["q", "channel"]),
        ({"k": None}, TypeError, ["k", "torch.Tensor", "NoneType"]),
        ({"k": K[:, :1]}, ValueError, ["k", "H = 2", "(4, 1, 6, 8)"]),
        ({"k": K[:3]}, ValueError, ["k", "N = 4", "(3, 2, 6, 8)"]),
        ({"k": K[..., :7]}, ValueError, ["k", "d = 8", "(4, 2, 6, 7)"]),
        ({"k": K.bfloat16()}, TypeError, ["k", "q's dtype torch.float32", "bfloat16"]),
        ({"v": K.half()}, TypeError, ["v", "q's dtype torch.float32", "float16"]),
        ({"v": K[:, :, :5]}, ValueError, ["v", "6", "(4, 2, 5, 8)"]),
        ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, ["k", "at least one key"]),
        ({"size": torch.ones(4, 5)}, ValueError, ["size", "(4, 6)", "(4, 5)"]),
        ({"size": torch.ones(4, 6).double()}, TypeError, ["size", "float32", "float64"]),
        ({"size": torch.ones(4, 6).bfloat16()}, TypeError, ["size", "256"]),
        ({"size": 3}, TypeError, ["size", "torch.Tensor", "int"]),
        ({"prefix_k": P}, ValueError, ["prefix_v is None"]),
        ({"prefix_v": P}, ValueError, ["prefix_k is None"]),
        ({"prefix_k": P, "prefix_v": P[:, :, :2]}, ValueError, ["prefix_v", "(2, 2, 3, 8)", "(2, 2, 2, 8)"]),
        ({"prefix_k": P[:, :1], "prefix_v": P}, ValueError, ["prefix_k", "H = 2", "(2, 1, 3, 8)"]),
        ({"prefix_k": P, "prefix_v": P.double()}, TypeError, ["prefix_v", "float64"]),
        ({"prefix_k": Q[:3], "prefix_v": Q[:3]}, ValueError, ["prefix_k", "M = 3", "N = 4"]),
        ({"prefix_k": Q[:0], "prefix_v": Q[:0]}, ValueError, ["prefix_k", "M = 0", "N = 4"]),
        ({"scale": float("nan")}, ValueError, ["scale", "finite", "nan"]),
        ({"scale": float("inf")}, ValueError, ["scale", "finite", "inf"]),
        ({"scale": "2"}, TypeError, ["scale", "float", "str"]),
        ({"scale": torch.tensor(2.0)}, TypeError, ["scale", "float", "Tensor"]),
        ({"backend": "flash"}, ValueError, ["backend", "'flash'", "'reference'"]),
    ],
)
def test_errors(backend, device, change, error, words):
    arguments = {"q": Q, "k": K, "v": K, "backend": backend} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error) as caught:
        stk.attention(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if all(isinstance(x, torch.Tensor) for x in (arguments["q"], arguments["k"])) and error is ValueError:
        plain = {k: v for k, v in arguments.items() if k != "backend"}
        with pytest.raises(error, match=words[0]):
            OP(**plain, backend=arguments["backend"])


def test_devices():
    for name in ("k", "v", "size", "prefix_k"):
        arguments = {"q": Q, "k": K, "v": K, "size": torch.ones(4, 6), "prefix_k": P, "prefix_v": P}
        arguments[name] = arguments[name].to("meta")
        with pytest.raises(ValueError, match=f"{name} is on meta, but q is on cpu; move one of them"):
            stk.attention(**arguments)


def test_what_torch_library_can_not_transform_is_refused(backend, device):
    q = Q.to(device)
    with pytest.raises(NotImplementedError, match="q carries a forward-mode tangent"):
        torch.func.jvp(lambda x: stk.attention(x, q, q, backend=backend), (q,), (q,))
    with pytest.raises(NotImplementedError, match=r"k is inside torch\.vmap"):
        torch.vmap(lambda x: stk.attention(q, x, q, backend=backend))(q[None])
