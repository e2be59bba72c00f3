# SPDX-License-Identifier: Apache-2.0
"""What else people do around a patch, in every family: the trial, threads, wrappers, removal, loops of their own."""

import copy
import gc
import random
import threading
from collections.abc import Callable
from functools import partial
from types import MethodType

import pytest
import stoptome_kernels as stk
import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from stoptome_kernels.tome.swap import Patched
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from support.situations import Family, Halved, attention, families, get, mlp_out, norm, scale
from support.vit import build, cases

FAMILIES = list(families())
READ_ATTENTION = ("STOP, DGL", "CLIP4Clip", "TempMe", "StopModel")
READ = [family for family in FAMILIES if family.layers]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


def tensors(given) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]


def same(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True))


# the trial leaves no trace


class Folding(nn.Linear):
    """As adapters do: ``eval()`` folds something into the weight, ``train()`` takes it out again."""

    folded = False

    def train(self, mode: bool = True):
        if mode == self.folded:
            self.weight.data += -1.0 if mode else 1.0
            self.folded = not mode
        return super().train(mode)


class Observer(nn.Module):
    """Counts calls in a buffer and in an attribute, and keeps what it saw; noise, too, in training."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.lock = [], threading.Lock()

    def forward(self, x):
        with self.lock:
            self.calls += 1
            self.seen.append(x)
        return self.inner(x) + (0.1 * torch.randn_like(x[..., :1]) if self.training else 0)


def folding(linear: nn.Linear) -> Folding:
    new = Folding(linear.in_features, linear.out_features, linear.bias is not None)
    new.load_state_dict(linear.state_dict())
    return new


def test_the_trial_leaves_no_trace(family):
    model, calls = family.make(), []
    for block in family.blocks(model):
        owner, name = mlp_out(block)
        setattr(owner, name, Observer(folding(getattr(owner, name))))
        for module in block.modules():
            module.register_forward_hook(lambda *_: calls.append(1))
            if family.name in READ_ATTENTION:  # which refuse hooks on their attention
                get(attention(block))._forward_hooks.clear()
                get(attention(block)).out_proj._forward_hooks.clear()
    get(norm(family.block(model))).train()  # modes of the user's own, part by part
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    rng = torch.get_rng_state(), random.getstate()
    family.patch(model)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert calls == []
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert same(model.state_dict(), state)
    assert not any(module.seen for module in model.modules() if isinstance(module, Observer))
    family.run(model)
    assert calls


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[-4]], ids=lambda family: family.name)  # both ways to try
def test_the_trial_frees_its_copies(family):
    model = family.make()
    gc.collect()
    before = sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())
    family.patch(model)
    gc.collect()
    assert sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects()) == before


def test_the_trial_of_what_can_not_be_copied():
    """Locks, in attributes and in hooks of every sort, are no reason to refuse a model."""
    family = FAMILIES[0]
    model, lock = family.make(), threading.Lock()
    block = family.block(model)
    block.mlp.lock, block.mlp.table = lock, {"lock": lock}
    block.register_state_dict_post_hook(partial(lambda _lock, *_: None, lock))
    block.register_load_state_dict_pre_hook(partial(lambda _lock, *_: None, lock))
    assert torch.equal(family.run(family.patch(model)), family.run(family.patch(family.make())))
    assert block.mlp.lock is lock


def test_the_trial_under_another_default_device():
    family = FAMILIES[0]
    model = family.make()
    with torch.device("meta"):
        family.patch(model)
    assert torch.equal(family.run(model), family.run(family.patch(family.make())))


def test_the_trial_calls_what_training_calls():
    """In inference torch reads the weights of a whole layer: adapters in it are none of that path's."""
    for name in ("torch-post-norm", "torch-pre-norm"):
        case = next(case for case in cases() if case.name == name)
        model, inputs = build(case), case.inputs(2)
        model.layers[1].linear1 = Observer(model.layers[1].linear1).eval()
        model.layers[1].linear1.in_features = 48
        with torch.no_grad():
            got = case.answer(stk.apply_tome_patch(model, 5)(*inputs))
            assert torch.equal(got, case.answer(stk.apply_tome_patch(build(case), 5)(*inputs)))
        model = build(case)
        model.layers[1]._sa_block = lambda x, *_, **__: 0 * x
        with pytest.raises(RuntimeError, match="_sa_block of its own"):
            stk.apply_tome_patch(model, 5)
    assert torch.backends.mha.get_fastpath_enabled()


class QuantizedLinear(nn.Linear):
    """Rounds what it gets to 8 bits a token, as dynamic quantisation does: a step more or less is rounding."""

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


def test_quantised_layers_are_no_other_computation(family):
    """One step of rounding is far more than float32 differs by."""
    model = family.make()
    for block in family.blocks(model):
        owner, name = mlp_out(block)
        new = QuantizedLinear(getattr(owner, name).in_features, getattr(owner, name).out_features)
        new.load_state_dict(getattr(owner, name).state_dict())
        setattr(owner, name, new)
    assert torch.isfinite(family.run(family.patch(model))).all()


# threads, and layers that are read


@pytest.mark.parametrize("family", READ, ids=lambda family: family.name)
def test_threads(family):
    """Layers of one image are read while another thread does the same, or asks for the answer alone."""
    model = family.patch(family.make())
    with torch.no_grad():
        layers, answer, wrong = family.layers(model), family.run(model), []
    start = threading.Barrier(3)

    def work(call: Callable, want) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(8):
                if not same(call(model), want):
                    wrong.append(call)

    threads = [
        threading.Thread(target=work, args=task) for task in [(family.layers, layers)] * 2 + [(family.run, answer)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch looks for tensors alone in what is given
@pytest.mark.parametrize("family", READ, ids=lambda family: family.name)
def test_layers_that_are_read_through_hooks(family):
    """A full backward hook wraps what a block gives once more, and sees its gradient."""
    model = family.patch(family.make())
    want, calls = family.layers(model), []
    plain = torch.autograd.grad(sum(x.double().sin().sum() for x in tensors(want)), weights(family, model))
    for block in family.blocks(model):
        block.register_full_backward_hook(lambda *_: calls.append(1))
    got = family.layers(model)
    assert same(got, want)
    grads = torch.autograd.grad(sum(x.double().sin().sum() for x in tensors(got)), weights(family, model))
    for one, other in zip(grads, plain, strict=True):
        torch.testing.assert_close(one, other)


def weights(family: Family, model) -> list[torch.Tensor]:
    return [p for p in family.blocks(model)[0].parameters() if p.requires_grad and p.dim() > 1]


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", READ, ids=lambda family: family.name)
def test_layers_that_are_read_from_sharded_blocks(family, mesh):
    model = family.patch(family.make())
    want = family.layers(model)
    for block in family.blocks(model):
        fully_shard(block, mesh=mesh)
    got = family.layers(model)
    assert same(got, want)
    sum(x.sin().sum() for x in tensors(got)).backward()


# removal, and patching again, around other libraries


def test_removal_around_accelerate(family):
    """Its hooks on blocks call the patched forward: refused. What it leaves when it goes is taken away."""
    model = family.make()
    with torch.no_grad():
        plain = family.run(model)
        merged = family.run(family.patch(model))
        for block in family.blocks(model):
            add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        assert torch.equal(family.run(model), merged)
        if any(isinstance(block, Patched) for block in family.blocks(model)):  # StopModel's need no other class
            with pytest.raises(RuntimeError, match=r"forward of its own after it was patched.*remove_hook_from_module"):
                stk.remove_tome_patch(model)
            assert torch.equal(family.run(model), merged)
        remove_hook_from_module(model, recurse=True)
        assert any("forward" in block.__dict__ for block in family.blocks(model))
        stk.remove_tome_patch(model)
        assert torch.equal(family.run(model), plain)
        assert torch.equal(family.run(family.patch(model)), merged)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda block: torch.compile(block, backend="eager")])
def test_removal_behind_wrappers(family, wrap):
    model = family.make()
    before = {id(module): type(module) for module in model.modules()}
    family.patch(model)
    blocks = family.blocks(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in blocks:
                module._modules[name] = wrap(child)
    assert stk.remove_tome_patch(model) is model
    assert all(type(module) is before[id(module)] for module in model.modules() if id(module) in before)
    assert not stk.is_patched(model)


def test_removal_of_nothing(family):
    model = family.make()
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    for untouched in (model, nn.Linear(2, 2)):
        assert stk.remove_tome_patch(untouched) is untouched
        assert not stk.is_patched(untouched)
    assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before


def test_a_forward_that_another_library_left(family):
    """A bound method of the block itself is no reason to refuse the model."""
    model = family.make()
    with torch.no_grad():
        want = family.run(family.patch(family.make()))
        for block in family.blocks(model):
            block.forward = block.forward
        assert torch.equal(family.run(family.patch(model)), want)


# loops of one's own, shared blocks


TIMM = [family for family in FAMILIES if family.name.startswith("timm")]


@pytest.mark.parametrize("family", TIMM, ids=lambda family: family.name)
def test_loops_over_blocks(family):
    model = family.patch(family.make())
    rope = [] if not hasattr(model, "rope") or model.rope is None else [model.rope.get_embed((8, 8))]
    if rope and rope[0].dim() == 3:
        rope = [rope[0][0]]
    x = torch.randn(2, model.pos_embed.shape[1] if model.pos_embed is not None else 64 + model.num_prefix_tokens, 48)
    says = r"got merged tokens \(Tokens\).*remove_tome_patch"
    tokens = model.blocks[1](model.blocks[0](x, *rope), *rope)
    for use in (
        nn.LayerNorm(48), nn.Linear(48, 2), torch.mean, lambda x: x + 1.0, lambda x: torch.ones(1) + x, lambda x: 2 * x,
        lambda x: x[:, 0], lambda x: x @ torch.ones(48),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=says):
            use(tokens)
    with pytest.raises(AttributeError, match=r"Tokens have no shape: merged tokens.*remove_tome_patch"):
        tokens.shape  # noqa: B018
    with pytest.raises(RuntimeError, match=r"block 2 got a plain tensor.*remove_tome_patch"):
        model.blocks[2](x, *rope)
    blocks = model.blocks
    for others in (blocks[:-1], nn.ModuleList([*blocks, copy.deepcopy(blocks[-1])])):
        model.blocks = others
        with pytest.raises(RuntimeError, match=r"but was patched with 4 and .*patch again"):
            family.run(model)


def test_blocks_of_two_models(family):
    model = family.make()
    other = nn.Sequential(*family.blocks(model))
    with pytest.warns(UserWarning, match=r"also in another module.*deepcopy"):
        family.patch(model)
    del other


def test_patched_blocks_in_another_model():
    family = TIMM[0]
    model, other = family.patch(family.make()), family.make()
    other.blocks = model.blocks
    with pytest.raises(ValueError, match=r"part of another model, which is patched already.*deepcopy"):
        family.patch(other)


# what attention is given, and what it is made of, after the patch


MULTIHEAD = [
    family for family in FAMILIES if isinstance(get(attention(family.block(family.make()))), nn.MultiheadAttention)
]
MULTIHEAD = [family for family in MULTIHEAD if family.name not in READ_ATTENTION]


def given_to(family: Family, change: Callable) -> Callable:
    """Give a call of a patched model whose second attention gets other arguments."""

    def call():
        model = family.patch(family.make())
        get(attention(family.block(model))).register_forward_pre_hook(change, with_kwargs=True)
        return family.run(model)

    return call


@pytest.mark.parametrize("family", MULTIHEAD, ids=lambda family: family.name)
def test_keys_and_values_of_something_else(family):
    """A hook may hand attention other keys and values than queries: without values only the bias is left."""
    without = given_to(family, lambda _m, args, options: ((args[0], args[1], args[2] * 0), options))()
    model = family.make()
    attn = get(attention(family.block(model)))
    with torch.no_grad():
        attn.in_proj_weight[2 * attn.embed_dim :] = 0
    torch.testing.assert_close(without, family.run(family.patch(model)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without, family.run(family.patch(family.make())), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"), [("key_padding_mask", torch.zeros(2, 65)), ("need_weights", True), ("is_causal", True)]
)
@pytest.mark.parametrize("family", MULTIHEAD, ids=lambda family: family.name)
def test_more_than_a_block_asks_of_its_attention(family, name, value):
    with pytest.raises(ValueError, match=f"got {name}, which merged tokens can't follow.*remove_tome_patch"):
        given_to(family, lambda _m, args, options: (args, options | {name: value}))()


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name[:4] in ("timm", "tran")], ids=lambda family: family.name
)
def test_causal_attention(family):
    with pytest.raises(ValueError, match=r"is_causal.*remove_tome_patch"):
        given_to(family, lambda _m, args, options: (args, options | {"is_causal": True}))()


@pytest.mark.parametrize("family", MULTIHEAD, ids=lambda family: family.name)
def test_keys_that_are_added_later(family):
    model = family.patch(family.make())
    get(attention(family.block(model))).add_zero_attn = True
    with pytest.raises(ValueError, match=r"add_zero_attn.*remove_tome_patch"):
        family.run(model)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_layer_norm_of_another_make(family, monkeypatch):
    """torch's own forward may be replaced for all norms at once, and weights be put in the place of parameters."""
    model = family.patch(family.make())
    plain = family.run(model)
    forward = nn.LayerNorm.forward
    kind = type(get(norm(family.block(model))))
    if kind is nn.LayerNorm or family.name in (
        "STOP, DGL",
        "CLIP4Clip",
        "TempMe",
    ):  # others have a forward of their own
        with monkeypatch.context() as patched:
            patched.setattr(nn.LayerNorm, "forward", lambda self, x: 0.5 * forward(self, x))
            got = family.run(model)
        model = family.make()
        for module in model.modules():
            if type(module) in (nn.LayerNorm, kind):
                module.weight.data *= 0.5
                module.bias.data *= 0.5
        torch.testing.assert_close(got, family.run(family.patch(model)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, plain, rtol=1e-3, atol=1e-4)
    model = family.patch(family.make())
    module = get(norm(family.block(model)))
    for name in ("weight", "bias"):
        stored = getattr(module, name).detach().as_subclass(Halved)
        delattr(module, name)
        setattr(module, name, stored)
    got = family.run(model)
    model = family.make()
    scale(get(norm(family.block(model))), 0.5)
    torch.testing.assert_close(got, family.run(family.patch(model)), rtol=1e-4, atol=1e-5)


# who reads the tower's tokens


def mean_of_an_encoder(tower, x):
    return tower.encoder(tower._process_input(x).repeat(1, 2, 1)[:, :65]).mean(1)


def mean_of_tokens(tower, x, *_, **__):
    return x.mean(1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "method", "reader"),
    [
        ("timm-res-post", "forward_head", mean_of_tokens),
        ("open_clip-clip", "_global_pool", lambda tower, x: (x.mean(1), x[:, 1:])),
        (
            "torchvision-vit",
            "forward",
            mean_of_an_encoder,
        ),
    ],
)
def test_readers_of_somebody_elses_on_the_model(name, method, reader, when):
    """Whatever is put on the tower may read all tokens: each has a row then."""
    family = next(family for family in FAMILIES if family.name == name)

    def put(model):
        tower = getattr(model, "visual", model)
        setattr(tower, method, MethodType(reader, tower))
        return model

    model = family.patch(put(family.make())) if when == "before" else put(family.patch(family.make()))
    want = put(family.make())
    stk.apply_tome_patch(want, 5, unmerge=True)
    torch.testing.assert_close(family.run(model), family.run(want))


def test_methods_of_blocks_that_are_replaced():
    for name, method in (("torch-sequence-first-pre-norm", "_sa_block"), ("open_clip-clip", "attention")):
        family = next(family for family in FAMILIES if family.name == name)
        model = family.patch(family.make())
        block = family.block(model)
        setattr(block, method, partial(getattr(block, method)))
        with pytest.raises(RuntimeError, match=rf"has a {method} of its own.*remove_tome_patch"):
            family.run(model)


@pytest.mark.parametrize("change", [lambda x: x.mul_(0.3), lambda x: None], ids=["in place", "not at all"])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", [f for f in READ if f.name.startswith("trans")], ids=lambda family: family.name)
def test_hidden_states_that_a_hook_changes(family, change, inference):
    """The next layer works on merged tokens: what is done to the recorded rows would be lost."""
    model = family.patch(family.make())
    with inference():
        want = family.layers(model)
        hook = family.block(model).register_forward_hook(lambda _m, _a, out: (change(out[0]), None)[1])
        if change(torch.zeros(1)) is None:
            assert same(family.layers(model), want)
        else:
            with pytest.raises(RuntimeError, match=r"a hook changed the hidden states.*remove_tome_patch"):
                family.layers(model)
        hook.remove()
        assert same(family.layers(model), want)


# what can't follow merging


@pytest.mark.parametrize("family", FAMILIES[:-1], ids=lambda family: family.name)  # StopModel's classes stay
def test_jit_script(family):
    model = family.patch(family.make())
    with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile.*remove_tome_patch"):
        torch.jit.script(model)


@pytest.mark.parametrize("family", TIMM[:1], ids=lambda family: family.name)
def test_fx(family):
    with pytest.raises(TypeError, match=r"torch.fx can't trace merging.*torch.export"):
        torch.fx.symbolic_trace(family.patch(family.make()))
