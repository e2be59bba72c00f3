# SPDX-License-Identifier: Apache-2.0
"""The comparison of configurations: every variant that is timed was right, and each one that was not is named."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("triton")


@pytest.fixture
def bench(bench, monkeypatch):
    """Import a module of the bench folder; a tiny shape, and a clock that runs every side once."""
    shapes, measure = bench("harness.shapes"), bench("harness.measure")
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Shape("tiny", 1, 1, 9, 24, 1, 1, 3))

    def once(sides, device, seconds, graph):
        for calls in sides.values():
            calls[0]()
        return {name: measure.Times(samples=[10.0 + len(name)]) for name in sides}

    monkeypatch.setattr(measure, "measure", once)
    return bench


@pytest.fixture
def run(bench, tmp_path):
    """Run the command on the tiny shape: its status and its rows."""

    def run(kernel: str, *more: str) -> tuple[int, list[dict]]:
        file = tmp_path / "rows.json"
        status = bench("tune").main(["--shapes", "tiny", "--kernels", kernel, "--json", str(file), *more])
        return status, json.loads(file.read_text()) if file.exists() else []

    return run


def limit(bench, monkeypatch, kernel, *changes):
    """Try these variants alone."""
    table = bench("harness.variants").KERNELS
    monkeypatch.setattr(bench("harness.variants"), "ORDERS", set())
    monkeypatch.setitem(table, kernel, replace(table[kernel], variants=lambda c: list(changes), flags=()))


KERNELS = {
    "norm_rows": {"ROWS": 4, "num_warps": 8, "EARLY": True},
    "norm_grad_rows": {"ROWS": 4, "num_warps": 8, "EARLY": False, "programs": 1},
    "reduce_rows": {"ROWS": 2, "BLOCK_D": 16, "CHUNKS": 2},
    "match": {"BLOCK_C": 32, "num_warps": 2},
    "attend": {"BLOCK_Q": 32, "STAGES": 2},
    "spread_rows": {"ROWS": 2, "BLOCK_D": 16, "CHUNKS": 2, "maxnreg": None},
    "grad_keys": {"BLOCK_Q": 32},
    "grad_queries": {"BLOCK_K": 32},
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_variants_are_timed(bench, run, monkeypatch, capsys, kernel):
    limit(bench, monkeypatch, kernel, KERNELS[kernel])
    status, rows = run(kernel)
    assert status == 0, capsys.readouterr().err
    timed = {row["impl"]: row for row in rows if row["p50_us"]}
    label = " ".join(f"{key}={value}" for key, value in KERNELS[kernel].items())
    assert timed.keys() - {"maxnreg=None"} == {"default", label}
    assert timed["default"]["share_of_copy"] == round(14 / 17, 4)
    assert timed[label]["gain"] == round(17 / (10 + len(label)), 4)
    assert {key: timed[label]["config"][key] for key in KERNELS[kernel]} == KERNELS[kernel]
    assert all(row["op"] == kernel and row["bytes"] > 0 and "commit" in row for row in rows)
    assert label in capsys.readouterr().out or timed[label]["p50_us"] > 17


def test_a_variant_changes_what_is_launched(bench):
    """Rows of a tile and the grid made of them; afterwards everything is as before."""
    shapes, variants = bench("harness.shapes"), bench("harness.variants")
    kernel = variants.KERNELS["norm_grad_rows"]
    job = kernel.job(shapes.make(replace(shapes.SHAPES["tiny"], n_cpu=2), "cpu", torch.float32))
    before = variants.config.norm, variants.config.norm_programs, variants.config.norm_resident
    with variants.configured(kernel, {"ROWS": 2, "num_warps": 8, "programs": 1}):
        ((_, grid, _, meta),) = job.launches()
    # 2 items of 3 tiles, 4 of them a program; and one more for each item
    assert (grid, meta["ROWS"], meta["num_warps"]) == ((4,), 2, 8)
    many = kernel.job(shapes.make(replace(shapes.SHAPES["tiny"], n_cpu=200), "cpu", torch.float32))
    for programs in (1, 2):  # on each of 132 multiprocessors; the 1200 tiles would let them be more
        with variants.configured(kernel, {"ROWS": 1, "programs": programs}):
            assert many.launches()[0][1] == (132 * programs + 200,)
    assert before == (variants.config.norm, variants.config.norm_programs, variants.config.norm_resident)
    assert job.launches()[0][3]["ROWS"] == variants.default_of(kernel, job)["ROWS"] == 8


def test_a_wrong_variant_is_refused(bench, run, monkeypatch, capsys):
    limit(bench, monkeypatch, "reduce_rows", {"D": 16}, {"ROWS": 2})
    status, rows = run("reduce_rows")
    assert status == 1
    assert [row["impl"] for row in rows if row["p50_us"]] == ["default", "ROWS=2"]
    assert rows[1]["impl"] == "D=16"
    assert rows[1]["reason"].startswith("wrong: reduce_rows, D=16: y differs")
    assert "reduce_rows, D=16" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", ["match", "attend", "norm_grad_rows"])
def test_a_wrong_default_is_not_timed(bench, run, monkeypatch, capsys, kernel):
    limit(bench, monkeypatch, kernel)
    tune, launch = bench("tune"), bench("tune").launch

    def broken(steps):
        """Add 1 to the outputs that are there from the start."""
        found = launch(steps)
        for tensor in steps[0][2]:
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() in outputs:
                tensor.add_(1)
        return found

    table = bench("harness.variants").KERNELS
    outputs = set()
    make = table[kernel].job

    def watched(inputs):
        job = make(inputs)
        outputs.update(t.data_ptr() for t in job.written(job.launches()).values())
        return job

    monkeypatch.setitem(table, kernel, replace(table[kernel], job=watched))
    monkeypatch.setattr(tune, "launch", broken)
    status, rows = run(kernel)
    assert (status, rows) == (1, [])
    assert f"wrong result, not timed: {kernel}, default" in capsys.readouterr().err


def test_a_variant_that_can_not_run_is_a_row(bench, run, monkeypatch, capsys):
    limit(bench, monkeypatch, "reduce_rows", {"BLOCK_D": 24}, {"NONE": 1}, {"ROWS": 2})
    status, rows = run("reduce_rows")
    assert status == 0
    assert [bool(row["p50_us"]) for row in rows] == [True, False, False, True]
    assert "power of 2" in rows[1]["reason"]
    assert rows[2]["reason"] == "this build has no NONE"
    assert "BLOCK_D=24" in capsys.readouterr().out


def test_orders_of_loads(bench):
    """A flag is tried the other way round where a configuration has it; where it is missing, that is said."""
    variants = bench("harness.variants")
    norm, default = variants.KERNELS["norm_rows"], {"ROWS": 1, "num_warps": 4}
    tried, missing = variants.variants_of(norm, default)
    assert missing == ["EARLY"]
    assert "EARLY=True" not in tried
    tried, missing = variants.variants_of(norm, {**default, "EARLY": False})
    assert missing == []
    assert next(iter(tried.items())) == ("EARLY=True", {"EARLY": True})
    tried, missing = variants.variants_of(norm, {"ROWS": 1, "num_warps": 4, "EARLY": True})
    assert missing == []
    assert {"EARLY": False} in tried.values()
    assert {"num_warps": 2} in tried.values()
    assert {} not in tried.values()


def test_the_limit_of_registers_is_the_defaults(bench):
    """Fewer warps under it would spill, and be judged by that; what leaves the tile as it is keeps it."""
    variants = bench("harness.variants")
    default = {"ROWS": 1, "num_warps": 4, "EARLY": True, "maxnreg": 80}
    tried, _ = variants.variants_of(variants.KERNELS["norm_grad_rows"], default)
    assert {"ROWS": 2, "num_warps": 2, "programs": 4, "maxnreg": None} in tried.values()
    assert {"maxnreg": None} in tried.values()
    assert {"programs": 6} in tried.values()
    assert {"EARLY": False} in tried.values()
    assert {"num_warps": 2, "maxnreg": 128, "programs": 8} in tried.values()
    default |= {"BLOCK_A": 128, "BLOCK_B": 16, "BLOCK_C": 64}
    tried, _ = variants.variants_of(variants.KERNELS["match"], default)
    assert {"maxnreg": 128} in tried.values()  # a variant's own
    assert {"BLOCK_B": 32, "maxnreg": None} in tried.values()


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped; what was measured so far:"),
        (torch.OutOfMemoryError(), 0, "spread_rows, tiny: skipped, not enough GPU memory"),
        ("Broken", 1, "error: wrong result, not timed: spread_rows; the device is lost, nothing more is run"),
    ],
    ids=["interrupt", "memory", "broken"],
)
def test_what_ends_a_kernel_keeps_the_others(bench, run, monkeypatch, capsys, error, status, says):
    for kernel in ("reduce_rows", "spread_rows", "norm_rows"):
        limit(bench, monkeypatch, kernel)
    measure, turns = bench("harness.measure"), []
    once, error = measure.measure, bench("tune").Broken("spread_rows") if error == "Broken" else error

    def stopped(*args):
        turns.append(1)
        if len(turns) == 2:
            raise error
        return once(*args)

    monkeypatch.setattr(measure, "measure", stopped)
    found, rows = run("reduce_rows,spread_rows,norm_rows")
    assert found == status
    assert [row["op"] for row in rows] == ["reduce_rows", *(["norm_rows"] if status == 0 else [])]
    said = capsys.readouterr()
    assert says in said.err
    assert "reduce_rows" in said.out


def test_bytes_are_the_least(bench):
    shapes, measure, variants = bench("harness.shapes"), bench("harness.measure"), bench("harness.variants")
    shape = shapes.SHAPES["tiny"]
    shape = replace(shape, heads=2)
    inputs = shapes.make(shape, "cpu", torch.float32)
    for kernel, cell in (
        ("reduce_rows", ("merge", "forward")), ("spread_rows", ("merge", "backward")), ("match", ("match", "forward")),
    ):  # fmt: skip
        assert variants.KERNELS[kernel].job(inputs).nbytes == measure.least_bytes(shape, 1, 4, *cell), kernel


def test_the_order_of_importance(bench):
    tune = bench("tune")
    found = [(kernel.name, shape.name) for kernel, shape in tune.cases(tune.arguments([]))]
    assert found[:3] == [(name, "stop-b32-train") for name in ("norm_rows", "norm_grad_rows", "reduce_rows")]
    assert {name for name, _ in found} == set(bench("harness.variants").KERNELS)
    only = tune.cases(tune.arguments(["--kernels", "match", "--shapes", "vit-b16-r16"]))
    assert [(kernel.name, shape.name) for kernel, shape in only] == [("match", "vit-b16-r16")]


def test_without_a_gpu_or_the_interpreter(bench, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench("tune").arguments([])
    assert stopped.value.code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
