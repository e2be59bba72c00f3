# SPDX-License-Identifier: Apache-2.0
"""Reading videos: which frames, and how they are cut."""

import itertools
import os
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retrieval import video as module
from retrieval.video import read_video, sample_indices
from support import videos
from support.videos import FILES, decoded, decoded_numbers, linux, numbered, numbers, resident, textured, write

clip = pytest.fixture(scope="module")(videos.clip)


@pytest.mark.parametrize(
    ("count", "frames", "expected"),
    [
        (12, 3, [2, 6, 10]),
        (10, 5, [1, 3, 5, 7, 9]),
        (12, 5, [1, 3, 6, 8, 10]),
        (5, 5, [0, 1, 2, 3, 4]),
        (6, 5, [0, 1, 3, 4, 5]),
        (3, 5, [0, 1, 2, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
    ],
)
def test_evaluation_takes_middles(count, frames, expected):
    assert sample_indices(count, frames, None).tolist() == expected


@given(st.integers(1, 5000), st.integers(1, 100), st.integers(0, 2**32))
def test_training_draws_one_frame_of_each_segment(count, frames, seed):
    chosen = sample_indices(count, frames, np.random.default_rng(seed))
    if count <= frames:
        assert chosen.tolist() == [min(i, count - 1) for i in range(frames)]
    else:
        assert (chosen // (count // frames)).tolist() == [*range(frames)]


def test_training_draws_every_frame_of_a_segment():
    draws = np.stack([sample_indices(39, 10, np.random.default_rng(seed)) for seed in range(99)])
    for segment in range(10):
        assert set(draws[:, segment].tolist()) == {3 * segment, 3 * segment + 1, 3 * segment + 2}
    assert len({tuple(draw) for draw in draws.tolist()}) == 99


@pytest.mark.parametrize(("count", "frames"), [(0, 4), (4, 0), (-1, 4)])
def test_nothing_to_choose_from(count, frames):
    with pytest.raises(ValueError, match=f"must be 1 or more, got {count} and {frames}"):
        sample_indices(count, frames, None)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx"), ("ts", "libx264")],
)
@pytest.mark.parametrize("count", [1, 3, 7, 33])
def test_the_frames_that_were_chosen_are_read(tmp_path, suffix, codec, count):
    path = write(tmp_path / f"a.{suffix}", numbered(count), codec=codec)
    frames, real = read_video(path, 5, 32)
    assert frames.shape == (5, 3, 32, 32)
    assert frames.dtype == torch.uint8
    assert numbers(frames) == sample_indices(count, 5, None).tolist()
    assert real == min(count, 5)


def test_training_follows_the_generator(clip):
    taken = [numbers(read_video(clip, 8, 32, rng=np.random.default_rng(seed))[0]) for seed in (1, 1, 2)]
    assert taken[0] == taken[1] == sample_indices(100, 8, np.random.default_rng(1)).tolist()
    assert taken[2] == sample_indices(100, 8, np.random.default_rng(2)).tolist()
    assert taken[0] != taken[2]


@pytest.mark.parametrize(
    ("span", "first", "last"),
    [
        ((0, 31), 0, 99),
        ((2, 4), 20, 40),
        ((2.45, 2.65), 24, 26),
        ((-5, 1), 0, 10),
        ((9, float("inf")), 90, 99),
        ((3, 3), 30, 30),
    ],
)
def test_span(clip, span, first, last):
    frames, real = read_video(clip, 4, 32, span=span)
    count = last - first + 1
    assert numbers(frames) == [first + i for i in sample_indices(count, 4, None)]
    assert real == min(count, 4)


@pytest.mark.parametrize(
    ("slice_framepos", "feature_framerate", "span", "frames", "expected"),
    [
        (0, 2, None, 4, [0, 5, 10, 15]),
        (1, 2, None, 4, [80, 85, 90, 95]),
        (0, 3, None, 5, [0, 3, 6, 10, 13]),  # nearest below 0, 3.33, 6.67, …
        (1, 0.5, None, 3, [40, 60, 80]),
        (0, 1, (2.5, 4.5), 3, [25, 35, 45]),
        (1, 10, None, 3, [97, 98, 99]),
        (0, 25, None, 3, [0, 1, 2]),  # more than there are: all of them
        (0, 1, None, 12, [*range(0, 100, 10), 90, 90]),
        (1, 1, None, 12, [*range(0, 100, 10), 90, 90]),
        (0, 0.01, None, 2, [0, 0]),
    ],
)
def test_first_and_last_frames_at_a_rate(clip, slice_framepos, feature_framerate, span, frames, expected):
    taken, real = read_video(
        clip, frames, 32, slice_framepos=slice_framepos, feature_framerate=feature_framerate, span=span
    )
    assert numbers(taken) == expected
    assert real == len(set(expected))


def test_rounding_does_not_lead_out_of_a_video(tmp_path):
    """22 · 7.3 / 2.2 is 73, and a little less or more in floating point; frame 73 is not there."""
    path = write(tmp_path / "a.mp4", numbered(73), rate=Fraction(73, 10))
    frames, _ = read_video(path, 2, 32, slice_framepos=1, feature_framerate=2.2)
    assert numbers(frames)[1] == 72


def test_spread_frames_have_no_rate(clip):
    one, other = (read_video(clip, 5, 32, feature_framerate=rate)[0] for rate in (1, 4))
    assert torch.equal(one, other)


def test_order(clip, tmp_path):
    plain = numbers(read_video(clip, 6, 32)[0])
    assert numbers(read_video(clip, 6, 32, order=1)[0]) == plain[::-1]
    rng = np.random.default_rng(3)
    shuffled = numbers(read_video(clip, 6, 32, order=2, slice_framepos=0, rng=rng)[0])
    assert shuffled == np.random.default_rng(3).permutation([0, 10, 20, 30, 40, 50]).tolist()

    # without a generator by the name: in every process, and wherever the file lies
    always = np.random.default_rng(zlib.crc32(b"clip.mp4")).permutation(plain).tolist()
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    for path in (clip, clip, tmp_path / "clip.mp4"):
        assert numbers(read_video(path, 6, 32, order=2)[0]) == always
    other = (tmp_path / "clip.mp4").rename(tmp_path / "other.mp4")
    assert numbers(read_video(other, 6, 32, order=2)[0]) != always


def test_repetitions_stay_at_the_end(tmp_path):
    """The mask is made of a number: real frames come first, whatever the order."""
    path = write(tmp_path / "short.mp4", numbered(3))
    reversed_, real = read_video(path, 5, 32, order=1)
    assert (numbers(reversed_), real) == ([2, 1, 0, 0, 0], 3)
    for seed in range(5):
        shuffled, real = read_video(path, 5, 32, order=2, rng=np.random.default_rng(seed))
        assert sorted(numbers(shuffled)[:3]) == [0, 1, 2]
        assert real == 3
        assert torch.equal(shuffled[3:], shuffled[2].expand(2, -1, -1, -1))


@pytest.mark.parametrize("options", [{"slice_framepos": 3}, {"order": -1}])
def test_flags_of_no_meaning(clip, options):
    with pytest.raises(ValueError, match="must be 0, 1 or 2"):
        read_video(clip, 4, 32, **options)


@pytest.mark.parametrize(
    ("height", "width"), [(96, 160), (160, 96), (97, 161), (131, 99), (96, 97), (20, 33), (33, 20), (48, 480), (64, 64)]
)
def test_short_side_resized_and_centre_cut_out(tmp_path, height, width):
    """As CLIP's transform does it, which resizes all of the picture by Pillow."""
    size = 48
    path = write(tmp_path / "a.mp4", [textured(height, width)], pix_fmt="yuv444p")
    (picture,) = decoded(path)
    scale = size / min(height, width)
    whole = Image.fromarray(picture).resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), Image.BICUBIC)
    left, top = round((whole.width - size) / 2), round((whole.height - size) / 2)
    expected = np.array(whole.crop((left, top, left + size, top + size)), np.int16)
    frames, _ = read_video(path, 1, size)
    assert np.abs(frames[0].permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize(("height", "width", "top", "left"), [(48, 48, 0, 0), (48, 61, 0, 6), (75, 48, 14, 0)])
def test_a_frame_of_the_right_size_is_only_cut(tmp_path, height, width, top, left):
    path = write(tmp_path / "a.mp4", [textured(height, width)], pix_fmt="yuv444p")
    frames, _ = read_video(path, 1, 48)
    expected = decoded(path)[0][top : top + 48, left : left + 48]
    assert np.array_equal(frames[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV can't write such a file")
@pytest.mark.parametrize("turn", [90, -90, 180])
def test_frames_are_turned_as_the_file_says(tmp_path, turn):
    picture = textured(48, 64)
    picture[:, 60:] = 255  # one side unlike the others
    upright = decoded(write(tmp_path / "a.mp4", [picture]))[0]
    frames, _ = read_video(write(tmp_path / "b.mp4", [picture], turn=turn), 1, 48)
    turned = np.rot90(upright, turn // 90)  # counter-clockwise
    top, left = (turned.shape[0] - 48) // 2, (turned.shape[1] - 48) // 2
    assert np.array_equal(frames[0].permute(1, 2, 0).numpy(), turned[top : top + 48, left : left + 48])


def test_one_size_after_the_other(tmp_path):
    """An mpeg stream may change its size on the way."""
    for name, height in (("a", 32), ("b", 64)):
        write(tmp_path / f"{name}.ts", numbered(6, height, height * 3 // 2))
    both = tmp_path / "both.ts"
    both.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    assert numbers(read_video(both, 12, 32)[0]) == [*range(6), *range(6)]


def cut(path, share):
    """The file's beginning."""
    whole = path.read_bytes()
    short = path.with_name(f"cut{path.suffix}")
    short.write_bytes(whole[: int(len(whole) * share)])
    return short


@pytest.mark.parametrize(("suffix", "codec"), FILES[:4])
@pytest.mark.parametrize("slice_framepos", [1, 2])
def test_of_a_file_that_breaks_off_the_rest_is_sampled(tmp_path, suffix, codec, slice_framepos):
    container = {"movflags": "faststart"} if suffix == "mp4" else {}  # what it promises stands at the beginning
    path = write(tmp_path / f"a.{suffix}", numbered(100), codec=codec, container=container)
    short = cut(path, 0.6)
    there = decoded_numbers(short)  # a frame that others need may be there, and those before it not
    assert 5 < len(there) < 95
    chosen = sample_indices(len(there), 4, None) if slice_framepos == 2 else np.arange(len(there))[-4:]
    frames, real = read_video(short, 4, 32, slice_framepos=slice_framepos, feature_framerate=10)
    assert numbers(frames) == [there[i] for i in chosen]
    assert real == 4


def test_training_draws_again_where_a_file_breaks_off(tmp_path):
    short = cut(write(tmp_path / "a.mp4", numbered(100), container={"movflags": "faststart"}), 0.6)
    there = decoded_numbers(short)
    for seed in range(4):
        frames, _ = read_video(short, 4, 32, rng=np.random.default_rng(seed))
        assert [there.index(number) // (len(there) // 4) for number in numbers(frames)] == [0, 1, 2, 3]
        assert torch.equal(frames, read_video(short, 4, 32, rng=np.random.default_rng(seed))[0])


def test_a_damaged_place_is_passed_over(tmp_path):
    path = write(tmp_path / "a.avi", numbered(40), codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][20]
    data = bytearray(path.read_bytes())
    data[packet.pos + 20 : packet.pos + packet.size] = bytes(packet.size - 20)
    path.write_bytes(data)
    frames, real = read_video(path, 39, 32)
    assert (numbers(frames), real) == ([i for i in range(40) if i != 20], 39)


@pytest.mark.parametrize("error", [av.error.OSError(5, "Input/output error"), IndexError("list index out of range")])
def test_reading_fails_on_the_way(tmp_path, monkeypatch, error):
    """A disk that gives up, or PyAV over a stream that turned up late: what was read before counts."""
    path = write(tmp_path / "a.mp4", numbered(40))
    opened = av.open

    class Failing:
        def __init__(self, *args, **options):
            self.container = opened(*args, **options)
            self.streams = self.container.streams

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def demux(self, stream):
            yield from itertools.islice(self.container.demux(stream), 21)
            raise error

    monkeypatch.setattr(module.av, "open", Failing)
    frames, real = read_video(path, 30, 32)
    assert (numbers(frames)[:real], real) == ([*range(21)], 21)


@pytest.mark.slow
@linux
def test_frames_that_are_not_wanted_are_not_held(tmp_path, monkeypatch):
    """120 frames of 1280 × 720 are 166 MB, or 332 MB as RGB."""
    path = write(tmp_path / "a.mp4", numbered(120, 720, 1280), options={"preset": "ultrafast"})
    read_video(path, 1, 32, slice_framepos=0)  # what is loaded once
    held = []
    square = module._square

    def spy(frame, size):
        held.append(resident() - before)
        return square(frame, size)

    monkeypatch.setattr(module, "_square", spy)
    before = resident()
    read_video(path, 2, 32, slice_framepos=1, feature_framerate=10)
    assert len(held) == 2
    assert held[1] < 80e6


@linux
def test_one_thread(clip, monkeypatch):
    def threads():
        return len(os.listdir("/proc/self/task"))

    running = []
    square = module._square

    def spy(frame, size):
        image = square(frame, size)
        running.append(threads())
        return image

    monkeypatch.setattr(module, "_square", spy)
    before = threads()
    read_video(clip, 4, 32)
    assert set(running) == {before}
