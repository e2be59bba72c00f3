# SPDX-License-Identifier: Apache-2.0
"""Frames are those that the ffmpeg program shows, whatever the file's header says of them."""

import io
import math
import struct
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from retrieval import video as module
from retrieval.video import BrokenVideo, read_video, sample_indices
from support.videos import NEARLY_LOSSLESS, numbered, numbers, textured, write

FFMPEG = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()


def ffmpeg(*arguments):
    """Run it, and return what it writes to its output."""
    command = [FFMPEG, "-nostdin", "-v", "error", "-y", "-threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout


def shown(path):
    """All frames of a file, each (H, W, 3), or none if it can't be read."""
    try:
        data = io.BytesIO(ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-"))
    except subprocess.CalledProcessError:
        return []
    pictures = []
    while data.readline() == b"P6\n":
        width, height = map(int, data.readline().split())
        assert data.readline() == b"255\n"
        pictures.append(np.frombuffer(data.read(width * height * 3), np.uint8).reshape(height, width, 3))
    return pictures


def shown_numbers(path):
    """The numbers of all frames of a file of 32 × 48 pixels."""
    return numbers(torch.tensor(np.stack(shown(path))[:, :, 8:40]).permute(0, 3, 1, 2))


def closed_gop(**more):
    """Options that give groups of 20 frames, with frames out of order."""
    options = NEARLY_LOSSLESS["libx264"] | {"g": "20"}
    return options | {"x264-params": ":".join([options["x264-params"], *(f"{k}={v}" for k, v in more.items())])}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder of closed.mp4, open.mp4 (whose groups need frames of the one before) and refresh.mp4 (one key frame)."""
    folder = tmp_path_factory.mktemp("sources")
    for name, options in {"closed": {}, "open": {"open-gop": 1}, "refresh": {"intra-refresh": 1}}.items():
        write(folder / f"{name}.mp4", numbered(100), options=closed_gop(**options))
    return folder


@pytest.fixture
def passes(monkeypatch):
    """How many frames each pass of decoding took."""
    taken = []
    frames = module._frames

    def spy(*arguments):
        taken.append(0)
        for frame in frames(*arguments):
            taken[-1] += 1
            yield frame

    monkeypatch.setattr(module, "_frames", spy)
    return taken


def check(path):
    """Compare all frames, and the chosen ones, with what ffmpeg shows; return their number."""
    if not shown(path):
        with pytest.raises(BrokenVideo):
            read_video(path, 4, 32)
        return 0
    expected = shown_numbers(path)
    frames, real = read_video(path, 120, 32)
    assert numbers(frames)[:real] == expected
    assert numbers(read_video(path, 4, 32)[0]) == [expected[i] for i in sample_indices(len(expected), 4, None)]
    return len(expected)


FRAGMENTS = ("-movflags", "frag_keyframe")
REMUXED = {
    "fragments.mp4": FRAGMENTS,
    "fragments only.mp4": ("-movflags", "frag_keyframe+empty_moov"),
    "beginning.mp4": ("-itsoffset", "1.5"),
    "nothing cut.mp4": ("-use_editlist", "0"),
    "same.mkv": (),
    "same.ts": (),
    "same.flv": (),
}
CUT_OUT = {"cut out.mp4": (), "cut out.mkv": (), "cut out.ts": (), "cut out fragments.mp4": FRAGMENTS}


@pytest.mark.parametrize("name", REMUXED)
def test_remuxed(tmp_path, sources, name):
    path = tmp_path / name
    before = REMUXED[name] if "-itsoffset" in REMUXED[name] else ()
    after = () if before else REMUXED[name]
    ffmpeg(*before, "-i", sources / "closed.mp4", "-c", "copy", *after, path)
    assert check(path) == 100


@pytest.mark.parametrize("name", CUT_OUT)
@pytest.mark.parametrize("source", ["closed", "open", "refresh"])
def test_cut_out_without_encoding(tmp_path, sources, source, name):
    """In an mp4 file the frames from the key frame to the place are there, and an edit list leaves them out."""
    path = tmp_path / name
    ffmpeg("-ss", "3.3", "-t", "4", "-i", sources / f"{source}.mp4", "-c", "copy", *CUT_OUT[name], path)
    count = check(path)
    assert 25 <= count < 70 or (name.endswith("ts") and count == 0)
    if name == "cut out.mp4":
        with av.open(str(path)) as file:
            assert file.streams.video[0].frames > count + 10


@pytest.mark.parametrize("cut", [(), ("-ss", "3.3")])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "fragments.mp4"])
def test_undamaged_files_are_decoded_once(tmp_path, sources, passes, name, cut):
    path = tmp_path / name
    ffmpeg(*cut, "-i", sources / "closed.mp4", "-c", "copy", *(FRAGMENTS if "fragments" in name else ()), path)
    read_video(path, 4, 32)
    assert passes == [len(shown(path))]


@pytest.mark.parametrize("suffix", ["mp4", "fragments.mp4", "mkv", "ts", "flv"])
@pytest.mark.parametrize("source", ["closed", "open", "refresh"])
def test_breaking_off(tmp_path, sources, source, suffix):
    whole = tmp_path / f"whole.{suffix}"
    flags = {"mp4": "faststart", "fragments.mp4": "frag_keyframe"}.get(suffix)
    ffmpeg("-i", sources / f"{source}.mp4", "-c", "copy", *(("-movflags", flags) if flags else ()), whole)
    data, counts = whole.read_bytes(), []
    for share in (0.85, 0.99):
        path = tmp_path / f"part.{suffix}"
        path.write_bytes(data[: int(len(data) * share)])
        counts.append(check(path))
    assert counts[0] < counts[1] <= 100


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "fragments.mp4"])
def test_variable_frame_rate(tmp_path, sources, suffix):
    """Frames are counted, not seconds."""
    path = tmp_path / f"a.{suffix}"
    flags = FRAGMENTS if "fragments" in suffix else ()
    select = "select=lt(mod(n\\,7)\\,3)"
    ffmpeg("-i", sources / "closed.mp4", "-vf", select, "-fps_mode", "vfr", "-qp", "1", "-g", "10", *flags, path)
    assert check(path) == 44


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.ts", ("-c:v", "libx264", "-qp", "1", "-flags", "+ildct+ilme")),  # interlaced
        ("a.avi", ("-c:v", "mpeg4", "-qmin", "1", "-qmax", "1", "-bf", "2")),
        ("a.webm", ("-c:v", "libvpx", "-crf", "4", "-b:v", "9M", "-auto-alt-ref", "1", "-lag-in-frames", "16")),
        ("a.webm", ("-c:v", "libvpx-vp9", "-crf", "4", "-b:v", "9M", "-cpu-used", "8")),  # with hidden frames
        ("a.gif", ()),
    ],
)
def test_other_codecs(tmp_path, sources, name, options):
    path = tmp_path / name
    ffmpeg("-i", sources / "closed.mp4", *options, path)
    assert check(path) == 100


def test_a_header_that_says_too_little(tmp_path, sources, passes):
    path = tmp_path / "a.mp4"
    ffmpeg("-i", sources / "closed.mp4", "-c", "copy", *FRAGMENTS, path)
    with av.open(str(path)) as file:
        assert 0 < file.streams.video[0].frames < 30
    assert numbers(read_video(path, 4, 32)[0]) == [12, 37, 62, 87]
    assert passes == [100]


@pytest.mark.parametrize("promised", [20, 99, 101, 6000])
def test_a_header_that_says_another_number(tmp_path, promised, passes):
    path = write(tmp_path / "a.avi", numbered(100), codec="mpeg4")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"strh") + 40, promised)
    path.write_bytes(data)
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == promised
    assert numbers(read_video(path, 4, 32)[0]) == [12, 37, 62, 87]
    assert check(path) == 100
    assert passes[0] == 100


def test_frames_that_are_broken_behind_the_last_one_wanted(tmp_path, passes):
    path = write(tmp_path / "a.avi", numbered(40), codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for packet in packets[-10:]:
        data[packet.pos + 20 : packet.pos + packet.size] = bytes(packet.size - 20)
    path.write_bytes(data)
    assert numbers(read_video(path, 2, 32)[0]) == [7, 22]  # of 40: 10 and 30
    assert passes == [30, 23]


@pytest.mark.parametrize(
    ("options", "decoded"),
    [
        ({}, 100),
        ({"slice_framepos": 1}, 100),
        ({"slice_framepos": 0}, 31),
        ({"span": (2, 4)}, 39),
        ({"span": (2, 9.9)}, 100),
    ],
)
def test_no_more_is_decoded_than_tells(sources, passes, options, decoded):
    """How many frames there are behind the last one wanted matters only to a choice that reaches to the end."""
    read_video(sources / "closed.mp4", 4, 32, **options)
    assert passes == [decoded]


def doubled(path):
    """A Matroska file that says that its frames are twice as many a second."""
    data = path.read_bytes()
    place = data.index(b"\x23\xe3\x83\x84") + 4
    (nanoseconds,) = struct.unpack_from(">I", data, place)
    assert nanoseconds == 10**8
    path.write_bytes(data[:place] + struct.pack(">I", nanoseconds // 2) + data[place + 4 :])


@pytest.mark.parametrize("kind", ["mkv that says 20", "mkv that says nothing", "avi that says 600"])
def test_a_frame_rate_that_the_timestamps_contradict(tmp_path, sources, kind):
    path = tmp_path / f"a.{kind[:3]}"
    ffmpeg("-i", sources / "closed.mp4", "-c", "copy", path)
    if kind == "mkv that says 20":
        doubled(path)
    elif kind == "mkv that says nothing":
        path.write_bytes(path.read_bytes().replace(b"\x23\xe3\x83", b"\x23\xe3\x8f"))
    frames = numbers(read_video(path, 21, 32, span=(2, 4))[0])
    assert frames[0] in (19, 20, 21)
    assert frames[-1] in (39, 40, 41)
    assert frames == sorted(frames)


def test_packets_without_frames_do_not_raise_the_frame_rate(tmp_path, passes):
    """Which is known after all have been decoded."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for picture in numbered(100):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                broken = av.Packet(bytes(50))
                broken.stream, broken.time_base = stream, Fraction(1, 1000)
                broken.pts = broken.dts = int(packet.pts * packet.time_base * 1000) + 50
                out.mux(packet)
                out.mux(broken)
    assert len(shown(path)) == 100
    assert numbers(read_video(path, 21, 32, span=(2, 4))[0]) == [*range(20, 41)]
    assert passes == [100, 41]


def test_the_last_frame_may_have_no_duration(tmp_path):
    path = write(tmp_path / "a.asf", numbered(5), codec="wmv2", rate=25)
    frames, real = read_video(path, 5, 32, slice_framepos=0, feature_framerate=12.5)
    assert (numbers(frames)[:real], real) == ([0, 2, 4], 3)


def test_timestamps_that_begin_again(tmp_path):
    """As in an mpeg stream that is several ones put together."""
    part = write(tmp_path / "part.ts", numbered(50)).read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(part * 2)
    assert len(shown(path)) == 100
    assert numbers(read_video(path, 11, 32, span=(6, 7))[0]) == [*range(10, 21)]


MATRICES = {
    "as it is": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (-1, 0, 0, -1),
    "mirrored upside down": (1, 0, 0, -1),
    "about a diagonal": (0, 1, 1, 0),
    "to the right": (0, 1, -1, 0),
    "to the left": (0, -1, 1, 0),
    "about the other diagonal": (0, -1, -1, 0),
    "stretched": (3, 0, 0, 1),
    "of no meaning": (0, 0, 0, 0),
    "by 30 degrees": (math.cos(math.pi / 6), 0.5, -0.5, math.cos(math.pi / 6)),
    "by 30 degrees, stretched": (3 * math.cos(math.pi / 6), 0.5, -1.5, math.cos(math.pi / 6)),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_display_matrix(tmp_path, kind):
    path = write(tmp_path / "a.mp4", [textured(48, 64)] * 2, options={"qp": "1"})
    data = bytearray(path.read_bytes())
    one, place = 1 << 16, data.index(b"tkhd") + 44
    assert data[place : place + 36] == struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    a, b, c, d = (round(number * one) for number in MATRICES[kind])
    struct.pack_into(">9i", data, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    picture = shown(path)[0]
    top, left = ((side - 48) // 2 for side in picture.shape[:2])
    expected = picture[top : top + 48, left : left + 48].astype(int)
    difference = np.abs(read_video(path, 1, 48)[0][0].permute(1, 2, 0).numpy() - expected)
    # by other angles the filters differ; turned the other way, the mean would be above 60
    assert difference.mean() < 10 if "30" in kind else difference.max() < 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_by_exif(tmp_path, orientation):
    """Frames have side data that PyAV has no name for besides their matrix."""
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    Image.fromarray(textured(48, 64)).save(data, "jpeg", quality=95, exif=exif)
    path = tmp_path / "a.mjpeg"
    path.write_bytes(data.getvalue() * 3)
    picture = shown(path)[0]
    top, left = ((side - 48) // 2 for side in picture.shape[:2])
    frames, real = read_video(path, 3, 48)
    assert real == 3
    difference = np.abs(frames[2].permute(1, 2, 0).numpy() - picture[top : top + 48, left : left + 48].astype(int))
    assert difference.max() < 20


@pytest.mark.parametrize("first", ["small", "large"])
@pytest.mark.parametrize("default", ["", "small", "large"])
def test_of_several_streams_the_one_that_ffmpeg_takes(tmp_path, first, default):
    """The larger one, if the file has no default."""
    small = write(tmp_path / "small.mp4", numbered(40))
    large = write(tmp_path / "large.mp4", numbered(40, 64, 96)[::-1])
    path = tmp_path / "a.mkv"
    order = [small, large] if first == "small" else [large, small]
    dispositions = [
        part
        for i, source in enumerate(order)
        for part in (f"-disposition:v:{i}", "default" if source.stem == default else "0")
    ]
    inputs = [part for source in order for part in ("-i", source)]
    ffmpeg(*inputs, "-map", "0", "-map", "1", "-c", "copy", *dispositions, "-default_mode", "passthrough", path)
    height = shown(path)[0].shape[0]
    assert (height == 64) == (default != "small")
    expected = list(range(40)) if height == 32 else list(range(40))[::-1]
    assert numbers(read_video(path, 40, 32)[0]) == expected


def test_a_stream_without_content(tmp_path):
    """Larger, and ahead of the one that has frames."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        for height, width in ((64, 96), (32, 48)):
            stream = out.add_stream("mpeg4", rate=10, options=NEARLY_LOSSLESS["mpeg4"])
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in numbered(100):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())
    with av.open(str(path)) as file:
        assert [stream.codec_context.width for stream in file.streams.video] == [96, 48]
    assert check(path) == 100
