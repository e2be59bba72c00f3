# SPDX-License-Identifier: Apache-2.0
"""Merging and unmerging on every backend: values, gradients, composition."""

import hypothesis.strategies as st
import pytest
import stoptome_kernels as stk
import torch

from support.helpers import assert_as_exact_as_eager, assert_valid, dtypes_of, eager_merge, examples, views

MODES = ["mean", "sum", "max"]

shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 4),
        "tokens": st.integers(4, 40),
        "dim": st.sampled_from([1, 3, 16, 31, 64, 200]),
        "protected": st.integers(0, 3),
        "r": st.integers(1, 20),
        "sized": st.booleans(),
        "seed": st.integers(0, 2**20),
    }
)


def make(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape["seed"])
    n, tokens = shape["n"], shape["tokens"]
    metric = torch.randn(n, tokens, 6, generator=generator).to(device)
    x = torch.randn(n, tokens, shape["dim"], generator=generator).to(device, dtype)
    size = torch.randint(1, 50, (n, tokens), generator=generator).float().to(device) if shape["sized"] else None
    return stk.match(metric, shape["r"], shape["protected"], "reference"), x, size


@pytest.mark.slow
def test_bit_for_bit_the_reference(backend, device):
    """Every product, sum and quotient is rounded once, in the same order, on every backend."""

    @examples(backend, shape=shapes)
    def check(shape):
        for dtype in dtypes_of(backend):
            plan, x, size = make(shape, device, dtype)
            for mode in MODES:
                results = []
                for name in (backend, "reference"):
                    leaf = x.clone().requires_grad_()
                    y, size_out = stk.merge(leaf, plan, size, mode, name)
                    y.backward(y.detach() * 0.75 + 1)
                    results.append((y, size_out, leaf.grad))
                for ours, theirs in zip(*results, strict=True):
                    assert torch.equal(ours, theirs), (dtype, mode)
            y = stk.merge(x, plan, size, backend=backend)[0]
            results = []
            for name in (backend, "reference"):
                leaf = y.clone().requires_grad_()
                x_hat = stk.unmerge(leaf, plan, name)
                x_hat.backward(x)
                results.append((x_hat, leaf.grad))
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs), dtype

    check()


@pytest.mark.interpreted
def test_as_exact_as_eager(backend, device):
    @examples(backend, shape=shapes)
    def check(shape):
        for dtype in dtypes_of(backend):
            plan, x, size = make(shape, device, dtype)
            for mode in MODES:
                leaves = [t.detach().clone().requires_grad_() for t in (x, x, x.double())]
                ours = stk.merge(leaves[0], plan, size, mode, backend)[0]
                eager, exact = (eager_merge(leaf, plan, size, mode) for leaf in leaves[1:])
                assert_as_exact_as_eager(ours, eager, exact)
                if mode == "max" and x.element_size() == 2:
                    continue  # equal maxima are common in 16 bits: eager splits the gradient, we give it to the first
                grad = torch.randn_like(exact)
                for out in (ours, eager, exact):
                    out.backward(grad.to(out.dtype))
                assert_as_exact_as_eager(*(leaf.grad for leaf in leaves))
                assert leaves[0].grad.abs().sum() > 0

    check()


def test_mass_is_conserved(backend, device):
    @examples(backend, shape=shapes)
    def check(shape):
        plan, x, size = make(shape, device)
        y, size_out = stk.merge(x, plan, size, backend=backend)
        size = torch.ones_like(x[..., 0]) if size is None else size
        assert torch.equal(size_out.sum(1), size.sum(1))
        mass, before = (size_out[..., None] * y).double().sum(1), (size[..., None] * x).double().sum(1)
        torch.testing.assert_close(mass, before, rtol=1e-5, atol=1e-5 * size.sum().item())

    check()


@pytest.mark.interpreted
def test_single_tokens_are_copied_bit_for_bit(backend, device):
    @examples(backend, shape=shapes)
    def check(shape):
        for dtype in dtypes_of(backend):
            plan, x, _ = make(shape, device, dtype)
            x.flatten()[::7] = -0.0
            x[:, -1] = torch.nan
            x[:, 0, 0] = torch.inf
            size = torch.rand(x.shape[:2], device=device) + 0.1
            bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
            for mode in MODES:
                y, _ = stk.merge(x, plan, size, mode, backend)
                for item in range(shape["n"]):
                    dest = plan.dest[item].tolist()
                    for token, output in enumerate(dest):
                        if dest.count(output) == 1:
                            assert torch.equal(y[item, output].view(bits), x[item, token].view(bits))

    check()


@pytest.mark.interpreted
def test_merging_again_what_was_unmerged_changes_nothing(backend, device):
    @examples(backend, shape=shapes)
    def check(shape):
        plan, x, size = make(shape, device)
        for mode in ("mean", "max"):
            y, _ = stk.merge(x, plan, size, mode, backend)
            again, _ = stk.merge(stk.unmerge(y, plan, backend), plan, size, mode, backend)
            torch.testing.assert_close(again, y, rtol=1e-6, atol=1e-6)

    check()


@pytest.mark.interpreted
def test_composed_plan_equals_composed_merges(backend, device):
    @examples(backend, shape=shapes, r=st.integers(1, 6))
    def check(shape, r):
        first, x, size = make(shape, device)
        y, size_1 = stk.merge(x, first, size, backend=backend)
        second = stk.match(y, r, min(1, shape["protected"]), backend)
        z, size_2 = stk.merge(y, second, size_1, backend=backend)
        both = first.then(second)
        assert_valid(both)
        at_once, size_both = stk.merge(x, both, size, backend=backend)
        assert torch.equal(size_both, size_2)
        torch.testing.assert_close(at_once, z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            stk.unmerge(z, both, backend), stk.unmerge(stk.unmerge(z, second, backend), first, backend), rtol=0, atol=0
        )

    check()


def test_composition_of_weight_0_tokens(backend, device):
    metric = torch.randn(1, 12, 4, device=device)
    metric[0, 4:] = torch.nan
    first = stk.match(metric, 4, 1, backend)
    x, size = torch.randn(1, 12, 5, device=device), torch.rand(1, 12, device=device) + 1
    y, size_1 = stk.merge(x, first, size, backend=backend)
    second = stk.match(torch.full((1, 8, 4), torch.nan, device=device), 2, 1, backend)
    _, size_2 = stk.merge(y, second, size_1, backend=backend)
    both = first.then(second)
    assert_valid(both)
    torch.testing.assert_close(stk.merge(x, both, size, backend=backend)[1], size_2, rtol=1e-6, atol=0)
    assert size_2.sum() < size.sum()


def test_nan_in_one_item_leaves_the_others_alone(backend, device):
    plan, x, size = make({"n": 4, "tokens": 20, "dim": 33, "protected": 1, "r": 6, "sized": True, "seed": 1}, device)
    broken = x.clone()
    broken[2] = torch.nan
    for mode in MODES:
        y, z = (stk.merge(t, plan, size, mode, backend)[0] for t in (x, broken))
        for item in (0, 1, 3):
            assert torch.equal(y[item], z[item])
        assert z[2].isnan().all()


@pytest.mark.interpreted
def test_nan_stays_in_its_group(backend, device):
    plan, x, _ = make({"n": 1, "tokens": 20, "dim": 8, "protected": 1, "r": 6, "sized": False, "seed": 2}, device)
    clean = {mode: stk.merge(x, plan, None, mode, backend)[0] for mode in MODES}
    for token in range(20):
        broken = x.clone()
        broken[0, token, 3] = torch.nan
        output = plan.dest[0, token].item()
        for mode in MODES:
            y = stk.merge(broken, plan, None, mode, backend)[0]
            assert y[0, output, 3].isnan()
            assert y.isnan().sum() == 1
            y[0, output, 3] = clean[mode][0, output, 3]
            assert torch.equal(y, clean[mode])


@pytest.mark.interpreted
def test_strides(backend, device):
    for dtype in dtypes_of(backend):
        plan, x, size = make(
            {"n": 3, "tokens": 21, "dim": 24, "protected": 2, "r": 5, "sized": True, "seed": 4}, device, dtype
        )
        wide = torch.zeros(3, 42, device=device)[:, ::2].copy_(size)
        y, size_out = stk.merge(x, plan, size, backend=backend)
        x_hat = stk.unmerge(y, plan, backend)
        for view in views(x):
            got = stk.merge(view, plan, wide, backend=backend)
            assert torch.equal(got[0], y)
            assert torch.equal(got[1], size_out)
            assert torch.equal(
                torch.ops.stoptome.unmerge_backward(view, plan.members, plan.offsets, backend),
                torch.ops.stoptome.unmerge_backward(x, plan.members, plan.offsets, backend),
            )
        for view in views(y):
            assert torch.equal(stk.unmerge(view, plan, backend), x_hat)
        # an expanded row (stride 0) and an expanded gradient, as sum().backward() makes them
        row = x[:1, :1].expand(3, 21, 24)
        assert torch.equal(
            stk.merge(row, plan, backend=backend)[0], stk.merge(row.contiguous(), plan, backend=backend)[0]
        )
        leaf = x.clone().requires_grad_()
        stk.merge(leaf, plan, size, "sum", backend)[0].sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(leaf))


@pytest.mark.parametrize("dim", [0, 1, 768, 1000, 1024])
def test_widths(backend, device, dim):
    plan, x, size = make({"n": 2, "tokens": 12, "dim": dim, "protected": 1, "r": 4, "sized": True, "seed": 5}, device)
    y, size_out = stk.merge(x, plan, size, backend=backend)
    reference = stk.merge(x, plan, size, backend="reference")
    assert torch.equal(y, reference[0])
    assert torch.equal(size_out, reference[1])


def test_sizes_are_exact_beyond_256(backend, device):
    """bfloat16 would count 257 as 256."""
    plan, x, _ = make({"n": 1, "tokens": 8, "dim": 4, "protected": 0, "r": 4, "sized": False, "seed": 6}, device)
    size = torch.tensor([[257.0, 1.0, 513.0, 3.0, 1.0, 1025.0, 1.0, 7.0]], device=device)
    _, size_out = stk.merge(x.bfloat16(), plan, size, backend=backend)
    assert size_out.dtype == torch.float32
    assert size_out.sum().item() == size.sum().item()


def test_all_sources_into_one_destination(backend, device):
    plan = stk.match(torch.ones(2, 41, 3, device=device), 20, 1, backend)
    x = torch.randn(2, 41, 10, device=device)
    y, size = stk.merge(x, plan, backend=backend)
    assert size[:, 1].tolist() == [21.0, 21.0]
    members = [1, *range(2, 41, 2)]
    torch.testing.assert_close(y[:, 1], x[:, members].mean(1))


def test_float16_subnormals_and_overflow(backend, device):
    plan = stk.match(torch.ones(1, 3, 2, device=device), 1, 1, backend)
    x = torch.tensor([[[0.0] * 4, [6e-8, 65504.0, 1e-7, -65504.0], [6e-8, 65504.0, 6e-8, -65504.0]]], device=device)
    y = stk.merge(x.half(), plan, mode="sum", backend=backend)[0][0, 1]
    want = (x.half()[0, 1].float() + x.half()[0, 2].float()).half()
    assert torch.equal(y, want)
    assert y.isinf().sum() == 2


@pytest.mark.parametrize("r", [5, 0])
def test_out(backend, device, r):
    for dtype in dtypes_of(backend):
        x, size = torch.randn(3, 20, 24, device=device, dtype=dtype), torch.rand(3, 20, device=device) + 1
        plan = stk.match(x, r, 1, backend)
        out = (torch.empty(3, 20 - r, 24, device=device, dtype=dtype), torch.empty(3, 20 - r, device=device))
        for mode in MODES:
            got = stk.merge(x, plan, size, mode, backend, out=out)
            assert got[0] is out[0]
            assert got[1] is out[1]
            want = stk.merge(x, plan, size, mode, "reference")
            if r:
                assert torch.equal(out[0], want[0])
                assert torch.equal(out[1], want[1])
            else:
                assert torch.equal(out[0], x)
                assert torch.equal(out[1], size)


@pytest.mark.compiled
def test_out_in_compiled_code(backend, device):
    torch._dynamo.reset()
    x = torch.randn(3, 20, 24, device=device)
    plan = stk.match(x, 5, 1, backend)

    def step(x, y, size):
        stk.merge(x.sin(), plan, None, "mean", backend, out=(y, size))
        return y * 2

    eager, compiled = ((torch.zeros(3, 15, 24, device=device), torch.zeros(3, 15, device=device)) for _ in range(2))
    want = step(x, *eager)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x, *compiled), want)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])


def test_out_is_noticed_by_graphs_that_saved_it(backend, device):
    x = torch.randn(3, 20, 24, device=device)
    plan = stk.match(x, 5, 1, backend)
    y, size = torch.randn(3, 15, 24, device=device), torch.empty(3, 15, device=device)
    weight = torch.randn_like(y, requires_grad=True)
    product = (weight * y).sum()
    stk.merge(x, plan, backend=backend, out=(y, size))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
