# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, its rows hold what they promise, and it refuses wrong results."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

NUMBERS = ("p20_us", "p50_us", "p80_us", "gb_per_s", "copy_gb_per_s", "share_of_copy", "speedup_vs_eager")
KEYS = {
    *("device", "device_kind", "driver", "cuda", "cpu", "cpus", "threads", "torch", "triton", "python", "package"),
    *(
        "commit",
        "dirty",
        "date",
        "pages",
        "shape",
        "n",
        "tokens",
        "dim",
        "heads",
        "channels",
        "protected",
        "r",
        "dtype",
    ),
    *("metric_form", "op", "direction", "impl", "backend", "runs", "input_sets", "bytes", "wall_us", "graph_us"),
    *(
        "times_copy_of_result",
        "times_clone_of_result",
        "check_plan_decisions",
        "check_plan_differences",
        "check_merge_max_error",
    ),
    *("check_merge_of_bound", "check_grad_max_error", "check_grad_of_bound", *NUMBERS),
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory, run_script) -> Path:
    file = tmp_path_factory.mktemp("bench") / "rows.json"
    more = ("--seconds", 0.5, "--threads", 1, "--json", file)
    assert "of copy speed" in run_script("merge.py", "--quick", "--shapes", "stop-b32-video-r2", *more)
    return file


@pytest.mark.slow
def test_rows_are_complete(rows_file):
    rows = json.loads(rows_file.read_text())
    assert {row["impl"] for row in rows} >= {"eager"}
    assert {(row["op"], row["direction"]) for row in rows} == {
        *(("match", "forward"), ("unmerge", "forward")),
        *(("merge", direction) for direction in ("forward", "forward, out=", "backward", "forward+backward")),
        *(("match+merge", direction) for direction in ("forward", "forward+backward")),
    }
    for row in rows:
        assert set(row) == KEYS
        assert all(row[key] > 0 for key in NUMBERS)
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["runs"] >= 5
        assert row["check_merge_of_bound"] <= 1
        assert (row["times_copy_of_result"] is not None) == (
            row["op"] == "merge" and row["direction"] != "forward+backward"
        )


def test_shapes_are_listed(bench, capsys):
    assert bench("merge").main(["--shapes", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(bench("harness.shapes").SHAPES)


def small(bench, dtype=torch.float32, metric="keys", protected=5):
    shapes = bench("harness.shapes")
    return shapes.make(shapes.Shape("small", 3, 3, 25, 96, 2, protected, 4, metric), "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("metric", "protected"), [("keys", 0), ("keys", 1), ("keys", 5), ("x", 4)])
def test_peers_pass_the_check(bench, dtype, metric, protected):
    operators, verify = bench("harness.baselines.operators"), bench("harness.verify")
    truth = verify.Truth(small(bench, dtype, metric, protected))
    for peer in (operators.eager(), operators.package("reference"), operators.package("auto")):
        assert verify.check(peer, truth).merge_of_bound <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("side", "cell"), [(8, 2), (7, 3)])
def test_peers_of_an_image_pass_the_check(bench, dtype, side, cell):
    from dataclasses import replace

    shapes, operators, verify = bench("harness.shapes"), bench("harness.baselines.operators"), bench("harness.verify")
    shape = shapes.Shape("image", 2, 2, side * side, 24, 0, 0, side * side // 2, "x", cell=cell)
    truth = verify.Truth(shapes.make(shape, "cpu", dtype))
    for peer in (
        operators.eager(True),
        operators.package("reference", image=True),
        operators.package("auto", image=True),
    ):
        assert verify.check(peer, truth).merge_of_bound <= 1
    good = operators.package("reference", image=True)
    assert operators.tome(truth.inputs) is None
    with pytest.raises(verify.WrongResult):  # even and odd tokens
        verify.check(replace(good, match=operators.package("reference").match), truth)
    with pytest.raises(verify.WrongResult):
        verify.check(replace(good, merge=lambda i, x, plan: (good.merge(i, x, plan)[0] * (1 + 1e-2), None)), truth)


def test_large_images_are_measured_when_named(bench):
    merge = bench("merge")
    assert "sd-512" not in {shape.name for shape in merge.chosen_shapes(merge.arguments([]))}
    assert [shape.name for shape in merge.chosen_shapes(merge.arguments(["--shapes", "sd-512"]))] == ["sd-512"]


def test_wrong_results_are_refused(bench):
    from dataclasses import replace

    operators, verify = bench("harness.baselines.operators"), bench("harness.verify")
    truth, good = verify.Truth(small(bench)), operators.package("reference")

    def refused(**broken):
        with pytest.raises(verify.WrongResult):
            verify.check(replace(good, **broken), truth)

    other = small(bench)
    refused(match=lambda i: good.match(replace(other, metric=other.metric.flip(-2))))  # matched by other tokens
    refused(merge=lambda i, x, plan: (good.merge(i, x, plan)[0] * (1 + 1e-5), good.merge(i, x, plan)[1]))
    refused(merge=lambda i, x, plan: (good.merge(i, x, plan)[0], good.merge(i, x, plan)[1] + 1))
    refused(merge=lambda i, x, plan: good.merge(i, x.detach() + 0 * x, plan))  # the right rows, a wrong gradient
    refused(unmerge=lambda i, y, plan: good.unmerge(i, y.roll(1, 1), plan))
    refused(both=lambda i, x: good.merge(i, x.roll(1, 0), good.match(i)))


def test_one_wrong_match_is_refused(bench):
    """Of all decisions, one: so few might differ by rounding, but not by as much."""
    operators, verify = bench("harness.baselines.operators"), bench("harness.verify")
    truth, good = verify.Truth(small(bench)), operators.package("reference")
    dest = good.dest(truth.inputs, good.match(truth.inputs))
    assert truth.differences(dest, "good") <= 2
    merged, _ = truth.decisions(dest, "good")
    item, source = merged.nonzero()[0].tolist()
    worst = truth.scores[item, source].argmin().int()
    dest[item, torch.arange(25)[truth.a][source]] = truth.inputs.shape.tokens_out - truth.scores.shape[2] + worst
    with pytest.raises(verify.WrongResult, match="1 tokens matched otherwise than rounding explains"):
        truth.differences(dest, "bad")


def test_real_input_merges_alike_tokens(bench):
    i = small(bench)
    assert i.metric.shape == (3, 2, 25, 64)
    assert not i.metric.is_contiguous()
    assert i.x.shape == (3, 25, 96)
    assert (i.size >= 1).all()
    assert (i.size[:, :5] == 1).all()
    assert i.size.max() > 1
    again = small(bench)
    assert torch.equal(i.x, again.x)
    # neighbouring patches of a picture are alike, random tokens are not
    assert bench("harness.verify").Truth(i).best.mean() > 0.5
