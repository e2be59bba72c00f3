#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Everything that needs an NVIDIA GPU, in one command: tests, benchmarks, variants, profiler, sanitizer, charts.

    bench/gpu_suite.sh OUTDIR first      the first minutes on a GPU, at most 400 s: is it right, and how fast
    bench/gpu_suite.sh OUTDIR second     after mending, at most 300 s: right again, torch.compile, STOP's tower
    bench/gpu_suite.sh OUTDIR tests      all tests that run on a GPU, at most 540 s
    bench/gpu_suite.sh OUTDIR bench      all operators and STOP, at most 560 s; `models`: whole vision transformers
    bench/gpu_suite.sh OUTDIR small      one video, eager, in a CUDA graph and compiled, at most 260 s
    bench/gpu_suite.sh OUTDIR all        tests, bench and small, 20 minutes
    bench/gpu_suite.sh OUTDIR dry        every stage on a machine without a GPU: does it start, end, and write its rows?

Needs a python3 with its own torch, Triton, pytest, hypothesis, matplotlib, numpy, tqdm; no network, no pip, and before
the stage `native` no compiler but the one that Triton calls. The environment is left as it is. Without a GPU all plans
but `dry` end after their first stage. The stages and their boxes are in harness/gpu_stages.py, the most important
first; each is interrupted at the end of its box, and a benchmark then writes what it has. A stage that fails does not
stop the next; the exit status is 1 if any failed.

Leaves in OUTDIR `report.txt`, what every stage printed, and `suite.tar.gz`, of at most 16 MiB: the report, junit files,
rows, charts, tables, versions, and what profiler and sanitizer wrote. `--cache` takes kernels that were compiled
elsewhere (bench/warm_cache.py). `--commit` names the commit in the rows where the checkout has no .git.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from harness import gpu_stages
from harness.gpu_stages import Stage

ROOT = Path(__file__).resolve().parent.parent
PACKED_BYTES = 16 << 20
DRY_SECONDS = 180  # of any stage of a dry run, which compiles on few cores and measures nothing


class Suite:
    """One run: the folder of its files, its report, and the time that is left."""

    def __init__(self, out: Path, plan: str, commit: str | None, cache: Path | None):
        self.out, self.dry, self.commit, self.cache = out, plan == "dry", commit, cache
        self.start = time.monotonic()
        self.deadline = self.start + gpu_stages.LIMITS[plan] - 10  # the last seconds are for packing
        self.work = Path(tempfile.mkdtemp(prefix="stoptome-suite-"))
        self.files = self.work / "files"
        self.site = self.work / "site"
        self.files.mkdir()
        self.report = (out / "report.txt").open("w", buffering=1)
        self.summary: list[str] = []
        self.left_out: set[str] = set()
        self.failed = False
        self.no_gpu = False

    def say(self, text: str) -> None:
        """Write a line to the report and to the terminal."""
        print(text, flush=True)
        print(text, file=self.report)

    def environment(self) -> dict[str, str]:
        """Return what every stage's process sees."""
        path = [str(self.site), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
        found = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "MPLBACKEND": "Agg",
            "STOPTOME_SITE": str(self.site),
        }
        found.pop("TRITON_INTERPRET", None)
        if self.cache or "TRITON_CACHE_DIR" not in found:
            found["TRITON_CACHE_DIR"] = str(self.work / "triton")
        if self.cache:
            found["TRITON_CACHE_MANAGER"] = "harness.cache_marks:MarkingCache"  # notes what is used
        return found

    def command(self, stage: Stage) -> list[str]:
        """Return the words of a stage's command on this machine."""
        arguments = [word.format(out=self.files) for word in stage.arguments]
        if stage.script == "pytest":
            words = self.pytest(stage)
            arguments = [str(ROOT / word) if word.startswith("tests") else word for word in arguments]
        else:
            words = [sys.executable, str(ROOT / "bench" / stage.script)]
        if self.dry:
            arguments += gpu_stages.SMALLEST.get(stage.script, ())
        if self.commit and "--json" in arguments:
            arguments += ["--commit", self.commit]
        under = [] if self.dry else [word.format(out=self.files) for word in stage.under]
        return [*under, *words, *arguments]

    def pytest(self, stage: Stage) -> list[str]:
        """Return pytest's command; foreign warnings are no failures, and four processes share a GPU's memory."""
        words = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        words += ["-p", "no:cacheprovider", "-W", "default", "-v", "--tb=short"]
        words += ["--junitxml", str(self.files / f"{stage.name}.xml")]
        if self.dry:
            return [*words, "-p", "harness.no_gpu"]
        if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0:
            words += ["-n", "4", "--maxschedchunk", "1"]  # in the order of the file: what matters most first
        return words

    def run(self, stage: Stage) -> None:
        """Run a stage within its box, and what is left of the whole run."""
        if self.no_gpu:
            return self.close(stage, "left out: no GPU here", 0.0)
        box = min(DRY_SECONDS if self.dry else stage.seconds, self.deadline - time.monotonic())
        if box < 5:
            return self.close(stage, "left out: no time", 0.0)
        words = self.command(stage)
        if shutil.which(words[0]) is None:
            return self.close(stage, f"left out: no {words[0]} here", 0.0)
        self.say(f"\n===== {stage.name} (at most {box:.0f} s): {shlex.join(words)}")
        begin = time.monotonic()
        status, stopped = self.call(words, box)
        if stage == gpu_stages.VERSIONS and status == gpu_stages.NO_GPU:
            self.no_gpu = not self.dry
            status = int(self.no_gpu)
        empty = status == 0 and stage.script == "pytest" and not self.any_passed(stage)
        failed = "no test passed" if empty else status
        verdict = "stopped at its box" if stopped else f"FAILED ({failed})" if failed else "ok"
        # a benchmark that was stopped has written what it has; tests that were stopped have not passed
        self.failed |= bool(failed) and not (stopped and stage.script != "pytest")
        self.close(stage, verdict, time.monotonic() - begin)

    def any_passed(self, stage: Stage) -> bool:
        """Return whether a stage of tests has one that passed: without a GPU, all are skipped."""
        if "--collect-only" in stage.arguments:
            return True
        counts = ElementTree.parse(self.files / f"{stage.name}.xml").getroot()[0]
        return int(counts.get("tests", 0)) > int(counts.get("skipped", 0))

    def call(self, words: list[str], box: float) -> tuple[int, bool]:
        """Run a command in a process group of its own: interrupted before the end of its box, killed at it."""
        grace = min(10.0, box / 4)
        process = subprocess.Popen(
            words, cwd=self.work, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True, preexec_fn=_heed_interrupts,
        )  # fmt: skip
        printed = threading.Thread(target=self.copy_output, args=(process.stdout,), daemon=True)
        printed.start()
        stopped = False
        try:
            process.wait(box - grace)
        except subprocess.TimeoutExpired:
            stopped = True
            _signal(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            _signal(process, signal.SIGKILL)  # and whatever it left running
        process.wait()
        printed.join(5)
        return process.returncode, stopped

    def copy_output(self, stream: IO[str]) -> None:
        """Pass on what a process prints, line by line."""
        with stream:
            for line in stream:
                self.say(line.rstrip("\n"))

    def close(self, stage: Stage, verdict: str, seconds: float) -> None:
        """Note how a stage ended, and pack what there is: the next one may be the last."""
        self.summary.append(f"{stage.name:16} {verdict:28} {seconds:5.0f} s")
        self.pack()

    def pack(self) -> None:
        """Write suite.tar.gz; what doesn't fit is left out, the largest file first, and named."""
        names = sorted(self.files.iterdir(), key=lambda file: file.stat().st_size)
        names.insert(0, self.out / "report.txt")
        part = self.out / "suite.tar.gz.part"
        while True:
            with tarfile.open(part, "w:gz") as tar:
                for file in names:
                    tar.add(file, f"suite/{file.name}")
            if part.stat().st_size <= PACKED_BYTES or len(names) == 1:
                break
            largest = names.pop().name
            if largest not in self.left_out:
                self.say(f"left out of suite.tar.gz, which is full: {largest}")
            self.left_out.add(largest)
        os.replace(part, self.out / "suite.tar.gz")

    def use_cache(self) -> None:
        """Unpack kernels that were compiled elsewhere, if they are this Triton's; else go on without."""
        if self.cache and self.call(self.warm_cache("use"), 30)[0] != 0:
            self.say("the prepared kernels are not used")
            self.cache = None

    def warm_cache(self, verb: str) -> list[str]:
        """Return a command of bench/warm_cache.py."""
        script = str(ROOT / "bench" / "warm_cache.py")
        return [sys.executable, script, verb, str(self.cache), str(self.work / "triton")]

    def finish(self) -> int:
        """Say how all stages ended; return the exit status."""
        if self.cache:
            self.call(self.warm_cache("used"), 10)
        self.say("\n===== summary")
        for line in self.summary:
            self.say(line)
        self.say(f"{'some stages failed' if self.failed else 'all stages passed'}, "
                 f"{time.monotonic() - self.start:.0f} s in all")  # fmt: skip
        self.pack()
        self.report.close()
        shutil.rmtree(self.work, ignore_errors=True)
        return 1 if self.failed else 0


def _heed_interrupts() -> None:
    """Undo what a shell does to a suite that it starts in the background, whose stages would ignore interrupts too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def copy_package(site: Path) -> None:
    """Put the Python files where the checkout, with its folders of other machines' builds, does not hide them."""
    leave = shutil.ignore_patterns("*.so", "__pycache__", "reference")
    shutil.copytree(ROOT / "stoptome_kernels", site / "stoptome_kernels", ignore=leave)
    shutil.copytree(ROOT / "python_ref", site / "stoptome_kernels" / "reference", ignore=leave)


def build() -> int:
    """Build the native CPU kernels into the suite's copy of the package."""
    with tempfile.TemporaryDirectory() as temp:
        source = Path(temp, "source")
        source.mkdir()
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "stoptome_kernels", "python_ref", "csrc"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
        words = ["setup.py", "build_ext", "--build-lib", os.environ["STOPTOME_SITE"], "--build-temp", temp]
        environment = {**os.environ, "STOPTOME_REQUIRE_NATIVE": "1"}
        return subprocess.run([sys.executable, *words], cwd=source, env=environment).returncode


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, nargs="?", metavar="OUTDIR")
    p.add_argument("plan", nargs="?", choices=tuple(gpu_stages.LIMITS), default="all")
    p.add_argument("--cache", type=Path, metavar="FILE", help="kernels compiled elsewhere, of bench/warm_cache.py")
    p.add_argument("--commit", metavar="HASH", default=os.environ.get("BENCH_COMMIT"))
    p.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.build:
        return build()
    if args.out is None:
        p.error("the following arguments are required: OUTDIR")
    if importlib.util.find_spec("torch") is None:
        p.error(f"{sys.executable} has no torch; put a python3 that has it first in PATH")
    args.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(args.out.resolve(), args.plan, args.commit, args.cache and args.cache.resolve())
    copy_package(suite.site)
    suite.use_cache()
    for stage in gpu_stages.dry() if suite.dry else gpu_stages.PLANS[args.plan]:
        suite.run(stage)
    return suite.finish()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stage outlives the suite
    sys.exit(main())
