# SPDX-License-Identifier: Apache-2.0
"""merge_norm inside PyTorch (opcheck, compile, export, checkpointing), and what it says about bad arguments."""

import pytest
import stoptome_kernels as stk
import torch
import torch._dynamo.testing

from support.merge_norm import SHAPE, call, grads, leaves, make

OPS = torch.ops.stoptome

# -- inside PyTorch ---------------------------------------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(backend, device, affine):
    plan, (x, residual, size, weight, bias) = make(SHAPE, device)
    size, weight, bias = (size, weight, bias) if affine else (None, None, None)
    index = (plan.members, plan.offsets)
    inputs = leaves([x, residual, size, weight, bias])
    torch.library.opcheck(OPS.merge_norm.default, (*inputs[:2], *index, *inputs[2:], 1e-5, backend))
    y, normed, _, mean, rstd = OPS.merge_norm(x, residual, *index, size, weight, bias, 1e-5, backend)
    for grad_y in (None, torch.randn_like(y)):
        arguments = (torch.randn_like(normed), grad_y, y, mean, rstd, *index, size, weight, affine, backend)
        torch.library.opcheck(OPS.merge_norm_backward.default, arguments)


@pytest.mark.parametrize("affine", [(), ("weight",), ("bias",)])
def test_gradients_where_arguments_have_their_defaults(affine):
    """PyTorch leaves such arguments out of what it tells an operator's gradient."""
    plan, (x, residual, size, weight, bias) = make(SHAPE, "cpu")
    given = {name: value for name, value in (("weight", weight), ("bias", bias)) if name in affine}
    results = []
    for backend in ("auto", "reference"):
        inputs = leaves([x, residual, *given.values()])
        y, normed, _ = stk.merge_norm(
            *inputs[:2], plan, size, **dict(zip(given, inputs[2:], strict=True)), backend=backend
        )
        (y.sin() + normed.cos()).sum().backward()
        results.append(grads(inputs))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def block(x, residual, keys, size, weight, bias, r, backend):
    plan = stk.match(keys, r, 1, backend)
    y, normed, size = stk.merge_norm(x.sin(), residual, plan, size, weight, bias, backend=backend)
    return y + normed.sin(), size


@pytest.mark.interpreted
@pytest.mark.compiled
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("r", [4, 0])
def test_compile_fullgraph(backend, device, compiler, r):
    torch._dynamo.reset()
    _, (x, residual, size, weight, bias) = make(SHAPE, device)
    keys = torch.randn(3, 2, 21, 16, device=device)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    results = []
    for f in (block, compiled):
        inputs = leaves([x, residual, size, weight, bias])
        out, size_out = f(inputs[0], inputs[1], keys, *inputs[2:], r, backend)
        out.square().sum().backward()
        results.append([out.detach(), size_out, *grads(inputs)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.compiled
def test_compile_with_dynamic_batch_compiles_once(backend, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for n in (4, 7, 2, 11):
        _, (x, residual, size, weight, bias) = make(SHAPE | {"n": n}, device)
        arguments = (x, residual, torch.randn(n, 2, 21, 16, device=device), size, weight, bias, 4, backend)
        assert torch.equal(compiled(*arguments)[0], block(*arguments)[0])
    assert counter.frame_count == 1


class Block(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.norm, self.backend = torch.nn.LayerNorm(24), backend

    def forward(self, x, residual, keys, size):
        return block(x, residual, keys, size, self.norm.weight, self.norm.bias, 4, self.backend)


@pytest.mark.compiled
@pytest.mark.interpreted
def test_export_with_dynamic_batch(backend, device):
    def arguments(n):
        _, (x, residual, size, _, _) = make(SHAPE | {"n": n}, device)
        return x, residual, torch.randn(n, 2, 21, 16, device=device), size

    n = torch.export.Dim("n", min=2, max=100)
    layer = Block(backend).to(device)
    program = torch.export.export(layer, arguments(3), dynamic_shapes=[{0: n}] * 4)
    assert "stoptome.merge_norm.default" in {str(node.target) for node in program.graph.nodes}
    for count in (2, 9):
        inputs = arguments(count)
        assert torch.equal(program.module()(*inputs)[0], layer(*inputs)[0])


def test_checkpointing(backend, device):
    plan, inputs = make(SHAPE, device)

    def layer(x):
        y, normed, _ = call(plan, [x, *inputs[1:]], backend)
        return y + normed.sin()

    x = inputs[0].requires_grad_()
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, want)


def test_fake_and_meta_tensors_and_defaults(backend, device):
    plan, inputs = make(SHAPE, device)
    meta = [t.to("meta") for t in (inputs[0], inputs[1].bfloat16(), plan.members, plan.offsets)]
    y, normed, size, mean, rstd = OPS.merge_norm(*meta)
    assert y.shape == normed.shape == (3, 16, 24)
    assert y.dtype == torch.float32
    assert size.shape == mean.shape == rstd.shape == (3, 16)
    got = OPS.merge_norm(*inputs[:2], plan.members, plan.offsets)
    assert torch.equal(got[0], stk.merge_norm(*inputs[:2], plan)[0])
    assert torch.equal(got[1], stk.merge_norm(*inputs[:2], plan)[1])


# -- bad input --------------------------------------------------------------------------------------------------------

X, PLAIN = torch.randn(2, 9, 3), torch.randn(3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": None}, TypeError, ["x", "torch.Tensor", "NoneType"]),
        ({"x": X[0]}, ValueError, ["x", "(9, 3)", "(N, T, D)"]),
        ({"x": X[:, :8]}, ValueError, ["x", "(2, 8, 3)", "9"]),
        ({"x": X.int()}, TypeError, ["x", "int32", "float32"]),
        ({"x": X[..., :0], "residual": X[..., :0]}, ValueError, ["x", "channel", "(2, 9, 0)"]),
        ({"residual": None}, TypeError, ["residual", "torch.Tensor", "NoneType"]),
        ({"residual": X[:, :8]}, ValueError, ["residual", "(2, 9, 3)", "(2, 8, 3)"]),
        ({"residual": X[..., :1]}, ValueError, ["residual", "(2, 9, 3)", "(2, 9, 1)"]),
        ({"residual": X.long()}, TypeError, ["residual", "int64", "float32"]),
        ({"plan": "plan"}, TypeError, ["plan", "MergePlan", "str"]),
        ({"size": torch.ones(2, 9, 1)}, ValueError, ["size", "(2, 9)", "(2, 9, 1)"]),
        ({"size": torch.ones(2, 9).half()}, TypeError, ["size", "float32", "float16"]),
        ({"weight": 1.0}, TypeError, ["weight", "torch.Tensor", "float"]),
        ({"weight": PLAIN[:2]}, ValueError, ["weight", "(D,) = (3,)", "(2,)"]),
        ({"weight": PLAIN[None]}, ValueError, ["weight", "(D,) = (3,)", "(1, 3)"]),
        ({"weight": PLAIN.int()}, TypeError, ["weight", "int32"]),
        ({"bias": PLAIN[:1]}, ValueError, ["bias", "(D,) = (3,)", "(1,)"]),
        ({"bias": PLAIN.bool()}, TypeError, ["bias", "bool"]),
        ({"eps": 0.0}, ValueError, ["eps", "positive", "0.0"]),
        ({"eps": -1e-5}, ValueError, ["eps", "positive", "-1e-05"]),
        ({"eps": float("inf")}, ValueError, ["eps", "finite", "inf"]),
        ({"eps": float("nan")}, ValueError, ["eps", "finite", "nan"]),
        ({"eps": "1e-5"}, TypeError, ["eps", "float", "str"]),
        ({"eps": torch.tensor(1e-5)}, TypeError, ["eps", "float", "Tensor"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'native'"]),
    ],
)
@pytest.mark.parametrize("r", [2, 0])
def test_errors(backend, device, change, error, words, r):
    plan = stk.match(torch.randn(2, 9, 4, device=device), r, 1, backend)
    arguments = {"x": X, "residual": X, "plan": plan, "weight": PLAIN, "bias": PLAIN, "backend": backend} | change
    arguments = {
        k: v.to(device) if isinstance(v, torch.Tensor) and k != "eps" else v for k, v in arguments.items()
    }  # fmt: skip
    with pytest.raises(error) as caught:
        stk.merge_norm(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_errors_of_the_operators_and_of_devices(backend, device):
    plan, (x, residual, size, weight, bias) = make(SHAPE, device)
    index = (plan.members, plan.offsets)
    with pytest.raises(ValueError, match="residual must have x's shape"):
        OPS.merge_norm(x, residual[:1], *index)
    with pytest.raises(ValueError, match="eps must be positive"):
        OPS.merge_norm(x, residual, *index, size, weight, bias, -1.0, backend)
    with pytest.raises(ValueError, match="residual is on meta, but x is on"):
        stk.merge_norm(x, residual.to("meta"), plan, backend=backend)
    with pytest.raises(ValueError, match="bias is on meta, but x is on"):
        stk.merge_norm(x, residual, plan, bias=bias.to("meta"), backend=backend)
    y, normed, _, mean, rstd = OPS.merge_norm(x, residual, *index, size, weight, bias, 1e-5, backend)
    for change, words in (
        ({"y": y[:, 1:]}, "y must be of shape"),
        ({"grad_y": y.half()}, "grad_y must be of shape"),
        ({"mean": mean.double()}, "mean must be of shape"),
        ({"rstd": rstd[:1]}, "rstd must be of shape"),
        ({"weight": weight[1:]}, "weight must have shape"),
        ({"grad_normed": normed[:, 1:]}, "grad_normed has shape"),
    ):
        good = {"grad_normed": normed, "grad_y": y, "y": y, "mean": mean, "rstd": rstd, "weight": weight} | change
        with pytest.raises(ValueError, match=words):
            OPS.merge_norm_backward(
                **good, members=plan.members, offsets=plan.offsets, size=size, affine=True, backend=backend
            )


@pytest.mark.parametrize("r", [2, 0])
def test_what_torch_library_can_not_transform_is_refused(backend, device, r):
    plan, inputs = make(SHAPE | {"r": r}, device)
    for place in (0, 1, 3, 4):

        def only(t, place=place):
            return call(plan, [t if i == place else other for i, other in enumerate(inputs)], backend)[1]

        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            torch.func.jvp(only, (inputs[place],), (inputs[place],))
        with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
            torch.vmap(only)(inputs[place][None])
