# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: real shapes, launches, synchronisation, CUDA graphs. The other files run on it too."""

import re

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.compat import bipartite_soft_matching_random2d
from stoptome_kernels.ops import direct

from support import GPU
from support.attention import assert_exact, make
from support.helpers import ROUNDOFF, assert_as_exact_as_eager, assert_valid, eager_merge, similarity_gap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]

# name: N, T, D, heads, protected, r; heads 0: the tokens themselves are the metric
SHAPES = {
    "STOP B/32": (128 * 12, 54, 768, 12, 5, 2),
    "one video": (12, 54, 768, 12, 5, 8),
    "CLIP B/16": (64 * 12, 197, 768, 12, 1, 10),
    "TempMe 2": (64 * 6, 68, 768, 0, 2, 20),
    "TempMe 4": (64 * 3, 88, 768, 0, 4, 26),
    "TempMe 12": (64, 168, 768, 0, 12, 50),
    "ViT-L 384": (64, 577, 1024, 16, 1, 23),
    "long": (8, 4097, 1024, 16, 1, 512),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(name, dtype):
    n, tokens, dim, heads, protected, r = SHAPES[name]
    x = torch.randn(n, tokens, dim, device="cuda", dtype=dtype)
    metric = x
    if heads:
        metric = torch.randn(n, tokens, 3, heads, 64, device="cuda", dtype=dtype)[:, :, 1].transpose(1, 2)
    size = torch.randint(1, 9, (n, tokens), device="cuda").float()
    return metric, x, size, r, protected


# -- right at real shapes: what matters most first --------------------------------------------------------------------


def some_items(n):
    """Items that the reference computes too; none depends on another, and its memory is that of the whole batch."""
    return torch.cat([torch.arange(min(n, 48)), torch.arange(max(min(n, 48), n - 16), n)]).cuda()


def of_items(plan, items):
    return stk.MergePlan(plan.dest[items], plan.members[items], plan.offsets[items], plan.protected)


def assert_same(got, want, what):
    """The same bits, NaN like NaN."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    differ = ~((got == want) | (got.isnan() & want.isnan()))
    if differ.any():
        error = (got.double() - want.double()).abs()[differ].max().item()
        first = differ.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} elements of {tuple(got.shape)} {got.dtype} differ, "
            f"first at {first}, by at most {error:.3g}; the bound is 0, all backends round alike"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_matching(name, dtype):
    """The reference's plan, but for pairs that float32 can't tell apart."""
    metric, _, _, r, protected = inputs(name, dtype)
    plan = stk.match(metric, r, protected, "triton")
    reference = stk.match(metric, r, protected, "reference")
    differ = (plan.dest != reference.dest).any(1).nonzero().flatten().tolist()
    most = max(1, len(plan.dest) // 50)
    assert len(differ) <= most, f"{name}, {dtype}: {len(differ)} of {len(plan.dest)} items differ, at most {most} may"
    assert_valid(of_items(plan, slice(0, 1)))
    band = 4 * (metric.shape[-1] + 4) * ROUNDOFF[torch.float32]
    for item in differ[:20]:
        gap = similarity_gap(metric[item].cpu(), protected, plan.dest[item].cpu(), reference.dest[item].cpu(), plan.r)
        assert gap <= band, f"{name}, {dtype}, item {item}: similarities {gap:.3g} apart, float32's band is {band:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_merging(name, dtype):
    """Merging, its gradient and unmerging: the reference's bits."""
    metric, x, size, r, protected = inputs(name, dtype)
    plan = stk.match(metric, r, protected, "triton")
    items = some_items(len(x))
    few = of_items(plan, items)
    for mode in ("mean", "sum", "max"):
        leaf, part = x.clone().requires_grad_(), x[items].requires_grad_()
        y, size_out = stk.merge(leaf, plan, size, mode, "triton")
        want, want_size = stk.merge(part, few, size[items], mode, "reference")
        what = f"{name}, {mode}"
        assert_same(y[items].detach(), want.detach(), what)
        assert_same(size_out[items], want_size, f"{what}, sizes")
        grad = torch.randn_like(y)
        y.backward(grad)
        want.backward(grad[items])
        assert_same(leaf.grad[items], part.grad, f"{what}, gradient")
    y = y.detach()
    assert_same(stk.unmerge(y, plan, "triton")[items], stk.unmerge(y[items], few, "reference"), f"{name}, unmerge")
    torch.use_deterministic_algorithms(False)  # the eager peer scatters
    if not (plan.members < 0).any():
        y = stk.merge(x, plan, size, backend="triton")[0][items]
        assert_as_exact_as_eager(
            y, eager_merge(x[items], few, size[items]), eager_merge(x[items].double(), few, size[items])
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["STOP B/32", "one video", "ViT-L 384", "TempMe 12"])
def test_merge_norm(name, dtype):
    """The merged stream as the reference's bits; what is normalised, and gradients, to the rounding of their sums."""
    metric, x, size, r, protected = inputs(name, dtype)
    plan, residual = stk.match(metric, r, protected), torch.randn_like(x)
    weight, bias = (torch.rand(x.shape[2], device="cuda") for _ in range(2))
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        y, normed, size_out = stk.merge_norm(*leaves[:2], plan, size, *leaves[2:], backend=backend)
        torch.autograd.backward([y, normed], [y.detach(), normed.detach().cos()])
        results.append([y.detach(), size_out, normed.detach(), *(t.grad for t in leaves)])
    assert_same(results[0][0], results[1][0], f"{name}, y")
    assert_same(results[0][1], results[1][1], f"{name}, sizes")
    names = ("normed", "gradient of x", "of residual", "of weight", "of bias")
    for what, ours, want in zip(names, *(found[2:] for found in results), strict=True):
        share = 2 * ROUNDOFF[ours.dtype] + 4 * (x.shape[2] ** 0.5 + x[..., 0].numel() ** 0.5) * ROUNDOFF[torch.float32]
        error, bound = (ours - want).abs().max().item(), share * want.abs().max().item()
        assert error <= bound, f"{name}, {dtype}, {what}: off by {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("items", "tokens", "ahead", "heads", "channels"),
    [
        (12 * 32, 54, 4, 12, 64), (12, 54, 4, 12, 64), (64, 197, 0, 12, 64), (24, 168, 4, 12, 64), (96, 101, 0, 12, 64),
        (12, 54, 0, 12, 64), (24, 577, 0, 16, 64), (2, 1568, 0, 12, 64), (1, 4096, 0, 4, 64), (12, 577, 4, 8, 64),
        (24, 257, 0, 16, 80), (12, 577, 4, 8, 128),
    ],
    ids=[
        "STOP B/32", "one video", "ViT-B", "TempMe 12", "ViT-B deep", "one video, no prefix", "ViT-L 384", "VideoMAE",
        "4096 keys", "577 keys and a prefix", "ViT-H", "128 channels",
    ],
)  # fmt: skip
def test_attention(items, tokens, ahead, heads, channels, dtype):
    """With sizes, and with a prefix that the 12 frames of a video share: as near to float64 as torch's own function."""
    arguments = make(tokens, tokens, ahead, channels, "cuda", dtype, n=items, m=max(1, items // 12), heads=heads)
    assert_exact(arguments, "triton")


# -- launches, synchronisation, graphs, addresses ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["STOP B/32", "ViT-L 384"])
def test_launches_of_merge_norm(name, dtype):
    """One launch forward, and one backward where weight and bias want no gradient."""
    metric, x, size, r, protected = inputs(name, dtype)
    plan, residual = stk.match(metric, r, protected), torch.randn_like(x)
    weight, bias = (torch.rand(x.shape[2], device="cuda") for _ in range(2))
    torch.use_deterministic_algorithms(False)  # filling outputs with NaN is a launch too
    leaf = x.clone().requires_grad_()
    y, normed, _ = stk.merge_norm(leaf, residual, plan, size, weight, bias)
    grads = [torch.randn_like(t) for t in (y, normed)]
    for run in (
        lambda: stk.merge_norm(x, residual, plan, size, weight, bias),
        lambda: torch.autograd.grad((y, normed), leaf, grads, retain_graph=True),
    ):
        names = kernels(run)
        assert len(names) == 1, names


def kernels(run):
    """The kernels of a second run."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("name", ["STOP B/32", "ViT-L 384", "TempMe 12"])
def test_deterministic(name):
    metric, x, size, r, protected = inputs(name, torch.bfloat16)

    def once():
        plan = stk.match(metric, r, protected, "triton")
        leaf = x.clone().requires_grad_()
        y, size_out = stk.merge(leaf, plan, size, backend="triton")
        y.sum().backward()
        return plan.members, plan.offsets, y.detach(), size_out, leaf.grad

    first = once()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize(("name", "most"), [("STOP B/32", 2), ("one video", 2), ("CLIP B/16", 2), ("ViT-L 384", 3)])
def test_launches(name, most):
    """One kernel matches while the sources fit a tile; merging is one kernel, and so is its gradient."""
    metric, x, size, r, protected = inputs(name, torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # filling outputs with NaN is a launch too

    def both():
        return stk.merge(x, stk.match(metric, r, protected), size)

    found = kernels(both)
    assert len(found) <= most, found
    leaf = x.requires_grad_()
    y = both()[0]
    grad = torch.randn_like(y)
    assert len(kernels(lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True))) == 1


@pytest.mark.parametrize("name", ["one video", "ViT-L 384"])
def test_no_host_synchronisation(name):
    metric, x, size, r, protected = inputs(name, torch.bfloat16)
    x.requires_grad_()

    def step():
        plan = stk.match(metric, r, protected)
        y, size_out = stk.merge(x, plan, size)
        following = stk.match(y, r, protected)
        z, _ = stk.merge(y, following, size_out)
        return torch.autograd.grad(stk.unmerge(z, plan.then(following)).sum(), x)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["one video", "ViT-L 384"])
def test_cuda_graph(name):
    metric, x, size, r, protected = inputs(name, torch.bfloat16)
    static = [metric.clone(), x.clone(), size.clone()]

    def step(metric, x, size):
        plan = stk.match(metric, r, protected)
        y, size_out = stk.merge(x, plan, size)
        return y, size_out, plan.dest, stk.unmerge(y, plan)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*static)
    for _ in range(3):
        fresh = inputs(name, torch.bfloat16)[:3]
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, step(*fresh), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [16, 64, 128])
def test_image(side, dtype):
    """One destination a cell of 2 x 2: as the reference, without waiting, in a CUDA graph."""
    x = torch.randn(2, side * side, 320, device="cuda", dtype=dtype)
    r = side * side // 2

    def step(x, no_rand=True):
        merge, unmerge = bipartite_soft_matching_random2d(x, side, side, 2, 2, r, no_rand)
        y = merge(x)
        return unmerge(y), y, merge.plan.dest

    step(x)  # compiles
    reference = bipartite_soft_matching_random2d(x, side, side, 2, 2, r, True, backend="reference")[0].plan
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, y, dest = step(x)
        step(x, no_rand=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (dest != reference.dest).float().mean() <= 0.01
    assert y.isfinite().all()

    static, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(static)
    static.copy_(torch.randn_like(static))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, step(static), strict=True))


def test_sets_that_are_none_leave_no_range():
    """Nobody reads the indices before the kernels do."""
    metric = torch.randn(2, 3000, 64, device="cuda")
    for low, high in ((-(2**40), 2**40), (0, 10), (2990, 4000)):
        src, dst = (torch.randint(low, high, (count,), device="cuda") for count in (2000, 500))
        plan = stk.match(metric, 900, sets=(src, dst))
        tokens = torch.where(plan.members < 0, ~plan.members, plan.members)
        assert torch.equal(tokens.sort(1).values, torch.arange(3000, device="cuda").expand(2, -1).int())
        assert (plan.offsets.diff(dim=1) >= 1).all()
        assert stk.merge(metric, plan)[0].isfinite().all()


def shifted(tensor, by):
    """A copy that begins so many elements behind an address that is a multiple of 16."""
    memory = torch.empty(by + tensor.numel(), dtype=tensor.dtype, device="cuda")
    return memory[by:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)], ids=["aligned first", "shifted first"])
def test_addresses_that_are_not_multiples_of_16(order, dtype):
    """Launches are prepared for a key without addresses: one for aligned tensors does not serve others, nor the other
    way round."""
    from stoptome_kernels._backends.triton import launch

    launch._READY.clear()
    metric, x, size, r, protected = inputs("one video", dtype)
    weight, bias = (torch.rand(x.shape[2], device="cuda") for _ in range(2))
    q, k, v = (torch.randn(12, 12, 54, 64, device="cuda", dtype=dtype) for _ in range(3))
    given = (metric.contiguous(), x, torch.randn_like(x), size, weight, bias, q, k, v)

    def merged(backend, plan, x, residual, size, weight, bias, q, k, v):
        leaf = x.detach().requires_grad_()
        y, sizes = stk.merge(leaf, plan, size, backend=backend)
        (grad,) = torch.autograd.grad(y, leaf, y.detach())
        stream, normed, _ = stk.merge_norm(x, residual, plan, size, weight, bias, backend=backend)
        same = (y.detach(), sizes, grad, stk.unmerge(y.detach(), plan, backend), stream)
        return same, (normed, stk.attention(q, k, v, size, backend=backend))

    reference = stk.match(given[0], r, protected, "reference")
    for by in order:
        metric, *rest = (shifted(tensor, by) for tensor in given)
        assert all((tensor.data_ptr() % 16 == 0) == (by == 0) for tensor in (metric, *rest))
        plan = stk.match(metric, r, protected, "triton")
        assert (plan.dest != reference.dest).any(1).sum() <= 1  # of pairs that float32 can't tell apart
        same, near = merged("triton", plan, *rest)
        want_same, want_near = merged("reference", plan, *rest)
        for ours, want in zip(same, want_same, strict=True):
            assert_same(ours, want, f"shifted by {by}")
        share = max(1e-5, 4 * ROUNDOFF[dtype])  # another element would be off by about 1
        for ours, want in zip(near, want_near, strict=True):
            torch.testing.assert_close(ours, want, rtol=share, atol=share)


def test_direct_calls_know_a_tensor_of_the_gpu():
    """Else every eager call would take the dispatcher."""
    x = torch.ones(2, device="cuda")
    with torch.inference_mode():
        tensors = (x, torch.nn.Parameter(x), torch.ones(2, device="cuda"), torch.zeros(2, 2, device="cuda").t())
    assert [direct.device_of(tensor) for tensor in tensors] == ["cuda"] * 4
    assert direct.are_on("cuda", *tensors)
    assert direct.is_unseen()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    torch._dynamo.reset()
    metric, x, size, r, protected = inputs("one video", torch.bfloat16)
    x.requires_grad_()

    def step(metric, x, size):
        plan = stk.match(metric, r, protected)
        y, size_out = stk.merge(x * 2, plan, size)
        return stk.unmerge(y, plan) + x, size_out

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for _ in range(4):
        ours, want = compiled(metric, x, size), step(metric, x, size)
        assert torch.equal(ours[1], want[1])
        torch.testing.assert_close(ours[0], want[0])
        grad = torch.autograd.grad(ours[0].float().square().sum(), x)[0]
        torch.testing.assert_close(grad, torch.autograd.grad(want[0].float().square().sum(), x)[0])


def test_auto_is_triton():
    metric, x, size, r, protected = inputs("one video", torch.bfloat16)
    plan = stk.match(metric, r, protected)
    assert torch.equal(plan.members, stk.match(metric, r, protected, "triton").members)
    backends = stk.backends()
    assert backends["triton"] is None
    reason = backends["native"] or "native kernels run on CPU tensors, not on cuda"  # where they were built
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        stk.merge(x, plan, size, backend="native")
    with pytest.raises(ValueError, match=r"x is on cpu, but the plan is on cuda"):
        stk.merge(x.cpu(), plan)
    stk.match(metric.double(), r, protected)  # float64 falls back to the reference


def test_more_than_2_31_elements():
    torch.use_deterministic_algorithms(False)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    n, tokens, dim = 2800, 1025, 1024
    row = torch.randn(1, tokens, dim, device="cuda", dtype=torch.bfloat16)
    plan_1 = stk.match(row, 256, 1)
    x = row.expand(n, -1, -1).contiguous()
    plan = stk.match(x, 256, 1)
    assert torch.equal(plan.members[-1], plan_1.members[0])
    y = stk.merge(x, plan)[0]
    assert y.numel() > 2**31
    assert torch.equal(y[-1:], stk.merge(row, plan_1)[0])
    assert torch.equal(stk.unmerge(y, plan)[-1:], stk.unmerge(y[:1], plan_1))


def test_a_corrupt_plan_reads_and_writes_nothing_outside():
    """Indices are clamped on the device, where raising would need a synchronisation."""
    metric, x, size, r, protected = inputs("one video", torch.float32)
    plan = stk.match(metric, r, protected)
    for wrong in (54, 2**31 - 1, -(2**31)):
        members = plan.members.clone()
        members[3, 20] = wrong
        y, _ = torch.ops.stoptome.merge(x, members, plan.offsets, size)
        torch.ops.stoptome.unmerge(y, members, plan.offsets)
        torch.cuda.synchronize()
        for item in (0, 1, 2, 4):
            assert torch.equal(y[item], stk.merge(x, plan, size)[0][item])
    for wrong in (55, 2**31 - 1, -(2**31)):
        offsets = plan.offsets.clone()
        offsets[3, 20] = wrong
        y, _ = torch.ops.stoptome.merge(x, plan.members, offsets, size)
        torch.ops.stoptome.unmerge(y, plan.members, offsets)
        torch.cuda.synchronize()


def test_no_row_is_left_unwritten():
    """A token that no group holds gets NaN, not what was in memory before."""
    metric, x, size, r, protected = inputs("one video", torch.float32)
    plan = stk.match(metric, r, protected)
    members = plan.members.clone()
    lost = int(members[3, 20])
    members[3, 20] = members[3, 21]
    y, _ = torch.ops.stoptome.merge(x, plan.members, plan.offsets, size)
    mean = rstd = y.new_ones(y.shape[:2])
    for run in (
        lambda: torch.ops.stoptome.unmerge(y, members, plan.offsets),
        lambda: torch.ops.stoptome.merge_backward(y, members, plan.offsets, size, None, None, "mean", "triton"),
        lambda: torch.ops.stoptome.merge_norm_backward(
            y, y, y, mean, rstd, members, plan.offsets, size, None, True, "triton"
        )[0],
    ):
        dirty = torch.full_like(x, 7.0)
        del dirty  # its memory is the next to be handed out
        rows = run().isnan().all(-1)
        assert rows.nonzero().tolist() == [[3, lost]]


def stop_model():
    from stoptome_kernels.stop import StopConfig, StopModel

    torch.manual_seed(0)
    model = StopModel(StopConfig(layers=3, prompt_layers=3, text_layers=1, vocab_size=64, temporal_prompt="DGL"))
    video = torch.randn(4, 12, 3, 224, 224)
    return stk.apply_tome_patch(model, 4), video


def test_stop_model_as_on_the_cpu():
    """The whole tower in float32, forward and backward, on the kernels of both machines."""
    model, video = stop_model()
    torch.use_deterministic_algorithms(False)  # convolution's gradient
    want = model.encode_video(video)
    want.square().sum().backward()
    name, parameter = "visual.prompt_embeddings", model.visual.prompt_embeddings
    grad = parameter.grad
    parameter.grad = None
    got = model.cuda().encode_video(video.cuda())
    got.square().sum().backward()
    assert torch.cosine_similarity(got.cpu(), want, dim=-1).min() > 0.9999
    assert (
        torch.cosine_similarity(dict(model.named_parameters())[name].grad.cpu().flatten(), grad.flatten(), dim=0)
        > 0.999
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stop_model_in_half_precision(dtype):
    """Autocast: close to float32, the same bits from run to run, gradients finite."""
    model, video = stop_model()
    torch.use_deterministic_algorithms(False)
    model, video = model.cuda(), video.cuda()
    want = model.encode_video(video)
    found = []
    for _ in range(2):
        with torch.autocast("cuda", dtype):
            out = model.encode_video(video)
        out.float().square().sum().backward()
        found.append(out)
    assert torch.equal(*found)
    assert torch.cosine_similarity(found[0].float(), want, dim=-1).min() > 0.97
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "plane"),
    [(9, 16, (3, 11, 11), (224, 224)), (9, 1, (3, 15, 25), (49, 768))],
)
def test_fft_conv3d(channels, outputs, kernel, plane):
    """STOP's convolutions and their gradients: as exact as cuDNN's float32 without tf32, the same bits twice."""
    taps = channels * kernel[0] * kernel[1] * kernel[2]
    x = torch.randn(2, channels, 6, *plane, device="cuda", requires_grad=True)
    weight = (torch.randn(outputs, channels, *kernel, device="cuda") / taps**0.5).requires_grad_()
    bias = torch.randn(outputs, device="cuda", requires_grad=True)
    padding = [k // 2 for k in kernel]
    results = []
    for run, dtype in (
        (stk.fft_conv3d, torch.float32),
        (stk.fft_conv3d, torch.float32),
        (lambda *p: torch.nn.functional.conv3d(*p, padding=padding), torch.float64),
    ):
        leaves = [part.detach().to(dtype).requires_grad_() for part in (x, weight, bias)]
        y = run(*leaves)
        results.append((y.detach(), *torch.autograd.grad((y * y.detach().sin()).sum(), leaves)))
    for first, second, right in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert (first - right).abs().max() <= 1e-5 * right.abs().max()


def timm_model():
    from harness import libraries  # noqa: F401  (first of all that may import torchvision)

    vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = vit.VisionTransformer(embed_dim=192, depth=3, num_heads=3, num_classes=10)
    return stk.apply_tome_patch(model, 13), torch.randn(4, 3, 224, 224)


@pytest.mark.parametrize("name", ["timm", "STOP"])
def test_models_in_a_cuda_graph(name):
    """Captured in one line of torch's: the bits and the trace of eager calls for whatever is put in; another shape is
    refused, and the model itself stays as it was."""
    model, batch = timm_model() if name == "timm" else stop_model()
    stk.apply_tome_patch(model, 4, trace_source=True)
    model, first, second = model.cuda().eval(), batch[:1].cuda(), batch[1:2].cuda()
    call = model.forward if name == "timm" else model.encode_video
    found = []
    with torch.no_grad():
        for x in (first, second):
            found.append((x, call(x), stk.tome_trace(model).dest.clone()))
        graphed = torch.cuda.make_graphed_callables(call, (first.clone(),))
    for x, want, trace in (*found, found[0]):
        assert torch.equal(graphed(x), want)
        assert torch.equal(stk.tome_trace(model).dest, trace)
    with pytest.raises(RuntimeError, match="size"):
        graphed(first[..., :112])
    with torch.no_grad():
        assert torch.equal(call(second), found[1][1])
    stk.remove_tome_patch(model)


def test_stop_model_compiled():
    model, video = stop_model()
    torch.use_deterministic_algorithms(False)
    model, video = model.cuda(), video.cuda()
    torch._dynamo.reset()
    compiled = torch.compile(model.encode_video, fullgraph=True)
    want, got = model.encode_video(video), compiled(video)
    assert torch.cosine_similarity(got, want, dim=-1).min() > 0.999
    got.sum().backward()
