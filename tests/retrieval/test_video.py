# SPDX-License-Identifier: Apache-2.0
"""Reading videos: which frames, how they are cut, and what becomes of files that are none."""

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retrieval import video as module
from retrieval.video import BrokenVideo, read_video, sample_indices

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


NEARLY_LOSSLESS = {
    "libx264": {"qp": "1", "preset": "veryfast", "x264-params": "bframes=3:b-adapt=0"},  # with frames out of order
    "libvpx": {"crf": "4", "b": "9M"},
    "mpeg4": {"qmin": "1", "qmax": "1"},
}
FILES = [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx"), ("ts", "libx264")]


def write(path, pictures, *, codec="libx264", rate=10, pix_fmt="yuv420p", options=None, turn=0, container=None):
    """A video of these pictures, (H, W, 3) uint8."""
    if options is None:
        options = NEARLY_LOSSLESS.get(codec, {})
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if turn:
            stream.set_display_rotation(turn)
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())
    return path


def numbered(count, height=32, width=48):
    """Pictures that tell their number: in units by the grey of the left half, in 40s by that of the right one."""
    pictures = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        pictures[i, :, : width // 2] = 10 + i % 40 * 6
        pictures[i, :, width // 2 :] = 10 + i // 40 * 6
    return [*pictures]


def numbers(frames):
    """The numbers of such pictures, of tensors (T, 3, S, S)."""
    side = frames.shape[-1]
    grey = frames.double().mean(1)[:, side // 2]
    units, forties = ((grey[:, place] - 10) / 6 for place in (side // 5, side * 4 // 5))
    return (units.round() + 40 * forties.round()).int().tolist()


def decoded_numbers(path):
    """The numbers of all pictures that can be decoded."""
    return numbers(torch.tensor(np.stack(decoded(path))[:, :, 8:40]).permute(0, 3, 1, 2))


def textured(height, width):
    """A picture with something to see at every place, smooth enough for a lossy codec."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + y / 11), np.sin(x / 5 - y / 9), np.cos(x / 13) * np.cos(y / 6)]
    return (np.stack(waves, -1) * 100 + 128).astype(np.uint8)


def decoded(path):
    """All pictures that can be decoded."""
    pictures = []
    with av.open(str(path)) as file:
        for packet in file.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                pictures += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    return pictures


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """100 frames, ten a second."""
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(100))


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


def sound(path, codec, cover=False):
    """A file of silence, perhaps with a picture on its cover."""
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream(codec, rate=16000)
        if cover:
            picture = out.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = int(av.stream.Disposition.attached_pic)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for i in range(10):
            frame.pts = i * 1024
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if cover:
            out.mux(picture.encode(av.VideoFrame.from_ndarray(textured(48, 64), "rgb24")))
            out.mux(picture.encode())
    return path


def broken(kind, folder):
    """A path that gives no frames, and read_video's options."""
    path = folder / "x.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "address":
        return "http://127.0.0.1:9/x.mp4", {}
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no video\n" * 50)
    elif kind == "sound":
        sound(path, "aac")
    elif kind == "cover":
        sound(path, "aac", cover=True)
    elif kind == "header only":  # every frame is promised, none is there
        write(path, numbered(30), container={"movflags": "faststart"})
        path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"mdat") + 8])
    elif kind == "no header":
        path.write_bytes(write(path, numbered(30)).read_bytes().partition(b"moov")[0][:-4])
    elif kind == "unknown codec":
        write(path, numbered(3))
        path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    elif kind == "no rate":
        path = write(folder / "x.mkv", numbered(2))
        default_duration = b"\x23\xe3\x83"
        assert path.read_bytes().count(default_duration) == 1
        path.write_bytes(path.read_bytes().replace(default_duration, b"\x23\xe3\x8f"))
        return path, {"span": (0, 1)}
    elif kind in ("after the end", "backwards"):
        return write(path, numbered(30)), {"span": (3.1, 9) if kind == "after the end" else (2, 1)}
    return path, {}


KINDS = {
    "missing": "no such file",
    "folder": "not a file",
    "pipe": "not a file",
    "address": "no such file",
    "empty": "the file is empty",
    "text": "Invalid data found when processing input",
    "sound": "no video stream",
    "cover": "no video stream",
    "header only": "no frame of it can be decoded",
    "no header": "Invalid data found when processing input",
    "unknown codec": "no decoder for its video",
    "no rate": "its frame rate is not known",
    "after the end": "no frame from 3.1 s to 9 s: 30 at 10 a second",
    "backwards": "no frame from 2 s to 1 s: 30 at 10 a second",
}


def open_files():
    return sorted(os.listdir("/proc/self/fd"))


@linux
@pytest.mark.parametrize("kind", KINDS)
def test_broken_videos(tmp_path, kind):
    path, options = broken(kind, tmp_path)
    before = open_files()
    with pytest.raises(BrokenVideo) as caught:
        read_video(path, 4, 32, **options)
    assert caught.value.reason == KINDS[kind]
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {KINDS[kind]}"
    assert open_files() == before  # while the exception and all it refers to are alive

    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason) == (caught.value.path, caught.value.reason)


@linux
def test_a_file_that_may_not_be_read(tmp_path, clip, monkeypatch):
    def refuse(*args, **options):
        raise av.error.PermissionError(13, "Permission denied", str(clip))

    monkeypatch.setattr(module.av, "open", refuse)
    with pytest.raises(BrokenVideo, match=r"Permission denied$"):
        read_video(clip, 4, 32)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # without an end: players wait for the next part
        ("live.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:2,\npart.ts\n"),
        ("whole.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\npart.ts\n#EXT-X-ENDLIST\n"),
        ("video.mp4", "ffconcat version 1.0\nfile part.ts\n"),
    ],
)
def test_a_playlist_is_no_video(tmp_path, monkeypatch, name, text):
    """What it shows is in other files, which whoever wrote it may not read."""
    write(tmp_path / "part.ts", numbered(20))
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    for _ in range(2):  # FFmpeg's message is the same, which PyAV would keep to itself
        with pytest.raises(BrokenVideo, match=r"a playlist, whose frames are in other files$"):
            read_video(tmp_path / name, 4, 32)


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\npart.ts\n#EXT-X-ENDLIST\n"
READ = """
import sys
from retrieval.video import *
for path in sys.argv[1:]:
    try:
        read_video(path, 4, 32)
    except BrokenVideo as error:
        print(error.reason)
"""


@linux
def test_files_that_a_playlist_names_are_not_opened(tmp_path):
    """A pipe that nobody writes to would never be open."""
    texts = {
        "a.mp4": "ffconcat version 1.0\nfile part.ts\n",
        "a.m3u8": HLS,
        "b.m3u8": HLS.replace("#EXT-X-ENDLIST\n", ""),
        "part.mp4": "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n"
        "timestamp: 00:00:00:000, filepos: 000000000\n",
    }
    for name in ("part.ts", "part.sub"):
        os.mkfifo(tmp_path / name)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", READ, *(str(tmp_path / name) for name in texts)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["a playlist, whose frames are in other files"] * len(texts), done.stderr


@pytest.mark.parametrize("muxer", ["mp4", "mov", "3gp", "asf", "ogg", "vob", "mpeg", "matroska", "flv", "h264"])
def test_containers_that_are_no_playlists_open(tmp_path, muxer):
    """By their content; FILES and others have the rest."""
    codec = {"asf": "wmv2", "ogg": "libvpx", "vob": "mpeg2video", "mpeg": "mpeg2video"}.get(muxer, "libx264")
    path = tmp_path / "a.bin"
    with av.open(str(path), "w", format=muxer) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for picture in numbered(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())
    assert read_video(path, 4, 32)[1] == 4


@pytest.mark.parametrize("name", ["a:b %03d?#.mp4", "ü 日本.mp4", "-x.mp4", os.fsdecode(b"\xff\xfe.mp4")])
def test_names_mean_nothing(tmp_path, clip, name, monkeypatch):
    try:
        (tmp_path / name).write_bytes(clip.read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    expected, _ = read_video(clip, 4, 32)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        assert torch.equal(read_video(path, 4, 32)[0], expected)


def test_tags_in_another_encoding(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "A TITLE"
        stream = out.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for picture in numbered(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())
    assert b"A TITLE" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"A TITLE", b"\xc9T\xc9 \xff\xfe!"))
    assert numbers(read_video(path, 5, 32)[0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("suffix", "codec"), FILES)
def test_damaged_files_give_frames_or_are_broken(tmp_path, suffix, codec):
    """Nothing else: no other exception, no end of the process."""
    whole = write(tmp_path / f"a.{suffix}", numbered(20), codec=codec).read_bytes()
    path = tmp_path / f"b.{suffix}"
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(len(data), size=rng.integers(0, 60)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            frames, real = read_video(path, 4, 32)
        except BrokenVideo:
            outcomes.add("broken")
        else:
            outcomes.add("frames")
            assert frames.shape == (4, 3, 32, 32)
            assert 1 <= real <= 4
    assert outcomes == {"frames", "broken"}


def resident():
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


def sized(folder, suffix):
    """200 × 100 pixels, 20 frames."""
    pictures = numbered(20, 100, 200)
    if suffix == "gif":
        images = [Image.fromarray(picture) for picture in pictures]
        images[0].save(folder / "a.gif", save_all=True, append_images=images[1:])
        return folder / "a.gif"
    codec = {"avi": "mpeg4", "webm": "libvpx", "mpg": "mpeg2video"}.get(suffix, "libx264")
    return write(folder / f"a.{suffix}", pictures, codec=codec, rate=25)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm", "ts", "flv", "mpg", "gif"])
def test_frames_of_too_many_pixels(tmp_path, suffix):
    path = sized(tmp_path, suffix)
    assert read_video(path, 4, 32, max_pixels=20_000)[1] == 4
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    for _ in range(2):
        with pytest.raises(BrokenVideo, match=r"it has frames of \d+ × \d+ pixels, more than --max_pixels 19999$"):
            read_video(path, 4, 32, max_pixels=19_999)
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
@pytest.mark.parametrize(("frames", "height", "width"), [(2, 100, 200), (9, 960, 1280)])
def test_frames_that_become_too_large_on_the_way(tmp_path, suffix, frames, height, width):
    """By little, which FFmpeg lets pass for the sake of edges, and by much."""
    codec = "libx264" if suffix == "ts" else "mpeg2video"
    small = write(tmp_path / f"a.{suffix}", numbered(20), codec=codec, rate=25).read_bytes()
    large = write(tmp_path / f"b.{suffix}", numbered(20, height, width), codec=codec, rate=25).read_bytes()
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(small + large)
    assert read_video(path, frames, 32)[0].shape == (frames, 3, 32, 32)
    with pytest.raises(BrokenVideo, match=rf"it has frames of {width} × {height} pixels, more than --max_pixels 9000$"):
        read_video(path, frames, 32, max_pixels=9000)


# the most memory since it began, less what it had then, in kB
USED = """
import sys
from retrieval.video import *
def read(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
torch.zeros(3), read_video(sys.argv[1], 2, 32, max_pixels=10**9)
for limit in (10**6, 10**8):
    open("/proc/self/clear_refs", "w").write("5")
    before, reason = read("VmRSS"), ""
    try:
        read_video(sys.argv[2], 2, 32, max_pixels=limit)
    except BrokenVideo as error:
        reason = error.reason
    print(read("VmHWM") - before, reason)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("kind", ["gif", "flv", "mp4", "later.ts"])
def test_frames_of_too_many_pixels_take_no_memory(tmp_path, clip, kind):
    """While the file is opened, too, when FFmpeg decodes some, and where they come later."""
    path = tmp_path / f"a.{kind}"
    if kind == "gif":
        Image.new("P", (6000, 4000)).save(path)
    else:
        write(path, [np.zeros((4000, 6000, 3), np.uint8)] * 2, options={"preset": "ultrafast"})
    if kind == "later.ts":
        small = write(tmp_path / "small.ts", numbered(2), rate=25).read_bytes()
        path.write_bytes(small + path.read_bytes())
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", USED, str(clip), str(path)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    (refused, _, reason), (taken, _, nothing) = (line.partition(" ") for line in done.stdout.splitlines())
    assert "--max_pixels 1000000" in reason
    assert nothing == ""
    assert int(taken) > 70_000  # of a frame as RGB alone
    assert int(refused) < 12_000


@linux
def test_many_reads_leave_nothing_behind(clip, tmp_path):
    bad, _ = broken("header only", tmp_path)

    def read(times):
        for _ in range(times):
            read_video(clip, 4, 32)
            with pytest.raises(BrokenVideo):
                read_video(bad, 4, 32)

    read(10)
    before, files = resident(), open_files()
    read(60)
    assert resident() - before < 12e6  # a container that stays open keeps 0.4 MB or more
    assert open_files() == files


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
