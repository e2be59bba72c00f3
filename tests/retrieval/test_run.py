# SPDX-License-Identifier: Apache-2.0
"""examples/stop_retrieval from videos to R@1: training, evaluation, going on, searching; what is refused."""

import dataclasses
import json
import os
import re
import shutil

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopModel

from retrieval import checkpoint, options, run
from retrieval.errors import UsageError
from retrieval.model import Retrieval, build
from retrieval.tokenizer import Tokenizer
from retrieval.video import read_video
from support.retrieval import FRAMES, clip_weights, layout, msrvtt, refused, results, weights


def test_a_run_leaves_what_stop_leaves(trained, data):
    found = torch.load(trained / "ckpt.best.pth.tar", weights_only=True)
    assert {"epoch", "global_step", "arch", "state_dict", "best_acc1", "optimizer", "scaler"} <= found.keys()
    assert (found["epoch"], found["global_step"], found["step"]) == (1, 2, 0)
    assert all(name.startswith("clip.") for name in found["state_dict"])
    assert json.loads((trained / "hparams_train.json").read_text())["tome_r"] == 2
    assert list((trained / "tensorboard").glob("events*"))
    log = (trained / "log.txt").read_text()
    assert "Text-to-Video: R@1" in log
    assert "step 2 of 2: loss" in log
    assert "videos/s, 0:00:00 to go" in log
    told = results(trained)
    assert told["videos"] == {"listed": 6, "missing": 0, "unreadable": 0, "evaluated": 6}
    assert told["captions"]["evaluated"] == 6
    assert (told["kind"], told["tome"]["tome_r"], told["weights"]["epoch"]) == ("training", 2, 1)
    assert told["data"]["data_path"] == str(data / "MSRVTT_data.json")
    assert found["best_acc1"] == told["text_to_video"]["r1"]


@pytest.mark.slow
def test_training_changed_the_weights_by_the_two_rates(trained, data, clip, tmp_path):
    """coef_lr 0 leaves CLIP's own weights alone, freeze_clip keeps them out of the optimizer."""
    before = torch.load(clip / "ViT-B-32.pt", weights_only=True)
    after = weights(trained)
    assert not torch.equal(after["clip.visual.conv1.weight"], before["visual.conv1.weight"])
    for n, more in enumerate((["--coef_lr", "0"], ["--freeze_clip", "1"])):
        assert run.main(msrvtt(data, clip, tmp_path / str(n), *more)) == 0
        after = weights(tmp_path / str(n))
        same = [
            torch.equal(after[f"clip.{name}"], value) for name, value in before.items() if value.is_floating_point()
        ]
        assert all(same)
        moments = torch.load(tmp_path / str(n) / "ckpt.pth.tar", weights_only=True)["optimizer"]["state"]
        assert ("clip.visual.conv1.weight" in moments) == (n == 0)
        assert moments["clip.visual.prompt_embeddings"]["exp_avg"].abs().max() > 0


@pytest.mark.slow
def test_stop_proper_learns_its_dynamic_prompts(tmp_path):
    """group2-2, made for frames of 224 pixels: one step of a tower of its width but one layer."""
    clip = clip_weights(tmp_path / "clip", image_size=224, patch_size=32, width=768, layers=1)
    videos = layout(tmp_path / "set", train=2, val=2)
    more = ("--temporal_prompt", "group2-2", "--batch_size", "2", "--tome_r", "2")
    assert run.main(msrvtt(videos, clip, tmp_path / "out", *more)) == 0
    found = torch.load(tmp_path / "out/ckpt.pth.tar", weights_only=True)
    names = {name for name in found["state_dict"] if "TemporalPrompt" in name}
    assert results(tmp_path / "out")["videos"]["evaluated"] == 2
    again = StopModel.from_checkpoint(os.fspath(tmp_path / "out/ckpt.pth.tar"))
    assert again.config.temporal_prompt == "group2-2"
    moments = found["optimizer"]["state"]
    learnt = {name for name in names & moments.keys() if moments[name]["exp_avg"].any()}
    # which cells are salient is a threshold, in the published model too: it has no gradient
    assert names - learnt == {f"clip.visual.TemporalPrompt.Cal_Net.{of}" for of in ("weight", "bias")}
    assert len(learnt) == 31


def test_the_best_checkpoint_is_evaluated_with_its_own_settings(trained, data, tmp_path):
    out = tmp_path / "eval"
    argv = ["--output_dir", str(out), "--do_eval", "--init_model", str(trained / "ckpt.best.pth.tar"), "--data_path",
            str(data / "MSRVTT_data.json"), "--features_path", str(data / "videos"), "--num_thread_reader",
            "0"]  # fmt: skip
    assert run.main(argv) == 0
    again, first = results(out), results(trained)
    assert again["text_to_video"] == first["text_to_video"]
    assert again["video_to_text"] == first["video_to_text"]
    # from the folder of the run itself, with the reranked results beside
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    assert run.main([*argv[:1], str(copy), "--do_eval", *argv[5:], "--qb_norm", "--camoe_dsl"]) == 0
    told = results(copy)
    assert told["text_to_video"] == first["text_to_video"]
    assert told["weights"]["fingerprint"] == again["weights"]["fingerprint"]
    history = json.loads((copy / "results.json").read_text())["evaluations"]
    assert history == [first, told], "an evaluation is added, and replaces none"
    assert told["qb_norm"]["text_to_video"]["queries"] == told["dsl"]["video_to_text"]["queries"] == 6


def test_the_package_reads_the_checkpoint(trained):
    model = StopModel.from_checkpoint(trained / "ckpt.pth.tar")
    assert model.loaded.missing == ()
    assert model.loaded.left_over == ()
    assert model.config.frames == FRAMES


@pytest.mark.slow
def test_nothing_but_a_folder_trains_on_synthetic_videos(tmp_path):
    """The default, with few videos; and a checkpoint of it is the model that was trained."""
    few = ["--synthetic_train", "6", "--synthetic_val", "4", "--epochs", "1", "--batch_size", "3"]
    assert run.main(["--output_dir", str(tmp_path), *few]) == 0
    first = results(tmp_path)
    assert len(list((tmp_path / "synthetic/videos").glob("*.mp4"))) == 10
    ranks = [first[way][name] for way in ("text_to_video", "video_to_text") for name in ("r1", "mean_rank")]
    assert run.main(["--output_dir", str(tmp_path), "--do_eval"]) == 0
    again = results(tmp_path)
    assert [again[way][name] for way in ("text_to_video", "video_to_text") for name in ("r1", "mean_rank")] == ranks
    args = options.complete(options.read(["--output_dir", str(tmp_path)]))
    trained_, _ = build(args, stk.ToMeConfig())
    read, _ = build(args, stk.ToMeConfig(), str(tmp_path / "ckpt.pth.tar"))
    ours = trained_.clip.config
    assert read.clip.config == dataclasses.replace(ours, prompt_layers=ours.deep)


@pytest.mark.slow
def test_index_and_query(trained, data, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    assert run.main(["--output_dir", str(out), "--index", str(data / "videos"), "--shard_size", "4"]) == 0
    shards = sorted(out.glob("index/**/*.safetensors"))
    assert len(shards) == 4  # 14 videos
    times = [shard.stat().st_mtime_ns for shard in shards]
    capsys.readouterr()
    assert run.main(["--output_dir", str(out), "--query", "a red circle", "two things", "--top_k", "3"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-8] == "a red circle"
    assert lines[-4] == "two things"
    ranks, scores, paths = zip(*(line.split() for line in lines[-7:-4]), strict=True)
    assert ranks == ("1", "2", "3")
    assert list(scores) == sorted(scores, reverse=True)
    assert all(os.path.exists(path) for path in paths)
    # what is there is not computed again; what is missing is
    shards[1].unlink()
    assert run.main(["--output_dir", str(out), "--index", str(data / "videos"), "--shard_size", "4"]) == 0
    assert [s.stat().st_mtime_ns == t for s, t in zip(shards, times, strict=True)] == [True, False, True, True]


@pytest.mark.slow
def test_the_video_found_for_a_caption_is_the_one_that_evaluation_ranks_first(trained, data, tmp_path, capsys):
    """Index and evaluation are two ways to the same order."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    common = ["--output_dir", str(out), "--data_path", str(data / "MSRVTT_data.json"), "--features_path",
              str(data / "videos")]  # fmt: skip
    assert run.main([*common, "--index"]) == 0
    caption = next(
        s for s in json.loads((data / "MSRVTT_data.json").read_text())["sentences"] if s["video_id"] == "video8"
    )
    capsys.readouterr()
    assert run.main(["--output_dir", str(out), "--query", caption["caption"], "--top_k", "6"]) == 0
    found = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines() if line.endswith(".mp4")]
    model = StopModel.from_checkpoint(out / "ckpt.best.pth.tar", tome=stk.ToMeConfig(2)).eval()
    wrapped = Retrieval(model)
    ids = Tokenizer()([caption["caption"]], 16)
    videos = [read_video(str(data / f"videos/video{n}.mp4"), FRAMES, 32) for n in range(8, 14)]
    mask = torch.ones(6, FRAMES, dtype=torch.bool)
    with torch.inference_mode():
        scores = wrapped.encode_text(ids) @ wrapped.encode_video(torch.stack([v for v, _ in videos]), mask).t()
    assert found == [f"video{8 + n}.mp4" for n in scores[0].argsort(descending=True).tolist()]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_output_folder_that_holds_a_run_is_left_alone(trained, data, clip, capsys):
    before = (trained / "ckpt.pth.tar").read_bytes()
    assert "holds another run" in refused(capsys, *msrvtt(data, clip, trained))
    assert (trained / "ckpt.pth.tar").read_bytes() == before


def test_an_output_folder_that_can_not_be_made(data, clip, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refused(capsys, *msrvtt(data, clip, tmp_path / "file" / "out"))
    assert str(tmp_path / "file" / "out") in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max_frames", "3", "--tome_r", "1", "--merge_layers", "1", "--merge_frame_nums", "2",
          "--merge_token_proportions", "5-5"], "3"),
        (["--merge_layers", "7", "--tome_r", "1", "--merge_frame_nums", "2", "--merge_token_proportions", "5-5"], "7"),
        (["--max_words", "78"], "--max_words 78"),
        (["--pretrained_clip_name", "ViT-B/16"], "no weights of CLIP at"),
        (["--init_model", "nowhere.pt"], "nowhere.pt"),
        (["--train_csv", "nowhere.csv"], "nowhere.csv"),
        (["--features_path", "nowhere"], "nowhere"),
        (["--resume", "nowhere.tar"], "nowhere.tar"),
        (["--fsdp"], "torchrun"),
        (["--shared_latent_space", "linear", "--text_prompt_length", "6"], "--text_prompt_length must be 8"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_training(data, clip, tmp_path, capsys, more, said):
    out = tmp_path / "out"
    assert said in refused(capsys, *msrvtt(data, clip, out, *more))
    assert not out.exists(), "a refused call leaves nothing"


def test_settings_that_weights_do_not_fit_name_their_file(data, clip, tmp_path, capsys):
    twice = tmp_path / "frames of  two"  # a name that looks like a setting stays as it is
    shutil.copytree(clip, twice)
    linear = ["--shared_latent_space", "linear", "--text_prompt_length", "6"]
    said = refused(capsys, *msrvtt(data, twice, tmp_path / "a", *linear))
    assert f"{twice / 'ViT-B-32.pt'}: with --shared_latent_space" in said


def test_weights_that_can_not_be_copied(clip, tmp_path, monkeypatch):
    """Of the weights, or of the machine: only the first is said of the file."""
    args = options.complete(options.read(msrvtt(tmp_path, clip, tmp_path)))
    args.world = 1

    def build_failing(message):
        def fail(self, state, activation):
            raise RuntimeError(message)

        monkeypatch.setattr(StopModel, "load_clip", fail)
        return build(args, stk.ToMeConfig())

    copying = 'Error(s) in loading state_dict:\n\tWhile copying the parameter named "visual.proj", {}'
    with pytest.raises(UsageError, match=r"ViT-B-32\.pt doesn't fit: .*visual\.proj"):
        build_failing(copying.format("copy_ isn't implemented"))
    for message in (copying.format("can't allocate memory"), "CUDA error"):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            build_failing(message)


def test_a_checkpoint_of_another_size(trained, data, clip, tmp_path, capsys):
    best = str(trained / "ckpt.best.pth.tar")
    said = refused(capsys, *msrvtt(data, clip, tmp_path / "a", "--init_model", best, "--max_frames", "8"))
    assert f"--max_frames {FRAMES}, not 8" in said
    state_dict = torch.load(best, weights_only=True)["state_dict"]
    state_dict["clip.visual.proj"] = state_dict["clip.visual.proj"][:, :7]
    torch.save(state_dict, tmp_path / "cut.pt")
    said = refused(capsys, *msrvtt(data, clip, tmp_path / "b", "--init_model", str(tmp_path / "cut.pt")))
    assert "visual.proj" in said
    assert str(tmp_path / "cut.pt") in said
    (tmp_path / "text.pt").write_text("no weights")
    assert "text.pt" in refused(capsys, *msrvtt(data, clip, tmp_path / "c", "--init_model", str(tmp_path / "text.pt")))
    said = refused(capsys, *msrvtt(data, clip, tmp_path / "d", "--resume", str(clip / "ViT-B-32.pt")))
    assert "--init_model" in said


@pytest.mark.slow
def test_searching_without_an_index_or_in_that_of_another_model(trained, data, clip, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    assert run.main(["--output_dir", str(out), "--index", str(data / "videos")]) == 0
    assert run.main(msrvtt(data, clip, tmp_path / "other", "--seed", "7")) == 0
    shutil.copy(tmp_path / "other/ckpt.best.pth.tar", out)
    capsys.readouterr()
    assert "by other weights" in refused(capsys, "--output_dir", str(out), "--query", "a cat")
    assert "another model" in refused(capsys, "--output_dir", str(out), "--index", str(data / "videos"))
    assert "--index" in refused(capsys, "--output_dir", str(trained), "--query", "a cat")
    assert "no checkpoint" in refused(capsys, "--output_dir", str(trained / "tensorboard"), "--query", "a cat")


# -- videos that can't be read ----------------------------------------------------------------------------------------


def test_broken_and_missing_videos_are_named_and_skipped(data, clip, tmp_path, capsys):
    copy = tmp_path / "set"
    shutil.copytree(data, copy)
    (copy / "videos/video2.mp4").write_bytes(b"no video")  # of training
    (copy / "videos/video3.mp4").unlink()
    (copy / "videos/video10.mp4").unlink()
    (copy / "videos/video9.mp4").write_bytes((data / "videos/video9.mp4").read_bytes()[:300])  # of evaluation
    out = tmp_path / "out"
    assert run.main(msrvtt(copy, clip, out, "--batch_size", "7")) == 0
    said = capsys.readouterr().out
    for name in ("video2", "video3", "video9", "video10"):
        assert f"{name}.mp4" in said
    told = results(out)
    assert told["videos"] == {"listed": 6, "missing": 1, "unreadable": 1, "evaluated": 4}
    assert told["captions"] == {
        "listed": 6, "of missing videos": 1, "of unreadable videos": 1, "evaluated": 4
    }  # fmt: skip
    assert "videos: 6 listed, 1 missing, 1 unreadable, 4 evaluated" in said
    assert "1 video could not be read and was skipped" in said


def test_nothing_but_broken_videos(data, clip, tmp_path, capsys):
    copy = tmp_path / "set"
    shutil.copytree(data, copy)
    for video in (copy / "videos").iterdir():
        video.write_bytes(b"no video")
    assert "can't be read" in refused(capsys, *msrvtt(copy, clip, tmp_path / "out"))


def test_out_of_memory_names_what_helps(data, clip, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoint, "capture", full)
    assert run.main(msrvtt(data, clip, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    for flag in ("--batch_size", "--max_frames", "--gradient_checkpointing", "--tome_r"):
        assert flag in said
