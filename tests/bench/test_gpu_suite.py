# SPDX-License-Identifier: Apache-2.0
"""The suite for machines with a GPU, on one without: boxes hold, nothing is lost, every stage starts and ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import gpu_suite
import plot
from harness import gpu_stages
from harness.gpu_stages import PLANS, Stage

SUITE = Path(gpu_suite.__file__)


@pytest.mark.parametrize("plan", PLANS)
def test_boxes_fit_the_time_of_a_plan(plan):
    """The last ten seconds are for packing."""
    assert sum(stage.seconds for stage in PLANS[plan]) <= gpu_stages.LIMITS[plan] - 10
    names = [stage.name for stage in PLANS[plan]]
    assert len({*names}) == len(names)
    assert names[0] == "versions"


def test_the_first_call_begins_with_the_tests():
    assert [stage.name for stage in PLANS["first"]][1] == "test-gpu"
    assert gpu_stages.LIMITS["first"] <= 400
    assert gpu_stages.LIMITS["second"] <= 300


def test_one_video_is_measured_in_every_way():
    """In one stage, which is in the longest plan, too; to compile takes the longest, and comes last."""
    for plan in ("small", "all"):
        (stage,) = (stage for stage in PLANS[plan] if stage.name == "stop-one-video")
        ways = stage.arguments[stage.arguments.index("--ways") + 1 :]
        assert ways[:3] == ("eager", "graph", "compile")


def run(tmp_path, monkeypatch, *stages, packed=None):
    """Run stages that are files of ``tmp_path``; return status, report, what was packed, and the seconds."""
    monkeypatch.setitem(PLANS, "first", stages)
    if packed:
        monkeypatch.setattr(gpu_suite, "PACKED_BYTES", packed)
    out, begin = tmp_path / "out", time.monotonic()
    status = gpu_suite.main([str(out), "first"])
    seconds = time.monotonic() - begin
    assert sorted(file.name for file in out.iterdir()) == ["report.txt", "suite.tar.gz"]
    with tarfile.open(out / "suite.tar.gz") as tar:
        files = {Path(member.name).name: tar.extractfile(member).read() for member in tar}
    return status, (out / "report.txt").read_text(), files, seconds


def script(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    fails = script(tmp_path, "fails.py", "import sys; print('wrong'); sys.exit(3)")
    works = script(tmp_path, "works.py", "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('[1]')")
    status, report, files, _ = run(
        tmp_path, monkeypatch, Stage("a", 10, fails), Stage("b", 10, works, ("{out}/rows.json",)),
        Stage("c", 10, works, under=("no-such-profiler",)),
    )  # fmt: skip
    assert status == 1
    assert files["rows.json"] == b"[1]"
    assert "wrong" in report
    summary = report.split("===== summary")[1]
    for line in (
        "a                FAILED (3)",
        "b                ok",
        "c                left out: no no-such-profiler",
    ):
        assert line in summary
    assert files["report.txt"].decode() == report


@pytest.mark.slow
@pytest.mark.alone
def test_a_stage_keeps_its_box(tmp_path, monkeypatch):
    """Interrupted before the end of it, and killed at it, with all that it started; also where the suite itself ignores
    interrupts, as a shell's background job does. The first of a stage's two waits ends here as soon as the stage is
    ready for it, so that no slow start of Python is part of the box."""
    waits = {}

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None:
                waits.setdefault(self.pid, []).append(timeout)
                if len(waits[self.pid]) == 1:
                    while not (tmp_path / f"ready-{self.pid}").exists() and self.poll() is None:
                        time.sleep(0.01)
                    raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(gpu_suite.subprocess, "Popen", Process)
    ready = f"open({str(tmp_path / 'ready-')!r} + str(os.getpid()), 'w').close()\n"
    deaf = script(
        tmp_path, "deaf.py",
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"print('child', child.pid, flush=True)\n{ready}"
        "time.sleep(60); time.sleep(60)",
    )  # fmt: skip
    polite = script(
        tmp_path, "polite.py",
        f"import os, time\ntry:\n    {ready}    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('wrote what there is')\n    exit(130)",
    )  # fmt: skip
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status, report, _, seconds = run(tmp_path, monkeypatch, Stage("deaf", 12, deaf), Stage("polite", 40, polite))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [*waits.values()] == [[9, 3], [30, 10]]
    assert "heard" in report
    assert "wrote what there is" in report
    assert report.count("stopped at its box") == 2
    assert seconds < 30, "neither slept for its 60 seconds"
    assert status == 0, "a benchmark that was stopped is no failure"
    child = int(report.split("child ")[1].split()[0])
    time.sleep(0.2)
    alive = Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z"
    assert not alive


@pytest.mark.slow
def test_tests_that_were_stopped_have_not_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite.Suite, "pytest", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    status, report, *_ = run(tmp_path, monkeypatch, gpu_stages.pytest("tests", 5))
    assert status == 1
    assert "stopped at its box" in report


def test_what_does_not_fit_is_left_out_and_named(tmp_path, monkeypatch):
    big = script(
        tmp_path, "big.py",
        "import os, sys, pathlib; folder = pathlib.Path(sys.argv[1])\n"
        "(folder / 'big.bin').write_bytes(os.urandom(400_000)); (folder / 'small.json').write_text('[]')",
    )  # fmt: skip
    _, report, files, _ = run(tmp_path, monkeypatch, Stage("big", 10, big, ("{out}",)), packed=200_000)
    assert "small.json" in files
    assert "big.bin" not in files
    assert "left out of suite.tar.gz, which is full: big.bin" in report


def test_wrong_arguments(capsys):
    for arguments in ([], ["out", "third"]):
        with pytest.raises(SystemExit) as stop:
            gpu_suite.main(arguments)
        assert stop.value.code == 2
    assert "OUTDIR" in capsys.readouterr().err


def test_without_a_gpu_nothing_passes(tmp_path, monkeypatch):
    """Tests would all be skipped, and a benchmark would measure a CPU."""
    versions = script(tmp_path, "versions.py", f"raise SystemExit({gpu_stages.NO_GPU})")
    monkeypatch.setattr(gpu_stages, "VERSIONS", Stage("versions", 10, versions))
    status, report, *_ = run(
        tmp_path, monkeypatch, gpu_stages.VERSIONS, Stage("b", 10, script(tmp_path, "works.py", "print('measured')"))
    )
    assert status == 1
    assert "left out: no GPU here" in report
    assert "measured" not in report


@pytest.mark.slow
def test_tests_that_were_all_skipped_have_not_passed(tmp_path, monkeypatch):
    """As they would be if torch lost the GPU between two stages."""
    test = tmp_path / "test_none.py"
    no_xdist = subprocess.CompletedProcess([], 1)  # four workers take seconds to start
    monkeypatch.setattr(gpu_suite.subprocess, "run", lambda *_, **__: no_xdist)
    test.write_text("import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_it(): pass\n")
    status, report, *_ = run(
        tmp_path, monkeypatch, Stage("a", 60, "pytest", ("--confcutdir", str(tmp_path), str(test)))
    )
    assert status == 1
    assert "FAILED (no test passed)" in report


@pytest.mark.slow
def test_versions_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(SUITE.with_name("versions.py"))], capture_output=True, text=True)
    assert done.returncode == gpu_stages.NO_GPU, done.stdout + done.stderr


def test_without_torch_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite.Suite, "run", lambda *_: None)
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        gpu_suite.main([str(tmp_path / "out"), "first"])
    assert f"{sys.executable} has no torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.full  # a minute and a half, of which each script's own tests see the most
def test_dry_run(tmp_path, capsys):
    """Every stage of the plans starts here, ends, and writes its rows, which nobody can publish."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "out"
    done = subprocess.run(
        [str(SUITE.with_suffix(".sh")), str(out), "dry"], capture_output=True, text=True, timeout=900,
        env={**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "all stages passed" in done.stdout
    with tarfile.open(out / "suite.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    files = tmp_path / "suite"
    for name in ("rows", "fused", "attention", "blocks", "tune", "stop", "models"):
        rows = json.loads((files / f"{name}.json").read_text())
        assert rows
        assert {(row["device"], row["device_kind"]) for row in rows} == {("none", "none")}, name
    assert {row["way"] for row in json.loads((files / "stop.json").read_text())} == {"eager", "graph", "compile"}
    for name in ("rows", "stop", "models"):
        assert (files / f"{name}.png").stat().st_size > 1000
        assert (files / f"{name}.md").stat().st_size > 100
    assert 'errors="0" failures="0" skipped="0" tests="4"' in (files / "test-gpu.xml").read_text()
    published = tmp_path / "published"
    (published / "bench/results/operators").mkdir(parents=True)
    shutil.copy(files / "rows.json", published / "bench/results/operators")
    capsys.readouterr()
    assert plot.main([], published) == 2
    assert "nothing was measured" in capsys.readouterr().err

    marked = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"], cwd=SUITE.parents[1],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    wanted = {line for line in marked.splitlines() if "::" in line}
    seen = {line.strip() for line in done.stdout.splitlines() if "::" in line}
    assert len(wanted) > 100
    assert wanted <= seen
