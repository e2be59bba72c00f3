# SPDX-License-Identifier: Apache-2.0
"""Where the weights of examples/stop_retrieval come from: random ones, and files that hold none."""

import json

import pytest
import torch

from retrieval import model, options, run
from retrieval.errors import UsageError
from support.retrieval import TINY, layout, msrvtt, refused

LOUD = "RANDOM WEIGHTS: --random_weights"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return layout(tmp_path_factory.mktemp("msrvtt") / "set", train=4, val=2)


@pytest.mark.slow
def test_random_weights_need_no_file(data, tmp_path, monkeypatch):
    """The run goes on and is evaluated as one of random weights, without the flag."""
    monkeypatch.setitem(model.SIZES, "ViT-B/32", TINY)
    out = tmp_path / "out"
    assert run.main(msrvtt(data, tmp_path, out, "--random_weights")) == 0
    assert json.loads((out / "hparams_train.json").read_text())["random_weights"] is True
    assert (out / "log.txt").read_text().count(LOUD) == 1
    assert run.main(["--output_dir", str(out), "--resume", "auto"]) == 0
    assert (out / "log.txt").read_text().count(LOUD) == 2
    assert run.main(["--output_dir", str(out), "--do_eval"]) == 0
    assert (out / "log.txt").read_text().count(LOUD) == 3


def test_random_weights_have_the_sizes_of_clip():
    """As OpenAI's archives have them: the numbers of parameters of its two towers are known."""
    for name, millions in (("ViT-B/32", 151.28), ("ViT-B/16", 149.62), ("ViT-L/14", 427.62)):
        given = ["--output_dir", "o", "--pretrained_clip_name", name, "--random_weights", "--max_frames", "2"]
        args = options.complete(options.read(given))
        with torch.device("meta"):
            built, notes = model.build(args, options.tome_config(args))
        plain = (p for n, p in built.named_parameters() if not any(added in n for added in model.ADDED))
        assert round(model.count(plain) / 1e6, 2) == millions
        assert any(LOUD in note for note in notes)


def test_a_small_model_of_its_own_is_no_smoke_test():
    args = options.complete(options.read(["--output_dir", "o", "--random_weights"]))
    assert not any(LOUD in note for note in model.build(args, options.tome_config(args))[1])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--random_weights", "--do_eval"], "--random_weights is how a training begins"),
        (["--random_weights", "--init_model", "x"], "--random_weights and --init_model"),
    ],
)
def test_contradictions(argv, said):
    with pytest.raises(UsageError, match=said):
        options.read(["--output_dir", "o", *argv])


def test_a_run_of_before_the_flag_had_no_random_weights():
    args = options.complete(options.read(["--output_dir", "o"]))
    args.world = 1
    settings = options.settings(args)
    del settings["random_weights"]
    assert options.checked(settings, "ckpt")["random_weights"] is False


def test_a_web_page_in_place_of_weights(data, tmp_path, capsys):
    (tmp_path / "ViT-B-32.pt").write_text("<!DOCTYPE html>\n<title>Sign in</title>")
    page = str(tmp_path / "ViT-B-32.pt")
    for n, more in enumerate(([], ["--init_model", page], ["--init_model", page, "--do_eval"], ["--resume", page])):
        said = refused(capsys, *msrvtt(data, tmp_path, tmp_path / str(n), *more))
        assert f"{page} can't be read as weights (it is an HTML page" in said


def test_missing_weights_name_the_ways_out(data, tmp_path, capsys):
    said = refused(capsys, *msrvtt(data, tmp_path / "none", tmp_path / "out"))
    assert all(way in said for way in ("docs/retrieval.md, Weights", "--random_weights", "--pretrained_clip_name tiny"))
