# SPDX-License-Identifier: Apache-2.0
"""Videos for tests, whose pictures tell their number, and what a process holds."""

import contextlib
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

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


def clip(tmp_path_factory):
    """100 frames, ten a second."""
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(100))


def resident():
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return sorted(os.listdir("/proc/self/fd"))
