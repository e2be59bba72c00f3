# SPDX-License-Identifier: Apache-2.0
"""Residual add, merge and LayerNorm in one op, on every backend: values, gradients, dtypes, strides."""

import hypothesis.strategies as st
import pytest
import stoptome_kernels as stk
import torch
import torch.nn.functional as F

from support.helpers import ROUNDOFF, assert_as_exact_as_eager, dtypes_of, examples, groups, views
from support.merge_norm import SHAPE, call, grads, leaves, make, plain, run, shapes

# -- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.interpreted
def test_as_exact_as_eager(backend, device):
    @examples(backend, shape=shapes(backend), eps=st.sampled_from([1e-5, 0.1]))
    def check(shape, eps):
        for dtype in dtypes_of("triton"):  # float64 is what they are measured by: see test_float64 and test_gradcheck
            plan, inputs = make(shape, device, dtype)
            ours, eager, exact = leaves(inputs), leaves(inputs), leaves(inputs, torch.float64)
            outputs = [call(plan, ours, backend, eps)[:2], plain(plan, eager, eps), plain(plan, exact, eps)]
            for trio in zip(*outputs, strict=True):
                assert trio[0].dtype == dtype
                assert_as_exact_as_eager(*trio)
            weights = [torch.randn_like(t).to(dtype) for t in outputs[2]]
            for pair in outputs:
                torch.autograd.backward(pair, [w.to(t.dtype) for w, t in zip(weights, pair, strict=True)])
            for trio in zip(grads(ours), grads(eager), grads(exact), strict=True):
                assert_as_exact_as_eager(*trio)
                assert trio[0].abs().sum() > 0

    check()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_float64(backend):
    """Nothing of it runs in float32 on the way."""

    @examples(backend, shape=shapes(backend))
    def check(shape):
        plan, inputs = make(shape, "cpu", torch.float64)
        ours, theirs = leaves(inputs), leaves(inputs)
        for one, two in zip(call(plan, ours, backend)[:2], plain(plan, theirs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
            one.backward(torch.full_like(one, 0.7), retain_graph=True)
            two.backward(torch.full_like(two, 0.7), retain_graph=True)
        for one, two in zip(grads(ours), grads(theirs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)

    check()


@pytest.mark.interpreted
def test_y_is_the_reference_bit_for_bit(backend, device):
    """Of y every sum, product and quotient is rounded once, in the same order; normed differs by the order of sums."""

    @examples(backend, shape=shapes(backend), lost=st.booleans(), other=st.sampled_from(dtypes_of("triton")))
    def check(shape, lost, other):
        for dtype in dtypes_of(backend):
            plan, (x, residual, *rest) = make(shape, device, dtype, lost)
            for inputs in ([x, residual, *rest], [x, residual.to(other), *rest], [x.to(other), residual, *rest]):
                y, normed, size = call(plan, inputs, backend)
                want = call(plan, inputs, "reference")
                assert torch.equal(y, want[0]), (dtype, other)
                assert torch.equal(size, want[2])
                assert y.dtype == normed.dtype == torch.promote_types(inputs[0].dtype, inputs[1].dtype)
                wide = torch.float64 if y.dtype == torch.float64 else torch.float32
                h = inputs[0].to(wide) + inputs[1].to(wide)
                assert torch.equal(y, stk.merge(h, plan, inputs[2], backend="reference")[0].to(y.dtype))
                if shape["dim"] < 16:
                    continue  # hardly any variance happens, and then the rounding of the mean is all one sees
                bound = 2 * ROUNDOFF[y.dtype] + (shape["dim"] ** 0.5 + 8) * ROUNDOFF[wide]
                assert (normed - want[1]).abs().max() <= bound * max(1, want[1].abs().max())

    check()


@pytest.mark.interpreted
def test_gradients_agree_with_the_reference(backend, device):
    """Also where eager code can't follow: tokens of weight 0, residuals of another dtype."""

    @examples(backend, shape=shapes(backend), lost=st.booleans(), other=st.sampled_from(dtypes_of("triton")))
    def check(shape, lost, other):
        shape |= {"dim": max(16, shape["dim"])}  # as above
        for dtype in dtypes_of(backend):
            plan, inputs = make(shape, device, dtype, lost)
            inputs[1] = inputs[1].to(other)
            for one, two in zip(*(run(plan, inputs, b)[3:] for b in (backend, "reference")), strict=True):
                assert one.dtype == two.dtype
                wide = torch.float64 if one.dtype == torch.float64 else torch.float32
                bound = 2 * ROUNDOFF[one.dtype] + (max(one.shape) + 64) * ROUNDOFF[wide]
                assert (one - two).abs().max() <= bound * max(1, two.abs().max())

    check()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "native"])  # Triton has no float64: see the tests above
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
def test_gradcheck(backend, sized, affine):
    shape = SHAPE | {"n": 2, "tokens": 12, "r": 3, "dim": 4, "sized": sized, "weight": affine[0], "bias": affine[1]}
    plan, inputs = make(shape, "cpu", torch.float64, lost=True)
    assert (plan.members < 0).any()
    inputs = leaves(inputs)
    for chosen in (slice(0, 2), slice(0, 1), slice(1, 2)):
        assert torch.autograd.gradcheck(lambda *inputs, s=chosen: call(plan, inputs, backend)[s], inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("dim", [1, 31, 200, 768, 1000, 1024])
def test_widths(backend, device, dim):
    for dtype in dtypes_of(backend):
        plan, inputs = make(SHAPE | {"n": 2, "tokens": 12, "dim": dim}, device, dtype)
        ours, reference = (run(plan, inputs, b) for b in (backend, "reference"))
        assert torch.equal(ours[0], reference[0])
        for one, two in zip(ours, reference, strict=True):
            bound = 2 * ROUNDOFF[one.dtype] + (dim**0.5 + 64) * ROUNDOFF[min(dtype, torch.float32, key=ROUNDOFF.get)]
            assert (one - two).abs().max() <= bound * max(1, two.abs().max())
        if dim == 1:  # nothing is left of a row but the bias
            assert torch.equal(ours[1], inputs[4].to(dtype).expand_as(ours[1]))


def test_rows_of_large_mean(backend, device):
    """Two passes: Σ y² − (Σ y)² would leave nothing of the variance."""
    plan, inputs = make(SHAPE | {"dim": 300}, device)
    inputs[0] = inputs[0] + 3000
    exact = plain(plan, [None if t is None else t.double() for t in inputs])[1]
    assert_as_exact_as_eager(call(plan, inputs, backend)[1], plain(plan, inputs)[1], exact)


def test_rows_that_do_not_vary(backend, device):
    """The variance is 0: eps alone keeps the row finite."""
    plan, inputs = make(SHAPE, device)
    for t in inputs[:2]:
        t[:] = 0.25
    _, normed, _, *gradients = run(plan, inputs, backend)
    assert torch.equal(normed, inputs[4].expand_as(normed))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.interpreted
def test_many_rows(backend, device):
    """More rows than there are parts of the gradients of weight and bias: programs and blocks take several in turn."""
    shape = SHAPE | ({"n": 12, "dim": 600} if backend == "triton" else {"n": 300, "dim": 40})
    plan, inputs = make(shape, device)
    ours, reference = (run(plan, inputs, b) for b in (backend, "reference"))
    for one, two in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * two.abs().max().item())


@pytest.mark.interpreted
def test_weight_0_members(backend, device):
    """What they hold shows nowhere, and they get no gradient; who is alone without them is copied, not rescaled."""
    for dtype in dtypes_of(backend):
        plan, inputs = make(SHAPE, device, dtype, lost=True)
        lost = torch.zeros_like(plan.dest, dtype=torch.bool)
        for item, members in enumerate(plan.members.tolist()):
            lost[item, [~m for m in members if m < 0]] = True
        assert lost.any()
        clean = run(plan, inputs, backend)
        inputs[0] = inputs[0].masked_fill(lost[..., None], torch.nan)
        broken = run(plan, inputs, backend)
        for one, two in zip(clean, broken, strict=True):
            assert torch.equal(one, two)
        for grad in clean[3:5]:
            assert (grad[lost] == 0).all()
            assert (grad[~lost] != 0).any(-1).all()
        sums, kinds = inputs[0] + inputs[1], set()
        for item in range(3):
            for output, members in enumerate(groups(plan, item)):
                valid = [m for m in members if m >= 0]
                kinds.add((len(valid), len(members) > len(valid)))
                if len(valid) == 1:
                    assert torch.equal(clean[0][item, output], sums[item, valid[0]])
        assert kinds >= {(1, False), (1, True), (2, True)}


def test_nan_in_one_item_leaves_the_others_alone(backend, device):
    plan, inputs = make(SHAPE, device)
    clean = run(plan, inputs, backend)
    inputs[1] = inputs[1].clone()
    inputs[1][1] = torch.nan
    broken = run(plan, inputs, backend)
    for one, two in zip(clean[:5], broken[:5], strict=True):
        assert torch.equal(one[[0, 2]], two[[0, 2]])
    assert broken[0][1].isnan().all()
    assert broken[1][1].isnan().all()


def test_gradients_that_are_nan_stay_in_their_row(backend, device):
    plan, inputs = make(SHAPE | {"weight": False, "bias": False}, device, lost=True)
    y = call(plan, inputs, backend)[0]
    clean, bad = [torch.ones_like(y), torch.randn_like(y)], [torch.ones_like(y), torch.zeros_like(y)]
    bad[1].copy_(clean[1])
    bad[1][0, 3, 7] = torch.nan
    one, two = (run(plan, inputs, backend, w)[3] for w in (clean, bad))
    members = plan.members[0, plan.offsets[0, 3] : plan.offsets[0, 4]].tolist()
    hit = [m for m in members if m >= 0]
    assert two[0, hit].isnan().all()
    two[0, hit] = one[0, hit]
    assert torch.equal(one, two)


def test_autocast(backend, device):
    """The stream in float32, what a layer adds in bfloat16: summed in float32, each gradient in its own dtype."""
    plan, inputs = make(SHAPE, device)
    layer = torch.nn.Linear(24, 24, device=device)
    want, got = leaves(inputs), leaves(inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        residual = layer(got[1])
        assert residual.dtype == torch.bfloat16
        residual.retain_grad()
        y, normed, size = call(plan, [got[0], residual, *got[2:]], backend)
    assert y.dtype == normed.dtype == size.dtype == torch.float32
    want[1] = residual.detach().float().requires_grad_()
    y_want, normed_want, _ = call(plan, want, backend)
    assert torch.equal(y, y_want)
    assert torch.equal(normed, normed_want)
    for pair in ((y, normed), (y_want, normed_want)):
        (pair[0].sum() + pair[1].square().sum()).backward()
    assert torch.equal(got[0].grad, want[0].grad)
    assert residual.grad.dtype == torch.bfloat16
    assert torch.equal(residual.grad, want[1].grad.bfloat16())
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_parameters_of_different_dtypes(backend, device, kinds):
    """Each is taken as it is, and its gradient is rounded to its own dtype alone."""
    plan, inputs = make(SHAPE, device)
    inputs[3:] = [t.to(kind) for t, kind in zip(inputs[3:], kinds, strict=True)]
    ours, want = run(plan, inputs, backend), run(plan, [*inputs[:3], *(t.float() for t in inputs[3:])], backend)
    for one, two in zip(ours, want, strict=True):
        assert torch.equal(one, two.to(one.dtype))
    assert tuple(t.dtype for t in ours[5:]) == kinds


# -- which gradients --------------------------------------------------------------------------------------------------


@pytest.mark.interpreted
def test_only_one_output_used(backend, device):
    for dtype in dtypes_of(backend):
        plan, inputs = make(SHAPE, device, dtype)
        both, for_y, for_normed, merged = (leaves(inputs) for _ in range(4))
        y, normed, _ = call(plan, both, backend)
        grad = torch.randn_like(y)
        zeros = torch.zeros_like(y)
        call(plan, for_y, backend)[0].backward(grad)
        stk.merge(merged[0] + merged[1], plan, merged[2], backend=backend)[0].backward(grad)
        assert torch.equal(for_y[0].grad, merged[0].grad)
        assert torch.equal(for_y[1].grad, merged[1].grad)
        assert for_y[3].grad is None  # as in the composition: normed was not used
        call(plan, for_normed, backend)[1].backward(grad)
        torch.autograd.backward([y, normed], [zeros, grad])
        for one, two in zip(grads(for_normed), grads(both), strict=True):
            assert torch.equal(one, two)
            assert one.abs().sum() > 0


def test_the_size_alone_has_no_gradient(backend, device):
    plan, inputs = make(SHAPE, device)
    inputs = leaves(inputs)
    inputs[2].requires_grad_()
    y, _, size = call(plan, inputs, backend)
    assert y.requires_grad
    assert not size.requires_grad
    (y.sum() + size.sum()).backward()
    assert inputs[2].grad is None
    with torch.no_grad():
        assert not call(plan, inputs, backend)[0].requires_grad


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (4,), (0, 4), (1, 3)])
def test_only_some_inputs_want_gradients(backend, device, wanted):
    plan, inputs = make(SHAPE, device)
    want = run(plan, inputs, backend)[3:]
    leaf = [t.clone().requires_grad_() if i in wanted else t for i, t in enumerate(inputs)]
    y, normed, _ = call(plan, leaf, backend)
    weights = [torch.linspace(-1, 2, y.numel(), device=device).view(y.shape) for _ in range(2)]
    torch.autograd.backward([y, normed], weights)
    for i, t in zip((0, 1, 3, 4), want, strict=True):
        if i in wanted:
            assert torch.equal(leaf[i].grad, t)
        else:
            assert leaf[i].grad is None


def test_neither_x_nor_residual_is_kept(backend, device):
    plan, inputs = make(SHAPE, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _, _ = call(plan, leaves(inputs), backend)
    rows = [t for t in kept if t.dim() == 3]
    assert [t.shape for t in rows] == [y.shape]
    assert sum(t.numel() for t in kept if t.dim() == 2) == 2 * y[..., 0].numel() + sum(
        t.numel() for t in (plan.members, plan.offsets, inputs[2])
    )


def test_no_second_derivative(backend, device):
    plan, inputs = make(SHAPE, device)
    inputs = leaves(inputs)
    y, normed, _ = call(plan, inputs, backend)
    (grad,) = torch.autograd.grad((y.sum() + normed.square().sum()), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"merge_norm has no second derivative; use merge and torch\.nn"):
        grad.square().sum().backward()
    # of the merge alone there is one
    y = call(plan, inputs, backend)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    (twice,) = torch.autograd.grad(grad.sum(), inputs[0])
    merged = stk.merge(inputs[0] + inputs[1], plan, inputs[2], backend=backend)[0]
    (grad,) = torch.autograd.grad(merged.square().sum(), inputs[0], create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(grad.sum(), inputs[0])[0])


# -- shapes and memory ------------------------------------------------------------------------------------------------


@pytest.mark.interpreted
def test_strides(backend, device):
    for dtype in dtypes_of(backend):
        plan, inputs = make(SHAPE, device, dtype)
        want = run(plan, inputs, backend)
        strided = [torch.zeros(*t.shape, 2, dtype=t.dtype, device=device)[..., 0].copy_(t) for t in inputs[2:]]
        for x, residual in zip(views(inputs[0]), reversed(list(views(inputs[1]))), strict=True):
            for one, two in zip(call(plan, [x, residual, *strided], backend), want[:3], strict=True):
                assert torch.equal(one, two)
        # an expanded row (stride 0), and gradients of any strides, as sum().backward() and transposes make them
        row = inputs[0][:1, :1]
        for one, two in zip(
            call(plan, [row.expand(3, 21, 24), *inputs[1:]], backend),
            call(plan, [row.repeat(3, 21, 1), *inputs[1:]], backend),
            strict=True,
        ):
            assert torch.equal(one, two)
        weights = [torch.randn_like(t) for t in want[:2]]
        dense = run(plan, inputs, backend, weights)
        for first, second in zip(views(weights[0]), reversed(list(views(weights[1]))), strict=True):
            for one, two in zip(run(plan, inputs, backend, [first, second]), dense, strict=True):
                assert torch.equal(one, two)
        expanded = [weights[0][:1, :1, :1].expand_as(t) for t in weights]
        for one, two in zip(
            run(plan, inputs, backend, expanded),
            run(plan, inputs, backend, [w.contiguous() for w in expanded]),
            strict=True,
        ):
            assert torch.equal(one, two)


def test_no_items(backend, device):
    plan, inputs = make(SHAPE | {"n": 0}, device)
    assert plan.r == 5
    y, normed, size, *gradients = run(plan, inputs, backend)
    assert y.shape == normed.shape == (0, 16, 24)
    assert size.shape == (0, 16)
    assert [tuple(g.shape) for g in gradients] == [(0, 21, 24), (0, 21, 24), (24,), (24,)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("sized", [False, True])
def test_nothing_to_merge(backend, device, sized):
    """r = 0: plain add and layer_norm, bit for bit, with their gradients."""
    for dtype in dtypes_of(backend):
        for affine in (True, False):
            shape = SHAPE | {"r": 0, "sized": sized, "weight": affine, "bias": affine}
            plan, inputs = make(shape, device, dtype)
            ours, theirs = leaves(inputs), leaves(inputs)
            y, normed, size = call(plan, ours, backend)
            h = theirs[0] + theirs[1]
            rows = h.float() if affine and dtype.itemsize == 2 else h
            want = F.layer_norm(rows, (24,), theirs[3], theirs[4]).to(dtype)
            assert torch.equal(y, h)
            assert torch.equal(normed, want)
            assert torch.equal(size, inputs[2] if sized else torch.ones(3, 21, device=device))
            assert size.dtype == torch.float32
            for pair in ((y, normed), (h, want)):
                (pair[0].sum() + pair[1].square().sum()).backward()
            for one, two in zip(grads(ours), grads(theirs), strict=True):
                assert torch.equal(one, two)


@pytest.mark.interpreted
def test_deterministic(backend, device):
    for dtype in dtypes_of(backend):
        plan, inputs = make(SHAPE | {"dim": 200}, device, dtype)
        first = run(plan, inputs, backend)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(plan, inputs, backend), strict=True))
