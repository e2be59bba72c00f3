#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw what merging does to a video: the benchmark's frames, merged by stk.match and stk.merge, layer after layer.

The tokens are the pixels of the patches and where they are: no model, so no weights to download.

python bench/visualize.py                     merged.png (some frames, as they were and merged) and merged.gif
python bench/visualize.py --clip 4            in the second half of the layers tokens of 4 frames merge with each other
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import stoptome_kernels as stk
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import cli, shapes
from harness.cli import positive

PIXELS = 224
PROTECTED = 1  # a class token; nothing reads it here, but it shows that it stays where it is
FINE = 4  # patches are compared at this many pixels a side: finer detail is noise to a plain dot product


def tokens_of(frames: Tensor, patch: int) -> Tensor:
    """``(T, 1 + patches, C)``: class token and patches of ``(T, 3, H, W)`` in [0, 1]."""
    side = frames.shape[-1] // patch
    coarse = F.interpolate(frames * 2 - 1, size=side * FINE, mode="area")
    seen = F.unfold(coarse, FINE, stride=FINE).transpose(1, 2)
    # a constant makes brightness count, which a cosine alone ignores; the position, what every model adds
    where = (torch.arange(side) + 0.5) / side * 2 - 1
    place = torch.stack([torch.ones(side, side), *torch.meshgrid(where, where, indexing="ij")], -1).flatten(0, 1)
    weight = torch.tensor([3.0, 2.0, 2.0])
    x = torch.cat([seen, (place * weight).expand(len(frames), -1, -1)], -1)
    return torch.cat([torch.ones(len(frames), PROTECTED, x.shape[-1]), x], 1)


def join(x: Tensor, size: Tensor, protected: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Join ``group`` frames into one item: all protected tokens first, then the patches, frame after frame.

    Args:
        x: ``(T, L, C)``; size: ``(T, L)``.

    Returns:
        ``(T / group, group · L, C)``, ``(T / group, group · L)``, and ``(group, L)``: where a frame's tokens went.
    """
    count, length = x.shape[:2]
    frame, token = torch.arange(group)[:, None], torch.arange(length)
    place = torch.where(
        token < protected,
        frame * protected + token,
        group * protected + frame * (length - protected) + token - protected,
    )
    order = place.flatten().argsort()
    x = x.reshape(count // group, group * length, -1)[:, order]
    return x, size.reshape(count // group, group * length)[:, order], place


def merge_video(x: Tensor, r: int, layers: int, clip: int) -> tuple[Tensor, int]:
    """Merge ``(T, L, C)``; each layer removes r tokens a frame, and after half of them ``clip`` frames become one item.

    Returns:
        ``(T, L)``: where every token went, equal exactly where tokens became one; and how many tokens are left.
    """
    count, length = x.shape[:2]
    size = torch.ones(count, length)
    dest = torch.arange(length).expand(count, length)  # within the item that the frame is in
    protected, group = PROTECTED, 1
    for layer in range(layers):
        if layer == layers // 2 and clip > 1:
            x, size, place = join(x, size, protected, clip)
            # a frame's tokens, then the place of these in the joined item
            dest = place.repeat(count // clip, 1).gather(1, dest)
            protected, group = protected * clip, clip
        plan = stk.match(x, r * group, protected)
        x, size = stk.merge(x, plan, size)
        dest = plan.dest.long().repeat_interleave(group, 0).gather(1, dest)
    item = torch.arange(count)[:, None] // group
    return item * x.shape[1] + dest, x.shape[0] * x.shape[1]


def whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be an integer, 0 or more, got {text!r}")
    return value


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.bare_parser(__doc__)
    add = p.add_argument
    add("--r", type=whole, default=24, metavar="R", help="tokens to remove from a frame in each layer (default: 24)")
    add("--layers", type=whole, default=4, metavar="N", help="how often (default: 4)")
    add("--patch", type=positive(int), default=16, metavar="PIXELS", help=f"side of a patch of {PIXELS} (default: 16)")
    add("--frames", type=positive(int), default=12, metavar="T", help="length of the video (default: 12)")
    add("--clip", type=positive(int), default=1, metavar="F", help="frames to join (default: 1, none)")
    add("--show", type=positive(int), default=4, metavar="N", help="frames in .png and .jpg (default: 4)")
    add("--seed", type=whole, default=13, metavar="S", help="another pan over the photograph (default: 13)")
    files = [Path("merged.png"), Path("merged.gif")]
    names = " and ".join(map(str, files))
    add("--out", type=Path, nargs="+", default=files, metavar="FILE", help=f".png .jpg .gif .mp4 (default: {names})")
    add("--small", action="store_true", help="a .png of 256 colours: a third of the bytes")
    args = p.parse_args(argv)
    if PIXELS % args.patch:
        sides = ", ".join(str(side) for side in range(4, PIXELS) if PIXELS % side == 0)
        p.error(f"argument --patch: must divide {PIXELS}, got {args.patch}: choose from {sides}")
    if args.frames % args.clip:
        p.error(f"argument --clip: must divide --frames = {args.frames}, got {args.clip}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    frames = shapes.video(args.frames, PIXELS, args.seed)
    x = tokens_of(frames, args.patch)
    dest, left = merge_video(x, args.r, args.layers, args.clip)
    before = x.shape[0] * x.shape[1]
    print(f"{args.frames} frames, {before} tokens → {left} ({left / before:.0%})")
    # of joined frames those of the first group: tokens are to be followed from frame to frame
    among = args.clip if args.clip > 1 else args.frames
    number = min(args.show, among)
    shown = [place * among // number for place in range(number)]
    for file in args.out:
        playing = file.suffix.lower() in (".gif", ".mp4")
        show = None if playing else shown
        small = args.small and file.suffix.lower() == ".png"
        out = None if small else file
        try:
            picture = stk.visualize(
                frames, dest, out, protected=PROTECTED, show=show, beside=True, layout="strip", fps=6
            )
            if small:
                picture.quantize(256).save(file, optimize=True)
        except (ImportError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{file}: {args.frames if playing else number} frames, {file.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
