# SPDX-License-Identifier: Apache-2.0
"""bench/blocks.py: its rows hold what they promise, and it refuses wrong results."""

import json

import pytest
import torch

import blocks

pytestmark = pytest.mark.usefixtures("machine")
SMALL = ["--shapes", "stop-b32-video-r8", "--seconds", "0.1"]


@pytest.mark.slow
def test_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert blocks.main([*SMALL, "--json", str(file)]) == 0
    rows = {(row["impl"], row["op"]): row for row in json.loads(file.read_text())}
    merging = {(impl, part) for impl in ("eager", "package") for part in ("attention", "match", "merge", "MLP")}
    assert set(rows) == merging | {("unmerged", part) for part in ("attention", "merge", "MLP")}
    for row in rows.values():
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["runs"] >= 5
        assert row["check_rows_that_differ"] <= 0.02 * row["n"] * (row["tokens"] - row["r"])
    assert rows["eager", "MLP"] == rows["package", "MLP"] | {"impl": "eager"}, "timed once, for both"
    assert "this package" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["eager_match", "eager_merge"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_results_are_not_timed(no_clock, monkeypatch, capsys, part, dtype):
    """A peer that merges other tokens, or forgets the sizes."""
    right = getattr(blocks.operators, part)

    def wrong(*args):
        if part == "eager_match":
            return right(args[0].flip(1), *args[1:])
        return right(*args[:2], torch.ones_like(args[2]), *args[3:])

    monkeypatch.setattr(blocks.operators, part, wrong)
    assert blocks.main([*SMALL, "--dtype", dtype]) == 1
    assert "differ between eager and package" in capsys.readouterr().err
