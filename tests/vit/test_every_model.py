# SPDX-License-Identifier: Apache-2.0
"""Token merging in the vision transformers of every library: what holds for all of them."""

import copy
import inspect
import pickle
from functools import partial

import onnxruntime
import pytest
import stoptome_kernels as stk
import torch
import torch._dynamo.testing
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from support.vit import Case, build, cases

CASES = list(cases())
# What is compiled or exported is the patched code of blocks, and pooling by sizes or by attention: a case for each
# class of blocks. Other cases differ in a block's options, or around it, and run in eager mode like these.
TRACED = [case if case.compiled else pytest.param(case, marks=pytest.mark.full) for case in CASES if case.traced]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def run(case: Case, model, inputs):
    return case.answer(model(*inputs))


def schedules(case: Case, model) -> list:
    layers = len(case.blocks(model))
    return [4, [0, 7], (6, -1.0), [3] * (layers - 1), 10_000]


def rates(case: Case, model, tome_r) -> tuple[int, ...]:
    return stk.tome.parse_r(tome_r, len(case.blocks(model)))


def test_r_0_changes_no_bit(case):
    model, inputs = build(case), case.inputs(2)
    before = run(case, model, inputs)
    assert torch.equal(run(case, stk.apply_tome_patch(model, 0), inputs), before)


def test_like_the_slow_way(case):
    model, inputs = build(case), case.inputs(2)
    plain = run(case, model, inputs)
    for tome_r in schedules(case, model):
        want = case.slow(model, inputs, rates(case, model, tome_r))
        got = run(case, stk.apply_tome_patch(model, tome_r), inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, plain, rtol=1e-3, atol=1e-3), "nothing was merged"
        stk.remove_tome_patch(model)


def test_gradients_like_the_slow_way(case):
    model, inputs = build(case).double(), tuple(x.double() for x in case.inputs(2))
    for tome_r in (5, [0, 9, 3]):
        want = case.slow(model, inputs, rates(case, model, tome_r))
        parameters = [p for p in model.parameters() if p.requires_grad]
        slow = torch.autograd.grad(want.sin().sum(), parameters, allow_unused=True)
        stk.apply_tome_patch(model, tome_r)
        fast = torch.autograd.grad(run(case, model, inputs).sin().sum(), parameters, allow_unused=True)
        stk.remove_tome_patch(model)
        for got, wanted in zip(fast, slow, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def gradients(case: Case, model, *batches) -> list:
    """Of one step over several forwards, all before the backward."""
    model.zero_grad()
    sum(run(case, model, inputs).sin().sum() for inputs in batches).backward()
    return [p.grad for p in model.parameters()]


def test_forwards_before_a_backward(case):
    """Nothing of one forward may reach another's backward."""
    model, first, second = stk.apply_tome_patch(build(case), 5), case.inputs(2), case.inputs(2)
    both = gradients(case, model, first, second)
    apart = [gradients(case, model, first), gradients(case, model, second)]
    for got, *parts in zip(both, *apart, strict=True):
        if got is not None:
            torch.testing.assert_close(got, sum(parts), rtol=1e-4, atol=1e-5)


def checkpointed(case: Case, model, use_reentrant: bool):
    """The model with every block checkpointed from outside, as FSDP's activation checkpointing does it."""

    def wrapped(forward):
        return lambda x, *args, **options: checkpoint(
            lambda *inner: forward(*inner, *args, **options), x, use_reentrant=use_reentrant
        )

    for block in case.blocks(model):
        block.forward = wrapped(block.forward)
    return model


def test_checkpointing_is_exact(case):
    model, batches = stk.apply_tome_patch(build(case), 5), (case.inputs(2), case.inputs(2))
    want = gradients(case, model, *batches)
    got = gradients(case, checkpointed(case, model, False), *batches)
    for ours, plain in zip(got, want, strict=True):
        assert plain is None or torch.equal(ours, plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, before us
def test_reentrant_checkpointing_is_refused(case):
    """It would silently give no gradients to what stands inside a tuple."""
    model = checkpointed(case, stk.apply_tome_patch(build(case), 5), True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(case, model, case.inputs(2))


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
def test_compiled(case):
    """One graph, for all batches: the first size is compiled as it is, the second for any."""
    torch._dynamo.reset()
    model = stk.apply_tome_patch(build(case), 5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 2, 3, 5):
            inputs = case.inputs(batch)
            torch.testing.assert_close(run(case, compiled, inputs), run(case, model, inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_for_any_size_at_once():
    """With dynamic=True numbers that modules hold, a scale for instance, are symbols too."""
    case = next(case for case in CASES if case.name == "transformers-vit")
    torch._dynamo.reset()
    model, inputs = stk.apply_tome_patch(build(case), 5), case.inputs(2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(run(case, compiled, inputs), run(case, model, inputs), rtol=1e-4, atol=1e-5)


def test_patched_under_autocast(case):
    """What a block computes is compared without it."""
    with torch.autocast("cpu", torch.bfloat16):
        stk.apply_tome_patch(build(case), 5)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
def test_exported(case):
    model, inputs = stk.apply_tome_patch(build(case), 5), case.inputs(2)
    program = torch.export.export(model, inputs)
    inputs = case.inputs(2)
    torch.testing.assert_close(run(case, program.module(), inputs), run(case, model, inputs), rtol=1e-4, atol=1e-5)


# the operators of a graph in ONNX are the same for all, but for what moves with the tokens: positions, padding, frames
CONVERTED = ("timm-avg", "timm-eva02", "torch-sequence-first-pre-norm", "transformers-siglip2-padded",
             "transformers-videomae")  # fmt: skip


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(
    "case",
    [case if case.name in CONVERTED else pytest.param(case, marks=pytest.mark.full) for case in CASES if case.traced],
    ids=lambda case: case.name,
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own exporter
def test_onnx(case, tmp_path, monkeypatch):
    """Without an operator of this package in it, and the same results from another runtime."""
    if "siglip2" in case.name:  # the library's own checks of the grid, which torch can't export to ONNX
        monkeypatch.setattr("transformers.models.siglip2.modeling_siglip2.torch_compilable_check", lambda *_: None)
    model, inputs = stk.apply_tome_patch(build(case), 5), case.inputs(2)
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert not any("stoptome" in node.domain for node in program.model.graph)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = case.inputs(2)
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    want = [out for out in tree_leaves(model(*inputs)) if isinstance(out, torch.Tensor)]
    got = [torch.from_numpy(out) for out in session.run(None, feed)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    """As near to float32 as the model that merges nothing."""
    model, inputs = build(case), case.inputs(2)

    def error() -> float:
        exact = run(case, model, inputs)
        with torch.autocast("cpu", dtype):
            got = run(case, model, inputs)
        # the median: rounding may choose other tokens, whose own rows are then far off where every token has one
        return ((got - exact).abs().median() / exact.abs().median()).item()

    plain = error()
    assert plain > 0
    stk.apply_tome_patch(model, [0, 5])
    assert error() < 4 * plain


def test_copies_and_files(case, tmp_path):
    model, inputs = build(case), case.inputs(2)
    keys = list(model.state_dict())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    stk.apply_tome_patch(model, 5, trace_source=True)
    want = run(case, model, inputs)
    assert list(model.state_dict()) == keys
    stk.tome_trace(model)
    torch.save(model, tmp_path / "model.pt")
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        with pytest.raises(RuntimeError, match="nothing to trace yet"):
            stk.tome_trace(copied)
        assert torch.equal(run(case, copied, inputs), want)
        stk.remove_tome_patch(copied)  # the copy alone
        assert not torch.equal(run(case, copied, inputs), want)
    assert torch.equal(run(case, model, inputs), want)
    other = stk.apply_tome_patch(build(case, seed=1), 5)
    other.load_state_dict(weights)
    assert torch.equal(run(case, other, inputs), want)


def test_taken_out_again(case):
    model, inputs = build(case), case.inputs(2)
    before = run(case, model, inputs)
    kinds = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    stk.apply_tome_patch(model, 5, trace_source=True)
    run(case, model, inputs)
    for name, module in model.named_modules():
        assert isinstance(module, kinds[name])
        assert type(module).__name__ == kinds[name].__name__
    stk.remove_tome_patch(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(run(case, model, inputs), before)


def test_signatures(case):
    """Programs that ask what a model, a block or a part may be given get the same answer."""
    model = build(case)

    def signatures():
        return {
            (name, method): inspect.signature(getattr(module, method))
            for name, module in model.named_modules()
            for method in ("forward", "forward_features", "forward_intermediates", "pool")
            if callable(getattr(module, method, None))
        }

    before = signatures()
    stk.apply_tome_patch(model, 5)
    assert signatures() == before


def test_new_settings(case):
    model, inputs = build(case), case.inputs(2)
    once = run(case, stk.apply_tome_patch(model, [0, 9]), inputs)
    stk.apply_tome_patch(model, 3, prop_attn=False, trace_source=True)
    assert not torch.equal(run(case, model, inputs), once)
    assert torch.equal(run(case, stk.apply_tome_patch(model, [0, 9]), inputs), once)


def test_sizes_count_in_attention(case):
    model, inputs = build(case), case.inputs(2)
    with_sizes = run(case, stk.apply_tome_patch(model, 8), inputs)
    assert not torch.equal(run(case, stk.apply_tome_patch(model, 8, prop_attn=False), inputs), with_sizes)


def test_trace(case):
    """The map of every layer: onto all tokens of the layer, protected ones to themselves, each finer than the next."""
    model = stk.apply_tome_patch(build(case), [0, 9, 4], trace_source=True)
    with pytest.raises(RuntimeError, match="nothing to trace yet"):
        stk.tome_trace(model)
    run(case, model, case.inputs(2))
    trace = stk.tome_trace(model)
    assert trace.protected == case.protected
    left = [case.tokens - 9 * (layer > 0) - 4 * (layer > 1) for layer in range(len(case.blocks(model)))]
    assert list(trace.tokens) == left
    coarser = torch.arange(case.tokens).repeat(2, 1, 1)
    for dest, tokens in zip(trace.layers, left, strict=True):
        assert dest.dtype == torch.int32
        assert dest.shape == (2, 1, case.tokens)
        for item in range(2):
            assert dest[item].unique().tolist() == list(range(tokens))
            pairs = torch.stack([coarser[item, 0], dest[item, 0]]).unique(dim=1)
            assert len(pairs[0].unique()) == pairs.shape[1]
        assert torch.equal(dest[..., : case.protected], coarser[..., : case.protected].int())
        coarser = dest
    stk.apply_tome_patch(model, 5)
    with pytest.raises(RuntimeError, match="trace_source=True"):
        stk.tome_trace(model)


def test_all_tokens_if_asked_for(case):
    """unmerge=True changes nothing of what the model answers."""
    model, inputs = build(case), case.inputs(2)
    want = run(case, stk.apply_tome_patch(model, 5), inputs)
    got = run(case, stk.apply_tome_patch(model, 5, unmerge=True), inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_refused(case):
    model = build(case)
    layers = len(case.blocks(model))
    for settings, says in (
        ({"tome_r": [1] * (layers + 1)}, f"there are {layers} layers"),
        ({"tome_r": -1}, "tome_r"),
        ({"tome_r": 1, "merge_layers": (1,), "merge_frame_nums": (2,), "merge_token_proportions": (5, 5)}, "no frames"),
        ({"tome_r": 1, "frames": 3}, "frames is for STOP"),
    ):
        with pytest.raises(ValueError, match=says):
            stk.apply_tome_patch(model, **settings)
    assert not any(hasattr(module, "tome") for module in model.modules())
    block = case.blocks(model)[-1]
    block.forward = partial(block.forward)
    with pytest.raises(RuntimeError, match="patch first"):
        stk.apply_tome_patch(model, 2)


def test_a_block_that_computes_something_else(case):
    """Is found out by trying it, and then nothing is patched."""
    model = build(case)
    block = case.blocks(model)[1]
    kind = type(block)
    block.__class__ = type(
        kind.__name__, (_Doubled, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    )
    with pytest.raises(ValueError, match=r"block 1, a .* computes something else"):
        stk.apply_tome_patch(model, 2)
    assert type(case.blocks(model)[0]) is kind
    assert not any(hasattr(module, "tome") for module in model.modules())


def test_a_block_made_of_other_parts(case):
    """As another version of its library may have it: no AttributeError from inside a forward; nothing is patched."""
    model = build(case)
    block = case.blocks(model)[0]
    kind = type(block)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    block.__class__ = type(kind.__name__, (_Elsewhere, kind), names)
    with pytest.raises(TypeError, match=r"block 0, a .* does not have the parts of its class"):
        stk.apply_tome_patch(model, 2)
    assert not any(hasattr(module, "tome") for module in model.modules())


class _Elsewhere:
    def forward(self, x, *args, **options):
        return x

    def __getattr__(self, name):
        if name in ("norm1", "ln_1", "layer_norm1", "layernorm_before"):
            raise AttributeError(f"no {name}")
        return super().__getattr__(name)


class _Doubled:
    def forward(self, *args, **options):
        return 2 * super().forward(*args, **options)
