# SPDX-License-Identifier: Apache-2.0
"""bench/stop.py runs, its rows hold what they promise, and it refuses wrong results."""

import json

import pytest
import torch

SMALL = ("--layers", "2", "--videos", "1", "--settings", "r=0", "r=4", "--seconds", "0.1", "--scope", "block", "blocks")


@pytest.fixture(scope="module")
def done(tmp_path_factory, run_script):
    """A run from the shell, and its file."""
    file = tmp_path_factory.mktemp("bench") / "rows.json"
    return run_script("stop.py", *SMALL, "--json", file), file


@pytest.mark.slow
def test_rows(done):
    output, file = done
    rows = {(r["op"], r["direction"], r["shape"], r["impl"]): r for r in json.loads(file.read_text())}
    assert set(rows) == {
        (op, direction, shape, impl)
        for direction in ("inference", "training")
        for op, shape, impl in (
            ("block", "r=0", "package"), ("block", "r=0", "upstream"), ("blocks", "r=0", "package"),
            ("blocks", "r=4", "package"), ("blocks", "r=0", "upstream"), ("blocks", "r=4", "eager"),
        )
    }  # fmt: skip
    for (_, direction, shape, _impl), row in rows.items():
        assert row["tokens"] == ([54, 54] if shape == "r=0" else [50, 46])
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["runs"] >= 5
        assert row["eta"] == pytest.approx(row["speedup_vs_r0"] / row["speedup_ideal"], abs=2e-4)
        assert (row["saved_bytes"] is not None) == (direction == "training")
        assert 0 < row["largest_bytes"] <= row["peak_bytes"]
        assert row["commit"] is None or len(row["commit"]) == 40
    zero, merged = (rows["blocks", "training", shape, "package"] for shape in ("r=0", "r=4"))
    assert zero["speedup_vs_r0"] == zero["memory_vs_r0"] == zero["speedup_ideal"] == 1
    # bytes are counted, not timed: fewer tokens keep less, and upstream keeps more than the package
    assert 0.8 < merged["memory_vs_r0"] < 0.97
    assert rows["blocks", "training", "r=0", "upstream"]["saved_bytes"] > 1.5 * zero["saved_bytes"]
    assert merged["guide"] == [[25, 30], [20, 25]]
    assert "12 × 46" in output


@pytest.mark.slow
def test_chart_and_table(done, bench, tmp_path):
    chart, table = tmp_path / "chart.png", tmp_path / "table.md"
    assert bench("plot").main(["stop", str(done[1]), "--chart", str(chart), "--table", str(table)]) == 0
    text = table.read_text()
    assert chart.stat().st_size > 5000
    assert text.count("| blocks |") == 2
    assert text.count("| inference | r=4 |") == text.count("| training | r=4 |") == 2
    assert "20–25 %" in text
    assert bench("plot").main(["stop", str(tmp_path / "none.json")]) == 2


@pytest.mark.slow
def test_one_video_in_every_way(bench, tmp_path, run_script):
    """Eager, in a CUDA graph and compiled: over the stand-in for a GPU, where a graph is empty and nothing compiles."""
    file = tmp_path / "rows.json"
    small = ("--layers", 2, "--settings", "r=0", "r=4", "--scope", "blocks", "--direction", "inference")
    output = run_script("stop.py", "--dry", *small, "--ways", "eager", "graph", "compile", "--json", file)
    rows = {(r["way"], r["shape"], r["impl"]): r for r in json.loads(file.read_text())}
    assert set(rows) == {
        ("eager", "r=0", "package"), ("eager", "r=4", "package"), ("eager", "r=0", "upstream"),
        ("eager", "r=4", "eager"), ("graph", "r=0", "package, in a CUDA graph"),
        ("graph", "r=4", "package, in a CUDA graph"), ("graph", "r=0", "upstream, in a CUDA graph"),
        ("compile", "r=0", "package, compiled"), ("compile", "r=4", "package, compiled"),
    }  # fmt: skip
    for (way, setting, _), row in rows.items():
        assert row["wall_us"] > 0
        assert (row["peak_bytes"] is not None) == (way == "eager")
        assert (row["speedup_vs_upstream"] is not None) == (way != "compile"), "over the same way"
        assert row["speedup_vs_r0"] == 1 or setting != "r=0"
    assert "r=4      package, in a CUDA graph" in output
    text = "\n".join(bench("charts.stop").tables(list(rows.values())))
    (line,) = (line for line in text.splitlines() if line.startswith("| blocks | r=4 | package |"))
    assert all(cell.strip() for cell in line.split("|")[1:-1])


def test_what_cannot_be_captured_is_left_out(bench, monkeypatch, capsys):
    """It is said, and the next is measured."""
    from harness import no_gpu
    from harness.workloads import Side, ways

    def compiled(call, **_):
        if call is bad:
            raise RuntimeError("not this one\nand more")
        return call

    good, bad = (lambda: torch.ones(1)), (lambda: torch.zeros(1))
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(no_gpu, "pretending", lambda: False)
    sides = [Side("package", name, call, ()) for name, call in (("r=0", bad), ("r=2", good))]
    found = ways.in_way([*sides, Side("upstream", "r=0", good, ())], "compile")
    assert [side.setting for side in found] == ["r=2"]
    assert capsys.readouterr().err == "package r=0, compile: left out: not this one\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--direction", "inference"), "a CUDA graph needs a GPU"), ((), "give --direction inference")],
)
def test_ways_that_are_refused(bench, machine, capsys, words, said):
    with pytest.raises(SystemExit):
        bench("stop").arguments(["--ways", "graph", *words])
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["sizes", "prompts"])
def test_a_wrong_result_is_not_timed(bench, no_clock, monkeypatch, capsys, forgotten):
    """A peer that forgets the sizes in attention, or the global prompts, is found out before a clock runs."""
    stop = bench("stop")
    from harness.baselines import stop as upstream

    masked = upstream.MergingStopBlock.masked

    def forgetful(self, q, k, weights):
        if forgotten == "sizes":
            return masked(self, q, k, None)
        own = 0 if len(k) < 100 else self.visual_prompt_length  # of each frame the prompts stand in front
        return masked(self, q, k[self.visual_prompt_length - own :], None)

    monkeypatch.setattr(upstream.MergingStopBlock, "masked", forgetful)
    assert stop.main(["--layers", "3", "--videos", "1", "--settings", "r=0", "r=8", "--scope", "blocks"]) == 1
    assert "eager at r=8: a row's cosine" in capsys.readouterr().err


def test_conv3d_has_a_peer_with_channels_last(bench):
    """Its own copy of the weights, in that layout; the others keep theirs."""
    stop = bench("stop")
    args = stop.arguments(["--videos", "1", "--layers", "1", "--settings", "r=0", "--scope", "prompts"])
    found = stop.sides(*stop.prepare(args, "group2-2"), "prompts", args)
    assert [side.impl for side in found] == ["package", "upstream", "upstream, channels last"]
    weights = [next(leaf for leaf in side.leaves if leaf.dim() == 5) for side in found]
    layout = [weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights]
    assert layout == [False, False, True]
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_live_bytes_counts_what_lives(bench):
    live = bench("harness.memory").LiveBytes()
    kept = torch.zeros(100)
    with live:
        a = kept + 1  # 400 bytes
        b = torch.cat([a, a])  # 800 more
        del a
        c = b[:50].clone()  # 200: 1000 live
    assert (live.peak, live.largest) == (1200, 800)
    del b, c


@pytest.mark.slow
def test_fused_operators_are_measured(tmp_path, run_script):
    """bench/fused.py from the shell: rows for both operators, each with what it is compared with."""
    file = tmp_path / "rows.json"
    run_script("fused.py", "--shapes", "stop-b32-video-r2", "--seconds", 0.05, "--json", file)
    rows = json.loads(file.read_text())
    assert {(row["op"], row["impl"]) for row in rows} == {
        ("merge_norm", "merge_norm"), ("merge_norm", "add, merge, layer_norm"), ("merge_norm", "add + layer_norm"),
        ("attention", "attention"), ("attention", "attention, sizes alone"), ("attention", "concatenated, mask"),
        ("attention", "sdpa, no sizes"),
    }  # fmt: skip
    assert all(row["times_base"] == 1 for row in rows if row["impl"] == row["against"])
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}


def test_fused_refuses_wrong_results(bench, no_clock, monkeypatch, capsys):
    """A merge_norm that forgets the residual is found out before a clock runs."""
    fused, stk = bench("fused"), bench("stoptome_kernels")
    right = stk.merge_norm

    def forgetful(x, residual, *rest, **options):
        return right(x, residual * (options["backend"] == "reference"), *rest, **options)

    monkeypatch.setattr(stk, "merge_norm", forgetful)
    assert fused.main(["--shapes", "stop-b32-video-r2"]) == 1
    assert "merge_norm: result 0 is off" in capsys.readouterr().err


@pytest.mark.slow  # conv3d of a video of 12 frames, six times
def test_towers_agree_with_upstream(bench):
    """Whole towers and STOP proper's prompts: the peers compute the same, by conv3d."""
    stop = bench("stop")
    for scope, temporal_prompt in (("tower", "DGL"), ("proper", "group2-2"), ("prompts", "group2-2")):
        args = stop.arguments(["--layers", "2", "--videos", "1", "--settings", "r=0", "--scope", scope])
        found = stop.sides(*stop.prepare(args, temporal_prompt), scope, args)
        assert [side.impl for side in found][:2] == ["package", "upstream"]
        assert len(found) == 2 + (scope == "prompts"), "there with channels last, too"
        stop.check(found, stop.references(found), "float32")
