# SPDX-License-Identifier: Apache-2.0
"""examples/stop_retrieval, stopped and gone on with: after a kill, after Ctrl-C, for more epochs; several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retrieval import run
from retrieval import train as training
from support.retrieval import MAIN, call, msrvtt, refused, results, weights


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(data, clip, tmp_path):
    more = [
        "--epochs",
        "3",
        "--save_steps",
        "1",
        "--tome_r",
        "2",
        "--num_thread_reader",
        "1",
        "--expand_msrvtt_sentences",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = call(*msrvtt(data, clip, whole, *more))
    assert done.returncode == 0, done.stderr
    argv = [sys.executable, str(MAIN), *msrvtt(data, clip, killed, *more, "--resume", "auto")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    kills = 0
    for step in (1, 4):  # as soon as this checkpoint stands: amid the next step, an evaluation or the next checkpoint
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            file = killed / "ckpt.pth.tar"
            if file.exists() and torch.load(file, weights_only=True)["global_step"] >= step:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        assert process.wait(timeout=60) in (-signal.SIGKILL, 0), process.stderr.read()
        process.stderr.close()
    assert kills == 2
    (killed / ".partial-0123-ckpt.pth.tar").write_bytes(b"half")  # what a kill may leave
    done = call(*msrvtt(data, clip, killed, *more, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stdout
    ours, theirs = weights(killed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    same = ("text_to_video", "video_to_text", "videos", "captions")
    assert [results(killed)[name] for name in same] == [results(whole)[name] for name in same]
    assert not list(killed.glob(".partial*"))
    assert run.main(msrvtt(data, clip, killed, *more, "--resume", "auto")) == 0  # nothing left to do
    assert all(torch.equal(value, theirs[name]) for name, value in weights(killed).items())


def interrupted(argv: list[str], when, **options) -> tuple[int, str]:
    """Start the program, send Ctrl-C to it and its workers as soon as ``when()``, and return exit code and stderr."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(MAIN), *argv]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        while process.poll() is None and not when():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.slow
def test_after_ctrl_c_a_run_goes_on_to_the_same_bits(data, clip, tmp_path):
    more = ["--epochs", "200", "--eval_epochs", "400", "--save_steps", "0", "--num_thread_reader", "1"]
    log = tmp_path / "out/log.txt"

    def begun():
        return log.exists() and "step 2 of 2" in log.read_text()

    code, said = interrupted(msrvtt(data, clip, tmp_path / "out", *more), begun)
    assert code == 130
    assert "Traceback" not in said
    assert f"--output_dir {tmp_path / 'out'} --resume auto" in said
    found = torch.load(tmp_path / "out/ckpt.pth.tar", weights_only=True)
    steps = found["global_step"]
    assert 2 <= steps < 400
    # as many epochs as it did, and half a one more, on the schedule of 200
    whole, epochs = tmp_path / "whole", steps // 2 + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "steps", 400)
        assert run.main(msrvtt(data, clip, whole, *more, "--epochs", str(epochs), "--save_steps", "1")) == 0
        shutil.copytree(tmp_path / "out", tmp_path / "again")
        found["hparams"]["epochs"] = epochs
        torch.save(found, tmp_path / "again/ckpt.pth.tar")
        assert run.main(["--output_dir", str(tmp_path / "again"), "--resume", "auto"]) == 0
    theirs = weights(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(tmp_path / "again").items())


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_keeps_the_epoch(data, clip, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run.main(msrvtt(data, clip, whole)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", stop)
        assert run.main(msrvtt(data, clip, out)) == 130
    assert "in the evaluation after epoch 1" in capsys.readouterr().err
    assert not (out / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_step", stop)  # no step is done twice
        assert run.main(["--output_dir", str(out), "--resume", "auto"]) == 0
    assert results(out)["text_to_video"] == results(whole)["text_to_video"]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(out).items())


@pytest.mark.slow
def test_ctrl_c_while_videos_are_made_leaves_nothing(tmp_path):
    out = tmp_path / "a/b"
    many = ["--output_dir", str(out), "--datatype", "synthetic", "--synthetic_train", "2000"]
    code, said = interrupted(many, lambda: any(out.glob(".synthetic-*/videos/*")))
    assert code == 130
    assert "Traceback" not in said
    assert not (tmp_path / "a").exists()


def test_going_on_where_there_is_no_run(data, clip, tmp_path, capsys):
    """Nobody who mistypes a folder shall wait for 2000 videos."""
    said = refused(capsys, "--output_dir", str(tmp_path / "no/run"), "--resume", "auto")
    assert f"no run in --output_dir {tmp_path / 'no/run'}" in said
    assert not (tmp_path / "no").exists()
    assert run.main(msrvtt(data, clip, tmp_path / "new", "--resume", "auto")) == 0
    assert "A NEW ONE BEGINS" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_can_have_more_epochs(trained, data, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    assert run.main(["--output_dir", str(out), "--resume", "auto"]) == 0
    assert "nothing left to do after 1 epoch" in capsys.readouterr().out
    assert run.main(["--output_dir", str(out), "--resume", "auto", "--epochs", "3"]) == 0
    assert "--epochs 3 in place of 1" in capsys.readouterr().out
    found = torch.load(out / "ckpt.pth.tar", weights_only=True)
    assert (found["epoch"], found["global_step"], found["hparams"]["epochs"]) == (3, 6, 3)
    history = json.loads((out / "results.json").read_text())["evaluations"]
    assert [each["weights"]["epoch"] for each in history] == [1, 2, 3]
    assert "--epochs is 2, but" in refused(capsys, "--output_dir", str(out), "--resume", "auto", "--epochs", "2")


EPOCHS = ["--epochs", "2", "--tome_r", "2", "--eps", "1e-3"]  # eps: rounding of tiny gradients isn't blown up to lr


@pytest.fixture(scope="module")
def in_one_process(data, clip, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    assert run.main(msrvtt(data, clip, out, *EPOCHS, "--batch_size", "8")) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(data, clip, in_one_process, tmp_path, capsys, how):
    shard = ["--fsdp"] if how == "fsdp" else []
    two = call(*msrvtt(data, clip, tmp_path / "two", *EPOCHS, *shard), processes=2)
    assert two.returncode == 0, two.stderr
    ours, theirs = weights(tmp_path / "two"), weights(in_one_process)
    assert ours.keys() == theirs.keys()
    begun = torch.load(clip / "ViT-B-32.pt", weights_only=True)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    moved = (theirs["clip.visual.conv1.weight"] - begun["visual.conv1.weight"]).abs().max()
    assert moved > 1e-4, "the steps must be larger than the tolerance"
    assert results(tmp_path / "two")["text_to_video"] == results(in_one_process)["text_to_video"]
    said = refused(capsys, "--output_dir", str(tmp_path / "two"), "--resume", "auto")
    assert "--nproc_per_node=2" in said, "one process would see other batches"


def test_accumulation_takes_every_part_and_the_same_number_of_steps(data, clip, tmp_path):
    assert run.main(msrvtt(data, clip, tmp_path, "--gradient_accumulation_steps", "2", "--clip_grad_norm", "0")) == 0
    found = torch.load(tmp_path / "ckpt.pth.tar", weights_only=True)
    assert found["global_step"] == 2


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_as_it_was_begun(data, clip, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run.main(msrvtt(data, clip, whole, "--tome_r", "3", "--do_train", "1")) == 0
    killed.mkdir()
    shutil.copy(whole / "hparams_train.json", killed)
    assert run.main(["--output_dir", str(killed), "--resume", "auto"]) == 0
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(killed).items())
    capsys.readouterr()
    assert "--tome_r is 2" in refused(capsys, "--output_dir", str(killed), "--resume", "auto", "--tome_r", "2")


def test_going_on_in_another_folder_leaves_the_run_there_alone(trained, data, clip, tmp_path, capsys):
    other, new = tmp_path / "other", tmp_path / "new"
    shutil.copytree(trained, other)
    best = str(trained / "ckpt.best.pth.tar")
    assert "holds another run" in refused(capsys, "--output_dir", str(other), "--resume", best)
    assert run.main(["--output_dir", str(new), "--resume", best]) == 0
    assert (new / "hparams_train.json").exists()


@pytest.mark.slow
def test_training_and_indexing_in_one_call_can_be_searched(data, clip, tmp_path, capsys):
    more = ["--epochs", "3", "--do_train", "1", "--index", "--lr", "0.02"]  # so large that the best is not the last
    assert run.main(msrvtt(data, clip, tmp_path / "out", *more)) == 0
    assert run.main(msrvtt(data, clip, tmp_path / "c", "--do_train", "1", "--index", "--query", "a red circle")) == 0
    assert run.main(["--output_dir", str(tmp_path / "out"), "--query", "a red circle"]) == 0
    capsys.readouterr()
    said = refused(capsys, *msrvtt(data, clip, tmp_path / "b", "--do_train", "1", "--index", str(tmp_path / "no")))
    assert "is no folder" in said
    assert not (tmp_path / "b/ckpt.pth.tar").exists()


def test_ctrl_c_while_the_last_epoch_is_saved_is_heard(data, clip, tmp_path, capsys, monkeypatch):
    saved = training.state.Folder.save

    def save(*args):
        saved(*args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training.state.Folder, "save", save)
    assert run.main(msrvtt(data, clip, tmp_path / "out", "--do_train", "1", "--index")) == 130
    assert "stopped after the last epoch" in capsys.readouterr().err
    assert not (tmp_path / "out/index").exists()


def test_a_kill_while_epochs_are_raised(trained, tmp_path, monkeypatch):
    """Whichever of checkpoint and settings is written first, they say the same to who goes on."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.state.Folder, "write_json", die)
        assert run.main(["--output_dir", str(out), "--resume", "auto", "--epochs", "3"]) == 130
    assert run.main(["--output_dir", str(out), "--resume", "auto"]) == 0
    assert torch.load(out / "ckpt.pth.tar", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize(("more", "said"), [([], "nothing of it is saved"), (["--index"], "the same call goes on")])
def test_ctrl_c_before_anything_is_saved(trained, tmp_path, capsys, monkeypatch, more, said):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "Tokenizer", stop)
    argv = ["--output_dir", str(tmp_path / "out"), "--init_model", str(trained / "ckpt.pth.tar"), "--do_eval", *more]
    assert run.main(argv) == 130
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
