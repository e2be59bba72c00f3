# SPDX-License-Identifier: Apache-2.0
"""bench/blocks.py: its rows hold what they promise, and it refuses wrong results."""

import json

import pytest
import torch

import blocks

SMALL = ["--shapes", "stop-b32-video-r8", "--seconds", "0.1"]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Leave the C library's heap and the number of threads alone."""
    monkeypatch.setattr(blocks.measure, "settle_heap", lambda pages: pages)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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
def test_wrong_results_are_not_timed(monkeypatch, capsys, part, dtype):
    """A peer that merges other tokens, or forgets the sizes."""
    right = getattr(blocks.operators, part)

    def wrong(*args):
        if part == "eager_match":
            return right(args[0].flip(1), *args[1:])
        return right(*args[:2], torch.ones_like(args[2]), *args[3:])

    monkeypatch.setattr(blocks.operators, part, wrong)
    monkeypatch.setattr(blocks.measure, "measure", lambda *_: pytest.fail("timed a wrong result"))
    assert blocks.main([*SMALL, "--dtype", dtype]) == 1
    assert "differ between eager and package" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["sd-512", "tempme-b32-clip2"])
def test_shapes_without_keys_are_refused(capsys, shape):
    with pytest.raises(SystemExit):
        blocks.main(["--shapes", shape])
    assert "choose from stop-b32-train" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_overwritten(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"mine": 1}')
    assert blocks.main([*SMALL, "--json", str(other)]) == 2
    assert "--json: " in capsys.readouterr().err
    assert other.read_text() == '{"mine": 1}'
