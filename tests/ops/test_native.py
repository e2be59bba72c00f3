# SPDX-License-Identifier: Apache-2.0
"""The native kernels beyond parity: instruction sets, threads, determinism, addresses beyond 2^31."""

import ast
import subprocess
import sys
import threading
import time

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels import _native

from support.helpers import DTYPES, ROUNDOFF, similarity_gap
from support.native import ISAS

SHAPES = [(12, 54, 768, 64, 5, 2), (5, 197, 100, 33, 1, 16), (3, 64, 31, 5, 0, 30), (2, 301, 64, 768, 1, 23)]


def everything(shape, dtype, seed=0):
    """All outputs of all kernels at one shape, with some equal and some bad tokens."""
    n, tokens, dim, channels, protected, r = shape
    torch.manual_seed(seed)
    keys = torch.randn(n, 2, tokens, channels).to(dtype)
    keys[:, :, tokens // 2 :: 3] = keys[:, :, :1]
    keys[0, 0, 7, 0] = torch.nan
    x, size = torch.randn(n, tokens, dim).to(dtype), torch.rand(n, tokens) + 0.5
    plan = stk.match(keys, r, protected, "native")
    out = [plan.dest, plan.members, plan.offsets]
    for mode in ("mean", "sum", "max"):
        leaf = x.clone().requires_grad_()
        y, size_out = stk.merge(leaf, plan, size, mode, "native")
        y.backward(y.detach() + 1)
        out += [y.detach(), size_out, leaf.grad]
    leaf = out[3].clone().requires_grad_()
    x_hat = stk.unmerge(leaf, plan, "native")
    x_hat.backward(x)
    return [*out, x_hat.detach(), leaf.grad, *normed(x, plan, size, "native")]


def normed(x, plan, size, backend):
    """y, normed and all gradients of merge_norm."""
    weight, bias = (torch.linspace(a, 2, x.shape[2], dtype=x.dtype) for a in (0.5, -1))
    leaves = [t.clone().requires_grad_() for t in (x, x.flip(1), weight, bias)]
    y, rows, _ = stk.merge_norm(*leaves[:2], plan, size, *leaves[2:], backend=backend)
    torch.autograd.backward([y, rows], [y.detach() + 1, rows.detach().cos()])
    return [y.detach(), rows.detach(), *(t.grad for t in leaves)]


def same(one, other):
    return all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_right(isa, shape, dtype):
    assert _native.instruction_set() == isa
    n, tokens, dim, channels, protected, r = shape
    metric = torch.randn(n, 2, tokens, channels).to(dtype)
    metric[0, 0, 7, 0] = torch.nan
    reference = stk.match(metric, r, protected, "reference")
    plan = stk.match(metric, r, protected, "native")
    band = 4 * (channels + 4) * ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    for item in range(n):
        assert similarity_gap(metric[item], protected, plan.dest[item], reference.dest[item], plan.r) <= band

    x, size = torch.randn(n, tokens, dim).to(dtype), torch.rand(n, tokens) + 0.5
    for mode in ("mean", "sum", "max"):
        results = []
        for backend in ("native", "reference"):
            leaf = x.clone().requires_grad_()
            y, size_out = stk.merge(leaf, reference, size, mode, backend)
            y.backward(y.detach() + 1)
            results.append((y.detach(), size_out, leaf.grad))
        assert same(*results)
    (y, *rest), (y_want, *rest_want) = (normed(x, reference, size, backend) for backend in ("native", "reference"))
    assert torch.equal(y, y_want)  # the sums of the others are in another order
    wide = min(dtype, torch.float32, key=ROUNDOFF.get)
    for ours, want in zip(rest, rest_want, strict=True):
        bound = 2 * ROUNDOFF[dtype] + 4 * (dim**0.5 + (n * tokens) ** 0.5) * ROUNDOFF[wide]
        assert (ours - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_give_the_same_merged_rows(dtype):
    """Bit for bit, as merge does; what LayerNorm makes of them may differ by the order of the sums over a row."""
    x, residual = (torch.randn(3, 54, 777).to(dtype) for _ in range(2))
    plan, size = stk.match(torch.randn(3, 54, 8), 20, 1, "native"), torch.rand(3, 54) + 0.5
    found = []
    for name in ISAS:
        try:
            _native.use_instruction_set(name)
        except ValueError:
            continue  # not of this processor
        found.append(stk.merge_norm(x, residual, plan, size, backend="native"))
    _native.use_instruction_set("")
    for y, normed_rows, size_out in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(size_out, found[0][2])
        torch.testing.assert_close(normed_rows, found[0][1])


@pytest.mark.alone
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_and_runs_do_not_show(shape):
    before = torch.get_num_threads()
    try:
        first = everything(shape, torch.float32)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert same(first, everything(shape, torch.float32))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_and_plain_stores_are_the_same(dtype):
    plain = everything(SHAPES[0], dtype)
    stream, huge = _native.set_stream_bytes(0), _native.set_huge_bytes(0)
    try:
        assert same(plain, everything(SHAPES[0], dtype))
    finally:
        _native.set_stream_bytes(stream)
        _native.set_huge_bytes(huge)


RUNTIMES = """
import torch, stoptome_kernels as stk
x = torch.randn(4, 64, 8)
stk.merge(x, stk.match(x, 9, backend="native"), backend="native")
with open("/proc/self/maps") as maps:
    print({line.split()[-1] for line in maps if any(k in line for k in ("libgomp", "libiomp", "libomp."))})
"""


@pytest.mark.slow
def test_one_pool_of_threads():
    """The kernels run on torch's own OpenMP runtime: no second one is mapped into a process, as faiss would its own."""
    done = subprocess.run([sys.executable, "-c", RUNTIMES], capture_output=True, text=True, timeout=300, check=True)
    assert len(ast.literal_eval(done.stdout)) == 1, done.stdout
    assert _native.use_openmp_of(torch._C.__file__)


@pytest.mark.alone
def test_the_gil_is_released():
    """Another Python thread goes on while a kernel runs."""
    metric = torch.randn(1, 12001, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    begun, done = threading.Event(), threading.Event()

    def work():
        begun.set()
        stk.match(metric, 100, 1, "native")
        done.set()

    try:
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        ticks = 0
        while not done.is_set():
            time.sleep(0.001)
            ticks += 1
        thread.join()
        assert ticks > 10
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def untouched_memory(poisoned):
    """Memory that is reserved but never touched costs nothing, unless it is filled with NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_addresses_beyond_31_bits(untouched_memory):
    """Items 2^31 elements apart: 32-bit arithmetic would read and write the wrong ones."""
    apart, tokens, dim = 2**31 + 64, 9, 16
    base = torch.empty(apart + tokens * dim, dtype=torch.bfloat16)
    far = base.as_strided((2, tokens, dim), (apart, dim, 1))
    near = torch.randn(2, tokens, dim).bfloat16()
    far.copy_(near)
    for backend in ("native", "reference"):
        plan, want = stk.match(far, 3, 1, backend), stk.match(near, 3, 1, backend)
        assert torch.equal(plan.members, want.members)
        assert torch.equal(stk.merge(far, plan, backend=backend)[0], stk.merge(near, plan, backend=backend)[0])
        rows = far[:, : plan.tokens_out]
        assert torch.equal(stk.unmerge(rows, plan, backend), stk.unmerge(near[:, : plan.tokens_out], plan, backend))
        for ours, want in zip(
            stk.merge_norm(far, far, plan, backend=backend),
            stk.merge_norm(near, near, plan, backend=backend),
            strict=True,
        ):
            assert torch.equal(ours, want)


def test_flushed_subnormals_are_flushed_alike():
    """Vector lanes and the tail of a row widen float16 in different ways."""
    plan = stk.match(torch.ones(1, 3, 2), 1, 1)
    x = torch.full((1, 3, 77), 1e-6, dtype=torch.float16)
    want = stk.merge(x, plan, backend="native")[0]
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(stk.merge(x, plan, backend="native")[0], want)
    finally:
        torch.set_flush_denormal(False)


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.alone
def test_more_than_2_31_elements(untouched_memory):
    n, tokens, dim = 2051, 1026, 1024
    if _available_bytes() < 10 * 2**30:
        pytest.skip("needs 10 GiB of free memory for two outputs of 2.2 billion elements")
    row = torch.randn(1, tokens, dim).bfloat16()
    metric = row[..., :8]  # which elements are compared, and how many, is nothing to what is merged
    plan_1 = stk.match(metric, 2, 1)
    plan = stk.match(metric.expand(n, -1, -1), 2, 1)
    assert torch.equal(plan.members[-1], plan_1.members[0])
    y, _ = stk.merge(row.expand(n, -1, -1), plan)
    assert y.numel() > 2**31
    want = stk.merge(row, plan_1)[0]
    assert torch.equal(y[:1], want)
    assert torch.equal(y[-1:], want)
    x_hat = stk.unmerge(y[-1:].expand(n, -1, -1), plan)
    assert x_hat.numel() > 2**31
    assert torch.equal(x_hat[-1:], stk.unmerge(want, plan_1))
