# SPDX-License-Identifier: Apache-2.0
"""Pictures of a merging: which patches of which frames became one token."""

from __future__ import annotations

import colorsys
import ctypes
import importlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .normalization import CLIP
from .plan import MergePlan

if TYPE_CHECKING:  # Pillow is only needed by those who draw
    from PIL.Image import Image

LAYOUTS = ("grid", "strip")
READABLE = 112  # pixels of a frame's shorter side, below which it is enlarged
SLACK = 0.1  # resizing bicubically overshoots [0, 1] by up to this; normalised frames go to about ±2
BACKGROUND = 255
CONTRAST = (9, 20)  # an outline goes this far from its fill to white, or from a bright fill to black


def visualize(
    frames: Any,
    trace: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    video: int = 0,
    protected: int | None = None,
    grid: tuple[int, int] | None = None,
    normalized: str | tuple[Sequence[float], Sequence[float]] | None = None,
    show: Sequence[int] | None = None,
    beside: bool = False,
    layout: str = "grid",
    scale: int | None = None,
    gap: int = 4,
    line: int | None = None,
    fps: float = 4,
) -> Image:
    """Draw which patches became one token, frame by frame.

    Merged patches are filled with the mean colour of all pixels of their token and outlined along the border of their
    group, in a lighter shade of the fill (a darker one where it is bright). A token that spans several frames has the
    same fill and the same vivid outline in all of them. Unmerged patches are drawn unchanged.

    Args:
        frames: ``(T, 3, H, W)`` or ``(T, H, W, 3)``, uint8 or floating in [0, 1]; a torch tensor or a numpy array.
        trace: destination of every token of every frame. One of: an integer tensor or array ``(T, L)``, in which two
            tokens of any frames were merged into one if and only if their numbers are equal, or ``(B, T, L)`` for
            several videos; an object with such an attribute ``dest``; a ``MergePlan`` with one frame per item (so equal
            numbers in different items are different tokens), ``N = T`` or ``N = B · T``.
        out: file to write: .png or .jpg of all frames, or .gif or .mp4 that plays them. Written whole or not at all.
        video: index of the video in the trace, of B, that ``frames`` shows.
        protected: number of leading tokens of a frame that are not patches (class token, prompts). Default:
            ``trace.protected``, or 1 where there is none.
        grid: number of patches of a frame ``(down, across)``, in row-major order. Default: square patches.
        normalized: normalisation to undo before drawing: ``"clip"``, or ``(mean, std)`` of three numbers each.
        show: indices of the frames to draw, in this order. Default: all. Colours are always computed from all frames.
        beside: also draw the original frame, above the merged one (left of it in .gif and .mp4).
        layout: arrangement of the picture: ``"grid"``, about square, or ``"strip"``, all frames in one row.
        scale: integer factor of enlargement. Default: enough to make small frames readable.
        gap: pixels between frames.
        line: thickness of outlines in pixels of the picture, 0 for none. Default: a sixteenth of a patch.
        fps: frames per second in .gif (at most 50) and .mp4.

    Returns:
        All frames as one RGB ``PIL.Image``, for any ``out``. The same input gives the same pixels.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names it.
        ImportError: Pillow, or for .mp4 an encoder, is missing; the message says what to install.
        FileNotFoundError: the folder of ``out`` does not exist.

    Reads values, so it synchronises with the GPU and can't be used inside compiled functions.
    """
    _pillow()
    write = None if out is None else _writer(Path(out))
    checks.choice(layout, "layout", LAYOUTS)
    gap = checks.count(gap, "gap", "pixels between frames")
    if not (isinstance(fps, (int, float)) and 0 < fps < math.inf):
        raise ValueError(f"fps must be a positive number of frames per second, got {fps!r}")
    before = _pixels(frames, normalized)
    count, height, width = before.shape[:3]
    dest = _destinations(trace, video, count)
    if protected is None:
        protected = getattr(trace, "protected", 1)
    protected = checks.count(protected, "protected", "leading tokens of a frame that are not patches")
    down, across = _grid(dest.shape[1], protected, height, width, grid)
    if scale is None:
        scale = -(-READABLE // min(height, width))
    scale = checks.count(scale, "scale", "factor of enlargement", least=1)
    if line is None:
        line = max(1, scale * min(height // down, width // across) // 16)
    line = checks.count(line, "line", "thickness of outlines in pixels")
    shown = _shown(show, count)

    after = _draw(before, dest[:, protected:].unflatten(1, (down, across)), shown, scale, line)
    before = _enlarge(before[shown], scale, scale)
    cells = _join([before, after], 1, gap) if beside else after
    columns = len(shown)
    if layout == "grid":
        columns = math.ceil(math.sqrt(len(shown) * cells.shape[1] / cells.shape[2]))
        columns = math.ceil(len(shown) / math.ceil(len(shown) / columns))  # rows of about the same length
    sheet = _image(_sheet(cells, columns, gap, 3 * gap if beside else gap))
    if write and out is not None:
        playing = _join([before, after], 2, gap) if beside else after
        _write_whole(Path(out), lambda file: write(file, sheet, playing, float(fps)))
    return sheet


# arguments


def _tensor(value: Any, name: str, wanted: str) -> Tensor:
    """Return ``value`` on the CPU; numpy arrays are recognised without importing numpy."""
    if not isinstance(value, Tensor):
        if not (hasattr(value, "__array__") and hasattr(value, "copy") and hasattr(value, "dtype")):
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        try:
            value = torch.from_numpy(value.copy())  # torch takes no negative strides, and warns of read-only memory
        except TypeError as error:
            raise TypeError(f"{name} must be {wanted}, got an array of {value.dtype}") from error
    return value.detach().cpu()


def _pixels(frames: Any, normalized: Any) -> Tensor:
    """Return ``(T, H, W, 3)`` uint8."""
    wanted = "a torch tensor or numpy array of shape (T, 3, H, W) or (T, H, W, 3)"
    pixels = _tensor(frames, "frames", wanted)
    if pixels.dim() != 4 or 3 not in (pixels.shape[1], pixels.shape[3]) or pixels.numel() == 0:
        way_out = "; choose one video: frames[b]" if pixels.dim() == 5 else ""
        raise ValueError(f"frames must be {wanted}, got shape {tuple(pixels.shape)}{way_out}")
    if pixels.shape[1] == 3:
        pixels = pixels.permute(0, 2, 3, 1)
    if pixels.dtype == torch.uint8:
        if normalized is not None:
            raise ValueError(
                "normalized is given, but frames are uint8, so they are not normalised; leave normalized out"
            )
        return pixels.contiguous()
    if not pixels.is_floating_point():
        raise TypeError(f"frames must be uint8 or floating in [0, 1], got {pixels.dtype}")
    pixels = pixels.double()
    if normalized is not None:
        mean, std = _mean_and_deviation(normalized)
        pixels = pixels * std + mean
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= -SLACK and high <= 1 + SLACK):  # NaN too
        after = "after undoing normalized they" if normalized is not None else "they"
        raise ValueError(
            f"frames must be in [0, 1], but {after} range from {low:.3g} to {high:.3g}: undo the normalisation first, "
            'or pass normalized="clip" or normalized=(mean, std); if they range to 255, pass uint8'
        )
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def _mean_and_deviation(normalized: Any) -> Tensor:
    """Return ``(2, 3)`` float64."""
    try:
        pair = torch.tensor(CLIP if normalized == "clip" else [list(each) for each in normalized], dtype=torch.float64)
    except (TypeError, ValueError):
        pair = torch.empty(0)
    if pair.shape != (2, 3) or not pair.isfinite().all() or not (pair[1] > 0).all():
        raise ValueError(f'normalized must be "clip" or (mean, std) of three numbers each, got {normalized!r}')
    return pair


def _destinations(trace: Any, video: int, count: int) -> Tensor:
    """Return ``(T, L)`` int64, equal exactly where tokens ended in one."""
    wanted = "a MergePlan, an integer tensor of shape (T, L) or (B, T, L), or an object with such a tensor as .dest"
    dest = _tensor(getattr(trace, "dest", trace), "trace", wanted)
    if dest.is_floating_point() or dest.is_complex() or dest.dtype == torch.bool or dest.dim() not in (2, 3):
        raise TypeError(f"trace must be {wanted}, got {dest.dtype} of shape {tuple(dest.shape)}")
    dest = dest.long()
    if isinstance(trace, MergePlan):
        dest = dest + trace.tokens_out * torch.arange(len(dest))[:, None]
        if len(dest) % count:
            raise ValueError(
                f"trace is a plan of N = {len(dest)} items, but frames has T = {count} frames: a plan must have one "
                "frame per item; for items of several frames compose a tensor (T, L) yourself"
            )
        dest = dest.unflatten(0, (-1, count))
    videos = 1 if dest.dim() == 2 else len(dest)
    if checks.count(video, "video", "index of a video in the trace") >= videos:
        raise ValueError(f"video must be less than the number of videos in the trace, {videos}, got {video}")
    dest = dest if dest.dim() == 2 else dest[video]
    if len(dest) != count:
        raise ValueError(
            f"trace has {len(dest)} frames of {dest.shape[1]} tokens, but frames has T = {count} frames; "
            "pass all frames of the traced video (show=... selects the frames to draw)"
        )
    return dest


def _grid(tokens: int, protected: int, height: int, width: int, grid: Any) -> tuple[int, int]:
    """Return patches down and across."""
    patches = tokens - protected
    leaves = (
        f"trace has {tokens} tokens a frame, of which protected = {protected} are not patches; that leaves {patches}"
    )
    if patches < 1:
        raise ValueError(f"{leaves}; protected must be less than the tokens of a frame")
    if grid is None:
        side = math.isqrt(height * width // patches)
        if side * side * patches != height * width or height % side or width % side:
            raise ValueError(
                f"{leaves}, but {patches} square patches don't tile frames of {height} x {width} pixels: correct "
                "protected (class token + prompts), or pass grid=(patches down, patches across)"
            )
        return height // side, width // side
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2):
        raise TypeError(f"grid must be a pair (patches down, patches across), got {grid!r}")
    down, across = (checks.count(number, "grid", "patches down and across") for number in grid)
    if down * across != patches:
        raise ValueError(f"{leaves}, but grid = ({down}, {across}) has {down * across}; correct grid or protected")
    if height % down or width % across:
        raise ValueError(
            f"grid = ({down}, {across}) doesn't divide frames of {height} x {width} pixels into whole patches; "
            "correct grid, or resize frames to the input size of the model"
        )
    return down, across


def _shown(show: Sequence[int] | None, count: int) -> list[int]:
    if show is None:
        return list(range(count))
    shown = [checks.count(number, "show", "indices of frames") for number in show]
    if not shown or max(shown) >= count:
        raise ValueError(f"show must be a non-empty list of frame indices from 0 to {count - 1}, got {list(show)}")
    return shown


# drawing


def _draw(frames: Tensor, dest: Tensor, shown: list[int], scale: int, line: int) -> Tensor:
    """Return the shown frames with their groups filled and outlined.

    All arithmetic is on integers, so that pixels are exact.

    Args:
        frames: ``(T, H, W, 3)`` uint8.
        dest: ``(T, down, across)`` int64.

    Returns:
        ``(len(shown), scale · H, scale · W, 3)`` uint8.
    """
    count, down, across = dest.shape
    pixels = frames.unflatten(2, (across, -1)).unflatten(1, (down, -1))  # (T, down, p, across, q, 3)
    patch = pixels.shape[2] * pixels.shape[4]
    _, group = dest.unique(return_inverse=True)
    members = group.flatten().bincount()
    sums = torch.zeros(len(members), 3, dtype=torch.int64)
    sums.index_add_(0, group.flatten(), pixels.sum((2, 4), dtype=torch.int64).flatten(0, 2))
    total = (members * patch)[:, None]
    fill = (sums + total // 2) // total

    in_frames = (group.flatten(1) + len(members) * torch.arange(count)[:, None]).unique() % len(members)
    across_frames = in_frames.bincount() > 1
    ends = 255 * (fill.sum(1, keepdim=True) < 3 * 128)
    outline = fill + (ends - fill) * CONTRAST[0] // CONTRAST[1]
    outline[across_frames] = _vivid(int(across_frames.sum()))

    group = group[shown]
    zoom = scale * pixels.shape[2], scale * pixels.shape[4]

    def spread(values: Tensor) -> Tensor:
        """Return one value a pixel from one a group."""
        return _enlarge(values[group], *zoom)

    drawn = torch.where(spread(members > 1)[..., None], spread(fill.byte()), _enlarge(frames[shown], scale, scale))
    border = _border(spread(torch.arange(len(members))), line) & spread(members > 1)
    return torch.where(border[..., None], spread(outline.byte()), drawn)


def _border(label: Tensor, line: int) -> Tensor:
    """Return ``(T, H, W)`` bool: pixels with another label, or the frame's edge, at most ``line`` pixels away."""
    padded = F.pad(label.float()[:, None], (line,) * 4, value=-1)  # labels below 2²⁴ are exact in float32
    highest = F.max_pool2d(padded, 2 * line + 1, 1)
    lowest = -F.max_pool2d(-padded, 2 * line + 1, 1)
    return (highest != lowest)[:, 0]


def _vivid(count: int) -> Tensor:
    """Return ``(count, 3)``: saturated colours; hues a golden section apart stay far from each other, however many."""
    hues = [(0.61803398875 * number) % 1 for number in range(count)]
    colours = [colorsys.hsv_to_rgb(hue, 0.9 - 0.25 * (n % 2), 1) for n, hue in enumerate(hues)]
    return (torch.tensor(colours).reshape(-1, 3) * 255).long()


def _enlarge(values: Tensor, down: int, across: int) -> Tensor:
    """Return every element of axes 1 and 2 repeated."""
    return values.repeat_interleave(down, 1).repeat_interleave(across, 2)


def _join(pictures: list[Tensor], axis: int, gap: int) -> Tensor:
    """Return batches of pictures put together along axis 1 (above each other) or 2 (side by side)."""
    shape = list(pictures[0].shape)
    shape[axis] = gap
    blank = torch.full(shape, BACKGROUND, dtype=torch.uint8)
    parts = [part for picture in pictures for part in (blank, picture)]
    return torch.cat(parts[1:], axis)


def _sheet(cells: Tensor, columns: int, gap: int, row_gap: int) -> Tensor:
    """Return ``(H, W, 3)``: cells in rows of ``columns``."""
    rows = -(-len(cells) // columns)
    cells = torch.cat([cells, torch.full_like(cells[:1], BACKGROUND).expand(rows * columns - len(cells), -1, -1, -1)])
    cells = cells.unflatten(0, (rows, columns))
    lines = _join([cells[:, column] for column in range(columns)], 2, gap)
    return _join([lines[row][None] for row in range(rows)], 1, row_gap)[0]


# files


def _pillow() -> Any:
    """Return PIL.Image."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError("stoptome_kernels.visualize draws with Pillow: pip install pillow") from error


def _image(pixels: Tensor) -> Image:
    """Return a PIL image of ``(H, W, 3)`` uint8."""
    height, width = pixels.shape[:2]
    return _pillow().frombytes("RGB", (width, height), _bytes(pixels))


def _bytes(pixels: Tensor) -> bytes:
    pixels = pixels.contiguous()
    return ctypes.string_at(pixels.data_ptr(), pixels.numel())  # tensor.numpy() would need numpy


Write = Callable[[Path, "Image", Tensor, float], None]  # file, all frames in one picture, frames to play, fps


def _writer(out: Path) -> Write:
    """Return what writes this kind of file. What it needs is looked for before anything is drawn."""
    writers: dict[str, Callable[[], Write]] = {
        ".png": lambda: _write_still,
        ".jpg": lambda: _write_still,
        ".jpeg": lambda: _write_still,
        ".gif": lambda: _write_gif,
        ".mp4": _mp4_writer,
    }
    if out.suffix.lower() not in writers:
        raise ValueError(f"out must end in {', '.join(writers)}, got {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {str(out.parent)!r}")
    return writers[out.suffix.lower()]()


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write all of the file or nothing: what was there before stays until the new one is complete."""
    temporary = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    try:
        write(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_still(file: Path, sheet: Image, playing: Tensor, fps: float) -> None:
    sheet.save(file, quality=92, optimize=True)


def _write_gif(file: Path, sheet: Image, playing: Tensor, fps: float) -> None:
    # one palette for all frames, so that a colour is the same in each; undithered, so that fills stay flat
    palette = _image(playing.flatten(0, 1)).quantize(256)
    undithered = _pillow().Dither.NONE
    first, *rest = (_image(frame).quantize(palette=palette, dither=undithered) for frame in playing)
    # browsers play delays under 20 ms slowly
    first.save(file, save_all=True, append_images=rest, duration=max(20, round(1000 / fps)), loop=0)


def _mp4_writer() -> Write:
    for module, writer in (("av", _write_mp4_av), ("imageio_ffmpeg", _write_mp4_ffmpeg)):
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return writer
    raise ImportError("out: writing .mp4 needs an encoder: pip install av (or imageio-ffmpeg), or write a .gif")


def _even(playing: Tensor) -> Tensor:
    """Make heights and widths even, as H.264 with halved chroma wants them."""
    return F.pad(playing, (0, 0, 0, playing.shape[2] % 2, 0, playing.shape[1] % 2), value=BACKGROUND)


def _write_mp4_av(file: Path, sheet: Image, playing: Tensor, fps: float) -> None:
    from fractions import Fraction

    import av

    playing = _even(playing)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = playing.shape[1], playing.shape[2], "yuv420p"
        for frame in playing:
            container.mux(stream.encode(av.VideoFrame.from_image(_image(frame))))
        container.mux(stream.encode())


def _write_mp4_ffmpeg(file: Path, sheet: Image, playing: Tensor, fps: float) -> None:
    import imageio_ffmpeg

    playing = _even(playing)
    size = (playing.shape[2], playing.shape[1])
    encoder = imageio_ffmpeg.write_frames(str(file), size, fps=fps, quality=8, macro_block_size=2)
    encoder.send(None)
    for frame in playing:
        encoder.send(_bytes(frame))
    encoder.close()
