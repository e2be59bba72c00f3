# SPDX-License-Identifier: Apache-2.0
"""The dynamic prompts of STOP proper: the fast path against the published steps, in our model and in upstream's."""

import copy
import dataclasses
import io

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel, checkpoint
from stoptome_kernels.stop.temporal import TemporalPrompt
from stoptome_kernels.video.convolutions import FrequencyConv3d
from torch import nn

from harness.baselines import stop as upstream
from support import clip4clip

FRAMES = 3
MOST_TIES = 2  # cells of a video whose scores are as close as rounding


def prompts(fast: bool = True) -> TemporalPrompt:
    torch.manual_seed(0)
    return TemporalPrompt(fast).eval()


def inputs(videos: int = 1):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(videos, FRAMES, 3, 224, 224, generator=generator)
    return video, torch.randn(videos, FRAMES, 50, 768, generator=generator)


def published(net: TemporalPrompt) -> TemporalPrompt:
    """The same weights, and the steps of the publication one by one."""
    slow = copy.deepcopy(net)
    slow.fast = False
    return slow


def exact(net: TemporalPrompt) -> TemporalPrompt:
    """The published steps in float64, where conv3d takes minutes: by fft_conv3d, which has tests of its own."""
    slow = published(net).double()
    for part in (*slow.Conv, *slow.InterConv):
        part.fast = True
    assert not slow.fast
    return slow


@pytest.fixture(scope="module")
def both():
    """Frames, salient cells and prompts of the layers: fast, and by the published steps, in float64 too."""
    net = prompts()
    video, tokens = inputs(2)
    with torch.no_grad():
        found = [run(net, video, tokens) for net in (net, published(net))]
        right = run(exact(net), video.double(), tokens.double())
    return *found, right


def run(net, video, tokens):
    frames, salient = net(video)
    return frames, salient, net.between_frames(tokens, salient)


@pytest.mark.slow  # conv3d of whole frames
def test_salient_cells_are_the_same(both):
    """But for cells whose score is as far from the threshold as rounding reaches; there are few of them."""
    fast, slow, right = both
    net, (video, _) = prompts().double(), inputs(2)
    score = net.Cal_Net(video.double().transpose(1, 2)).squeeze(1)
    score = score.unflatten(3, (-1, 7)).unflatten(2, (-1, 7)).mean((2, 4))
    ordered = score.flatten(2).sort(2, descending=True).values
    gap = (score - ordered[:, :, 6, None, None]).abs()
    for salient in (fast[1], slow[1]):
        other = salient != right[1]
        assert other.sum() <= MOST_TIES
        assert (gap[other] < 1e-6).all()


@pytest.mark.slow  # conv3d of whole frames
def test_frames_and_prompts_are_the_same(both):
    fast, slow, right = both
    for place in (0, 2):
        size = right[place].abs().max()
        error, theirs = ((side[place] - right[place]).abs().max() / size for side in (fast, slow))
        assert error <= 2 * theirs + 1e-6


@pytest.mark.slow  # conv3d of whole frames
def test_gradients_are_the_same():
    """Of every parameter and of the tokens; without dropout, which draws other numbers."""
    net, (video, tokens) = prompts(), inputs()
    grads = []
    for one in (net, published(net), exact(net)):
        dtype = one.Cal_Net.weight.dtype
        leaf = tokens.to(dtype, copy=True).requires_grad_()
        frames, _, between = run(one, video.to(dtype), leaf)
        (frames.square().mean() + 1e3 * between.square().mean()).backward()
        grads.append({name: p.grad for name, p in one.named_parameters()} | {"tokens": leaf.grad})
    fast, slow, exactly = grads
    assert {name for name, grad in slow.items() if grad is None} == {"Cal_Net.weight", "Cal_Net.bias"}
    for name, right in exactly.items():
        if right is None:
            assert fast[name] is None
            continue
        error, theirs = ((side[name] - right).abs().max() / right.abs().max() for side in (fast, slow))
        assert error <= 2 * theirs + 2e-5, (name, error, theirs)


def test_other_sizes():
    """A grid of 5 × 5 patches of width 64: the same steps, six salient cells of each frame, prompts as asked for."""
    torch.manual_seed(0)
    net = TemporalPrompt(True, 5, 64, 2).eval()
    video, tokens = torch.randn(2, FRAMES, 3, 40, 40), torch.randn(2, FRAMES, 26, 64)
    with torch.no_grad():
        fast, slow = run(net, video, tokens), run(published(net), video, tokens)
    assert fast[2].shape == (2, FRAMES * 2, 64)
    assert fast[1].shape == (2, FRAMES, 5, 5)
    assert (fast[1].sum((2, 3)) == 6).all()
    assert torch.equal(fast[1], slow[1])
    for place in (0, 2):
        torch.testing.assert_close(fast[place], slow[place], atol=1e-6, rtol=1e-4)


def test_a_small_model_learns_them():
    """Every parameter but those of the threshold gets a gradient, and its checkpoint tells the sizes. A bias that all
    frames' scores have is lost where the smallest of them is subtracted."""
    torch.manual_seed(0)
    sizes = {"image_size": 40, "patch_size": 8, "width": 64, "frame_prompts": 2, "text_prompts": 4}
    model = StopModel(StopConfig(**PROPER | sizes))
    video = torch.randn(1, FRAMES, 3, 40, 40)
    model.encode_video(video).square().sum().backward()
    prompts = model.visual.TemporalPrompt.named_parameters()
    still = {name for name, p in prompts if p.grad is None or not p.grad.abs().sum() > 0}
    assert still - {"Cal_Net_Inter.bias"} == {"Cal_Net.weight", "Cal_Net.bias"}
    told = checkpoint.infer_config(model.state_dict(), frame_prompts=2, text_prompts=4, max_words=10)
    assert told == dataclasses.replace(model.config, prompt_layers=2)


def test_dropout_is_applied():
    net = prompts().train()
    video, _ = inputs()
    first, second = net(video).frames, net(video).frames
    assert not torch.equal(first, second)
    assert not torch.equal(first, net.eval()(video).frames)


@pytest.mark.parametrize("name", ["Conv.0", "MLP.0", "Cal_Net", "Cal_Net_Inter", "InterConv.0"])
def test_parts_with_hooks_are_called(name):
    """A hook on any part sees and changes what the part gives, as in the published steps."""
    net, (video, tokens) = prompts(), inputs()
    with torch.no_grad():
        before = run(net, video, tokens)
        net.get_submodule(name).register_forward_hook(lambda module, args, out: -out)
        found, want = run(net, video, tokens), run(published(net), video, tokens)
    assert any(not torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in zip(found, before, strict=True))
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got.float(), right.float(), atol=2e-5, rtol=1e-4)


def test_autocast_and_half():
    net, (video, tokens) = prompts(), inputs()
    with torch.no_grad():
        want = run(net, video, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(net, video, tokens)
        assert torch.equal(found[1], want[1])  # a decision, in float32
        torch.testing.assert_close(found[0].float(), want[0], atol=0.05, rtol=0.02)
        half = run(copy.deepcopy(net).bfloat16(), video.bfloat16(), tokens.bfloat16())
        plain = run(published(net).bfloat16(), video.bfloat16(), tokens.bfloat16())
    assert [part.dtype for part in half] == [part.dtype for part in plain]
    for got in (found[2], half[2]):
        torch.testing.assert_close(got.float(), want[2], atol=0.02 * want[2].abs().max().item(), rtol=0.05)
    torch.testing.assert_close(half[0].float(), want[0], atol=0.05, rtol=0.02)


def test_replaced_parts_are_called():
    """A linear layer of another class, as an adapter puts there, or one without bias, computes what it is."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    video, _ = inputs()
    for part in (Adapted(16, 16), nn.Linear(16, 16, bias=False)):
        net = prompts()
        net.MLP[0] = part
        with torch.no_grad():
            frames, want = net(video).frames, published(net)(video).frames
        torch.testing.assert_close(frames, want, atol=2e-5, rtol=1e-4)


def test_meta():
    """Shapes alone, as for a model that has no weights yet."""
    net = prompts().to("meta")
    frames, _ = net(torch.empty(1, FRAMES, 3, 224, 224, device="meta"))
    assert frames.shape == (1, FRAMES, 3, 224, 224)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("training", [False, True])
def test_one_graph(training):
    """Compiled without a break, and in inference exported; eager operations, since the graph is what may be wrong."""
    net, (video, tokens) = prompts(), inputs()
    with torch.set_grad_enabled(training):
        want = run(net, video, tokens)
        compiled = torch.compile(lambda *given: run(net, *given), fullgraph=True, backend="aot_eager")
        for got, right in zip(compiled(video, tokens), want, strict=True):
            torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-5)
    if not training:
        exported = torch.export.export(net, (video,))
        torch.testing.assert_close(exported.module()(video).frames, want[0], atol=1e-6, rtol=1e-5)


# -- the models -------------------------------------------------------------------------------------------------------

PROPER = {
    "layers": 2, "text_layers": 1, "frames": FRAMES, "vocab_size": 50, "context_length": 16, "max_words": 10,
    "text_width": 64, "text_heads": 1,
}  # fmt: skip


def test_a_flag_turns_it_off():
    torch.manual_seed(0)
    model = StopModel(StopConfig(**PROPER)).eval()
    slow = StopModel(StopConfig(**PROPER, fast_prompts=False)).eval()
    slow.load_state_dict(model.state_dict())
    assert model.visual.TemporalPrompt.fast
    assert not slow.visual.TemporalPrompt.fast
    video, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(video), slow.encode_video(video), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"fast_prompts is for upstream's STOP.*StopConfig\(fast_prompts=False\)"):
        stk.apply_tome_patch(model, 2, fast_prompts=False)


class UpstreamPrompt(nn.Module):
    """A temporal prompt as a user may have it: convolutions with the settings of upstream's, called as modules."""

    def __init__(self):
        super().__init__()
        self.Conv = nn.Sequential(nn.Conv3d(3, 9, (3, 11, 11), padding=(1, 5, 5)), nn.PReLU())
        self.last = nn.Conv3d(9, 3, (3, 11, 11), padding="same")
        self.small = nn.Conv3d(3, 3, 3, padding=1)
        self.strided = nn.Conv3d(3, 3, (3, 11, 11), padding=(1, 5, 5), stride=(1, 2, 2))
        self.mirrored = nn.Conv3d(3, 3, (3, 11, 11), padding=(1, 5, 5), padding_mode="circular")

    def forward(self, video):
        x = self.last(self.Conv(video))
        return x + self.small(x) + self.mirrored(x) + self.strided(x).mean()


FAST = ["TemporalPrompt.Conv.0", "TemporalPrompt.last"]


class Tower(upstream.StopTower):
    """Upstream's tower, which adds a temporal prompt to what it sees."""

    def __init__(self):
        super().__init__(64, 2, 16, 4, 2)
        self.TemporalPrompt = UpstreamPrompt()

    def forward(self, video, patches, prompts):
        return super().forward(patches + self.TemporalPrompt(video).mean(), prompts)


def tower():
    torch.manual_seed(0)
    return Tower().eval()


def tower_inputs():
    generator = torch.Generator().manual_seed(1)
    video, patches = torch.randn(1, 3, 4, 24, 24, generator=generator), torch.randn(4, 16, 64, generator=generator)
    return video, patches, torch.randn(2, 1, 8, 64, generator=generator)


def fast_parts(model):
    return [name for name, module in model.named_modules() if isinstance(module, FrequencyConv3d)]


def test_upstream_model():
    """Patched with tome_r > 0 the large convolutions that keep the size are fast, and compute the same."""
    model, (video, patches, prompts) = tower(), tower_inputs()
    with torch.no_grad():
        want = model.TemporalPrompt(video)
        stk.apply_tome_patch(model, 2)
        assert fast_parts(model) == FAST
        torch.testing.assert_close(model.TemporalPrompt(video), want, atol=1e-5, rtol=1e-5)
        merged = model(video, patches, prompts)
        stk.apply_tome_patch(model, 2, fast_prompts=False)
        assert fast_parts(model) == []
        assert torch.equal(model.TemporalPrompt(video), want)
        torch.testing.assert_close(model(video, patches, prompts), merged, atol=1e-5, rtol=1e-4)


def test_upstream_model_without_merging_is_bit_for_bit():
    model, given = tower(), tower_inputs()
    with torch.no_grad():
        want = model(*given)
        stk.apply_tome_patch(model, 2)
        assert not torch.equal(model.TemporalPrompt(given[0]), tower().TemporalPrompt(given[0]))
        stk.apply_tome_patch(model, 0)
        assert fast_parts(model) == []
        assert torch.equal(model(*given), want)
        stk.apply_tome_patch(model, 2)
        stk.remove_tome_patch(model)
        assert type(model.TemporalPrompt.last) is nn.Conv3d
        assert torch.equal(model(*given), want)


def test_upstream_parts_are_called():
    """Hooks of a convolution work as before; a forward that somebody put on one, or a class of one's own, stays."""
    model, (video, _, _) = tower(), tower_inputs()
    model.TemporalPrompt.last.forward = lambda x: x[:, :3] * 2
    calls = []
    model.TemporalPrompt.Conv[0].register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        want = model.TemporalPrompt(video)
        stk.apply_tome_patch(model, 2)
        assert fast_parts(model) == FAST[:1]
        torch.testing.assert_close(model.TemporalPrompt(video), want, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2

    class Own(nn.Conv3d):
        pass

    other = tower()
    other.TemporalPrompt.last = Own(9, 3, (3, 11, 11), padding=(1, 5, 5))
    stk.apply_tome_patch(other, 2)
    assert fast_parts(other) == FAST[:1]


def test_upstream_model_is_copied_and_saved():
    model, (video, _, _) = tower(), tower_inputs()
    stk.apply_tome_patch(model, 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        want = model.TemporalPrompt(video)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert fast_parts(other) == FAST
            assert torch.equal(other.TemporalPrompt(video), want)
    image = video[0]  # without a batch, as conv3d takes it
    assert model.TemporalPrompt.Conv[0](image).shape == (9, 4, 24, 24)


def test_a_convolution_that_was_changed_after_the_patch():
    """Its class can't be given back: nothing is changed, and the error says what to undo."""
    model = tower()
    stk.apply_tome_patch(model, 2)
    nn.utils.parametrizations.weight_norm(model.TemporalPrompt.last)
    with pytest.raises(RuntimeError, match="was given another class after it was patched"):
        stk.apply_tome_patch(model, 0)
    assert fast_parts(model) == FAST


def test_flag_is_a_bool_and_for_stop():
    with pytest.raises(TypeError, match="fast_prompts must be a bool, got int"):
        stk.apply_tome_patch(tower(), 2, fast_prompts=1)
    with pytest.raises(ValueError, match="fast_prompts is for upstream's STOP: leave it out"):
        stk.apply_tome_patch(clip4clip.Clip4ClipTower(64, 2, 16), 2, fast_prompts=False)
