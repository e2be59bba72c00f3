# SPDX-License-Identifier: Apache-2.0
"""Wheels and sdists: built without torch, installed somewhere else, used from there."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support import ROOT

CHECK = """
import os, sys
# an editable install of this checkout would lend its own modules to the installed copy
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch, stoptome_kernels as stk
assert stk.__file__.startswith(sys.argv[1]), stk.__file__
native = stk.backends()["native"]
assert (native is None) == (sys.argv[2] == "native"), native
assert "python_ref" not in os.listdir(sys.argv[1])
from stoptome_kernels.reference import similarity
x = torch.randn(2, 9, 4)
y, size = stk.merge(x, stk.match(x, 2))
assert torch.equal(y, stk.merge(x, stk.match(x, 2), backend="reference")[0])
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory) -> dict[str, str]:
    """An environment in which importing torch fails, as in pip's isolated builds."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, no_torch) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "-n", "-x", "--sdist", "-o", out, ROOT, cwd=out, **no_torch)
    (file,) = out.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory) -> Path:
    """The unpacked sdist: what it lacks, a user lacks."""
    out = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    (folder,) = out.iterdir()
    return folder


def build_and_install(source, tmp_path, no_torch, **environment) -> tuple[Path, str]:
    built, site = tmp_path / "wheel", tmp_path / "site"
    command = [sys.executable, "-m", "build", "-n", "-x", "--wheel", "-o", built, source]
    done = run(*command, cwd=tmp_path, **no_torch, **environment)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "stoptome_kernels/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"stoptome_kernels", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    return site, done.stdout + done.stderr


@pytest.mark.slow
def test_wheel(source, tmp_path, no_torch):
    site, _ = build_and_install(source, tmp_path, no_torch, STOPTOME_REQUIRE_NATIVE="1")
    run(sys.executable, "-c", CHECK, site, "native", cwd=tmp_path, PYTHONPATH=str(site))


@pytest.mark.slow
def test_wheel_without_a_compiler(source, tmp_path, no_torch):
    site, output = build_and_install(source, tmp_path, no_torch, CXX="/no/such/compiler")
    lines = [line for line in output.splitlines() if "without the native CPU kernels" in line]
    assert len(lines) == 1
    assert not list(site.rglob("*.so"))
    run(sys.executable, "-c", CHECK, site, "python", cwd=tmp_path, PYTHONPATH=str(site))


def test_native_module_links_no_openmp_and_no_torch(source):
    from stoptome_kernels import _native

    needed = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True).stdout
    libraries = [line.split()[0] for line in needed.splitlines()]  # without their addresses, which may be any digits
    assert not [name for name in libraries if any(word in name for word in ("gomp", "iomp", "libomp", "torch", "c10"))]


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: nothing to compare with")
    for name in tracked.stdout.split():
        if name.split("/")[0] in ("csrc", "stoptome_kernels", "python_ref", "tests") or name in (
            "LICENSE",
            "README.md",
        ):
            assert name in names, name


@pytest.mark.slow
def test_a_source_tree_that_was_not_installed_says_so(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; sys.path[:0] = sys.argv[1:]; import stoptome_kernels",
         str(source), os.path.dirname(os.path.dirname(__import__("torch").__file__))],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install -e ." in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF alone has relocations that are made read-only")
def test_the_native_module_has_full_relro():
    """What the loader resolved can't be overwritten afterwards."""
    from stoptome_kernels import _native

    headers = run("readelf", "--wide", "--dynamic", "--program-headers", _native.__file__, cwd=ROOT).stdout
    assert "GNU_RELRO" in headers
    assert "BIND_NOW" in headers


def test_constraints_hold_whatever_is_asked_for():
    """A version for every package of pyproject.toml, within its range; torch and Triton are chosen in the Makefile."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    versions = {}
    for pin in map(Requirement, lines):
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        if pin.marker is None or pin.marker.evaluate({"python_version": "3.12"}):
            versions[pin.name] = exact.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["build-system"]["requires"], *project["dependency-groups"]["release"]]
    asked += [name for extra in project["project"]["optional-dependencies"].values() for name in extra]
    for wanted in map(Requirement, asked):
        name = wanted.name.lower().replace("_", "-")
        if name not in ("torch", "triton"):
            assert name in versions, f"constraints.txt has no {name}: make constraints"
            assert versions[name] in wanted.specifier, (wanted, versions[name])
