# SPDX-License-Identifier: Apache-2.0
"""Files that are no videos, or none that may be read: named, with the reason, and nothing of them left behind."""

import os
import pickle
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from retrieval import video as module
from retrieval.video import BrokenVideo, read_video
from support import videos
from support.videos import FILES, linux, numbered, numbers, open_files, resident, textured, write

clip = pytest.fixture(scope="module")(videos.clip)


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
        return write(folder / "x.ts", numbered(1), rate=25), {"span": (0, 1)}
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
    """A playlist shows other files, which its author may not read."""
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
