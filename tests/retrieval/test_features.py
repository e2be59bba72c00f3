# SPDX-License-Identifier: Apache-2.0
"""Files written whole or not at all, and features in shards: resumed after every kind of kill, never mixed."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch

from retrieval import atomic, features, sealed
from retrieval.corpus import Video
from retrieval.errors import UsageError
from retrieval.features import FeatureStore, Shard
from support import ROOT

VIDEOS = [Video(f"video{n}", f"videos/{n}.mp4", (n, n + 1.5) if n % 3 else None) for n in range(10)]
GOOD = [0, 2, 3, 4, 5, 7, 8, 9]  # the others are broken


def store(folder: Path) -> FeatureStore:
    return FeatureStore(folder, VIDEOS, "model", shard_size=4)


def fill(store: FeatureStore, shards: Sequence[Shard]) -> None:
    for shard in shards:
        kept = [n for n in range(shard.stop - shard.start) if shard.start + n in GOOD]
        numbers = torch.tensor([shard.start + n for n in kept], dtype=torch.float32)
        store.write(shard, numbers[:, None] + torch.arange(3) / 4, kept)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """The files of a store that nothing disturbed."""
    made = store(tmp_path / "whole")
    fill(made, made.pending())
    return contents(tmp_path / "whole")


# files


def test_replace_writes_and_overwrites(tmp_path):
    for text in ("old", "new"):
        atomic.replace(tmp_path / "file.txt", lambda file, text=text: file.write_text(text))
        assert contents(tmp_path) == {"file.txt": text.encode()}
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")

    def write(file):
        file.write_bytes(b"ne")
        raise error

    with pytest.raises(type(error)):
        atomic.replace(tmp_path / "file", write)
    assert contents(tmp_path) == {"file": b"old"}


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    def write(file):
        file.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UsageError, match=r"features.bin can't be written: No space left on device; give") as caught:
        atomic.replace(tmp_path / "features.bin", write)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(UsageError, match="can't be written"):
            atomic.replace(tmp_path / folder / "a", lambda file: file.write_bytes(b""))
    with pytest.raises(UsageError, match="can't be made"):
        store(tmp_path / "file")


def test_data_reach_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (calls.append((os.fstat(n).st_ino, os.fstat(n).st_size)), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), rename(a, b)))
    atomic.replace(tmp_path / "file", lambda file: file.write_bytes(b"data"))
    file, folder = ((path.stat().st_ino, path.stat().st_size) for path in (tmp_path / "file", tmp_path))
    assert calls == [file, "replace", folder]


def test_a_sweep_spares_what_is_being_written(tmp_path):
    (tmp_path / f"{atomic.PREFIX}0123-file").write_bytes(b"left by a killed process")

    def write(file):
        file.write_bytes(b"da")
        atomic.sweep(tmp_path)
        with file.open("ab") as rest:
            rest.write(b"ta")

    atomic.replace(tmp_path / "file", write)
    assert contents(tmp_path) == {"file": b"data"}


# the store


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("size", [1, 4, 10, 256])
def test_what_is_written_is_loaded(tmp_path, dtype, shape, size):
    made = FeatureStore(tmp_path, VIDEOS, "model", size)
    everything = torch.randn(10, *shape).to(dtype)
    assert not made.complete
    for shard in reversed(made.pending()):
        kept = [n for n in range(shard.stop - shard.start) if shard.start + n in GOOD]
        made.write(shard, everything[shard.start : shard.stop][kept], kept)
    assert made.complete
    loaded = FeatureStore(tmp_path, VIDEOS, "model").load()
    assert loaded.videos == tuple(VIDEOS[n] for n in GOOD)
    assert torch.equal(loaded.tensor, everything[GOOD])
    assert loaded.tensor.dtype == dtype
    assert loaded.fingerprint == "model"


def test_features_made_in_inference_mode_or_with_gradients(tmp_path):
    made = FeatureStore(tmp_path, VIDEOS, "model")
    with torch.inference_mode():
        made.write(made.shards[0], torch.ones(3, 10).t(), range(10))  # not contiguous either
    assert made.load().tensor.shape == (10, 3)
    made.write(made.shards[0], torch.zeros(10, 3, requires_grad=True), range(10))
    assert not made.load().tensor.any()


def test_shards_are_dealt_to_processes_whatever_is_there(tmp_path):
    made = FeatureStore(tmp_path, VIDEOS, "model", 2)
    assert made.shards == tuple(Shard(n, 2 * n, 2 * n + 2) for n in range(5))
    assert [[shard.number for shard in made.pending(rank, 2)] for rank in range(2)] == [[0, 2, 4], [1, 3]]
    fill(made, made.shards[:3])
    assert [[shard.number for shard in made.pending(rank, 2)] for rank in range(2)] == [[4], [3]]
    assert [shard.number for shard in made.pending(4, 9)] == [4]


def test_a_shard_tells_its_videos(tmp_path, whole):
    data = whole["features-00001-of-00003.safetensors"]
    assert safetensors.torch.load(data)["features"].tolist() == [[n, n + 0.25, n + 0.5] for n in (4, 5, 7)]
    told = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][sealed.KEY])
    assert (told["format"], told["fingerprint"], told["kept"]) == (2, "model", [0, 1, 3])
    assert told["kept_videos"] == [
        ["video4", "videos/4.mp4", [4, 5.5]], ["video5", "videos/5.mp4", [5, 6.5]], ["video7", "videos/7.mp4", [7, 8.5]]
    ]  # fmt: skip


def test_a_shard_without_a_readable_video(tmp_path):
    made = FeatureStore(tmp_path, VIDEOS, "model", 5)
    made.write(made.shards[0], torch.zeros(0, 7), [])
    made.write(made.shards[1], torch.ones(1, 3), [4])
    loaded = made.load()
    assert loaded.videos == (VIDEOS[9],)
    assert loaded.tensor.tolist() == [[1, 1, 1]]
    made.write(made.shards[1], torch.zeros(0, 3), [])
    assert made.complete
    assert made.load().videos == ()


def test_a_store_keeps_the_shard_size_it_began_with(tmp_path):
    fill(made := store(tmp_path), store(tmp_path).shards[:2])
    again = FeatureStore(tmp_path, VIDEOS, "model", shard_size=256)
    assert again.shard_size == 4
    assert again.pending() == made.pending() == [Shard(2, 8, 10)]


OTHER = [
    (VIDEOS, "another model", "fingerprint"),
    (VIDEOS[:9], "model", "corpus"),
    (VIDEOS[::-1], "model", "corpus"),
    ([Video("other", "videos/0.mp4"), *VIDEOS[1:]], "model", "corpus"),
    ([Video("video0", "elsewhere/0.mp4"), *VIDEOS[1:]], "model", "corpus"),
    ([Video("video0", "videos/0.mp4", (0, 1)), *VIDEOS[1:]], "model", "corpus"),
]


@pytest.mark.parametrize(("videos", "mark", "differing"), OTHER)
def test_another_model_or_corpus_is_refused(tmp_path, videos, mark, differing):
    first = store(tmp_path)
    with pytest.raises(UsageError, match=f"features of another model or corpus: manifest.json.* {differing}; give"):
        FeatureStore(tmp_path, videos, mark, 4)
    # two that began at once: neither saw the other's manifest, the later one's stays
    (tmp_path / features.MANIFEST).unlink()
    later = FeatureStore(tmp_path, videos, mark, 4)
    for touch in (first.pending, first.load, lambda: fill(first, first.shards[:1]), lambda: first.complete):
        with pytest.raises(UsageError, match=r"manifest.json differs in"):
            touch()
    assert later.pending() == list(later.shards)


def test_a_shard_of_another_model_is_never_mixed_in(tmp_path):
    other = FeatureStore(tmp_path / "other", VIDEOS, "another model", 4)
    fill(other, other.shards)
    ours = store(tmp_path / "ours")
    fill(ours, ours.shards)
    name = "features-00001-of-00003.safetensors"
    (tmp_path / "ours" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    for touch in (ours.load, ours.pending):
        with pytest.raises(UsageError, match=f"another model or corpus: {name} differs in fingerprint"):
            touch()


def test_a_shard_in_the_place_of_another_is_refused(tmp_path):
    fill(made := store(tmp_path), store(tmp_path).shards)
    first, second = sorted(tmp_path.glob("features-*"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match="differs in start, stop"):
        made.load()


@pytest.mark.parametrize("left", [0, 3, 50, -1])
def test_a_truncated_shard_is_pending(tmp_path, whole, left):
    made = store(tmp_path / "whole")
    path = tmp_path / "whole" / "features-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert made.pending() == [Shard(1, 4, 8)]
    assert not made.complete
    with pytest.raises(UsageError, match="lacks 1 of 3 shards: run --index again"):
        made.load()
    fill(made, made.pending())
    assert contents(tmp_path / "whole") == whole


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_damaged_manifest(tmp_path, text):
    store(tmp_path)
    (tmp_path / features.MANIFEST).write_text(text, "latin-1")
    with pytest.raises(UsageError, match=r"manifest.json .*give another folder or remove this one"):
        store(tmp_path)


@pytest.mark.parametrize("second", [torch.zeros(4, 5), torch.zeros(4, 1, 3), torch.zeros(4, 3).half()])
def test_shards_of_different_widths_are_refused(tmp_path, second):
    fill(made := store(tmp_path), store(tmp_path).shards)
    made.write(made.shards[1], second, range(4))
    with pytest.raises(UsageError, match=r"00001-of-00003.safetensors hold features of different widths or types"):
        made.load()


@pytest.mark.parametrize(
    ("tensor", "kept", "named"),
    [
        (torch.zeros(4), range(4), "features must be"),
        (torch.zeros(4, 3).double(), range(4), "features must be"),
        (torch.zeros(3, 3), range(4), "kept must be 3"),
        (torch.zeros(2, 3), [1, 0], "kept must be 2 rising"),
        (torch.zeros(2, 3), [1, 1], "kept must be 2 rising"),
        (torch.zeros(2, 3), [3, 4], "kept must be 2 rising numbers from 0 to 3"),
    ],
)
def test_bad_arguments_of_write(tmp_path, tensor, kept, named):
    made = store(tmp_path)
    with pytest.raises(ValueError, match=named):
        made.write(made.shards[0], tensor, kept)
    assert made.pending() == list(made.shards)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="videos must be"):
        FeatureStore(tmp_path, [], "model")
    with pytest.raises(ValueError, match="shard_size must be"):
        FeatureStore(tmp_path, VIDEOS, "model", 0)
    with pytest.raises(ValueError, match="rank must be"):
        store(tmp_path).pending(2, 2)


# kills, and processes at the same time


def forked(function: Callable[[], object]) -> int:
    if not (child := os.fork()):
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


STEPS = 4 * 4  # a manifest and three shards are each written in halves, synced, renamed, and their folder synced
ATTEMPTS = 6


def kill_at_every_step(folder: Path) -> None:
    """Fill stores ``folder/0``, ``folder/1`` … until the process dies at step 0, 1 … of writing files."""

    def fill_until(step: int) -> None:
        steps = itertools.count()

        def counted(call):
            def counting(*args):
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)

            return counting

        def write_in_halves(path, data):
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                counted(file.write)(data[len(data) // 2 :])

        Path.write_bytes = write_in_halves
        Path.write_text = lambda path, text: write_in_halves(path, text.encode())
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        made = store(folder / str(step))
        fill(made, made.pending())

    for step in range(STEPS):
        assert exit_code(forked(lambda step=step: fill_until(step))) == -signal.SIGKILL


def fill_at_once(folder: Path) -> None:
    """Two processes fill each store, one shard after the other in turn or, every other time, both all of them."""
    for attempt in range(ATTEMPTS):

        def share(rank: int, attempt=attempt) -> None:
            made = store(folder / str(attempt))
            fill(made, made.pending(rank, 2) if attempt % 2 else made.shards)

        children = [forked(lambda rank=rank: share(rank)) for rank in range(2)]
        assert [exit_code(child) for child in children] == [0, 0]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> Path:
    """A folder of stores that were written under both; in a process of its own, which forks as it has no threads."""
    folder = tmp_path_factory.mktemp("disturbed")
    script = "import sys, test_features as t; f = t.Path(sys.argv[1])\n"
    script += "t.kill_at_every_step(f / 'killed'); t.fill_at_once(f / 'at once')"
    path = os.pathsep.join(str(ROOT / name) for name in ("tests/retrieval", "tests", "examples/stop_retrieval"))
    subprocess.run(
        [sys.executable, "-c", script, str(folder)], check=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )
    return folder


@pytest.mark.slow
def test_a_store_killed_at_any_step_resumes_to_the_same(disturbed, whole):
    left_behind, pending = 0, []
    for step in range(STEPS):
        folder = disturbed / "killed" / str(step)
        left_behind += any(name.startswith(atomic.PREFIX) for name in contents(folder))
        resumed = store(folder)
        pending.append(len(resumed.pending()))
        fill(resumed, resumed.pending())
        assert contents(folder) == whole
    assert left_behind == 3 * len(whole)
    assert pending == [3] * 7 + [2] * 4 + [1] * 4 + [0]


def test_two_processes_at_once(disturbed, whole):
    for attempt in range(ATTEMPTS):
        assert contents(disturbed / "at once" / str(attempt)) == whole


# the fingerprint

STATE = {
    "weight": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(2.0), "half": torch.ones(2, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
}  # fmt: skip
SETTINGS = {"frames": 12, "tome": {"r": 2, "prop_attn": True}}


def test_the_fingerprint_never_changes():
    expected = "6dc6384c74d908d0aa8a59aef2f947197afffce324854559d563edcd6da4d7ec"
    assert features.fingerprint(STATE, SETTINGS) == expected


def test_the_fingerprint_depends_on_no_order_and_no_layout():
    expected = features.fingerprint(STATE, SETTINGS)
    state = {name: STATE[name] for name in reversed(STATE)}
    state["weight"] = STATE["weight"].t().contiguous().t().requires_grad_()
    assert features.fingerprint(state, dict(reversed(SETTINGS.items()))) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"weight": STATE["weight"].reshape(3, 2)},
        {"weight": STATE["weight"].int()},
        {"weight": STATE["weight"] + torch.eye(2, 3) * 1e-6},
        {"scale": torch.tensor(-2.0)},
        {"none": torch.zeros(4, 0)},
        {"extra": torch.zeros(0)},
    ],
)
def test_the_fingerprint_depends_on_every_weight(change):
    assert features.fingerprint(STATE | change, SETTINGS) != features.fingerprint(STATE, SETTINGS)


@pytest.mark.parametrize("change", [{"frames": 13}, {"tome": {"r": 2, "prop_attn": False}}, {"more": None}])
def test_the_fingerprint_depends_on_every_setting(change):
    assert features.fingerprint(STATE, SETTINGS | change) != features.fingerprint(STATE, SETTINGS)
