# SPDX-License-Identifier: Apache-2.0
"""The index finds what brute force finds, is always of one generation, and lives with torch in one process."""

import builtins
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stoptome_kernels.stop import StopModel

from retrieval import atomic, search
from retrieval.corpus import Video
from retrieval.errors import UsageError
from retrieval.features import Features
from retrieval.search import Hit, Index
from support import ROOT


def corpus(count=40, *shape, seed=0, name="video") -> Features:
    rng = torch.Generator().manual_seed(seed)
    videos = [Video(f"{name}{n}", f"{name}s/{n}.mp4", (n, n + 0.5) if n % 2 else None) for n in range(count)]
    return Features(tuple(videos), 5 * torch.randn(count, *(shape or (16,)), generator=rng), f"model of {name}s")


def ids(hits: list[list[Hit]]) -> list[list[str]]:
    return [[hit.id for hit in found] for found in hits]


def cosines(text: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """The model's own, with a scale of 1."""
    model = SimpleNamespace(config=SimpleNamespace(embed_dim=text.shape[1]), logit_scale=torch.zeros(()))
    return StopModel.similarity(model, text, video)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("queries", [1, 50])  # FAISS multiplies few queries and many in different ways
def test_equals_brute_force(tmp_path, shape, dtype, queries):
    features = corpus(300, *shape)
    features = Features(features.videos, features.tensor.to(dtype))
    text = torch.randn(queries, 16) * 7
    search.build(features, tmp_path)
    index = Index.open(tmp_path)
    assert len(index) == 300
    scores, order = cosines(text, features.tensor).sort(1, descending=True)
    hits = index.search(text, 9)
    assert ids(hits) == [[f"video{n}" for n in row] for row in order[:, :9].tolist()]
    torch.testing.assert_close(torch.tensor([[hit.score for hit in found] for found in hits]), scores[:, :9])


def test_a_hit(tmp_path):
    features = Features(
        (Video("a", "x/a.mp4"), Video("b", "x/b.mp4", (1, 2.5))), torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    )
    search.build(features, tmp_path)
    (hits,) = Index.open(tmp_path).search(torch.tensor([[5.0, 0.0]]), 2)
    assert hits == [
        Hit(1, pytest.approx(0.6), "b", "x/b.mp4", (1, 2.5)), Hit(2, pytest.approx(0.0), "a", "x/a.mp4", None)
    ]  # fmt: skip


def test_no_more_are_found_than_there_are(tmp_path):
    search.build(corpus(3), tmp_path)
    assert [hit.rank for hit in Index.open(tmp_path).search(torch.randn(1, 16), 99)[0]] == [1, 2, 3]
    assert Index.open(tmp_path).search(torch.zeros(0, 16), 5) == []


def test_features_of_inference_mode_and_names_of_any_kind(tmp_path):
    name = os.fsdecode(b"caf\xc3\xa9 \xff\n.mp4")  # as os.walk gives names that are no UTF-8
    with torch.inference_mode():
        search.build(Features((Video(name, name),), torch.ones(1, 4)), tmp_path)
        assert ids(Index.open(tmp_path).search(torch.ones(1, 4), 1)) == [[name]]
    search.build(Features((Video(name, name),), torch.ones(1, 4, requires_grad=True)), tmp_path)
    assert ids(Index.open(tmp_path).search(torch.ones(1, 4, requires_grad=True), 1)) == [[name]]


def test_the_index_tells_whose_features_it_holds(tmp_path):
    search.build(corpus(), tmp_path)
    assert Index.open(tmp_path).fingerprint == "model of videos"


# refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(tmp_path, value):
    features = corpus(5)
    features.tensor[3, 1] = value
    with pytest.raises(UsageError, match=r"videos/3.mp4 \(1 of 5 videos\) are not finite"):
        search.build(features, tmp_path)
    assert list(tmp_path.iterdir()) == []
    search.build(corpus(), tmp_path)
    text = torch.randn(3, 16)
    text[1, 0] = value
    with pytest.raises(UsageError, match="query 2 are not finite"):
        Index.open(tmp_path).search(text, 1)


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no video that could be read"):
        search.build(Features((), torch.zeros(0, 0)), tmp_path)


def test_queries_of_another_model_are_refused(tmp_path):
    search.build(corpus(), tmp_path)
    with pytest.raises(UsageError, match="16 channels, the model makes 8: build the index with --index"):
        Index.open(tmp_path).search(torch.randn(1, 8), 1)


@pytest.mark.parametrize(("shape", "k"), [((16,), 1), ((1, 1, 16), 1), ((1, 16), 0)])
def test_bad_arguments(tmp_path, shape, k):
    search.build(corpus(), tmp_path)
    with pytest.raises(ValueError, match="text_features must be"):
        Index.open(tmp_path).search(torch.zeros(shape), k)


def test_no_index(tmp_path):
    with pytest.raises(UsageError, match=r"no index in .*: build it with --index"):
        Index.open(tmp_path)
    search.build(corpus(), tmp_path)
    (tmp_path / search.ENTRIES).unlink()
    with pytest.raises(UsageError, match=r"no index in .*: build it with --index"):
        Index.open(tmp_path)


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", flipped, lambda data: data + b"\0"])
def test_a_damaged_index(tmp_path, damage):
    search.build(corpus(), tmp_path)
    path = tmp_path / search.INDEX
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r"is damaged .*: build it anew with --index"):
        Index.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2, "generations": {}}', '{"format": 1}'])
def test_damaged_entries(tmp_path, text):
    search.build(corpus(), tmp_path)
    (tmp_path / search.ENTRIES).write_text(text)
    with pytest.raises(UsageError, match=r"is damaged .*: build it anew with --index"):
        Index.open(tmp_path)
    search.build(corpus(), tmp_path)
    assert len(Index.open(tmp_path)) == 40


def test_the_entries_of_another_index(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        search.build(corpus(seed=ord(name)), tmp_path / name)
    (tmp_path / "a" / search.INDEX).write_bytes((tmp_path / "b" / search.INDEX).read_bytes())
    with pytest.raises(UsageError, match=r"is damaged \(entries.json does not belong to index.faiss\)"):
        Index.open(tmp_path / "a")


def test_without_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (lambda: search.build(corpus(), tmp_path), lambda: Index.open(tmp_path)):
        with pytest.raises(UsageError, match="pip install faiss-cpu"):
            call()


# generations


def nearest(folder: Path, features: Features) -> str:
    """Return what the index finds for the features themselves: each video, if index and entries belong together."""
    index = Index.open(folder)
    assert [found[0] for found in ids(index.search(features.tensor, 1))] == [video.id for video in features.videos]
    return index.fingerprint


@pytest.mark.parametrize("killed_before", [1, 2, 3, 4])
def test_a_build_killed_at_any_step_leaves_the_old_index_or_the_new(tmp_path, monkeypatch, killed_before):
    old, new = corpus(20), corpus(30, seed=1, name="film")
    search.build(old, tmp_path)
    replace, steps = atomic.replace, []

    def dying(path, write):
        steps.append(path)
        if len(steps) == killed_before:
            raise KeyboardInterrupt
        replace(path, write)

    monkeypatch.setattr(atomic, "replace", dying)
    if killed_before <= 3:
        with pytest.raises(KeyboardInterrupt):
            search.build(new, tmp_path)
    else:
        search.build(new, tmp_path)
    monkeypatch.undo()
    there = old if killed_before <= 2 else new
    assert nearest(tmp_path, there) == there.fingerprint
    search.build(new, tmp_path)
    assert nearest(tmp_path, new) == new.fingerprint
    assert len(json.loads((tmp_path / search.ENTRIES).read_text())["generations"]) == 1


def test_a_reader_overtaken_by_a_build_reads_again(tmp_path, monkeypatch):
    old, new = corpus(20), corpus(30, seed=1, name="film")
    search.build(old, tmp_path)
    read, built = search._generations, []

    def overtaken(folder):  # the reader has read the index, and not yet the entries
        if not built:
            built.append(True)
            search.build(new, tmp_path)
        return read(folder)

    monkeypatch.setattr(search, "_generations", overtaken)
    assert nearest(tmp_path, new) == new.fingerprint


# FAISS beside torch

BOTH = """
import sys, torch
torch.set_num_threads(2)
square = torch.randn(600, 600)
square @ square
from retrieval import search
from retrieval.corpus import Video
from retrieval.features import Features
search._faiss().omp_set_num_threads(2)
features = torch.randn(2000, 64)
search.build(Features(tuple(Video(str(n), "") for n in range(2000)), features), sys.argv[1])
index = search.Index.open(sys.argv[1])
for _ in range(10):
    assert [int(found[0].id) for found in index.search(features[:200], 5)] == list(range(200))
    square @ square
"""


@pytest.mark.slow
def test_two_openmp_runtimes_in_one_process(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples" / "stop_retrieval"), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "error", "-c", BOTH, str(tmp_path)]
    done = subprocess.run(command, timeout=60, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_warning_of_swig_is_ignored_at_import(monkeypatch):
    imported = builtins.__import__

    def warning(name, *args):
        if name == "faiss":
            warnings.warn(message, DeprecationWarning, stacklevel=1)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", warning)
    message = "builtin type SwigPyPacked has no __module__ attribute"
    search._faiss()
    message = "something else is deprecated"
    with pytest.raises(DeprecationWarning, match="something else"):
        search._faiss()
