# SPDX-License-Identifier: Apache-2.0
"""Files that were made to harm: of the right digest, with anything in them. Each is refused in one line."""

import copy
import hashlib
import json
import math
import struct

import faiss
import numpy as np
import pytest
import safetensors.torch
import torch

from retrieval import checkpoint, features, options, sealed, search, state, train
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


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "null", DEEP, "[" * 100_000, '{"lr": 1}', "9" * 5000, "\ud800", '{"a":'])
def test_settings_that_nothing_vouches_for(tmp_path, text):
    (tmp_path / state.SETTINGS).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=r"hparams_train\.json .*; remove it to begin anew") as caught:
        state.Folder(str(tmp_path)).settings()
    one_line(caught.value)


def run_settings() -> dict:
    merging = ["--tome_r", "3", "--merge_layers", "1", "--merge_frame_nums", "2", "--merge_token_proportions", "5-5"]
    args = options.complete(options.read(["--output_dir", "o", *merging]))
    args.world = 1
    return options.settings(args)


def test_the_settings_of_every_run_are_those_that_its_flags_gave():
    run = run_settings()
    found = options.checked(json.loads(json.dumps(run)), "ckpt")
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()} == run
    assert found["merge_token_proportions"] == (5, 5)
    kept = {name: value for name, value in run.items() if name not in options.FREE_TO_CHANGE}
    assert options.checked(kept, "ckpt").keys() == kept.keys()


WRONG = [
    *((name, None) for name in ("lr", "seed", "datatype", "do_train", "lora", "epochs", "precision", "tome_r", "wd")),
    *((name, value) for name in ("epochs", "batch_size", "max_frames", "seed")
      for value in (-1, 1.5, True, "4", [4], {}, 10**30, math.nan, torch.tensor(1), b"4")),
    *((name, value) for name in ("lr", "beta1", "warmup_proportion", "clip_grad_norm")
      for value in (-0.5, math.nan, math.inf, "0.1", True, [], torch.ones(2), 10**400)),
    *((name, value) for name in ("lora", "fsdp", "freeze_clip", "tome_prop_attn", "expand_msrvtt_sentences")
      for value in (0, 1, "1", 1.0, [], torch.tensor(True))),
    *((name, value) for name in ("merge_layers", "merge_frame_nums")
      for value in (5, "1-2", [1.0], ["1"], [[1]], [True], [-1], [None], {"a": 1})),
    *((name, value)
      for name in ("datatype", "precision", "temporal_prompt", "pretrained_clip_name", "sim_header", "optim")
      for value in (5, "x", ["msrvtt"], True, torch.ones(1))),
    *((name, value) for name in ("data_path", "pretrained_dir", "init_model", "index", "output_dir")
      for value in (5, ["x"], "a\0b", "\ud800", True)),
    ("precision", "fp16"), ("optim", "BertAdam"), ("sim_header", "seqLSTM"), ("query", "x"), ("query", [5]),
    ("slice_framepos", 3), ("slice_framepos", True), ("frame_pos", 1.0), ("max_words", 1), ("tome_preset", "none"),
    ("world", 0), ("world", "1"), ("world", True), ("feature_framerate", 0.0),
]  # fmt: skip


def test_a_value_that_no_flag_gives_is_refused():
    run = run_settings()
    for name, value in WRONG:
        with pytest.raises(
            UsageError, match=rf"the settings in ckpt have a value for --{name} that no run has"
        ) as caught:
            options.checked(run | {name: value}, "ckpt")
        assert len(one_line(caught.value)) < 400


@pytest.mark.parametrize("run", [[], 5, None, "x", torch.ones(3)])
def test_settings_of_another_kind(run):
    with pytest.raises(UsageError, match="the settings in ckpt are no object"):
        options.checked(run, "ckpt")


@pytest.mark.parametrize("name", ["unknown", "__class__", "notes", "given", "help", 5])
def test_a_setting_that_is_no_flag_is_refused(name):
    with pytest.raises(UsageError, match="which is no flag here"):
        options.checked(run_settings() | {name: 1}, "ckpt")


@pytest.mark.parametrize("name", ["lr", "batch_size", "tome_r", "world", "datatype"])
def test_a_setting_that_is_missing(name):
    run = run_settings()
    del run[name]
    with pytest.raises(UsageError, match=f"the settings in ckpt lack {name}"):
        options.checked(run, "ckpt")


def test_both_ways_to_take_settings_over_check_them():
    args = options.read(["--output_dir", "o"])
    args.world = 1
    for take in (options.adopt, options.complete):
        with pytest.raises(UsageError, match=r"ckpt have a value for --lr"):
            take(copy.deepcopy(args), run_settings() | {"lr": "x"}, "ckpt")


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Fit:
    """A model, its optimizer after a step, and what a checkpoint of them holds."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW([{"params": [p]} for p in self.model.parameters()])
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        progress = checkpoint.Progress(1, 1, 4, 50.0)
        self.content = checkpoint.capture(self.model, self.optimizer, self.scaler, progress, {"lr": 0.5})

    def resume(self, path, content):
        torch.save(content, path)
        found = checkpoint.read(path)
        return checkpoint.restore(found, self.model, self.optimizer, self.scaler)


ON = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
MOMENTS = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}
GROUPS = [{"params": ["weight"]}, {"params": ["bias"]}]
NOT_OURS = {
    "state_dict": [[], 5, None, {"weight": 5}, {5: torch.ones(1)}, {}, torch.ones(2), {"weight": torch.ones(2, 3)},
                   {"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)},
                   {"weight": torch.ones(3, 2), "bias": torch.ones(2)},
                   {"weight": torch.ones(2, 3).half(), "bias": torch.ones(2)},
                   {"weight": torch.ones(2, 3).to_sparse(), "bias": torch.ones(2)},
                   {"weight": torch.ones(2, 3, device="meta"), "bias": torch.ones(2)},
                   {"weight": torch.ones(2, 3, dtype=torch.complex64), "bias": torch.ones(2)}],
    "optimizer": [5, [], None, {}, {"state": {}}, {"state": [], "param_groups": GROUPS},
                  {"state": {}, "param_groups": GROUPS}, {"state": {5: MOMENTS}, "param_groups": GROUPS},
                  {"state": {"weight": MOMENTS}, "param_groups": GROUPS[::-1]},
                  {"state": {"weight": MOMENTS}, "param_groups": [5]},
                  {"state": {"other": MOMENTS}, "param_groups": GROUPS},
                  {"state": {"weight": MOMENTS}, "param_groups": [{"params": [0]}, {"params": [1]}]},
                  {"state": {"weight": MOMENTS}, "param_groups": [{"params": ["weight", "bias"]}]},
                  {"state": {"weight": {**MOMENTS, "step": 1}}, "param_groups": GROUPS},
                  {"state": {"weight": {**MOMENTS, "step": torch.ones(2)}}, "param_groups": GROUPS},
                  {"state": {"weight": {**MOMENTS, "exp_avg": torch.zeros(3, 2)}}, "param_groups": GROUPS},
                  {"state": {"weight": {**MOMENTS, "exp_avg_sq": torch.zeros(2, 3).int()}}, "param_groups": GROUPS},
                  {"state": {"weight": {**MOMENTS, "more": torch.zeros(1)}}, "param_groups": GROUPS}],
    "epoch": [-1, "a", 1.0, None, True, [1], 10**30, torch.tensor(1)],
    "step": [-1, "a", 1.0, None, True, {}, 10**30],
    "global_step": [-1, "a", None, False],
    "best_acc1": [None, "x", math.nan, math.inf, 101, -2, [50.0], True, torch.tensor(5.0)],
    "scaler": [None, 5, [], "x", {"scale": 1.0}, {5: 1}, ON | {"scale": "x"}, ON | {"scale": math.nan},
               ON | {"scale": 0.0}, ON | {"growth_interval": 1.5}, ON | {"more": 1}, ON | {"backoff_factor": 2.0}],
    "hparams": [[], 5, None, "x", {5: 1}, torch.ones(1)],
}  # fmt: skip


def test_what_was_saved_is_restored(tmp_path):
    fit = Fit()
    assert fit.resume(tmp_path / "ckpt", fit.content) == checkpoint.Progress(1, 1, 4, 50.0)


def test_a_parameter_that_never_had_a_gradient_has_none_after_going_on(tmp_path):
    """STOP proper has two."""
    fit, again = Fit(), Fit()
    for each in (fit, again):
        each.optimizer = torch.optim.AdamW([{"params": [p]} for p in each.model.parameters()])
        each.model.weight.grad = None
    fit.optimizer.step()
    again.model.bias.grad = None  # as a model is before its first step
    content = checkpoint.capture(fit.model, fit.optimizer, fit.scaler, checkpoint.Progress(0, 1, 1, 5.0), {})
    assert content["optimizer"]["state"].keys() == {"bias"}
    again.resume(tmp_path / "ckpt", content)
    assert [*again.optimizer.state] == [again.model.bias]
    moments = [each.optimizer.state[each.model.bias] for each in (fit, again)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("key", NOT_OURS)
def test_a_checkpoint_with_anything_in_it(tmp_path, key):
    fit = Fit()
    before = copy.deepcopy(fit.model.state_dict())
    path = tmp_path / "ckpt.pth.tar"
    for value in NOT_OURS[key]:
        with pytest.raises(UsageError) as caught:
            fit.resume(path, fit.content | {key: value})
        assert str(path) in one_line(caught.value), value
        assert all(torch.equal(tensor, before[name]) for name, tensor in fit.model.state_dict().items())
    content = {name: value for name, value in fit.content.items() if name != key}
    with pytest.raises(UsageError, match=rf"ckpt\.pth\.tar is no checkpoint of this program \({key} is missing\)"):
        fit.resume(path, content)


CONTENTS = {
    "nothing": b"", "text": b"hello there", "numbers": b"1 2 3\n" * 99, "zeros": bytes(5000),
    "zip": b"PK\x03\x04" + bytes(99), "pickle": b"\x80\x04N.", "json": b"{}",
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_a_checkpoint_that_is_none(tmp_path, name):
    path = tmp_path / "ckpt.pth.tar"
    path.write_bytes(CONTENTS[name])
    for read in (checkpoint.read, checkpoint.settings_of, lambda path: checkpoint.load_weights(path, Fit().model)):
        with pytest.raises(UsageError, match=r"ckpt\.pth\.tar") as caught:
            read(path)
        one_line(caught.value)


@pytest.mark.parametrize("content", [[], 5, None, "x", {5: 6}, {}, {"state_dict": 5}, torch.ones(2)])
def test_a_checkpoint_of_another_kind(tmp_path, content):
    path = tmp_path / "ckpt.pth.tar"
    torch.save(content, path)
    for read in (checkpoint.read, lambda path: checkpoint.load_weights(path, Fit().model)):
        with pytest.raises(UsageError, match=r"ckpt\.pth\.tar") as caught:
            read(path)
        one_line(caught.value)
    assert checkpoint.settings_of(path) is None


def test_a_checkpoint_of_a_training_of_other_length():
    training = train.Training.__new__(train.Training)
    training.sampler, training.args = type("S", (), {"steps": 3}), type("A", (), {"epochs": 2})
    for epoch, step, total in ((0, 3, 3), (0, 1, 2), (3, 0, 9), (1, 0, 2)):
        found = checkpoint.Checkpoint("ckpt", {}, None, None, {}, checkpoint.Progress(epoch, step, total))
        with pytest.raises(UsageError, match="ckpt is at step"):
            training._must_be_ours(found)
    for epoch, step, total in ((0, 0, 0), (1, 2, 5), (2, 0, 6)):
        training._must_be_ours(
            checkpoint.Checkpoint("ckpt", {}, None, None, {}, checkpoint.Progress(epoch, step, total))
        )


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
