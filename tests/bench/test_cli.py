# SPDX-License-Identifier: Apache-2.0
"""The main of all benchmarks: what it writes, prints and returns, whatever happens. A benchmark that does next to
nothing, written as the recipe in docs/dev/architecture.md has it, goes through it."""

import argparse
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from harness import cli, measure
from harness.rows import IDENTITY, percentiles, read_rows, write_rows
from harness.verify import WrongResult


def rows_of(n: int, args) -> list[dict]:
    """Measure a sum of n numbers, next to a copy of them."""
    x = torch.ones(n)
    if x.sum() != n:
        raise WrongResult(f"the sum of {n} ones")
    times = measure.measure({"sum": [x.sum], "copy": [x.clone]}, args.device, args.seconds, set())
    same = {"shape": "ones", "n": n, "dtype": args.dtype, "op": "reduce", "direction": "forward"}
    return [{**same, "impl": name, **percentiles(found["samples"])} for name, found in times.items()]


def table(rows: list[dict]) -> str:
    return "\n".join(f"{row['n']:6} {row['impl']:5} {row['p50_us']:8.1f} µs" for row in rows)


def main(argv: list[str]) -> int:
    p = cli.parser("Measure sums.")
    p.add_argument("--sizes", nargs="+", type=cli.positive(int), default=[10, 1000])
    cli.add_dtype(p)
    cli.add_seconds(p, 0.01, "each size")
    args = cli.configure(p.parse_args(argv))
    return cli.main(args, (rows_of(n, args) for n in args.sizes), table)


@pytest.fixture(autouse=True)
def as_it_was(machine):
    """Leave this process as it is."""


@pytest.fixture
def at_the_second(monkeypatch):
    """Raise an error in place of the second measurement, or of the second call of another function; the rows of the
    first are in the file by then."""

    def at(error: BaseException, file: Path | None = None, module=measure, name: str = "measure") -> None:
        once, turns = getattr(module, name), []

        def then(*args):
            turns.append(args)
            if len(turns) == 2:
                assert file is None or len(read_rows(file)) == 2
                raise error
            return once(*args)

        monkeypatch.setattr(module, name, then)

    return at


def test_rows_are_written_and_shown(tmp_path, capsys):
    file = tmp_path / "new" / "rows.json"
    assert main(["--json", str(file), "--threads", "1", "--commit", "c" * 40]) == 0
    rows = read_rows(file)
    assert [(row["n"], row["impl"]) for row in rows] == [(10, "sum"), (10, "copy"), (1000, "sum"), (1000, "copy")]
    for row in rows:
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["runs"] >= 5
        assert (row["commit"], row["threads"], row["pages"]) == ("c" * 40, 1, "reused")
        assert row.keys() >= {"device", "device_kind", "torch", "date", "dirty", *IDENTITY}
    heading, *shown, last = capsys.readouterr().out.splitlines()
    assert heading == f"{rows[0]['device']}, 1 threads, torch {torch.__version__}, float32"
    assert shown == table(rows).splitlines()
    assert last == f"rows: {file}"


def test_a_folder_gets_a_file_by_the_name_of_the_machine(tmp_path):
    assert main(["--json", str(tmp_path), "--threads", "1", "--sizes", "10"]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.endswith(f"-1-threads-torch{'.'.join(torch.__version__.split('.')[:2])}.json")


def test_a_second_run_replaces_its_rows_and_keeps_others(tmp_path, capsys):
    file = tmp_path / "rows.json"
    others = ["--json", str(file), "--threads", "1"]
    assert main([*others, "--sizes", "10", "20"]) == 0
    before = read_rows(file)
    assert main([*others, "--sizes", "20", "30", "--commit", "d" * 40]) == 0
    after = read_rows(file)
    assert [row["n"] for row in after] == [10, 10, 20, 20, 30, 30]
    assert after[:2] == before[:2]
    assert {row["commit"] for row in after[2:]} == {"d" * 40}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_without_a_file_rows_are_shown_alone(tmp_path, capsys):
    assert main(["--sizes", "10"]) == 0
    assert "rows:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (WrongResult("sum is 3"), 1, "error: wrong result, nothing more is timed: sum is 3"),
        (cli.Failure("no more", 7), 7, "error: no more"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 1, "error: not enough GPU memory: CUDA out of memory"),
        (KeyboardInterrupt(), 130, "stopped; what was measured so far:"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_was_measured_before_is_kept(tmp_path, capsys, at_the_second, error, status, says):
    file = tmp_path / "rows.json"
    at_the_second(error, file)
    assert main(["--json", str(file)]) == status
    said = capsys.readouterr()
    assert said.err.strip() == says
    assert [row["n"] for row in read_rows(file)] == [10, 10]
    assert "    10 copy" in said.out
    assert said.out.splitlines()[-1] == f"rows: {file}"


def test_an_interrupt_while_rows_are_written_loses_none(tmp_path, at_the_second):
    file = tmp_path / "rows.json"
    at_the_second(KeyboardInterrupt(), file, cli, "write_rows")
    assert main(["--json", str(file)]) == 130
    assert [row["n"] for row in read_rows(file)] == [10, 10, 1000, 1000]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    assert main(["--json", str(file), "--sizes", "10"]) == 0
    before = file.read_text()
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        main(["--json", str(file), "--sizes", "20"])
    assert file.read_text() == before


def test_rows_of_another_machine_are_others(tmp_path):
    file = tmp_path / "rows.json"
    main(["--json", str(file), "--sizes", "10"])
    rows = read_rows(file)
    for key in ("device", "threads", "pages", "torch"):
        write_rows(file, [rows[0] | {key: "another"}, rows[1] | {"p50_us": 1.0}])
    after = read_rows(file)
    assert after[:2] == [rows[0], rows[1] | {"p50_us": 1.0}]
    assert len(after) == 6


def test_too_little_memory_is_told_with_the_way_out():
    says = "not enough GPU memory for a model: use a smaller --batch"
    with pytest.raises(cli.Failure, match=says), cli.measuring("a model", "--batch"):
        raise torch.OutOfMemoryError("CUDA")


@pytest.mark.parametrize("stopped", [False, True])
def test_tables_that_are_printed_as_they_come(capsys, at_the_second, stopped):
    if stopped:
        at_the_second(KeyboardInterrupt())
    args = cli.configure(cli.parser("").parse_args([], namespace=argparse.Namespace(dtype=None, seconds=0.01)))
    seen = []
    batches = (rows_of(n, args) for n in (10, 20))
    assert cli.main(args, batches, table, live=True, after=seen.extend) == (130 if stopped else 0)
    assert [row["n"] for row in seen] == ([10, 10] if stopped else [10, 10, 20, 20])
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()[1:]] == [
        [str(n), impl] for n in ((10,) if stopped else (10, 20)) for impl in ("sum", "copy")
    ]
    assert said.err == ("stopped\n" if stopped else "")


COMMANDS = {
    "blocks": ["--shapes", "stop-b32-video-r8"], "fused": ["--shapes", "stop-b32-video-r2"],
    "attention": ["--cases", "stop-b32-58"],
    "models": ["--models", "ViT-S/16", "--layers", "1"], "stop": ["--videos", "1"],
    "merge": ["--shapes", "stop-b32-video-r2"], "tune": ["--kernels", "norm_rows", "--shapes", "stop-b32-video-r2"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_something_else_is_not_overwritten(bench, no_clock, monkeypatch, tmp_path, capsys, command):
    """Said before anything is measured, not after minutes."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if command == "merge":
        pytest.importorskip("tqdm")
    if command == "tune":
        pytest.importorskip("triton")
    other = tmp_path / "other.json"
    other.write_text('{"mine": 1}')
    assert bench(command).main([*COMMANDS[command], "--json", str(other)]) == 2
    said = capsys.readouterr()
    assert said.err == f"error: --json: {other} is not a list of benchmark rows; name another file\n"
    assert said.out == ""
    assert json.loads(other.read_text()) == {"mine": 1}


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (None, "--sizes 0", "must be a positive int, got '0'"),
        (None, "--seconds inf", "must be a positive float, got 'inf'"),
        (None, "--dtype int8", "invalid choice: 'int8'"),
        (None, "--pages new", "invalid choice: 'new'"),
        ("merge", "--shapes nonsense", "choose from stop-b32-train"),
        ("merge", "--dtype int8", "float16"),
        ("merge", "--backend cuda", "choose from triton, native, reference"),
        ("merge", "--threads 0", "positive"),
        ("merge", "--plot chart.gif", ".png"),
        ("stop", "--videos 0", "positive int"),
        ("stop", "--layers 3", "leave them out"),
        ("stop", "--settings r=3", "invalid choice"),
        ("blocks", "--shapes sd-512", "choose from stop-b32-train"),  # it has no keys
        ("blocks", "--shapes tempme-b32-clip2", "choose from stop-b32-train"),
        ("models", "--batch 0", "positive int"),
    ],
)
def test_bad_arguments_name_the_good_ones(bench, no_clock, capsys, command, arguments, says):
    if command == "merge":
        pytest.importorskip("tqdm")
    with pytest.raises(SystemExit) as stopped:
        (bench(command).main if command else main)(arguments.split())
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
