# SPDX-License-Identifier: Apache-2.0
"""The parts of training in examples/stop_retrieval: samples, rates, gradients, the model around STOP's towers."""

import argparse
import itertools
import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stoptome_kernels.stop import StopConfig, StopModel
from torch.utils.data import DataLoader

from retrieval import loader as loading
from retrieval import options, synthetic
from retrieval.annotations import load
from retrieval.corpus import Split, Video
from retrieval.loader import Broken, TrainSampler, TrainSet, VideoSet, collate
from retrieval.model import Retrieval, parameter_groups
from retrieval.parallel import Processes
from retrieval.train import clip_gradients, rate
from retrieval.video import BrokenVideo
from support.retrieval import TINY


def one_of(rank: int, world: int) -> Processes:
    processes = Processes()
    processes.rank, processes.world = rank, world
    return processes


# -- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "batch", "parts", "world"), [(100, 4, 1, 3), (64, 8, 2, 2), (7, 7, 1, 1)])
def test_processes_share_the_batches_that_one_would_see(samples, batch, parts, world):
    one = TrainSampler(samples, batch * world, parts, 3, one_of(0, 1))
    many = [TrainSampler(samples, batch, parts, 3, one_of(rank, world)) for rank in range(world)]
    for epoch in (0, 1):
        for sampler in (one, *many):
            sampler.start(epoch)
        whole = list(one)
        assert len(whole) == len(one) == one.steps * parts
        shares = [list(sampler) for sampler in many]
        for n, together in enumerate(whole):
            assert {key for share in shares for key in share[n]} == set(together)
            assert all(len(share[n]) == batch for share in shares)
        seen = [key for together in whole for key in together]
        assert len(set(seen)) == len(seen)
    one.start(0)
    first = list(one)
    one.start(1)
    assert [n for b in first for _, n in b] != [n for b in one for _, n in b], "another order each epoch"


def test_a_sampler_goes_on_where_it_was():
    sampler = TrainSampler(40, 4, 2, 0, one_of(0, 1))
    sampler.start(2)
    whole = list(sampler)
    sampler.start(2, step=3)
    assert list(sampler) == whole[6:]
    assert len(sampler) == len(whole) - 6


class Read:
    """In place of a reader: a video's frames are filled with its number; ``bad`` ones are broken."""

    def __init__(self, bad=()):
        self.bad, self.drawn = bad, []

    def __call__(self, video, rng):
        if video.id in self.bad:
            raise BrokenVideo(video.path, "no frames")
        self.drawn.append(None if rng is None else int(rng.integers(1 << 30)))
        return torch.full((2, 3, 4, 4), int(video.id), dtype=torch.uint8), 1 + int(video.id) % 2

    def nothing(self):
        return torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


def small(captions=(2, 1, 3)) -> tuple[Split, torch.Tensor]:
    videos = tuple(Video(str(n), f"v{n}.mp4") for n in range(len(captions)))
    pairs = tuple((n, f"{n} {k}") for n, count in enumerate(captions) for k in range(count))
    return Split("train", videos, pairs), torch.arange(len(pairs))[:, None].int()


def test_a_video_comes_with_a_caption_of_its_own_by_lot():
    split, ids = small()
    data = TrainSet(split, ids, Read(), every_caption=False, seed=0)
    assert len(data) == 3
    allowed = {0: {0, 1}, 1: {2}, 2: {3, 4, 5}}
    for number, own in allowed.items():
        drawn = {int(data[epoch, number].ids) for epoch in range(60)}
        assert drawn == own


def test_every_caption_comes_with_its_video():
    split, ids = small()
    data = TrainSet(split, ids, Read(), every_caption=True, seed=0)
    assert [(int(data[0, n].frames[0, 0, 0, 0]), int(data[0, n].ids)) for n in range(len(data))] == [
        (0, 0), (0, 1), (1, 2), (2, 3), (2, 4), (2, 5)
    ]  # fmt: skip


def test_a_sample_depends_on_seed_epoch_and_number_alone():
    split, ids = small()
    drawn = {}
    for seed in (0, 1):
        for order in ([0, 1, 2], [2, 0, 1]):
            reader = Read()
            data = TrainSet(split, ids, reader, every_caption=False, seed=seed)
            for epoch in (0, 1):
                for number in order:
                    sample = data[epoch, number]
                    key = (seed, epoch, number)
                    value = (int(sample.ids), reader.drawn[-1])
                    assert drawn.setdefault(key, value) == value
    assert len({value[1] for value in drawn.values()}) == len(drawn)


def test_a_broken_video_is_replaced_and_reported_so_that_batches_keep_their_size():
    split, ids = small((1, 1, 1, 1))
    data = TrainSet(split, ids, Read(bad={"1"}), every_caption=False, seed=0)
    batch = collate([data[0, n] for n in range(4)])
    assert batch.video.shape[0] == 4
    assert ("v1.mp4", "no frames") in batch.broken
    assert batch.readable.all()
    assert batch.video[:, 0, 0, 0, 0].tolist() == batch.ids[:, 0].tolist(), "the caption is the replacement's"
    hopeless = TrainSet(split, ids, Read(bad={"0", "1", "2", "3"}), every_caption=False, seed=0)
    assert not collate([hopeless[0, 0]]).readable.any()


def test_evaluation_reads_every_video_once_in_order_without_lots():
    split, _ = small((1,) * 7)
    reader = Read(bad={"3"})
    loader = DataLoader(VideoSet(split.videos, reader), batch_size=3, collate_fn=collate)
    batches = list(loader)
    values = torch.cat([b.video[:, 0, 0, 0, 0] for b in batches]).tolist()
    assert values == [0, 1, 2, 0, 4, 5, 6]
    assert torch.cat([b.readable for b in batches]).tolist() == [True] * 3 + [False] + [True] * 3
    assert reader.drawn == [None] * 6
    assert batches[0].mask.tolist() == [[True, False], [True, True], [True, False]]


def test_cached_frames_are_those_of_the_file(tmp_path):
    """A video of three times as many frames as are taken: the very same, in evaluation and by lot; decoded once."""
    paths = synthetic.write(tmp_path / "set", train=2, val=2, frames=24)
    videos = load("msrvtt", *paths, want=("train",))["train"].videos
    args = argparse.Namespace(max_frames=8, slice_framepos=2, feature_framerate=1.0, max_pixels=10**6)
    plain, cached = loading._Reader(args, 64, 0), loading._Cached(args, 64, 0)
    for _ in range(2):
        for video in videos:
            for seed in (None, 0, 1):
                rngs = [None if seed is None else np.random.default_rng(seed) for _ in range(2)]
                frames, real = plain(video, rngs[0])
                again, real_again = cached(video, rngs[1])
                assert torch.equal(frames, again)
                assert real == real_again == 8
        for video in videos:  # the second time there are no files
            Path(video.path).unlink(missing_ok=True)
        plain = cached


def test_a_broken_file_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(loading.log, "warning", lambda text, *values: said.append(text % values))
    broken = Broken()
    batch = collate([VideoSet(small()[0].videos, Read(bad={"0"}))[0]])
    broken.note(batch)
    broken.note(batch)
    assert broken.say(Processes()) == 1
    assert said == ["skipped v0.mp4: no frames", "1 video could not be read and was skipped"]


def test_a_set_smaller_than_a_batch_is_one_batch():
    split, ids = small()
    args = argparse.Namespace(
        max_frames=2, slice_framepos=2, feature_framerate=1.0, expand_msrvtt_sentences=False, datatype="msrvtt",
        train_frame_order=0, seed=0, batch_size=32, gradient_accumulation_steps=4, num_thread_reader=0,
        cache_frames=False, max_pixels=10**6,
    )  # fmt: skip
    _, sampler = loading.train_loader(args, split, ids, 4, Processes())
    assert (sampler.batch, sampler.parts, sampler.steps) == (3, 1, 1)


def resident() -> int:
    """Bytes of this process and its workers, without what they share: batches on their way come and go."""
    pages = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        _, held, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        pages += held - shared
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read off Linux's /proc")
def test_memory_of_the_loader_is_flat_over_many_epochs(tmp_path):
    paths = synthetic.write(tmp_path / "set", train=16, val=2, size=128)
    split = load("msrvtt", *paths, want=("train",))["train"]
    args = options.complete(options.read([
        "--output_dir", "o", "--data_path", paths.data_path, "--features_path", paths.features_path, "--batch_size",
        "4", "--num_thread_reader", "1", "--max_frames", "12",
    ]))  # fmt: skip
    loader, sampler = loading.train_loader(args, split, torch.zeros(48, 8, dtype=torch.int32), 128, Processes())
    seen = []
    for epoch in range(48):
        sampler.start(epoch)
        for batch in loader:
            assert batch.video.shape == (4, 12, 3, 128, 128)
            seen.append(resident())
    # torch keeps up to 128 shared tensors, three a batch, before it lets go of the dead: flat means from there on, but
    # for the batches on their way
    size = batch.video.numel()
    grown = max(seen[144:]) - max(seen[96:144])
    assert grown < 12 * size, f"{grown / size:.0f} batches more after 48"


# -- the optimizer ----------------------------------------------------------------------------------------------------


def test_the_rate_rises_then_falls_as_half_a_cosine():
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rate(0, 1, 0.1) == 1
    assert rate(0, 10, 0) == 1


def test_gradients_are_clipped_as_torch_clips_them():
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (3, 1, 7)]
    for limit in (0.5, 100.0, math.inf):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        copies = [p.grad.clone() for p in parameters]
        total = clip_gradients(parameters, limit)
        for p, before in zip(parameters, copies, strict=True):
            torch.testing.assert_close(p.grad, before * min(1.0, limit / float(total)))


def tiny(precision="fp32", **changes) -> Retrieval:
    torch.manual_seed(0)
    return Retrieval(StopModel(StopConfig(**TINY | changes, frames=4, max_words=16, temporal_prompt="DGL")), precision)


def test_each_parameter_is_in_one_group():
    model = tiny()
    groups = parameter_groups(model, 1.0, 0.1, 0.2)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        added = any(part in name for part in ("rompt", "LoRA"))
        assert of[id(parameter)]["lr"] == (1.0 if added else 0.1), name
        assert of[id(parameter)]["weight_decay"] == (0.2 if parameter.dim() > 1 else 0), name


# -- the model --------------------------------------------------------------------------------------------------------


def batch(b=3, frames=4):
    ids = torch.zeros(b, 16, dtype=torch.int)
    ids[:, 0], ids[:, 1:3], ids[:, 3] = 49406, torch.randint(1, 1000, (b, 2)), 49407
    video = torch.randint(0, 256, (b, frames, 3, 32, 32), dtype=torch.uint8)
    return ids, video, torch.ones(b, frames, dtype=torch.bool)


def test_the_loss_is_symmetric_cross_entropy_of_scaled_cosines():
    model = tiny()
    ids, video, mask = batch()
    loss = model(ids, video, mask)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    text = model.clip.encode_text(ids)
    seen = model.clip.encode_video((video.float() / 255 - mean) / deviation)[:, 0]
    cosines = F.cosine_similarity(text[:, None], seen[None], dim=-1)
    log = [torch.log_softmax(cosines * math.e, d).diagonal().mean() for d in (0, 1)]
    torch.testing.assert_close(loss, -(log[0] + log[1]) / 2)


@pytest.mark.parametrize("output", ["global_prompt0", "average_frame_cls_token", "global-local-feature"])
def test_features_have_length_one(output):
    model = tiny(visual_output=output)
    ids, video, mask = batch()
    for features in (model.encode_text(ids), model.encode_video(video, mask)):
        assert features.shape == (3, 32)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_repeated_frames_don_t_count_where_frames_are_averaged_here():
    model = tiny(visual_output="global-local-feature").eval()
    _, video, mask = batch()
    whole = model.encode_video(video, mask)
    mask[1, 2:] = False
    with torch.no_grad():
        pixels = (video.float() / 255 - model.mean) / model.deviation
        seen = F.normalize(model.clip.encode_video(pixels), dim=-1)
        expected = F.normalize(seen[1, :3].sum(0), dim=0)
        part = model.encode_video(video, mask)
    torch.testing.assert_close(part[1], expected)
    torch.testing.assert_close(part[0], whole[0].detach())
    assert not torch.allclose(part[1], whole[1].detach(), atol=1e-3)


@pytest.mark.parametrize("precision", ["amp", "bf16"])
def test_lower_precision_is_near(precision):
    ids, video, mask = batch()
    exact, near = tiny()(ids, video, mask), tiny(precision)(ids, video, mask)
    assert near.dtype == torch.float32
    assert exact != near
    torch.testing.assert_close(near, exact, rtol=0.02, atol=0)


def test_logit_scale_stays_in_its_range():
    model = tiny()
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.1), (2.0, 2.0)):
        torch.nn.init.constant_(model.clip.logit_scale, value)
        model.clamp()
        assert float(model.clip.logit_scale.detach()) == pytest.approx(kept)
