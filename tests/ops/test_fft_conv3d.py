# SPDX-License-Identifier: Apache-2.0
"""fft_conv3d: parity with conv3d, which the reference is, and its limits."""

import math
import platform

import pytest
import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from stoptome_kernels._backends import frequency, native

from support.helpers import ROUNDOFF, dtypes_of

OPS = torch.ops.stoptome
# (B, C, T, H, W), O, kernel: STOP's kernels on small planes, kernels wider than the planes, even and odd widths
SHAPES = [
    ((2, 3, 4, 20, 17), 3, (3, 11, 11)), ((1, 9, 3, 9, 24), 2, (5, 11, 11)), ((1, 1, 5, 7, 40), 3, (3, 15, 25)),
    ((1, 2, 1, 1, 1), 3, (1, 1, 1)), ((2, 2, 2, 3, 4), 1, (7, 15, 25)), ((1, 4, 13, 5, 33), 5, (1, 3, 5)),
]  # fmt: skip


def given(shape, outputs, kernel, dtype=torch.float32, weight_dtype=None, seed=0):
    """Input, weight and bias, of which the input is a view as STOP's, whose channels come after its frames."""
    generator = torch.Generator().manual_seed(seed)
    b, c, t, h, w = shape
    x = torch.randn(b, t, c, h, w, generator=generator).to(dtype).transpose(1, 2)
    weight = torch.randn(outputs, c, *kernel, generator=generator) / math.sqrt(c * math.prod(kernel))
    bias = torch.randn(outputs, generator=generator)
    return x, *(part.to(weight_dtype or dtype) for part in (weight, bias))


def with_grads(run, parts, dtype=None):
    """Result of a convolution and gradients of its sum with fixed random factors, which are rounded to a dtype."""
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    y = run(*leaves)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype or y.dtype).to(y)
    return y.detach(), *torch.autograd.grad(y, leaves, factors)


def exact(x, weight, bias):
    padding = [k // 2 for k in weight.shape[2:]]
    return F.conv3d(x.double(), weight.double(), bias.double(), padding=padding)


@pytest.mark.parametrize(("shape", "outputs", "kernel"), SHAPES)
def test_parity(backend, device, shape, outputs, kernel):
    """Result and gradients against conv3d in float64, to a few roundings of the largest value."""
    for dtype in dtypes_of(backend):
        parts = [part.to(device) for part in given(shape, outputs, kernel, dtype)]
        found = with_grads(lambda *p: stk.fft_conv3d(*p, backend=backend), parts)
        want = with_grads(exact, [part.double() for part in parts], dtype)
        wide = ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
        # torch's own conv3d, the reference, rounds partial sums of half precision
        limit = 2 * ROUNDOFF[dtype] + 40 * wide if backend != "reference" else 32 * ROUNDOFF[dtype] + 200 * wide
        for got, right in zip(found, want, strict=True):
            assert got.dtype == dtype
            assert (got.double() - right).abs().max() <= limit * right.abs().max()


@pytest.mark.parametrize("name", ["native", "triton"])
def test_pieces(name, monkeypatch):
    """Whatever fits in the memory for spectra: frames one by one, pieces with edges on both sides, several videos."""
    in_triton = name == "triton"
    products = pytest.importorskip("stoptome_kernels._backends.triton.conv").Products if in_triton else native._Products
    parts = given((3, 2, 7, 6, 10), 3, (5, 3, 5))
    want = with_grads(exact, parts)
    seen = []
    pieces = frequency._pieces
    monkeypatch.setattr(frequency, "_pieces", lambda *a: seen.append(list(pieces(*a))) or seen[-1])
    frame = 5 * 8 * 7 * 8
    for budget, count in ((1, 21), (3 * frame, 9), (2 * 7 * frame, 2), (1 << 30, 1))[:: 2 if in_triton else 1]:
        monkeypatch.setattr(products, "budget", budget)
        found = with_grads(lambda *p: stk.fft_conv3d(*p, backend=name), parts)
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got.double(), right.double(), atol=2e-5, rtol=1e-5)
        assert len(seen[-1]) == count


def test_memory_is_bounded(monkeypatch):
    """Spectra take what they are allowed, and the frames that the taps reach, however many videos there are."""
    taken = []
    empty = native._Products.empty

    def counted(like, shape, dtype):
        out = empty(like, shape, dtype)
        if dtype.is_complex:
            taken.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(native._Products, "empty", counted)
    monkeypatch.setattr(native._Products, "budget", 1 << 20)
    x, weight, bias = given((4, 2, 24, 40, 40), 3, (3, 5, 5))
    stk.fft_conv3d(x, weight, bias, backend="native")
    assert len(taken) > 8
    frame = 5 * 45 * 23 * 8
    assert all(one + other <= (1 << 20) + 2 * frame for one, other in zip(taken[::2], taken[1::2], strict=True))


def test_as_exact_as_conv3d():
    """At STOP's kernel, in float32: not one error in a sum of 3267 products, but fewer and smaller."""
    parts = given((1, 9, 3, 64, 64), 9, (3, 11, 11))
    right = exact(*parts)
    error = (stk.fft_conv3d(*parts, backend="native").double() - right).abs().max()
    theirs = (F.conv3d(*parts, padding=(1, 5, 5)).double() - right).abs().max()
    assert error <= theirs


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"] if platform.machine() == "x86_64" else ["baseline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(isa, dtype):
    from stoptome_kernels import _native

    try:
        _native.use_instruction_set(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for shape, outputs, kernel in SHAPES:
            parts = given(shape, outputs, kernel, dtype)
            found = with_grads(lambda *p: stk.fft_conv3d(*p, backend="native"), parts)
            for got, right in zip(found, with_grads(exact, parts), strict=True):
                assert (got.double() - right).abs().max() <= 40 * ROUNDOFF[dtype] * right.abs().max()
    finally:
        _native.use_instruction_set("")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_every_time(threads):
    """Bit for bit from run to run, gradients too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = given((2, 3, 4, 40, 50), 5, (3, 11, 11))
        first = with_grads(lambda *p: stk.fft_conv3d(*p, backend="native"), parts)
        for _ in range(3):
            again = with_grads(lambda *p: stk.fft_conv3d(*p, backend="native"), parts)
            assert all(map(torch.equal, first, again))
        for got, right in zip(first, with_grads(exact, parts), strict=True):
            assert (got.double() - right).abs().max() <= 40 * ROUNDOFF[torch.float32] * right.abs().max()
    finally:
        torch.set_num_threads(before)


def test_part_of_the_gradients(backend, device):
    """Inputs that need no gradient get none; the others' are the same as if all needed one."""
    parts = [part.to(device) for part in given((1, 2, 3, 6, 8), 3, (3, 5, 5))]
    every = with_grads(lambda *p: stk.fft_conv3d(*p, backend=backend), parts)
    for needed in range(3):
        leaves = [part.detach().clone().requires_grad_(place == needed) for place, part in enumerate(parts)]
        y = stk.fft_conv3d(*leaves, backend=backend)
        factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        y.backward(factors)
        assert [leaf.grad is not None for leaf in leaves] == [place == needed for place in range(3)]
        torch.testing.assert_close(leaves[needed].grad, every[1 + needed])
    without = stk.fft_conv3d(parts[0], parts[1], backend=backend)
    torch.testing.assert_close(without + parts[2][:, None, None, None], every[0])


def test_no_videos(backend, device):
    parts = [part.to(device) for part in given((1, 2, 3, 6, 8), 3, (3, 5, 5))]
    y, x_grad, weight_grad, bias_grad = with_grads(
        lambda *p: stk.fft_conv3d(*p, backend=backend), (parts[0][:0], *parts[1:])
    )
    assert y.shape == (0, 3, 3, 6, 8)
    assert x_grad.shape == (0, 2, 3, 6, 8)
    assert not weight_grad.any()
    assert not bias_grad.any()


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_nan_spreads_over_its_planes(name):
    """As the docstring has it: over its frame and those that the taps reach, no further, and not to other videos."""
    x, weight, bias = given((2, 2, 6, 8, 8), 2, (3, 5, 5))
    x[1, 0, 4, 3, 3] = torch.nan
    bad = stk.fft_conv3d(x, weight, bias, backend=name).isnan()
    assert bad[1, :, 3:].all()
    assert not bad[0].any()
    assert not bad[1, :, :3].any()


def test_weights_may_be_wider_than_the_input(backend, device):
    """Half-precision input with float32 weights, as a master copy: rounded once."""
    parts = [part.to(device) for part in given((1, 3, 3, 9, 9), 4, (3, 5, 5), torch.float16, torch.float32)]
    got = stk.fft_conv3d(*parts, backend=backend)
    assert got.dtype == torch.float16
    limit = (2 if backend != "reference" else 8) * ROUNDOFF[torch.float16]
    right = exact(*parts)
    assert (got.double() - right).abs().max() <= limit * right.abs().max()


def test_autocast():
    """The dtype of conv3d; what is saved for backward takes as little."""
    x, weight, bias = given((1, 2, 3, 6, 8), 3, (3, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = stk.fft_conv3d(x, weight.requires_grad_(), bias)
        assert y.dtype == F.conv3d(x, weight, bias, padding=(1, 2, 2)).dtype == torch.bfloat16
        assert stk.fft_conv3d(x.double(), weight.double(), bias.double()).dtype == torch.float64
    saved = [t.dtype for t in y.grad_fn.saved_tensors]
    assert saved == [torch.bfloat16, torch.float32]
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lambda x, w, b: (x[0], w, b), ValueError, r"x must have shape \(B, C, T, H, W\), got \(2, 3, 6, 8\)"),
        (lambda x, w, b: (x.int(), w, b), TypeError, "x must be float32.*got torch.int32"),
        (lambda x, w, b: (None, w, b), TypeError, "x must be a torch.Tensor"),
        (lambda x, w, b: (x, w[0], b), ValueError, "weight must have shape"),
        (lambda x, w, b: (x, w[:, :1], b), ValueError, r"weight must have x's C = 2 channels in its axis 1"),
        (lambda x, w, b: (x, w[..., :4], b), ValueError, "odd kt, kh and kw.*use torch.nn.functional.conv3d"),
        (lambda x, w, b: (x, w[:0], b[:0]), ValueError, "must not be empty"),
        (lambda x, w, b: (x[:, :, :0], w, b), ValueError, "must not be empty"),
        (lambda x, w, b: (x, w, b[:2]), ValueError, r"bias must have shape \(O,\) = \(3,\), got \(2,\)"),
        (lambda x, w, b: (x, w.double(), b), TypeError, "weight is float64, but x is torch.float32"),
        (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight is on meta, but x is on cpu"),
        (lambda x, w, b: (x, w, b, "cuda"), ValueError, "backend must be one of"),
    ],
)
def test_errors(change, kind, says):
    with pytest.raises(kind, match=says):
        stk.fft_conv3d(*change(*given((1, 2, 3, 6, 8), 3, (3, 5, 5))))


def test_no_second_derivative():
    x, weight, bias = given((1, 1, 2, 4, 4), 1, (1, 3, 3))
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(
        stk.fft_conv3d(x, weight, bias, backend="native").square().sum(), weight, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"no second derivative; use torch.nn.functional.conv3d"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["reference", "native"])
def test_gradcheck(name):
    parts = [part.requires_grad_() for part in given((1, 2, 2, 3, 4), 2, (3, 3, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda *p: stk.fft_conv3d(*p, backend=name), parts)


@pytest.mark.slow
def test_opcheck(backend, device):
    x, weight, bias = (part.to(device) for part in given((1, 2, 2, 3, 4), 2, (3, 3, 5)))
    y = stk.fft_conv3d(x, weight, bias, backend=backend)
    torch.library.opcheck(OPS.fft_conv3d.default, (x.requires_grad_(), weight.requires_grad_(), bias, backend))
    backward = (y, x.detach(), weight.detach(), True, False, True, backend)
    torch.library.opcheck(OPS.fft_conv3d_backward.default, backward)


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_and_exported():
    """One graph, any batch, the same numbers and gradients."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, self.weight, self.bias = map(torch.nn.Parameter, given((1, 2, 3, 6, 8), 3, (3, 5, 5)))

        def forward(self, x):
            return stk.fft_conv3d(x * 2, self.weight, self.bias).relu()

    net, (x, _, _) = Net(), given((3, 2, 3, 6, 8), 3, (3, 5, 5))
    want = net(x)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(compiled(x[:2]), want[:2])
    grads = torch.autograd.grad(want.sum(), list(net.parameters()))
    for got, right in zip(torch.autograd.grad(compiled(x).sum(), list(net.parameters())), grads, strict=True):
        torch.testing.assert_close(got, right)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},))
    torch.testing.assert_close(exported.module()(x[:2]), want[:2])


def test_lengths_are_fast():
    """Even, of the primes 2, 3 and 5, and none smaller is."""
    fast = [2**a * 3**b * 5**c for a in range(1, 11) for b in range(7) for c in range(5)]
    for least in range(1, 1000):
        assert frequency.fast_length(least) == min(length for length in fast if length >= least)
