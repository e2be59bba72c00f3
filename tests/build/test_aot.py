# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for the GPUs they are meant for, without spilling registers; no GPU is needed."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import ROOT

REPORT, TABLES = ROOT / "bench" / "aot_report.py", ROOT / "bench" / "results" / "aot"
# a folder with Triton 3.6.0, what PyTorch 2.11 on a GPU has (pip install --target FOLDER --no-deps triton==3.6.0)
TRITON_36 = os.environ.get("STOPTOME_TRITON_36")

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux"),
]


@pytest.fixture(params=["installed", "3.6"])
def triton(request) -> str:
    """A Triton to compile with: its folder, nothing for the one that is installed."""
    if request.param == "3.6" and not TRITON_36:
        pytest.skip("STOPTOME_TRITON_36 does not name a folder with Triton 3.6.0")
    return TRITON_36 or "" if request.param == "3.6" else ""


def report(triton: str, tmp_path: Path, *arguments: str) -> list[dict]:
    """Return the rows of the report; fail if a kernel does not compile, spills, or wants too much shared memory."""
    out = tmp_path / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (triton, environment.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(REPORT), "--json", str(out), *arguments],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_no_merge_spills(triton, tmp_path):
    """Forward and backward of every mode, in a half and a full precision, on the oldest and the newest architecture."""
    what = ("--what", "match", "merge m", "merge sum", "unmerge", "grad of mean", "grad of sum", "grad of max")
    rows = report(
        triton, tmp_path, "--arch", "80", "100", "--dtype", "bf16", "fp32", "--shape", "stop-b32-train", *what
    )  # fmt: skip
    assert {row["kernel"] for row in rows} == {"match_item", "reduce_rows", "spread_rows"}
    report(triton, tmp_path, "--arch", "90", "--dtype", "fp16", "--shape", "vit-l16-384", "--what", "grad of unmerge")


@pytest.mark.slow
def test_no_matching_spills(triton, tmp_path):
    """One launch and two, keys and x as metric, even and odd tokens and given sets."""
    shapes = ("stop-b32-train", "clip-b16", "tempme-168", "vit-l16-384", "sd-64")
    rows = report(triton, tmp_path, "--arch", "90", "--dtype", "bf16", "fp32", "--what", "match", "--shape", *shapes)
    for what in ("match", "match sets"):
        kernels = {row["kernel"] for row in rows if row["what"] == what}
        assert kernels == {"match_item", "score_blocks", "plan_blocks"}
    # where indices and rows together are the most for a program's registers
    shapes = ("stop-b32-train", "sd-64")
    report(
        triton, tmp_path, "--arch", "80", "100", "--dtype", "fp16", "fp32", "--what", "match sets", "--shape", *shapes
    )
    report(triton, tmp_path, "--arch", "100", "--dtype", "fp32", "--what", "match", "--shape", "vit-b16-deep")
    report(triton, tmp_path, "--arch", "90", "--dtype", "fp16", "--what", "match", "--shape", "few-tokens")


@pytest.mark.slow
def test_no_merge_norm_spills(triton, tmp_path):
    """A row of 768 or 1024 stays in registers, with and without the gradients of weight and bias."""
    rows = report(
        triton, tmp_path, "--arch", "80", "100", "--what", "merge_norm", "--shape", "stop-b32-train", "vit-l16-384"
    )  # fmt: skip
    assert {row["kernel"] for row in rows} == {"norm_rows", "norm_grad_rows"}
    assert len({row["what"] for row in rows}) == 6
    # 16 bytes an access: y and its normalised copy, x and residual for one token of a group and for several
    for row in rows:
        if row["kernel"] == "norm_rows":
            assert row["loads128"] >= 6, row
            assert row["stores128"] >= 2, row


@pytest.mark.slow
def test_no_attention_spills(triton, tmp_path):
    """One block of keys and several, with a prefix and without, few queries, wide heads; its gradient in one launch and
    in two."""
    shapes = ("stop-b32-train", "clip-b16", "tempme-68", "tempme-168", "vit-l16-384", "keys-577-d80")
    rows = report(
        triton,
        tmp_path,
        "--arch",
        "80",
        "90",
        "100",
        "--dtype",
        "bf16",
        "fp32",
        "--what",
        "attention",
        "--shape",
        *shapes,
    )
    assert {row["kernel"] for row in rows} == {"attend", "grad_queries", "grad_keys", "grad_item"}
    assert {row["what"].split(",")[0] for row in rows} == {"attention", "grad of attention"}
    for row in rows:  # also where a prefix is read in place
        # a tile of four queries, or of 16 rows of float32 on 8 warps, is one access of a thread
        small = row["warps"] == 8
        assert row["loads128"] >= (4 if small else 6), row
        assert row["stores128"] >= (1 if small or "prompts" in row["what"] else 2), row
        assert row["blocks"] >= 2 or row["dtype"] == "fp32", row


def test_rows_move_in_128_bit_accesses(triton, tmp_path):
    """The merge is bound by memory: every access to rows of 768 bfloat16 is as wide as the hardware has them."""
    for row in report(
        triton, tmp_path, "--arch", "90", "--dtype", "bf16", "--shape", "stop-b32-train", "--what", "merge"
    ):
        if row["kernel"] == "norm_grad_rows":  # one store for all members
            assert row["loads128"] >= 2, row
            assert row["stores128"] >= 1, row
            continue
        assert row["loads128"] >= 2, row
        assert row["stores128"] >= 2, row


@pytest.mark.slow
def test_committed_tables_hold(triton, tmp_path):
    """bench/results/aot says of STOP's kernels on an H100 what is compiled today."""
    installed = "3.6" if triton else ".".join(version("triton").split(".")[:2])
    table = TABLES / f"triton-{installed}.md"
    if not table.exists():
        pytest.skip(f"bench/results/aot has no table of Triton {installed}")
    assert len(table.read_text().splitlines()) <= 450
    report(
        triton, tmp_path, "--arch", "90", "--dtype", "bf16", "--shape", "stop-b32-train", "--check", str(table)
    )  # fmt: skip
