# SPDX-License-Identifier: Apache-2.0
"""A text-video set that is made, not downloaded: mp4 files of synthetic scenes in MSR-VTT's file layout.

Its captions can be told apart only by what happens, and when: see ``scenes``. Videos of the evaluation come in
pairs that differ in one attribute; ``MSRVTT_data.json`` says of the second of a pair which one (``"twin"``) and in
what (``"differs_in"``).
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import msgspec
import numpy as np
from tqdm import tqdm

from . import drawing, scenes, sealed, side_by_side
from .errors import UsageError

VERSION = 2  # to be raised when the same settings give other videos or captions
MANIFEST = "synthetic.json"
CAPTIONS = 3  # of a training video
# One thread: more would wait for each other at such sizes. Without mbtree, whose lookahead reads memory in x264's
# veryfast preset that nobody wrote: the same film then gave other bytes.
_ENCODER = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """The settings of a set, and the SHA-256 of each of its files, by their paths in its folder."""

    version: int
    settings: dict[str, int]
    files: dict[str, str]


class Paths(NamedTuple):
    """Where a set lies; the names are those of the command line's flags."""

    data_path: str
    features_path: str
    train_csv: str
    val_csv: str


class Clip(NamedTuple):
    """A video before it is a file: what happens in it, and the seed of everything else in it."""

    id: str
    scene: scenes.Scene
    seed: tuple[int, ...]


def write(
    folder: str | os.PathLike[str],
    *,
    train: int,
    val: int,
    seed: int = 0,
    size: int = 64,
    frames: int = 24,
    fps: int = 8,
    processes: int = 1,
    silent: bool | None = True,
) -> Paths:
    """Make a set, or find it made: what is there by the same settings is used as it is, if no bit of it has changed.

    The same settings give the same bytes with the same PyAV, Pillow and NumPy, whatever the number of processes. The
    folder appears when it is complete, so that a killed process leaves no part of a set in it.

    Args:
        folder: doesn't exist, is empty, or holds such a set.
        train, val: videos. Those of ``val`` are pairs, see ``scenes.draw_split``.
        size: pixels a side, even.
        frames: of a video, 4 or more; fps: of them in a second.
        processes: that draw and encode.
        silent: without a progress bar; None: with one if a terminal shows it.

    Raises:
        UsageError: the folder holds something else or can't be written, a file in it is damaged, there aren't so many
            scenes, or scikit-image, whose photographs are the backgrounds, is missing.
        ValueError: a size or number that no video has.
    """
    settings = {"train": train, "val": val, "seed": seed, "size": size, "frames": frames, "fps": fps}
    _check(settings | {"processes": processes})
    folder = Path(folder)
    try:
        if not _found(folder, settings):
            _make(folder, settings, processes, silent)
    except OSError as error:
        raise UsageError(f"no synthetic videos can be written to {folder}: {error.strerror or error}") from error
    names = ("MSRVTT_data.json", "videos", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv")
    return Paths(*(os.fspath(folder / name) for name in names))


def draw(train: int, val: int, seed: int = 0) -> tuple[dict[str, Any], list[Clip], list[Clip]]:
    """The set without its files.

    Returns:
        What ``MSRVTT_data.json`` holds, the clips to train on, and those to evaluate on; ``film`` gives frames.
    """
    apart, pairs = scenes.draw_split(train, val, seed)
    clips = [
        Clip(f"video{i}", scene, (seed, 1, i)) for i, scene in enumerate([*apart, *(pair.scene for pair in pairs)])
    ]
    rng = np.random.default_rng((seed, 2))
    videos: list[dict[str, Any]] = []
    sentences: list[dict[str, Any]] = []
    for i, clip in enumerate(clips):
        split = "train" if i < train else "test"
        video: dict[str, Any] = {"video_id": clip.id, "id": i, "split": split, "category": 0, "url": ""}
        twin = pairs[i - train].twin if i >= train else None
        if twin is not None:
            video |= {"twin": f"video{train + twin}", "differs_in": pairs[i - train].attribute}
        videos.append(video)
        for caption in rng.permutation(clip.scene.captions())[: CAPTIONS if i < train else 1]:
            sentences.append({"video_id": clip.id, "caption": str(caption), "sen_id": len(sentences)})
    return {"videos": videos, "sentences": sentences}, clips[:train], clips[train:]


def film(clip: Clip, size: int = 64, frames: int = 24) -> np.ndarray:
    """``(frames, size, size, 3)`` uint8, RGB, as it is before encoding."""
    return drawing.render(clip.scene, np.random.default_rng(clip.seed), size, frames)


def _check(numbers: dict[str, int]) -> None:
    least = {"train": 1, "val": 1, "seed": 0, "size": 16, "frames": 4, "fps": 1, "processes": 1}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise ValueError(f"{name} must be an int of {least[name]} or more, got {value!r}")
    if numbers["size"] % 2:
        raise ValueError(f"size must be even, as H.264 wants it, got {numbers['size']}")


def _found(folder: Path, settings: dict[str, int]) -> bool:
    """Return whether the set is there; raises UsageError where something else is."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, and no folder for synthetic videos: give another one")
    try:
        manifest = sealed.read_json(folder / MANIFEST, _Manifest)
    except FileNotFoundError:
        if next(folder.iterdir(), None) is None:
            return False
        raise UsageError(f"{folder} holds no synthetic videos but something else: give another folder") from None
    except sealed.Damaged as error:
        raise UsageError(f"{folder / MANIFEST} {error}; delete {folder}, and it is made anew") from error
    there = {**manifest.settings, "version": manifest.version}
    for name, value in {"version": VERSION, **settings}.items():
        if there.get(name) != value:
            raise UsageError(
                f"{folder} holds synthetic videos with {name} {there.get(name)}, not {value}: delete it or give another"
            )
    files = _files(folder)
    for name, digest in manifest.files.items():
        if name not in files or _digest(files[name]) != digest:
            what = "is damaged" if name in files else "is missing"
            raise UsageError(f"{folder / name} {what}; delete {folder}, and it is made anew")
    return True


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder and below by their names in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(folder: Path, settings: dict[str, int], processes: int, silent: bool | None) -> None:
    """Write the set beside its place, then put it there in one step."""
    data, train, val = draw(settings["train"], settings["val"], settings["seed"])
    drawing.photographs()  # whatever is missing, better now than in a process of its own
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    try:
        (made / "videos").mkdir(parents=True)
        save = partial(_save, made / "videos", settings["size"], settings["frames"], settings["fps"])
        with tqdm(total=len(train) + len(val), desc="making videos", unit="video", disable=silent, leave=False) as bar:
            _each(save, [*train, *val], processes, bar)
        (made / "MSRVTT_data.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        _write_csv(made / "MSRVTT_train.9k.csv", ["video_id"], ([clip.id] for clip in train))
        captions = {sentence["video_id"]: sentence["caption"] for sentence in data["sentences"]}
        rows = ([f"ret{i}", f"msr{clip.id[5:]}", clip.id, captions[clip.id]] for i, clip in enumerate(val))
        _write_csv(made / "MSRVTT_JSFUSION_test.csv", ["key", "vid_key", "video_id", "sentence"], rows)
        files = {name: _digest(path) for name, path in _files(made).items()}
        sealed.write_json(made / MANIFEST, {"version": VERSION, "settings": settings, "files": files})
        try:
            made.rename(folder)
        except OSError:
            if not _found(folder, settings):  # else another process was quicker, with the same
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _each(save: Callable[[Clip], None], clips: list[Clip], processes: int, bar: tqdm) -> None:
    """Call ``save`` for every clip, in so many processes."""
    if processes == 1:
        for clip in clips:
            save(clip)
            bar.update()
        return
    shares = [clips[n::processes] for n in range(processes)]
    # without a lock, which a process that is ended might hold
    done = multiprocessing.get_context("spawn").RawArray("i", processes)
    works = [partial(_save_share, save, share, done, n) for n, share in enumerate(shares)]
    side_by_side.call(works, processes, lambda: bar.update(sum(done) - bar.n))


def _save_share(save: Callable[[Clip], None], clips: list[Clip], done: Any, place: int) -> None:
    """Call ``save`` for the clips of one process, and count them at its place."""
    for clip in clips:
        save(clip)
        done[place] += 1


def _save(folder: Path, size: int, frames: int, fps: int, clip: Clip) -> None:
    encode(folder / f"{clip.id}.mp4", film(clip, size, frames), fps)


def encode(path: str | os.PathLike[str], film: np.ndarray, fps: int) -> None:
    """Write ``(frames, height, width, 3)`` uint8 RGB as H.264 in an mp4 file."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", Fraction(fps), _ENCODER)
        stream.height, stream.width = film.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def _write_csv(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
