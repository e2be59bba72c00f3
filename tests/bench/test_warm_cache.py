# SPDX-License-Identifier: Apache-2.0
"""The prepared cache: kernels compiled here are found by another process in another folder; nothing else comes in."""

import io
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import ROOT

BENCH = ROOT / "bench"
ENTRY = "A" * 52

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux"),
]


@pytest.fixture
def warm_cache(bench):
    return bench("warm_cache")


def pack(file: Path, key: dict, files: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, content in {"key.json": json.dumps(key).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(f"{ENTRY}/link.json")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
    return file


GOOD = {
    f"{ENTRY}/rows.json": b"{}",
    f"{ENTRY}/__grp__rows.json": json.dumps({"child_paths": {"rows.json": "rows.json"}}).encode(),
}


def test_a_pack_that_fits(warm_cache, tmp_path, monkeypatch, capsys):
    """Group files get the paths of the folder; what was used and what was compiled besides is counted."""
    monkeypatch.setattr(warm_cache, "other_gpu", lambda: None)
    file = pack(tmp_path / "pack.tar.gz", {**warm_cache.key(), "kernels": 1}, GOOD)
    folder = tmp_path / "cache"
    assert warm_cache.main(["use", str(file), str(folder)]) == 0
    assert capsys.readouterr().out == "1 kernels\n"
    group = json.loads((folder / ENTRY / "__grp__rows.json").read_text())
    assert group == {"child_paths": {"rows.json": str(folder / ENTRY / "rows.json")}}

    assert warm_cache.main(["used", str(file), str(folder)]) == 0
    assert "how many of the 1 kernels were used is not known" in capsys.readouterr().out
    new = folder / ("B" * 52)
    new.mkdir()
    (new / "__grp__more.json").write_text("{}")
    (folder / ".used").mkdir()
    for name in (ENTRY, new.name):
        (folder / ".used" / name).touch()
    assert warm_cache.main(["used", str(file), str(folder)]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 kernels were used: rows 1" in out
    assert "1 kernels were compiled besides: more 1" in out


@pytest.mark.parametrize("name", ["triton", "triton_key", "ptxas", "environment"])
def test_a_pack_of_another_triton(warm_cache, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(warm_cache, "other_gpu", lambda: None)
    file = pack(tmp_path / "pack.tar.gz", {**warm_cache.key(), "kernels": 1, name: "another"}, GOOD)
    assert warm_cache.main(["use", str(file), str(tmp_path / "cache")]) == 3
    out = capsys.readouterr().out
    assert out.startswith(f"{name} is ")
    assert "'another'" in out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../x", "/x", f"{ENTRY}/../x", f"{ENTRY}/y/x", "x", "key.json/x", ".used/x"])
def test_a_hostile_member(warm_cache, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(warm_cache, "other_gpu", lambda: None)
    file = pack(tmp_path / "pack.tar.gz", {**warm_cache.key(), "kernels": 1}, {**GOOD, name: b"x"})
    folder = tmp_path / "in" / "cache"
    assert warm_cache.main(["use", str(file), str(folder)]) == 2
    assert "which no pack has" in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"pack.tar.gz"}


def test_a_link_and_a_file_that_is_no_pack(warm_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warm_cache, "other_gpu", lambda: None)
    link = pack(tmp_path / "link.tar.gz", {**warm_cache.key(), "kernels": 1}, GOOD, link="/etc/hostname")
    (tmp_path / "text.tar.gz").write_text("no archive")
    for file in (link, tmp_path / "text.tar.gz", tmp_path / "none.tar.gz"):
        assert warm_cache.main(["use", str(file), str(tmp_path / "cache")]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "cache").exists()


LAUNCH = """
import sys
from harness import launch_paths, no_gpu
gpu = no_gpu.install(results=False)
launch_paths.run("large", gpu)
print(*gpu.variants)
"""


@pytest.mark.slow
def test_another_process_finds_the_kernels(tmp_path):
    """Four kernels, one of them perhaps under two keys: made in one folder, used in another, nothing compiled there."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    script, file, folder = BENCH / "warm_cache.py", tmp_path / "pack.tar.gz", tmp_path / "else" / "where"
    own = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}

    def run(*command: object, **more: str) -> str:
        path = os.pathsep.join([str(BENCH), str(BENCH.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
            env={**own, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **more},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    count = int(run(script, "make", file, "--only", "large", "--processes", 1).splitlines()[-1].split()[0])
    assert count in (4, 5)
    assert run(script, "use", file, folder).splitlines()[-1] == f"{count} kernels"
    before = sorted(path.name for path in folder.iterdir())
    with_cache = {"TRITON_CACHE_DIR": str(folder), "TRITON_CACHE_MANAGER": "harness.cache_marks:MarkingCache"}
    assert len(run("-c", LAUNCH, **with_cache).split()) == 4
    assert sorted(path.name for path in folder.iterdir() if path.name != ".used") == before
    out = run(script, "used", file, folder)
    assert f"4 of {count} kernels were used" in out
    assert "0 kernels were compiled besides" in out
