# SPDX-License-Identifier: Apache-2.0
"""Files that were made to harm: of the right digest, with anything in them. Each is refused in one line."""

import hashlib
import math
import struct

import faiss
import numpy as np
import pytest
import safetensors.torch
import torch

from retrieval import features, sealed, search
from retrieval.annotations import load
from retrieval.corpus import Video
from retrieval.errors import UsageError
from retrieval.features import FeatureStore

VIDEOS = [Video(f"video{n}", f"videos/{n}.mp4") for n in range(4)]
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def one_line(said: object) -> str:
    assert "\n" not in str(said)
    return str(said)


# -- features ---------------------------------------------------------------------------------------------------------


def store(folder) -> FeatureStore:
    return FeatureStore(folder, VIDEOS, "model", 2)


@pytest.mark.parametrize("value", [0, -1, "a", 1.5, True, None, 10**30, [2]])
def test_a_size_of_shards_that_none_has(tmp_path, value):
    made = store(tmp_path)
    told = {"format": features.FORMAT, "fingerprint": "model", "corpus": made._identity.corpus, "shard_size": value}
    sealed.write_json(tmp_path / features.MANIFEST, told)
    if value == 10**30:  # one shard, of all videos
        assert len(store(tmp_path).shards) == 1
        return
    with pytest.raises(UsageError, match=r"manifest\.json is not of this version .*shard_size"):
        store(tmp_path)


@pytest.mark.parametrize("change", [{"shard_size": ...}, {"more": 1}, {"format": 99}, {"corpus": 5}])
def test_a_manifest_of_other_fields(tmp_path, change):
    made = store(tmp_path)
    told = {
        "format": features.FORMAT,
        "fingerprint": "model",
        "corpus": made._identity.corpus,
        "shard_size": 2,
    } | change
    sealed.write_json(tmp_path / features.MANIFEST, {name: v for name, v in told.items() if v is not ...})
    with pytest.raises(UsageError, match=r"manifest\.json"):
        store(tmp_path)


SHARD = torch.ones(2, 3)
SHARDS = {
    "float64": ({"features": SHARD.double()}, {}),
    "integers": ({"features": SHARD.int()}, {}),
    "one more tensor": ({"features": SHARD, "more": torch.zeros(1)}, {}),
    "another tensor": ({"feature": SHARD}, {}),
    "no tensor": ({}, {}),
    "too many rows": ({"features": torch.ones(3, 3)}, {}),
    "a vector": ({"features": torch.ones(2)}, {}),
    "four dimensions": ({"features": torch.ones(2, 1, 1, 3)}, {}),
    "kept out of range": ({"features": SHARD}, {"kept": [0, 2]}),
    "kept below": ({"features": SHARD}, {"kept": [-1, 0]}),
    "kept falling": ({"features": SHARD}, {"kept": [1, 0]}),
    "kept twice": ({"features": SHARD}, {"kept": [1, 1]}),
    "kept of bools": ({"features": SHARD}, {"kept": [False, True]}),
    "kept of floats": ({"features": SHARD}, {"kept": [0.0, 1.0]}),
    "kept is a number": ({"features": SHARD}, {"kept": 2}),
    "kept is missing": ({"features": SHARD}, {"kept": ...}),
    "a start of text": ({"features": SHARD}, {"start": "0"}),
    "one more field": ({"features": SHARD}, {"more": 0}),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_of_something_else(tmp_path, name):
    made = store(tmp_path)
    tensors, change = SHARDS[name]
    told = {**made._header(made.shards[0]), "kept": [0, 1], "kept_videos": [["a", "b", None]] * 2} | change
    path = made._path(made.shards[0])
    path.write_bytes(sealed.pack(tensors, {field: value for field, value in told.items() if value is not ...}))
    for touch in (made.pending, made.load):
        with pytest.raises(UsageError) as caught:
            touch()
        assert str(path) in one_line(caught.value)
        assert "remove it and run --index again" in str(caught.value)
    path.unlink()
    assert made.pending() == list(made.shards)


@pytest.mark.parametrize("text", [None, "", "[]", "{", DEEP, '{"sha256": 5}', "9" * 5000, '{"kept": NaN}', "\ud800"])
def test_a_shard_of_other_metadata(tmp_path, text):
    made = store(tmp_path)
    told = {} if text is None else {sealed.KEY: text}
    try:
        data = safetensors.torch.save({"features": SHARD}, told)
    except UnicodeEncodeError:
        data = b"\x08\0\0\0\0\0\0\0" + b'{"a":1} '  # what safetensors itself would not write
    made._path(made.shards[0]).write_bytes(data)
    if text == "\ud800":
        assert made.pending() == list(made.shards)  # not whole
        return
    with pytest.raises(UsageError, match=r"features-00000-of-00002\.safetensors .*; remove it and run --index again"):
        made.load()


# -- the index --------------------------------------------------------------------------------------------------------


def crafted(folder, data: bytes, count: int = 4, **change) -> None:
    """An index of these bytes, and entries that vouch for them."""
    generation = {"fingerprint": "model", "entries": [["a", "a.mp4", None]] * count} | change
    (folder / search.INDEX).write_bytes(data)
    generations = {hashlib.sha256(data).hexdigest(): generation}
    sealed.write_json(folder / search.ENTRIES, {"format": search.FORMAT, "generations": generations})


def faiss_bytes(index, vectors=np.eye(4, 8, dtype=np.float32)) -> bytes:  # noqa: B008
    index.train(vectors)
    index.add(vectors)
    return faiss.serialize_index(index).tobytes()


MANY = np.eye(40, 8, dtype=np.float32)  # FAISS warns of fewer to train on
FLAT = faiss_bytes(faiss.IndexFlatIP(8))


def with_field(place: int, value: bytes) -> bytes:
    return FLAT[:place] + value + FLAT[place + len(value) :]


INDEXES = {
    "L2": faiss_bytes(faiss.IndexFlatL2(8)),
    "HNSW": faiss_bytes(faiss.IndexHNSWFlat(8, 4, faiss.METRIC_INNER_PRODUCT)),
    "IVF": faiss_bytes(faiss.IndexIVFFlat(faiss.IndexFlatIP(8), 8, 1, faiss.METRIC_INNER_PRODUCT), MANY),
    "id map": faiss_bytes(faiss.IndexPreTransform(faiss.IndexFlatIP(8))),
    "more vectors": faiss_bytes(faiss.IndexFlatIP(8), np.ones((5, 8), np.float32)),
    "fewer vectors": faiss_bytes(faiss.IndexFlatIP(8), np.ones((3, 8), np.float32)),
    "none": b"",
    "a head alone": FLAT[:45],
    "cut off": FLAT[:-4],
    "longer": FLAT + b"\0" * 4,
    "another width": with_field(4, struct.pack("<i", 7)),
    "no width": with_field(4, struct.pack("<i", 0)),
    "a width below 0": with_field(4, struct.pack("<i", -8)),
    "a huge width": with_field(4, struct.pack("<i", 2**31 - 1)),
    "another number": with_field(8, struct.pack("<q", 2**62)),
    "a number below 0": with_field(8, struct.pack("<q", -1)),
    "another size": with_field(37, struct.pack("<q", 2**61)),
    "not trained": with_field(32, b"\0"),
    "another metric": with_field(33, struct.pack("<i", 1)),
    "NaN": with_field(45, struct.pack("<f", math.nan)),
    "infinite": with_field(45, struct.pack("<f", math.inf)),
}


def test_the_crafted_indexes_are_crafted_alone(tmp_path):
    """The same path reads the one that is right."""
    crafted(tmp_path, FLAT)
    assert len(search.Index.open(tmp_path)) == 4


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_the_right_digest_and_another_content(tmp_path, monkeypatch, name):
    monkeypatch.setattr(faiss, "deserialize_index", None)
    crafted(tmp_path, INDEXES[name])
    with pytest.raises(UsageError, match=r"is damaged \(index\.faiss .*\): build it anew with --index") as caught:
        search.Index.open(tmp_path)
    assert str(tmp_path) in one_line(caught.value)


@pytest.mark.parametrize(
    "entries",
    [5, None, {}, [5], [["a", "b"]], [["a", "b", None, 1]], [["a", 5, None]], [["a", "b", [1]]], [["a", "b", ["1", 2]]],
     [["a", "b", 5]], [["a", "b", [True, 1]]]],
)  # fmt: skip
def test_entries_of_another_kind(tmp_path, entries):
    crafted(tmp_path, FLAT, entries=entries)
    with pytest.raises(UsageError, match=r"is damaged \(entries\.json .*\): build it anew"):
        search.Index.open(tmp_path)


@pytest.mark.parametrize("generations", [[], 5, None, {"x": []}, {"x": {"fingerprint": 1, "entries": []}}])
def test_generations_of_another_kind(tmp_path, generations):
    crafted(tmp_path, FLAT)
    sealed.write_json(tmp_path / search.ENTRIES, {"format": search.FORMAT, "generations": generations})
    with pytest.raises(UsageError, match=r"is damaged \(entries\.json .*\): build it anew"):
        search.Index.open(tmp_path)


@pytest.mark.parametrize("name", [search.ENTRIES, search.INDEX])
def test_an_index_that_is_a_folder(tmp_path, name):
    crafted(tmp_path, FLAT)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=r"Is a directory.*: build it anew"):
        search.Index.open(tmp_path)


# -- annotations ------------------------------------------------------------------------------------------------------


def activity(folder, text: str):
    (folder / "v.mp4").write_bytes(b"")
    (folder / "val_ids.json").write_text('["v"]')
    (folder / "val_1.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    return load("activity", str(folder), str(folder), want=("val",))["val"]


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "9" * 301])
def test_numbers_that_no_one_can_hold(tmp_path, number):
    with pytest.raises(UsageError, match=r"val_1\.json .*: holds a number of \d+ digits") as caught:
        activity(tmp_path, f'{{"v": {{"duration": {number}, "sentences": ["x"]}}}}')
    assert len(one_line(caught.value)) < 300


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "-Infinity", "-5", "0"])
def test_durations_that_mean_nothing(tmp_path, number):
    assert activity(tmp_path, f'{{"v": {{"duration": {number}, "sentences": ["x"]}}}}').videos[0].span is None


def test_a_duration_of_many_digits_is_long(tmp_path):
    found = activity(tmp_path, f'{{"v": {{"duration": {"9" * 300}, "sentences": ["x"]}}}}').videos[0]
    assert found.span == (0, 1e300)


@pytest.mark.parametrize("text", ["[" * 10**5, DEEP, "[" * 10**5 + "]" * 10**5])
def test_annotations_nested_deeply(tmp_path, text):
    with pytest.raises(UsageError, match=r"val_1\.json .*nested too deeply"):
        activity(tmp_path, text)


def test_half_a_character_is_read_as_a_mark(tmp_path, monkeypatch):
    from retrieval.tokenizer import Tokenizer

    found = activity(tmp_path, '{"v": {"duration": 1, "sentences": ["a \\ud800 b", "\\udfff"]}}')
    ids = Tokenizer()([text for _, text in found.captions], 12)
    assert (ids != 0).sum() > 4
    with pytest.raises(UsageError, match="no UTF-8"):
        activity(tmp_path, '{"v": "\ud800"}')
