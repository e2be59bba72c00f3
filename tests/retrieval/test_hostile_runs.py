# SPDX-License-Identifier: Apache-2.0
"""Settings and checkpoints that were made to harm: of the right digest, with anything in them; each is refused in one
line."""

import copy
import json
import math

import pytest
import torch

from retrieval import checkpoint, options, state, train
from retrieval.errors import UsageError

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def one_line(said: object) -> str:
    assert "\n" not in str(said)
    return str(said)


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
    for epoch, step, total in ((0, 4, 4), (0, 1, 2), (3, 0, 9), (1, 0, 2)):
        found = checkpoint.Checkpoint("ckpt", {}, None, None, {}, checkpoint.Progress(epoch, step, total))
        with pytest.raises(UsageError, match="ckpt is at step"):
            training._must_be_ours(found)
    for epoch, step, total in ((0, 0, 0), (0, 3, 3), (1, 2, 5), (2, 0, 6)):
        training._must_be_ours(
            checkpoint.Checkpoint("ckpt", {}, None, None, {}, checkpoint.Progress(epoch, step, total))
        )
