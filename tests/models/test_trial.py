# SPDX-License-Identifier: Apache-2.0
"""Blocks of upstream's kind that compute something else, now or later, and what is no reason to refuse one."""

import threading

import pytest
import stoptome_kernels as stk
import torch
import torch.distributed as dist
from stoptome_kernels.patching import guards as parts
from stoptome_kernels.patching import trial as trials
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel

from harness.baselines import stop as upstream
from support import clip4clip
from support.families import families, get, norm, stop_model, stop_tower

READ = [family for family in families() if family.name in ("STOP, DGL", "CLIP4Clip", "TempMe", "StopModel")]
CLIP4CLIP = READ[1]


@pytest.fixture(params=READ, ids=lambda family: family.name)
def family(request):
    return request.param


# what is found when a model is patched


class Shifted(clip4clip.Clip4ClipBlock):
    """Gives part of each frame to the next one, which a single frame doesn't show."""

    def forward(self, given):
        x, frames = given
        if frames > 1:
            videos = x.unflatten(1, (-1, frames)).clone()
            videos[..., 1:, :8] = videos[..., :-1, :8]
            x = videos.flatten(1, 2)
        return super().forward((x, frames))


def test_work_across_frames_is_seen():
    model = clip4clip.Clip4ClipTower(64, 3, 12)
    for block in model.transformer.resblocks:
        block.__class__ = Shifted
    with pytest.raises(ValueError, match="computes something else"):
        stk.apply_tome_patch(model, 2)


class OtherScale(upstream.StopBlock):
    """Another factor in front of a branch that is zero when the model is made."""

    def forward(self, given):
        x, *rest = super().forward(given)
        return x + self.LoRA(x), *rest


def test_branches_that_add_nothing_yet_are_seen():
    model = stop_tower()
    for block in model.transformer.resblocks:
        block.__class__ = OtherScale
        nn.init.zeros_(block.LoRA[2].weight)
        nn.init.zeros_(block.LoRA[2].bias)
    with pytest.raises(ValueError, match="computes something else"):
        stk.apply_tome_patch(model, 2)


class Between(clip4clip.Clip4ClipTransformer):
    """Does something between two blocks."""

    def forward(self, x, video_frame=-1):
        for block in self.resblocks:
            x = block((x, video_frame))[0] + 1
        return x


class Prompted(upstream.StopTower):
    """Changes what comes out of the blocks."""

    def forward_deep_prompt(self, x, unified_visual_prompt):
        return 2 * super().forward_deep_prompt(x, unified_visual_prompt)


def test_loops_of_somebody_elses_are_seen():
    model = CLIP4CLIP.make()
    model.transformer.__class__ = Between
    with pytest.raises(ValueError, match="Between does more than call its blocks"):
        CLIP4CLIP.patch(model)
    assert not stk.is_patched(model)
    model = stop_tower()
    model.__class__ = Prompted
    with pytest.raises(ValueError, match="Prompted does more than call its blocks"):
        stk.apply_tome_patch(model, 2)
    assert not stk.is_patched(model)


def test_a_block_that_fails_by_itself():
    for family, error in ((READ[2], AttributeError), (CLIP4CLIP, KeyError)):

        def failing(self, *args, error=error, **options):
            raise error("x")

        model = family.make()
        for block in family.blocks(model):
            block.__class__ = type("Failing", (type(block),), {"forward": failing})
        with pytest.raises(ValueError, match="fails on random tokens without the patch"):
            family.patch(model)


def test_an_interrupt_leaves_nothing(monkeypatch):
    family = next(family for family in families() if family.name == "timm-avg")
    model = family.make()
    plain = family.run(model)
    with monkeypatch.context() as patched:
        patched.setattr(trials, "copy_without_hooks", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            family.patch(model)
    assert not stk.is_patched(model)
    assert torch.equal(family.run(model), plain)
    family.patch(model)


# what is no reason to refuse a model


@pytest.mark.parametrize("value", [float("nan"), 1e30, 0.0])
def test_weights_that_are_not_loaded_yet(family, value):
    model = family.make()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    family.patch(model)
    model.load_state_dict(state)
    assert torch.equal(family.run(model), family.run(family.patch(family.make())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype(family, dtype):
    assert stk.is_patched(family.patch(family.make().to(dtype)))


def test_weights_on_meta_or_fake(family):
    with torch.device("meta"):
        model = family.patch(family.make())
    state = family.make().state_dict()
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(family.run(model), family.run(family.patch(family.make())))
    with FakeTensorMode():
        assert stk.is_patched(family.patch(family.make()))


def test_weights_that_are_plain_tensors(family):
    """As replicas of DataParallel, and FSDP1, have them."""
    model = family.patch(family.make())
    with torch.no_grad():
        want = family.run(model)
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    delattr(module, name)
                    setattr(module, name, weight.detach().clone())
        torch.testing.assert_close(family.run(model), want, rtol=1e-5, atol=1e-5)  # memory may be aligned otherwise


@pytest.mark.filterwarnings("ignore:FSDP")  # one process shards nothing; there is a newer one
@pytest.mark.parametrize("family", [READ[0], READ[1]], ids=lambda family: family.name)
def test_fsdp1(family):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = family.patch(family.make())
        want = family.run(model)
        blocks = model.transformer.resblocks
        for name, block in list(blocks.named_children()):
            setattr(blocks, name, FullyShardedDataParallel(block, device_id=torch.device("cpu"), use_orig_params=True))
        torch.testing.assert_close(family.run(model), want)
    finally:
        dist.destroy_process_group()


def test_two_patches_at_once():
    """What the trial sets for the process is as before in the end."""
    models = [family.make() for family in READ * 2]
    threads = [
        threading.Thread(target=family.patch, args=(model,)) for family, model in zip(READ * 2, models, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(stk.is_patched, models))
    assert torch.backends.mha.get_fastpath_enabled()


def test_copies_do_not_share_weights():
    """Not of tensors that can't be copied by deepcopy, either."""
    linear = nn.Linear(2, 2)
    linear.lock, linear.table = threading.Lock(), {"lock": threading.Lock()}
    twin = parts.copy_without_hooks(linear)
    with torch.no_grad():
        twin.weight.fill_(7)
    assert isinstance(twin.weight, nn.Parameter)
    assert not (linear.weight == 7).any()


# what changes later


def changed_later(family, change, says: str) -> None:
    model = family.patch(family.make())
    change(family.block(model))
    with pytest.raises(RuntimeError, match=says):
        family.run(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("add_zero_attn", True), ("dropout", 0.5), ("batch_first", True), ("bias_k", nn.Parameter(torch.ones(1, 1, 64)))],
)
@pytest.mark.parametrize("family", [READ[0], READ[1], READ[3]], ids=lambda family: family.name)
def test_settings_of_attention(family, name, value):
    changed_later(family, lambda block: setattr(block.attn, name, value), f"has dropout.*{name}|{name}.*would have no")


@pytest.mark.parametrize("family", READ[:3], ids=lambda family: family.name)
def test_methods_and_masks_of_blocks(family):
    changed_later(
        family, lambda block: setattr(block, "attention", lambda x: x), r"was set on the block itself \(attention\)"
    )
    changed_later(family, lambda block: setattr(block, "attn_mask", torch.zeros(2, 2)), "attn_mask.*remove_tome_patch")


def test_hooks_on_the_sequence_of_blocks():
    model = CLIP4CLIP.patch(CLIP4CLIP.make())
    model.transformer.resblocks.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"resblocks of .* have hooks.*remove_tome_patch"):
        CLIP4CLIP.run(model)


class QuickGELU(nn.Module):
    """Another activation of the same name."""

    def forward(self, x):
        return 0.5 * x


def test_another_activation_of_the_same_name(family):
    model = family.patch(family.make())
    family.block(model).mlp.gelu = QuickGELU()
    want = family.make()
    family.block(want).mlp.gelu = nn.Identity()
    with torch.no_grad():
        family.block(want).mlp.c_proj.weight *= 0.5
    torch.testing.assert_close(family.run(model), family.run(family.patch(want)), rtol=1e-4, atol=1e-5)


class Scaled(nn.LayerNorm):
    """A norm that does more once it is told to."""

    scale = None

    def forward(self, x):
        return super().forward(x) if self.scale is None else super().forward(x) * self.scale


@pytest.mark.parametrize("family", READ[:3], ids=lambda family: family.name)
def test_a_norm_that_does_more_later(family):
    def made():
        model = family.make()
        old = get(norm(family.block(model)))
        new = Scaled(old.normalized_shape, old.eps)
        new.load_state_dict(old.state_dict())
        family.block(model).ln_2 = new.eval()
        return model

    model = family.patch(made())
    torch.testing.assert_close(family.run(model), family.run(family.patch(family.make())), rtol=1e-4, atol=1e-5)
    family.block(model).ln_2.scale = 0.5
    want = family.make()
    with torch.no_grad():
        family.block(want).ln_2.weight *= 0.5
        family.block(want).ln_2.bias *= 0.5
    torch.testing.assert_close(family.run(model), family.run(family.patch(want)), rtol=1e-4, atol=1e-5)


def test_text_blocks_read_weights_too():
    model = stop_model()
    model.transformer.resblocks[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"TextBlock.attn has hooks"):
        model.encode_text(torch.tensor([[48, 5, 49, 0]]))
