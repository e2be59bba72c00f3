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
from harness.rows import WHOLE, read_rows, write_rows
from harness.workloads import host_parts
from harness.workloads.host_parts import ON_TOP

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
TIMM = {(f"timm ViT block, {what}", way) for what in ("r = 2", "unpatched") for way in WAYS}
MERGES = ("merge", "merge_norm")
DIRECT = {
    "asking who would see it", "looking at the arguments", "choosing the backend", "memory for the results",
    "the rest of the backend", "the kernel's call", WHOLE,
}  # fmt: skip
BY_LIBRARY = {
    "the public function's checks", "torch.library's dispatch", "the operator's checks", "choosing the backend",
    "the backend", WHOLE,
}  # fmt: skip


def parts_of(op: str) -> set[tuple[str, str]]:
    """Return the parts of a call, by the way that it takes."""
    more = ({"making the plan"} if op == "match" else set()) | ({ON_TOP} if op in MERGES else set())
    return {("direct", part) for part in DIRECT | more} | {("by torch.library", part) for part in BY_LIBRARY | more}


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
        found = json.loads(files[name].read_text())
        assert len({frozenset(row) for row in found}) == 1, "all rows have the same columns"
        rows, parts = ([row for row in found if (row["part"] is None) == wanted] for wanted in (True, False))
        assert {(row["op"], row["direction"]) for row in rows} == OPS | (TIMM if find_spec("timm") else set())
        check_parts(parts, rows)
        for row in found:
            assert (row["impl"], row["dtype"], row["threads"]) == (backend, dtype, 1)
            assert row["runs"] >= 5
            assert f"{row['p50_us']:.1f} µs" in done.stdout
        for row in rows:
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert row["times_layer_norm"] == pytest.approx(row["p50_us"] / row["base_us"], rel=0.02, abs=0.02)
            check_beside(row, rows)
        (base,) = (row for row in rows if (row["op"], row["direction"]) == ("F.layer_norm", "forward"))
        assert base["times_layer_norm"] == 1
        # an op of ours calls at least one of torch's for its memory
        assert all(row["times_layer_norm"] > 1 for row in rows if row["op"] not in ("F.layer_norm", "unmerge"))


def check_parts(parts: list[dict], rows: list[dict]) -> None:
    """Check that each op has its parts, that those of a way add up to the call, and that the direct way is the call."""
    p50 = {(row["op"], row["direction"]): row["p50_us"] for row in rows}
    assert {row["op"] for row in parts} == set(host_parts.OPS)
    for op in host_parts.OPS:
        own = {(row["direction"], row["part"]): row["p50_us"] for row in parts if row["op"] == op}
        assert own.keys() == parts_of(op)
        for way in ("direct", "by torch.library"):
            whole = own[way, WHOLE]
            inside = [us for (direction, part), us in own.items() if direction == way and part not in (WHOLE, ON_TOP)]
            assert sum(inside) == pytest.approx(whole, abs=0.01), "exact but for rounding"
        assert own["direct", WHOLE] == p50[op, "forward"]
        if op in MERGES:
            assert own["direct", ON_TOP] == pytest.approx(p50[op, "with gradient"] - p50[op, "forward"], abs=0.002)
        # what is timed by itself takes time; differences of so few samples may be anything
        alone = ("asking who would see it", "choosing the backend", "the kernel's call", "the backend", WHOLE)
        assert all(us > 0 for (_, part), us in own.items() if part in alone)
        assert own["by torch.library", "the backend"] > own["direct", "the kernel's call"]


def check_beside(row: dict, rows: list[dict]) -> None:
    """Check that the patched block alone is compared with the same unpatched."""
    if row["op"] != "timm ViT block, r = 2":
        assert row["times_unpatched"] is None
        return
    (beside,) = (r for r in rows if (r["op"], r["direction"]) == ("timm ViT block, unpatched", row["direction"]))
    assert row["times_unpatched"] == pytest.approx(row["p50_us"] / beside["p50_us"], abs=0.001)
    if row["target"]:
        assert row["met"] == (row["times_unpatched"] <= 1.25)


def row(op: str, way: str, ratio: float, target: float | None, **more) -> dict:
    met = None if target is None else ratio <= target
    return {
        "device": "none", "torch": "2", "triton": "3", "commit": "c" * 40, "dirty": False, "impl": "native", "op": op,
        "direction": way, "p50_us": 5 * ratio, "base_us": 5.0, "times_layer_norm": ratio, "target": target, "met": met,
        "part": None, "times_unpatched": None, **more,
    }  # fmt: skip


def test_misses_are_marked():
    rows = [row("match", "forward", 6.0, 6), row("merge", "forward", 6.1, 6), row("unmerge", "forward", 99.0, None)]
    text = host.table(rows)
    assert [
        line.endswith(end) for line, end in zip(text.splitlines(), ("≤ 6×", "≤ 6×, missed", "×  "), strict=True)
    ] == [True] * 3


def test_a_block_is_compared_with_the_same_unpatched():
    vit = "timm ViT block, r = 2"
    rows = [row(vit, "forward", 99.0, 1.25, times_unpatched=beside, met=beside <= 1.25) for beside in (1.2, 1.3)]
    met, missed = host.table(rows).splitlines()
    assert met.endswith("≤ 1.25× unpatched")
    assert missed.endswith("≤ 1.25× unpatched, missed")


US = {
    "forward": 20.0, "with gradient": 35.0, "unseen": 1.0, "choose": 2.0, "backend": 9.0, "memory": 4.0, "kernel": 3.0,
    "by torch.library, forward": 40.0, "by torch.library, with gradient": 80.0, "dispatched": 30.0,
    "implementation": 15.0, "operator's backend": 10.0,
}  # fmt: skip


def test_parts_by_hand():
    direct = {
        "asking who would see it": 1, "looking at the arguments": 20 - 1 - 2 - 9, "choosing the backend": 2,
        "memory for the results": 4, "the rest of the backend": 2, "the kernel's call": 3, WHOLE: 20, ON_TOP: 15,
    }  # fmt: skip
    by_library = {
        "the public function's checks": 10, "torch.library's dispatch": 15, "the operator's checks": 15 - 2 - 10,
        "choosing the backend": 2, "the backend": 10, WHOLE: 40, ON_TOP: 40,
    }  # fmt: skip
    ways = {"direct": direct, "by torch.library": by_library}
    assert list(host_parts.parts(US)) == [(way, part, us) for way, own in ways.items() for part, us in own.items()]


@pytest.mark.parametrize(
    ("more", "public"),
    [
        ({"plan": 1.0}, 40 - 30 - 1),
        ({"chosen inside": 1.5}, 40 - 30 - 0.5),  # attention asks twice, once before the operator
    ],
)
def test_parts_that_some_calls_have(more, public):
    found = {(way, part): value for way, part, value in host_parts.parts(US | more)}
    assert found["by torch.library", "the public function's checks"] == public
    for way, whole in (("direct", 20), ("by torch.library", 40)):
        assert sum(us for (w, part), us in found.items() if w == way and part not in (WHOLE, ON_TOP)) == whole


def test_parts_are_rows_of_their_own(tmp_path):
    """They have op and direction in common, and are replaced one by one."""
    where = {"threads": 1, "pages": None, "shape": "tiny", "n": 2, "dtype": "float32"}
    first = [where | row("match", "direct", 1.0, None, part=part) for part in ("one", "other")]
    write_rows(tmp_path / "rows.json", first)
    write_rows(tmp_path / "rows.json", [first[1] | {"p50_us": 7.0}])
    assert [(r["part"], r["p50_us"]) for r in read_rows(tmp_path / "rows.json")] == [("one", 5.0), ("other", 7.0)]


def test_targets():
    """Those of the project, each of an op that is measured."""
    assert host.TARGETS == {
        ("match", "forward"): 6, ("merge", "forward"): 6, ("merge_norm", "forward"): 8,
        ("attention, sizes and prefix", "forward"): 8,
        ("merge", "with gradient"): 12, ("merge_norm", "with gradient"): 16,
        ("timm ViT block, r = 2", "forward"): 1.25,
    }  # fmt: skip
    assert set(host.TARGETS) <= OPS | TIMM
