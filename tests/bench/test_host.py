# SPDX-License-Identifier: Apache-2.0
"""bench/host.py runs on both backends, its rows are complete, and its table says what misses its target."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import host

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None or sys.platform != "linux", reason="needs Triton's compiler"),
]
WAYS = ("forward", "with gradient", "backward")
OPS = {
    *((op, way) for op in ("F.layer_norm", "merge", "unmerge", "merge_norm") for way in WAYS),
    *((f"attention, {what}", way) for what in ("sizes and prefix", "plain") for way in WAYS),
    ("match", "forward"),
    ("MergePlan.then", "forward"),
    *(("STOP block, r = 2", way) for way in WAYS),
}
TIMM = {("timm ViT block, r = 2", way) for way in WAYS}


@pytest.mark.slow
def test_both_backends(tmp_path):
    """A process each, a file of rows each."""
    paths = [str(Path(host.__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    done = subprocess.run(
        [sys.executable, host.__file__, "--seconds", "0.1", "--json", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = {file.stem.rpartition("-")[2]: file for file in tmp_path.glob("*.json")}
    triton = next(name for name in files if name.startswith("triton3."))
    assert set(files) == {"native", triton}
    for name, backend, dtype in (("native", "native", "float32"), (triton, "triton", "bfloat16")):
        rows = json.loads(files[name].read_text())
        assert {(row["op"], row["direction"]) for row in rows} == OPS | (TIMM if find_spec("timm") else set())
        for row in rows:
            assert (row["impl"], row["dtype"], row["threads"]) == (backend, dtype, 1)
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert row["runs"] >= 5
            assert row["times_layer_norm"] == pytest.approx(row["p50_us"] / row["base_us"], rel=0.02, abs=0.02)
            assert f"{row['p50_us']:.1f} µs" in done.stdout
        (base,) = (row for row in rows if (row["op"], row["direction"]) == ("F.layer_norm", "forward"))
        assert base["times_layer_norm"] == 1
        # a launch of 16 µs and what is around it, by far more than one operation of torch
        assert all(row["times_layer_norm"] > 2 for row in rows if row["op"] != "F.layer_norm")


def row(op: str, way: str, ratio: float, target: int | None) -> dict:
    met = None if target is None else ratio <= target
    return {
        "device": "none", "torch": "2", "triton": "3", "commit": "c" * 40, "dirty": False, "impl": "native", "op": op,
        "direction": way, "p50_us": 5 * ratio, "base_us": 5.0, "times_layer_norm": ratio, "target": target, "met": met,
    }  # fmt: skip


def test_misses_are_marked():
    rows = [row("match", "forward", 6.0, 6), row("merge", "forward", 6.1, 6), row("unmerge", "forward", 99.0, None)]
    text = host.table(rows)
    assert [
        line.endswith(end) for line, end in zip(text.splitlines(), ("≤ 6×", "≤ 6×, missed", "×  "), strict=True)
    ] == [True] * 3


def test_targets():
    """Those of the project, each of an op that is measured."""
    assert host.TARGETS == {
        ("match", "forward"): 6, ("merge", "forward"): 6, ("merge_norm", "forward"): 8,
        ("attention, sizes and prefix", "forward"): 8,
        ("merge", "with gradient"): 12, ("merge_norm", "with gradient"): 16,
    }  # fmt: skip
    assert set(host.TARGETS) <= OPS
