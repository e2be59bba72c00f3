# SPDX-License-Identifier: Apache-2.0
"""--tome_r 0,2,4: several settings on one checkpoint, what is recommended, and pictures of what merged."""

import json
import math
import re
from dataclasses import replace

import pytest
import stoptome_kernels as stk
import torch
from PIL import Image
from stoptome_kernels.stop import StopModel

from retrieval import compare, metrics, options, pictures, run
from support.retrieval import clip_weights, layout, msrvtt, refused, results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a run of one epoch without merging."""
    folder = tmp_path_factory.mktemp("compare")
    argv = msrvtt(layout(folder / "set"), clip_weights(folder / "clip"), folder / "out")
    assert run.main(argv) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def swept(trained):
    argv = ["--output_dir", str(trained), "--do_eval", "--tome_r", "4,2,4,memory", "--draw_trace", "2", "--qb_norm"]
    with pytest.MonkeyPatch.context() as patch:  # a preset for towers of more layers and frames than this one
        patch.setattr(compare, "SECONDS", 0.1)
        patch.setattr(stk.ToMeConfig, "preset", lambda name: stk.ToMeConfig(1, False, True, (1,), (2,), (5, 5)))
        assert run.main(argv) == 0
    return trained


def table(folder) -> dict:
    return json.loads((folder / compare.TABLE).read_text())


def test_every_setting_is_evaluated_as_it_would_be_alone(swept, tmp_path):
    rows = table(swept)["rows"]
    assert [row["setting"] for row in rows] == ["r = 0", "r = 4", "r = 2", "memory"], "once, r = 0 first"
    assert (rows[0]["lost"], rows[0]["lost_interval"]) == (0, [0, 0])
    assert rows[1]["lost_interval"][0] < rows[1]["lost"] < rows[1]["lost_interval"][1]
    assert [row["tokens"] for row in rows][:3] == [21, 13, 17]
    assert rows[3]["items"] == 2
    assert all(row["speedup"] > 0 and row["peak_bytes"] is None for row in rows)
    for r, row in ((0, rows[0]), (4, rows[1])):
        alone = tmp_path / str(r)
        checkpoint = str(swept / "ckpt.best.pth.tar")
        argv = ["--output_dir", str(alone), "--do_eval", "--init_model", checkpoint, "--tome_r", str(r), "--qb_norm"]
        assert run.main(argv) == 0
        told = results(alone)
        assert (told["text_to_video"]["r1"], told["text_to_video"]["r5"]) == (row["r1"], row["r5"])
        history = json.loads((swept / "results.json").read_text())["evaluations"]
        (same,) = [e for e in history if e["kind"] == "sweep" and e["tome"]["tome_r"] == r]
        assert same["text_to_video"] == told["text_to_video"]
        assert same["qb_norm"] == told["qb_norm"]
        assert same["weights"]["fingerprint"] == told["weights"]["fingerprint"]


def test_table_chart_and_pictures(swept):
    text = (swept / "log.txt").read_text()
    assert "R@1 lost (95 %)" in text
    assert table(swept)["reason"] in text
    with Image.open(swept / compare.CHART) as chart:
        assert chart.size[0] > 500
    pictures = sorted(path.name for path in (swept / "traces").iterdir())
    assert len(pictures) == 6, "two videos at three settings that merge"
    assert pictures[0] == "000-video8-memory.png"
    merged, less = (Image.open(swept / f"traces/000-video8-r-{r}.png") for r in (4, 2))
    with merged, less:
        assert merged.size == less.size
        assert merged.tobytes() != less.tobytes()


def test_pictures_of_one_setting(trained, tmp_path, capsys):
    checkpoint = str(trained / "ckpt.pth.tar")
    argv = ["--output_dir", str(tmp_path / "a"), "--do_eval", "--init_model", checkpoint]
    assert run.main([*argv, "--tome_r", "4", "--draw_trace", "1"]) == 0
    assert [path.name for path in (tmp_path / "a/traces").iterdir()] == ["000-video8-r-4.png"]
    assert "1 picture of what merged" in capsys.readouterr().out
    argv[1] = str(tmp_path / "b")
    for more in (["--draw_trace", "1"], ["--tome_r", "0,0", "--draw_trace", "1"]):
        assert "--draw_trace draws what merged" in refused(capsys, *argv, *more)
    assert not (tmp_path / "b").exists(), "refused before the evaluation"


def test_pictures_are_of_videos_that_can_be_read(tmp_path, capsys):
    data, out = layout(tmp_path / "set"), tmp_path / "out"
    (data / "videos/video8.mp4").write_bytes(b"no video")
    assert run.main(msrvtt(data, clip_weights(tmp_path / "clip"), out)) == 0
    capsys.readouterr()
    assert run.main(["--output_dir", str(out), "--do_eval", "--tome_r", "4", "--draw_trace", "1"]) == 0
    assert capsys.readouterr().out.count("skipped ") == 1
    assert [path.name for path in (out / "traces").iterdir()] == ["000-video9-r-4.png"]


@pytest.mark.parametrize("text", ["a/b c", "../..", "日本", "v" * 300, "a:b*?"])
def test_a_part_of_a_file_name(text):
    assert re.fullmatch(r"[\w.-]{0,100}", pictures._cleaned(text), re.ASCII)


def test_clip_merging_is_compared_as_it_was_trained():
    """With each r but 0; of a run, or of flags."""
    clips = ["--merge_layers", "1", "--merge_frame_nums", "2", "--merge_token_proportions", "20-10"]

    def compared(*argv, run=None):
        args = options.complete(options.read(["--output_dir", "o", "--do_eval", "--tome_r", "0,1,2", *argv]), run)
        return compare.settings(args)

    asked = compared(*clips)
    assert asked["r = 2"] == stk.ToMeConfig(2, False, True, (1,), (2,), (20, 10))
    assert asked["r = 0"].off
    trained = options.complete(options.read(["--output_dir", "o", "--tome_r", "1", "--no-tome_prop_attn", *clips]))
    trained.world = 1
    found = compared(run=options.settings(trained))
    assert found["r = 1"] == stk.ToMeConfig(1, False, False, (1,), (2,), (20, 10))
    assert not found["r = 0"].prop_attn


def test_presets_are_compared_as_they_are():
    args = options.complete(options.read(["--output_dir", "o", "--do_eval", "--tome_r", "0,memory"]))
    assert compare.settings(args)["memory"] == stk.ToMeConfig.preset("memory")


def test_models_share_their_weights(trained):
    args = options.complete(options.read(["--output_dir", "o", "--do_eval", "--tome_r", "0,4"]))
    found, _ = compare.models(args, compare.settings(args), None, torch.device("cpu"))
    plain, merging = found.values()
    assert {p.data_ptr() for p in plain.parameters()} == {p.data_ptr() for p in merging.parameters()}
    assert stk.describe(merging.clip).schedule.tokens != stk.describe(plain.clip).schedule.tokens
    assert isinstance(merging.clip, StopModel)


ROW = compare.Row("r = 0", 54, 12, 1.0, 100.0, 1.0, None, 50.0, 80.0, 1.0, 0.0, (0.0, 0.0))
FOUR = replace(ROW, setting="r = 4", videos_per_second=130.0, speedup=1.3, r1=49.5, lost=0.5, lost_interval=(-0.5, 1.5))
EIGHT = replace(ROW, setting="r = 8", videos_per_second=170.0, speedup=1.7, r1=48.0, lost=2.0, lost_interval=(1.0, 3.0))


@pytest.mark.parametrize(
    ("rows", "most", "chosen", "said"),
    [
        ([ROW, FOUR, EIGHT], 1.0, FOUR, "the loss may be up to 1.5"),
        ([ROW, FOUR, EIGHT], 3.0, EIGHT, "loses at most 3 of R@1"),
        ([ROW, FOUR, EIGHT], 0.5, FOUR, "0.5 lost, 1.30× as fast"),
        ([ROW, FOUR, EIGHT], 0.4, ROW, "take r = 0: nothing that loses at most 0.4 of R@1"),
        ([ROW, replace(FOUR, videos_per_second=99.0, lost=-3.0)], 1.0, ROW, "take r = 0"),
    ],
)
def test_the_fastest_that_loses_little_is_recommended(rows, most, chosen, said):
    best, reason = compare.recommend(rows, most)
    assert best is chosen
    assert said in reason


def test_the_chart_stands_rounding(tmp_path):
    """Intervals that end where the mean is, to the last bits."""
    row = replace(FOUR, r1=50.0 - 100 / 3, lost=100 / 3, lost_interval=(100 / 3 + 4e-15, 100 / 3 - 4e-15))
    compare.draw([ROW, row], tmp_path / "chart.png")


def test_an_interval_of_paired_differences():
    differences = torch.tensor([1.0, 0, -1, 0, 1, 1, 0, 0])
    apart = metrics.paired_interval(differences, torch.arange(8))
    half = 1.96 * math.sqrt(8 * float(differences.var(correction=0)) + 1) / 8
    assert apart == pytest.approx((0.25 - half, 0.25 + half))
    none = metrics.paired_interval(torch.zeros(4), torch.arange(4))
    assert none == pytest.approx((-0.49, 0.49)), "of four queries nothing is certain"
    # captions of one video are not as many witnesses
    low, high = metrics.paired_interval(differences.repeat_interleave(100), torch.arange(8).repeat_interleave(100))
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(8 * float(differences.var(correction=0))) / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tome_r", "0,2"], "give it with --do_eval alone"),
        (["--do_eval", "--do_train", "1", "--tome_r", "0,2"], "give it with --do_eval alone"),
        (["--do_eval", "--tome_r", "0,x"], "0,2,4,inference; got '0,x'"),
        (["--do_eval", "--tome_r", "inference"], "got 'inference'"),
        (["--do_eval", "--tome_r", "0,2", "--tome_preset", "memory"], "--tome_preset memory and --tome_r"),
        (["--draw_trace", "3"], "give it with --do_eval"),
        (["--do_eval", "--tome_r", "0,2", "--max_loss", "-1"], "--max_loss: must be a number, from 0 to 100"),
    ],
)
def test_what_can_not_be_compared(tmp_path, capsys, argv, said):
    assert said in refused(capsys, "--output_dir", str(tmp_path / "out"), *argv)


def test_a_setting_that_the_model_refuses_is_named(trained, capsys):
    said = refused(capsys, "--output_dir", str(trained), "--do_eval", "--tome_r", "0,2,memory")
    assert "--tome_r, memory: " in said
