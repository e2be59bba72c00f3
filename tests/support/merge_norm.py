# SPDX-License-Identifier: Apache-2.0
"""Inputs of merge_norm, what eager code makes of them, and the gradients: for all tests of it."""

import hypothesis.strategies as st
import stoptome_kernels as stk
import torch
import torch.nn.functional as F

from support.helpers import eager_merge


def shapes(backend):
    """Return a strategy for shapes, of fewer rows for Triton's interpreter, which takes a while for each."""
    n, tokens = (3, 24) if backend == "triton" else (5, 40)
    return st.fixed_dictionaries(
        {
            "n": st.integers(1, n),
            "tokens": st.integers(4, tokens),
            "dim": st.sampled_from([2, 3, 16, 31, 64, 200, 300]),
            "protected": st.integers(0, 3),
            "r": st.integers(1, tokens // 2),
            "sized": st.booleans(),
            "weight": st.booleans(),
            "bias": st.booleans(),
            "seed": st.integers(0, 2**20),
        }
    )


SHAPE = {
    "n": 3,
    "tokens": 21,
    "dim": 24,
    "protected": 2,
    "r": 5,
    "sized": True,
    "weight": True,
    "bias": True,
    "seed": 4,
}


def make(shape, device, dtype=torch.float32, lost=False):
    """A plan and x, residual, size, weight, bias; with ``lost`` some tokens are merged with weight 0."""
    generator = torch.Generator().manual_seed(shape["seed"])
    n, tokens, dim = shape["n"], shape["tokens"], shape["dim"]

    def random(*sizes, dtype=torch.float32):
        return torch.randn(sizes, generator=generator).to(device, dtype)

    metric = random(n, tokens, 6)
    if lost:  # beside two tokens that are merged with each other, and (in item 2) into one that is alone otherwise
        metric[::4, shape["protected"] + 2 :] = torch.nan
        metric[2::4, shape["protected"] + 1 :] = torch.nan
    x, residual = random(n, tokens, dim, dtype=dtype) * 2 + 0.5, random(n, tokens, dim, dtype=dtype)
    size = torch.randint(1, 50, (n, tokens), generator=generator).float().to(device) if shape["sized"] else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = random(dim, dtype=wide) + 1, random(dim, dtype=wide)
    plan = stk.match(metric, shape["r"], shape["protected"], "reference")
    return plan, [x, residual, size, weight if shape["weight"] else None, bias if shape["bias"] else None]


def call(plan, inputs, backend, eps=1e-5):
    x, residual, size, weight, bias = inputs
    return stk.merge_norm(x, residual, plan, size, weight, bias, eps, backend)


def plain(plan, inputs, eps=1e-5):
    """Return what users write: h = x + residual; merge; layer_norm, with parameters wider than the stream in
    float32."""
    x, residual, size, weight, bias = inputs
    y = eager_merge(x + residual, plan, size)
    if y.dtype.itemsize == 2:
        return y, F.layer_norm(y.float(), y.shape[2:], weight, bias, eps).to(y.dtype)
    return y, F.layer_norm(y, y.shape[2:], weight, bias, eps)


def leaves(inputs, dtype=None):
    """Copies that want gradients (all but size), in another dtype if given."""
    return [
        t if t is None or i == 2 else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for i, t in enumerate(inputs)
    ]


def grads(inputs):
    return [t.grad for i, t in enumerate(inputs) if t is not None and i != 2]


def run(plan, inputs, backend, weights=None, eps=1e-5):
    """Outputs and gradients, with ``weights`` for y and normed."""
    inputs = leaves(inputs)
    y, normed, size = call(plan, inputs, backend, eps)
    weights = weights or [torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).to(y) for _ in range(2)]
    torch.autograd.backward([y, normed], weights)
    return [y.detach(), normed.detach(), size, *grads(inputs)]
