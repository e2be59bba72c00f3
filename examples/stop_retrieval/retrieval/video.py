# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file: which ones, decoded by PyAV, as squares."""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideDataType
from PIL import Image
from torch import Tensor

# tags that are no UTF-8 must not fail the file; from PyAV 19 on they never do, and the argument is gone
_OPEN: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
MAX_PIXELS = 8192 * 8192  # a frame of so many takes 400 MB on its way to a tensor
# Files whose streams FFmpeg may find after it has opened them, when it decodes frames to learn about them without our
# limit: FLV, MPEG program and transport streams
_LATE = (b"FLV", b"\0\0\1\xba", b"\x47")
_REFUSED = re.compile(r"Picture size (\d+)x(\d+) exceeds")
# formats of FFmpeg that name other files or addresses, or scripts: these would be opened before we see the first stream
PLAYLISTS = {
    "hls", "applehttp", "dash", "concat", "imf", "vobsub", "sdp", "rtsp", "rtp", "sap", "avisynth", "vapoursynth",
}  # fmt: skip
# all others; FFmpeg knows what a file is by its first bytes, and opens nothing else if that is not among these
_FORMATS = ",".join(sorted(name for name in av.formats_available if PLAYLISTS.isdisjoint(name.split(","))))
_NOT_AMONG_THEM = "Format not on whitelist"
PATIENCE = 60.0  # seconds that one packet may take


class BrokenVideo(Exception):
    """A file that gives no frames.

    Attributes:
        path: of the file.
        reason: one short line.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both, as pickle makes the copy in another process of them
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def sample_indices(count: int, frames: int, rng: np.random.Generator | None) -> np.ndarray:
    """Which of a video's frames are taken, int64 ``(frames,)``, rising; the last one repeats if there are too few.

    As STOP has it. With ``rng`` (training) one frame by lot of each of ``frames`` segments, every one ``count //
    frames`` long, so that what remains at the end is never drawn. Without (evaluation) the middles of segments that
    cover all of the video.

    Args:
        count: frames of the video, 1 or more.
        frames: how many are wanted, 1 or more.

    Raises:
        ValueError: either is less than 1.
    """
    if count < 1 or frames < 1:
        raise ValueError(f"count and frames must be 1 or more, got {count} and {frames}")
    places = np.arange(frames)
    if count <= frames:
        return np.minimum(places, count - 1)
    if rng is None:
        segment = count / frames
        return (segment / 2 + segment * places).astype(np.int64)
    segment = count // frames
    return places * segment + rng.integers(segment, size=frames)


def read_video(
    path: str | os.PathLike[str],
    frames: int,
    size: int,
    *,
    rng: np.random.Generator | None = None,
    span: tuple[float, float] | None = None,
    slice_framepos: int = 2,
    feature_framerate: float = 1,
    order: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, int]:
    """Decode some frames of a video; no others are held in memory.

    They are counted and shown as the ffmpeg program does it (``-fps_mode passthrough``): as many as can be decoded,
    whatever a header promises, without those that an edit list leaves out, turned and mirrored as the file says, and
    of several video streams those of the largest, if the file names no default. Pixels count as squares. Their short
    side is resized to ``size`` as CLIP does it, and the middle cut out.

    Args:
        frames: how many are wanted.
        size: pixels of a side.
        rng: for a training sample; None: the same frames every time.
        span: seconds from and to, where frame ``i`` is at ``i`` divided by the average frame rate; the frames at both
            ends belong to it, as in STOP. None: all of the video.
        slice_framepos: 2: spread over the video (``sample_indices``). 0 and 1: the first and the last ones of those
            that ``feature_framerate`` takes a second, as in CLIP4Clip.
        feature_framerate: frames a second, above 0; a video that has fewer gives all it has.
        order: 0: as they are shown; 1: reversed; 2: shuffled, by ``rng``, or always the same for a file of this name.
        max_pixels: of a frame; for a larger one FFmpeg takes no memory, and the file counts as broken.

    Returns:
        uint8 ``(frames, 3, size, size)``, RGB, and how many of these are not repetitions of the last one.

    Raises:
        BrokenVideo: the file gives no frame; whatever PyAV finds wrong with it ends as this.
    """
    if slice_framepos not in (0, 1, 2) or order not in (0, 1, 2):
        raise ValueError(f"slice_framepos and order must be 0, 1 or 2, got {slice_framepos} and {order}")
    path = os.fspath(path)

    def choose(count: int, rate: float) -> tuple[np.ndarray, int, bool]:
        """Return which of ``count`` frames are taken, ``(frames,)``, how many are no repetitions, and whether any
        number of frames that includes these gives the same ones."""
        if not rate and (span or slice_framepos != 2):
            raise BrokenVideo(path, "its frame rate is not known")
        first, end = 0, count
        if span:
            first, end = max(int(span[0] * rate), 0), int(min(span[1] * rate, count - 1)) + 1
            if first >= end:
                raise BrokenVideo(path, f"no frame from {span[0]:g} s to {span[1]:g} s: {count} at {rate:g} a second")
        settled = end < count
        if slice_framepos == 2:
            chosen = sample_indices(end - first, frames, rng)[: end - first]
        else:
            step = max(rate / feature_framerate, 1)
            taken = math.ceil((end - first) / step)
            skipped = 0 if slice_framepos == 0 else max(taken - frames, 0)
            settled |= slice_framepos == 0 and taken >= frames
            chosen = (np.arange(skipped, min(skipped + frames, taken)) * step).astype(np.int64)
            chosen = np.minimum(chosen, end - first - 1)  # rounding must not lead out of the video
        if order == 1:
            chosen = chosen[::-1]
        elif order == 2:
            name = os.fsencode(os.path.basename(path))
            chosen = (rng or np.random.default_rng(zlib.crc32(name))).permutation(chosen)
        return first + np.pad(chosen, (0, frames - len(chosen)), mode="edge"), len(chosen), settled

    limit = _Limit(path, max_pixels)
    with limit:
        try:
            return _read(path, choose, size, limit)
        except (av.FFmpegError, OSError) as error:
            limit.check()
            raise BrokenVideo(path, error.strerror or str(error)) from error


class _Limit:
    """The limits of what may be opened: no playlists, and how large frames may be. FFmpeg keeps to it,
    and says in a message what it refused: its error doesn't tell.

    Attributes:
        options: for opening a file and for its decoder.
    """

    def __init__(self, path: str, pixels: int):
        self.path, self.pixels = path, pixels
        # some more, as decoders have frames of whole blocks and with edges; to the pixel sizes are compared here
        self.options = {"max_pixels": str(min(pixels + pixels // 16 + (1 << 18), 2**31 - 1))}
        self._capture = av.logging.Capture()

    def __enter__(self) -> None:
        self._before = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # the next file may be refused in the same words
        self._said = self._capture.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)
        level, skip = self._before
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)

    def check(self, width: int = 0, height: int = 0) -> None:
        """Raise BrokenVideo if this is too large, or if FFmpeg refused a frame or the file since it was asked last."""
        playlist = any(text.startswith(_NOT_AMONG_THEM) for _, _, text in self._said)
        sizes = [
            (width, height),
            *((int(m[1]), int(m[2])) for _, _, text in self._said if (m := _REFUSED.search(text))),
        ]
        self._said.clear()
        if playlist:
            raise BrokenVideo(self.path, "a playlist, whose frames are in other files")
        for across, down in sizes:
            if across * down > self.pixels:
                raise BrokenVideo(
                    self.path, f"it has frames of {across} × {down} pixels, more than --max_pixels {self.pixels}"
                )


def _read(
    path: str, choose: Callable[[int, float], tuple[np.ndarray, int, bool]], size: int, limit: _Limit
) -> tuple[Tensor, int]:
    if not os.path.isfile(path):  # what else has a name may never end (a pipe), or lie in a network (an address)
        raise BrokenVideo(path, "not a file" if os.path.exists(path) else "no such file")
    if os.path.getsize(path) == 0:
        raise BrokenVideo(path, "the file is empty")
    with open(path, "rb") as file:
        late = file.read(4).startswith(_LATE)
    if late:
        with _opened(path, limit, codec_whitelist="none") as container:  # which decodes nothing, and reads the headers
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    limit.check(stream.codec_context.width, stream.codec_context.height)
    # A header's number of frames may be wrong. To count packets takes a hundredth of the time that decoding takes, but
    # not each gives a frame: the number is known when all have been decoded.
    tally = _count(path, limit)
    count, known = tally.packets, False
    while count:
        with _opened(path, limit) as container:
            stream = next((s for s in container.streams.video if s.index == tally.index), None)
            if stream is None or stream.codec_context is None:
                raise BrokenVideo(path, "it changed while it was read")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {**limit.options}
            rate, measured = tally.rate(count)
            chosen, real, settled = choose(count, rate)
            settled = known or (settled and not measured)
            wanted = set(chosen.tolist())
            images: dict[int, Tensor] = {}
            decoded = 0
            for decoded, frame in enumerate(_frames(container, stream), 1):
                limit.check(frame.width, frame.height)
                if decoded - 1 in wanted:
                    images[decoded - 1] = _square(frame, size)
                if settled and len(images) == len(wanted):
                    break
            if len(images) == len(wanted) and (settled or decoded == count):
                return torch.stack([images[number] for number in chosen.tolist()]), real
        limit.check()
        # a known number only shrinks, so that reading ends even if the file changes meanwhile
        count, known = min(decoded, count - 1) if known else decoded, True
    raise BrokenVideo(path, "no frame of it can be decoded")


def _opened(path: str, limit: _Limit, **options: str) -> av.container.InputContainer:
    options |= limit.options | {"format_whitelist": _FORMATS}
    return av.open(f"file:{path}", timeout=PATIENCE, options=options, **_OPEN)


class _Tally:
    """Facts from the packets of a video stream, without those that an edit list leaves out: these are decoded where
    other frames need them, and not shown.

    Attributes:
        index: of the stream in its file.
        rank: of the streams of a file the ffmpeg program takes that of the highest one.
        packets: how many.
    """

    def __init__(self, stream: av.VideoStream):
        self.index, self.packets = stream.index, 0
        self._header = float(stream.average_rate or 0)
        self._unit = float(stream.time_base or 0)
        jumping = av.format.Flags.ts_discont.value  # formats whose timestamps may jump
        self._timed = not stream.container.format.flags & jumping  # type: ignore[operator]
        self._first, self._last, self._duration = math.inf, -math.inf, 0
        self.width, self.height = stream.codec_context.width, stream.codec_context.height
        self._default = bool(stream.disposition & av.stream.Disposition.default)

    def add(self, packet: av.Packet) -> None:
        if packet.is_discard:
            return
        self.packets += 1
        if packet.pts is None:
            self._timed = False
            return
        self._first = min(self._first, packet.pts)
        if packet.pts > self._last:
            self._last, self._duration = packet.pts, packet.duration or 0

    @property
    def rank(self) -> tuple[bool, int]:
        return self.packets > 0, self.width * self.height + 5_000_000 * self._default

    def rate(self, frames: int) -> tuple[float, bool]:
        """Return the average frame rate of so many frames, 0 if it isn't known, and whether it is by their timestamps:
        where the header has none, or one that is more than a tenth off, as of a file of which it knows the first
        fragment alone."""
        seconds = (self._last - self._first + self._duration) * self._unit
        if not self._timed or not 0 < seconds < math.inf:
            return self._header, False
        rate = (frames if self._duration else frames - 1) / seconds
        if abs(rate - self._header) <= self._header / 10:
            return self._header, False
        return rate, True


def _count(path: str, limit: _Limit) -> _Tally:
    """Count the packets of the video stream that is read.

    Raises:
        BrokenVideo: there is none, or its frames are too large.
    """
    with _opened(path, limit) as container:
        # a cover is a stream of its own, of one picture
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise BrokenVideo(path, "no video stream")
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            raise BrokenVideo(path, "no decoder for its video")
        tallies = {stream.index: _Tally(stream) for stream in streams}
        for packet in _packets(container, *streams):
            tallies[packet.stream_index].add(packet)
        best = max(tallies.values(), key=lambda tally: tally.rank)
        limit.check(best.width, best.height)
        return best


def _packets(container: av.container.InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """Up to the end or to where the file can't be read on, without the empty ones, which PyAV puts at the end."""
    # IndexError: in the end PyAV stumbles over streams that only turned up on the way, as a damaged .ts may have them
    with contextlib.suppress(av.FFmpegError, IndexError):
        yield from (packet for packet in container.demux(*streams) if packet.size)


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """In the order in which they are shown; damaged packets are passed over."""
    for packet in _packets(container, stream):
        with contextlib.suppress(av.FFmpegError):
            yield from stream.decode(packet)
    with contextlib.suppress(av.FFmpegError):  # the decoder still holds some
        yield from stream.decode(None)


def _square(frame: av.VideoFrame, size: int) -> Tensor:
    """``(3, size, size)``, in one thread: several processes read. By Pillow, whose bicubic filter CLIP's and
    CLIP4Clip's transforms use; of the resized image only the middle is computed."""
    image = _upright(Image.fromarray(frame.to_ndarray(format="rgb24", threads=1)), _display_matrix(frame))
    across, down = image.size
    short = min(across, down)
    width, height = size * across // short, size * down // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    if short == size:
        image = image.crop((left, top, left + size, top + size))
    else:
        x, y = across / width, down / height
        box = (left * x, top * y, min((left + size) * x, across), min((top + size) * y, down))
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _nameless(kind: type[SideDataType], value: int) -> SideDataType:
    """Return a member for a value that has none."""
    member = object.__new__(kind)
    member._name_, member._value_ = f"UNKNOWN_{value}", value  # type: ignore[assignment]
    return member


# PyAV fails over a frame with side data of a kind that it has no name for; in PyAV 18 EXIF is such a kind
SideDataType._missing_ = classmethod(_nameless)  # type: ignore[assignment, arg-type]


def _display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The first one, as FFmpeg has it: nine numbers, of which the first two and the fourth and fifth turn."""
    sides: Any = frame.side_data  # PyAV's annotation is of another type
    for side in sides:
        if side.type == SideDataType.DISPLAYMATRIX:
            return struct.unpack("=9i", bytes(side))
    return None


def _upright(image: Image.Image, matrix: tuple[int, ...] | None) -> Image.Image:
    """Turn and mirror an image as a display matrix says and the ffmpeg program does it, which knows the eight ways to
    lay a rectangle and angles between them; at these the corners are cut off and what is beside the image is black."""
    if matrix is None:
        return image
    a, b, _, c, d = matrix[:5]  # a point (x, y) is shown at (ax + cy, bx + dy)
    scales = math.hypot(a, c), math.hypot(b, d)
    if not all(scales):
        return image
    angle = round(math.degrees(math.atan2(b / scales[1], a / scales[0]))) % 360  # clockwise
    way = Image.Transpose
    ways: dict[int, list[Image.Transpose]] = {
        0: [way.FLIP_TOP_BOTTOM] * (d < 0),
        90: [way.TRANSPOSE if c > 0 else way.ROTATE_270],
        180: [way.FLIP_LEFT_RIGHT] * (a < 0) + [way.FLIP_TOP_BOTTOM] * (d < 0),
        270: [way.TRANSVERSE if c < 0 else way.ROTATE_90],
    }
    if angle not in ways:
        return image.rotate(-angle, Image.Resampling.BILINEAR)
    for transpose in ways[angle]:
        image = image.transpose(transpose)
    return image
