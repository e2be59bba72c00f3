# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every kind that the program reads: refused in one line that names the file, or no harm done."""

import gzip
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from retrieval import checkpoint, features, search, state, synthetic
from retrieval import results as evaluations
from retrieval.annotations import load
from retrieval.corpus import Video
from retrieval.errors import UsageError
from retrieval.features import FeatureStore
from retrieval.tokenizer import OWN, Tokenizer
from retrieval.video import BrokenVideo, read_video
from support import damage
from support.fuzz import rounds

VIDEOS = [Video(f"video{n}", f"videos/{n}.mp4", (n, n + 1.5) if n % 3 else None) for n in range(6)]


class Kind(NamedTuple):
    """A file, and what reads it to something that can be compared."""

    path: Path
    read: Callable[[], Any]


def stored(folder: Path) -> Kind:
    made = FeatureStore(folder, VIDEOS, "model", 3)
    for shard in made.shards:
        made.write(shard, torch.arange(6.0).reshape(3, 2) + shard.start, range(3))
    return Kind(made._path(made.shards[1]), lambda: FeatureStore(folder, VIDEOS, "model", 3).load())


def manifest(folder: Path) -> Kind:
    return stored(folder)._replace(path=folder / features.MANIFEST)


def index(folder: Path) -> Kind:
    tensor = torch.eye(6) + 1
    search.build(features.Features(tuple(VIDEOS), tensor, "model"), folder)

    def read():
        found = search.Index.open(folder)
        return found.fingerprint, found.search(tensor, 6)

    return Kind(folder / search.INDEX, read)


def entries(folder: Path) -> Kind:
    return index(folder)._replace(path=folder / search.ENTRIES)


def settings(folder: Path) -> Kind:
    state.Folder(str(folder)).write_json(state.SETTINGS, {"lr": 1e-4, "merge_layers": [3, 6], "name": "x\x1b\udcff"})
    return Kind(folder / state.SETTINGS, state.Folder(str(folder)).settings)


def results(folder: Path) -> Kind:
    evaluations.append(folder, [{"kind": "evaluation", "text_to_video": {"r1": 12.5}, "name": "x\x1b"}])
    return Kind(folder / evaluations.NAME, lambda: evaluations.read(folder))


def trained(folder: Path) -> Kind:
    model = torch.nn.Linear(40, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    progress = checkpoint.Progress(1, 2, 9, 12.5)
    made = checkpoint.capture(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), progress, {"lr": 0.5})
    state.Folder(str(folder)).save(made, best=False)

    def read():
        found = checkpoint.read(folder / state.LAST)
        moments = {n: (m.step, m.exp_avg, m.exp_avg_sq) for n, m in found.optimizer.state.items()}
        groups = [group.params for group in found.optimizer.param_groups]
        return found.weights, moments, groups, found.scaler, found.hparams, found.progress

    return Kind(folder / state.LAST, read)


def drawn(folder: Path, name: str) -> Kind:
    made = folder / "set"

    def read():
        synthetic.write(made, train=1, val=1, size=16, frames=4)
        return {path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.name in SET[1:]}

    read()
    return Kind(next(made.rglob(name)), read)


SET = (synthetic.MANIFEST, "MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv", "video1.mp4")
SEALED: dict[str, Callable[[Path], Kind]] = {
    "shard": stored, "manifest": manifest, "index": index, "entries": entries, "settings": settings,
    "results": results, "checkpoint": trained,
    **{name: lambda folder, name=name: drawn(folder, name) for name in SET},
}  # fmt: skip


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, features.Features):
        return same(vars(found), vars(expected))
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def refusal(kind: Kind) -> str | None:
    """Return what is said of a file that is refused."""
    try:
        kind.read()
    except (UsageError, BrokenVideo) as error:
        return str(error)
    return None


def refused(kind: Kind) -> bool:
    """Return whether a damaged file was refused, and then as it should be."""
    said = refusal(kind)
    if said is None:
        return False
    assert "\n" not in said
    assert str(kind.path) in said or str(kind.path.parent) in said
    return True


def drawn_damage(whole: bytes, count: int) -> Iterator[damage.Copy]:
    """Yield damaged copies, of each kind ``count``, and other ones in each further round of ``make fuzz``."""
    for seed in range(rounds(1)):
        yield from damage.every(whole, count, seed)


@pytest.mark.parametrize("name", SEALED)
def test_fuzz_what_the_program_wrote_is_read_as_it_was_or_refused(tmp_path, name):
    kind = SEALED[name](tmp_path)
    whole, expected = kind.path.read_bytes(), kind.read()
    outcomes = {}
    for copy in drawn_damage(whole, 24):
        kind.path.write_bytes(copy.data)
        outcomes[copy.what] = refused(kind)
        if not outcomes[copy.what]:
            assert same(kind.read(), expected), copy.what
    kind.path.write_bytes(whole)
    assert same(kind.read(), expected)
    assert sum(outcomes.values()) > 0.6 * len(outcomes), outcomes


@pytest.mark.parametrize("name", ["shard", "checkpoint", "index", "entries", "manifest", "settings", "synthetic.json"])
def test_every_flip_of_the_content_is_found(tmp_path, name):
    """Of the bytes that hold values; in headers of a zip archive some bits mean nothing."""
    kind = SEALED[name](tmp_path)
    whole, expected = kind.path.read_bytes(), kind.read()
    for copy in damage.flips(whole, 150 if name == "shard" else 60, seed=1):
        kind.path.write_bytes(copy.data)
        if not refused(kind):
            assert same(kind.read(), expected), copy.what


# -- files of others, which carry no digest ---------------------------------------------------------------------------


def annotations(folder: Path, datatype: str, name: str, content: dict[str, bytes]) -> Kind:
    (folder / "videos").mkdir(exist_ok=True)
    for video in ("a", "b"):
        (folder / f"videos/{video}.mp4").write_bytes(b"")
    for file, data in content.items():
        (folder / file).write_bytes(data)
    data = folder / "data.json" if datatype == "msrvtt" else folder
    csv = str(folder / "val.csv") if datatype == "msrvtt" else None
    return Kind(folder / name, lambda: load(datatype, str(data), str(folder / "videos"), None, csv))


MSRVTT = {"videos": [{"video_id": "a", "split": "train"}, {"video_id": "b", "split": "test"}],
          "sentences": [{"video_id": v, "caption": f"a caption of {v}"} for v in "ab"]}  # fmt: skip
LISTS = {"train_list.txt": b"a\n", "test_list.txt": b"b\n"}
CAPTIONS = {"a": [["a", "man"], ["a", "dog"]], "b": [["a", "cat"]]}
OTHERS: dict[str, Callable[[Path], Kind]] = {
    "json": lambda folder: annotations(
        folder, "msrvtt", "data.json",
        {"data.json": json.dumps(MSRVTT).encode(), "val.csv": b"video_id,sentence\nb,a dog\n"},
    ),
    "csv": lambda folder: annotations(
        folder, "msrvtt", "val.csv",
        {"data.json": json.dumps(MSRVTT).encode(), "val.csv": b'video_id,sentence\nb,"a dog, a cat"\na,a man\n'},
    ),
    "list": lambda folder: annotations(
        folder, "vatex", "test_list.txt", {**LISTS, "ref_captions.json": b'{"a": ["x"], "b": ["y"]}'}
    ),
    **{
        f"pickle{protocol}": lambda folder, protocol=protocol: annotations(
            folder, "msvd", "raw-captions.pkl", {**LISTS, "raw-captions.pkl": pickle.dumps(CAPTIONS, protocol)}
        )
        for protocol in (0, 2, 4)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_fuzz_damaged_annotations_are_read_as_what_they_say_or_refused(tmp_path, name):
    kind = OTHERS[name](tmp_path)
    whole = kind.path.read_bytes()
    kind.read()
    outcomes = set()
    for copy in drawn_damage(whole, 60):
        kind.path.write_bytes(copy.data)
        outcomes.add(refused(kind))
    assert outcomes == {True, False}


def test_fuzz_a_damaged_vocabulary(tmp_path):
    kind = Kind(tmp_path / OWN.name, lambda: Tokenizer(tmp_path / OWN.name)(["a man's dog, isn't it"], 12))
    whole = OWN.read_bytes()
    kind.path.write_bytes(whole)
    expected = kind.read()
    for copy in drawn_damage(whole, 4):
        kind.path.write_bytes(copy.data)
        if not refused(kind):
            assert same(kind.read(), expected), copy.what


def test_a_vocabulary_with_two_merges_swapped(tmp_path):
    lines = gzip.decompress(OWN.read_bytes()).decode().split("\n")
    lines[7], lines[8] = lines[8], lines[7]
    (tmp_path / OWN.name).write_bytes(gzip.compress("\n".join(lines).encode(), 1))
    with pytest.raises(UsageError, match="some of its merges are others"):
        Tokenizer(tmp_path / OWN.name)


def test_fuzz_a_damaged_video(tmp_path):
    synthetic.write(tmp_path / "set", train=1, val=1, size=16, frames=8)
    path = tmp_path / "set/videos/video0.mp4"
    kind = Kind(path, lambda: read_video(path, 4, 16))
    whole = path.read_bytes()
    outcomes = set()
    for copy in drawn_damage(whole, 24):
        path.write_bytes(copy.data)
        outcomes.add(refused(kind))
        if not refused(kind):
            frames, real = kind.read()
            assert frames.shape == (4, 3, 16, 16)
            assert 1 <= real <= 4
    assert outcomes == {True, False}


def test_the_same_damage_every_time():
    data = os.urandom(3000)
    first, again = ([*damage.every(data, 12)] for _ in range(2))
    assert first == again
    assert all(copy.data != data for copy in first)
    flipped = [copy.data for copy in damage.flips(data, 12)]
    assert all(sum((a ^ b).bit_count() for a, b in zip(data, copy, strict=True)) == 1 for copy in flipped)
    assert [*damage.flips(b"", 5)] == []
