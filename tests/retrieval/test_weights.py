# SPDX-License-Identifier: Apache-2.0
"""Where the weights of examples/stop_retrieval come from: random ones, and files that hold none."""

import json

import pytest
import torch
from safetensors.torch import save_file
from stoptome_kernels.stop import StopModel

from retrieval import model, options, run
from retrieval.errors import UsageError
from support.retrieval import TINY, clip_weights, layout, msrvtt, refused, results, weights

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


# -- weights of other libraries ---------------------------------------------------------------------------------------


def open_clip_folder(folder, **cfg):
    """Weights as open_clip's hub has them, of a small CLIP with GELU."""
    state = torch.load(clip_weights(folder) / "ViT-B-32.pt", weights_only=True)
    (folder / "ViT-B-32.pt").unlink()
    plain = {name: value for name, value in state.items() if value.is_floating_point()}
    save_file(plain, folder / "open_clip_model.safetensors")
    model = {"embed_dim": 32, "vision_cfg": {"head_width": 64}, "text_cfg": {"width": 64, "heads": 1}, **cfg}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return folder


@pytest.mark.slow
def test_weights_of_open_clip(data, tmp_path, capsys):
    """Trained, gone on with, evaluated and read from Python with the activation that their settings tell."""
    given, out = open_clip_folder(tmp_path / "clip"), tmp_path / "out"
    assert run.main(msrvtt(data, tmp_path, out, "--init_model", str(given))) == 0
    assert f"weights from {given / 'open_clip_model.safetensors'}" in (out / "log.txt").read_text()
    found = StopModel.from_checkpoint(out / "ckpt.pth.tar", max_words=16)
    assert found.config.activation == "gelu"
    assert run.main(["--output_dir", str(out), "--resume", "auto"]) == 0
    assert run.main(["--output_dir", str(out), "--do_eval"]) == 0
    evaluated = results(out)
    (given / "open_clip_config.json").unlink()
    said = refused(capsys, *msrvtt(data, tmp_path, tmp_path / "other", "--init_model", str(given)))
    assert "give --activation='quick_gelu' or --activation='gelu'" in said
    again = msrvtt(data, tmp_path, tmp_path / "other", "--init_model", str(given), "--activation", "gelu")
    assert run.main(again) == 0
    assert results(tmp_path / "other")["text_to_video"] == evaluated["text_to_video"]
    both = weights(out), weights(tmp_path / "other")
    assert all(torch.equal(both[0][name], value) for name, value in both[1].items())
    best = str(out / "ckpt.best.pth.tar")
    said = refused(capsys, *msrvtt(data, tmp_path, tmp_path / "a", "--init_model", best, "--activation", "quick_gelu"))
    assert "--activation='quick_gelu' was given" in said


@pytest.mark.slow
def test_weights_of_open_clip_are_evaluated_without_training(data, tmp_path):
    given, out = open_clip_folder(tmp_path / "clip"), tmp_path / "out"
    assert run.main(msrvtt(data, tmp_path, out, "--do_eval", "--init_model", str(given))) == 0


def test_settings_that_contradict_the_flag(data, tmp_path, capsys):
    given = open_clip_folder(tmp_path / "clip", quick_gelu=True)
    said = refused(capsys, *msrvtt(data, tmp_path, tmp_path / "a", "--init_model", str(given), "--activation", "gelu"))
    assert "the settings next to it say --activation='quick_gelu', not 'gelu'" in said
    (tmp_path / "none").mkdir()
    assert "a folder without model.safetensors" in refused(
        capsys, *msrvtt(data, tmp_path, tmp_path / "b", "--init_model", str(tmp_path / "none"))
    )
