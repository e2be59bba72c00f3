# SPDX-License-Identifier: Apache-2.0
"""examples/stop_retrieval/accuracy.py: that it learns, what it writes down, and the table and chart made of that."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

import accuracy
import plot
from retrieval import options, recipes
from support import ROOT

SCRIPT = ROOT / "examples/stop_retrieval/accuracy.py"


def start(*argv) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--quick", *argv]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, env=env)


def rows_of(folder) -> dict:
    """Return the rows of a study by setting, direction and how tokens were chosen."""
    rows = json.loads((folder / "rows.json").read_text())
    return {(row["shape"], row["direction"], row["impl"]): row for row in rows}


@pytest.mark.full  # two minutes, for which the steps are needed; test_training sees each of its parts
def test_the_small_model_learns_the_synthetic_set(tmp_path):
    """R@1 of ten times chance after about 150 steps; chance is 0.5 % among 200 videos."""
    done = start("--work", tmp_path / "work", "--json", tmp_path / "rows.json", "--seconds", 1)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    for when in ("inference", "training"):
        row = rows["r=0", when, "merge"]
        assert row["n"] == 200
        assert row["r1_mean"] > 10 * 100 / row["n"]
        assert row["median_rank"][0] < 30


def shortly(folder) -> str:
    """Run the quick study in this process; return what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        argv = ["--quick", "--work", folder / "work", "--json", folder / "rows.json", "--seconds", 0.2]
        assert accuracy.main([str(part) for part in argv]) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Rows of a short study, what it said, and its folder."""
    folder = tmp_path_factory.mktemp("accuracy")
    quick = recipes.STUDY["quick"]
    fewer = {"train": 64, "val": 100, "base": quick["base"] | {"epochs": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.STUDY, "quick", quick | fewer)
        said = shortly(folder)
        again = shortly(folder)
    assert " s\n" not in again.split("setting")[0], "what is done is not run again"
    return rows_of(folder), said, folder


@pytest.mark.slow
def test_a_row_holds_what_the_table_says(study):
    rows, said, _ = study
    merged, base = rows["r=4", "inference", "merge"], rows["r=0", "inference", "merge"]
    assert set(rows) == {(c.setting, c.when, c.by) for c in accuracy.cases(quick=True)}
    assert merged["lost_mean"] == pytest.approx(base["r1_mean"] - merged["r1_mean"])
    assert merged["r1_spread"] is None, "one seed has no spread"
    assert merged["guide"] == "1–3 %"
    assert merged["tokens"][-1] < base["tokens"][-1]
    assert merged["speedup_ideal"] > 1
    assert merged["training_bytes"] < base["training_bytes"]
    assert all(row[key] for row in rows.values() for key in ("device", "torch", "date", "threads", "seeds"))
    assert f"{merged['r1_mean']:.1f}" in said
    # the runs of the study differ in how tokens were chosen, not in how many there are
    four = [row for (setting, when, _), row in rows.items() if setting == "r=4" and when == "inference"]
    assert len({row["mean_rank"][0] for row in four}) == len(four) == 4
    assert "training_us" not in rows["r=4", "inference", "drop"], "no timing that was not measured"


@pytest.mark.slow
def test_chart_and_table_are_made_of_rows(study, tmp_path):
    rows, _, folder = study
    png, table = tmp_path / "chart.png", tmp_path / "table.md"
    assert plot.main(["accuracy", str(folder / "rows.json"), "--chart", str(png), "--table", str(table)]) == 0
    text = table.read_text()
    assert png.stat().st_size > 10_000
    assert f"| R@1 {rows['r=0', 'training', 'merge']['r1_mean']:.1f} |" in text
    assert f"{rows['r=4', 'inference', 'drop']['lost_mean']:.1f} |" in text
    assert "synthetic videos" in text


def test_the_study_compares_what_it_says():
    found = list(accuracy.cases(quick=False))
    assert len(set(found)) == len(found) == 2 * (1 + 4 * 4)
    assert len({case.name for case in found}) == len(found), "each has a folder of its own"
    for case in found:
        assert case.config.prop_attn == (case.by != "merge, sizes off")
    flags = accuracy.flags(accuracy.SETTINGS["clips"])
    args = options.complete(options.read(["--output_dir", "o", *flags]))
    assert options.tome_config(args) == accuracy.SETTINGS["clips"]


@pytest.mark.slow
def test_a_file_of_something_else_is_left_alone(tmp_path):
    """By the program as a user starts it."""
    file = tmp_path / "rows.json"
    file.write_text("{}")
    done = start("--json", file, "--work", tmp_path / "work")
    assert done.returncode == 2
    assert "--json" in done.stderr
    assert file.read_text() == "{}"
