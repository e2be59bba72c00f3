# SPDX-License-Identifier: Apache-2.0
"""make check, make test, make test-full: each has every file, shares are all of the whole, alone is alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, lanes


def collect(*arguments: str) -> list[str]:
    """Return the names of the tests that pytest would run."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_every_file_is_represented_in_make_check():
    """But the files of which each test takes long, named here."""
    quick = {name.partition("::")[0] for name in collect("-m", "not slow and not full")}
    files = {name.partition("::")[0] for name in collect("-m", "")}
    # which compile kernels for 25 s
    assert files - quick == {"tests/bench/test_launches.py", "tests/ops/test_prepared_launches.py"}


def test_the_files_that_are_named_exist():
    for name in (*lanes.SPREAD, *lanes.FIRST):
        assert (ROOT / name).is_file(), name


def test_each_test_is_in_one_share():
    names = [f"tests/ops/test_merge.py::test_{i}[triton-{i}]" for i in range(1000)]
    shares = [{name for name in names if lanes.in_share(name, part, 8)} for part in range(8)]
    assert set.union(*shares) == {*names}
    assert sum(map(len, shares)) == len(names)
    assert min(map(len, shares)) > 80


@pytest.mark.parametrize("text", ["8/8", "1", "-1/8", "a/b", "1/0"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(pytest.UsageError, match="K/N"):
        lanes.share(text)


def test_files_stay_together():
    assert lanes.scope("tests/retrieval/test_run.py::test_a[1]") == lanes.scope("tests/retrieval/test_run.py::test_b")
    one, other = (f"{lanes.SPREAD[0]}::test_{name}" for name in "ab")
    assert lanes.scope(one) != lanes.scope(other)


TIMED = """
import time, pytest

@pytest.fixture(autouse=True)
def span():
    begin = time.monotonic()
    time.sleep({seconds})
    yield
    with open({out!r}, "a") as file:
        print({name!r}, begin, time.monotonic(), file=file)

@pytest.mark.parametrize("i", range({count}))
{mark}
def test_it(i):
    pass
"""


@pytest.mark.slow
def test_what_is_marked_alone_has_nothing_beside_it(tmp_path):
    """While other tests of another process go on one after the other; those run side by side."""
    out = str(tmp_path / "spans")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    for name, mark, count in (("a", "", 30), ("b", "@pytest.mark.alone", 3), ("c", "", 30)):
        text = TIMED.format(seconds=0.02, out=out, name=name, mark=mark, count=count)
        (tmp_path / f"test_{name}.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "3", "-p", "support.lanes", "-p", "no:cacheprovider"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "63 passed" in done.stdout, done.stdout + done.stderr
    lines = Path(out).read_text().splitlines()
    spans = [(name, float(begin), float(end)) for name, begin, end in map(str.split, lines)]
    for name, begin, end in spans:
        beside = [
            other for other, first, last in spans if first < end and last > begin and (first, last) != (begin, end)
        ]
        if name == "b":
            assert beside == []
    overlaps = [1 for name, begin, end in spans for other, first, last in spans if name == "a" and other == "c"
                and first < end and last > begin]  # fmt: skip
    assert overlaps
