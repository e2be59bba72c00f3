# SPDX-License-Identifier: Apache-2.0
"""Packages that the extras of pyproject.toml bring into an environment: whoever has a torch keeps it, and gets no
torchvision, whose packages on PyPI ask for one exact torch, with CUDA."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from support import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BRING_TORCHVISION = {"test", "vit"}  # by timm and open_clip_torch, which are what is tested and measured there
OTHERS = sorted(EXTRAS.keys() - BRING_TORCHVISION)
HERE = [extra for extra in OTHERS if extra != "fidelity"]  # of whose packages only the data is installed, by make


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def brought(requirements: list[str]) -> dict[str, list[Requirement]]:
    """Return all that requirements bring, by name, as the packages that are installed here say: who asks for it, and
    in what version."""
    found: dict[str, list[Requirement]] = {}
    asked = [(Requirement(text), "") for text in requirements]
    seen = set()
    while asked:
        wanted, extra = asked.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = normalized(wanted.name)
        found.setdefault(name, []).append(wanted)
        if name == "torch":  # what it needs is its own affair
            continue
        for extra in ("", *wanted.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                asked += [(Requirement(text), extra) for text in metadata.requires(name) or ()]
    return found


@pytest.mark.parametrize("extra", HERE)
def test_an_extra_leaves_torch_alone(extra):
    found = brought([*PROJECT["dependencies"], *EXTRAS[extra]])
    assert "torchvision" not in found
    assert not [name for name in found if name.startswith("nvidia-")]
    for wanted in found["torch"]:
        assert "2.6.0" in wanted.specifier, f"{wanted} would replace the oldest torch that is promised"
        assert "2.13.0+cpu" in wanted.specifier


def test_torchvision_is_seen_where_it_is_brought():
    """Else the test above would pass whatever an extra asks for."""
    for extra in BRING_TORCHVISION:
        assert "torchvision" in brought(EXTRAS[extra])


@pytest.mark.full  # asks the index that pip is set up with
def test_pip_leaves_torch_alone(tmp_path):
    """pip's own plan for an environment that holds a torch and nothing else."""
    env, torch = tmp_path / "env", "torch-2.13.0.dist-info"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (site,) = env.glob("lib/python*/site-packages")
    (site / torch).mkdir()
    (site / torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    (site / torch / "RECORD").write_text("")
    asked = [*PROJECT["dependencies"], *(text for extra in OTHERS for text in EXTRAS[extra])]
    command = [sys.executable, "-m", "pip", "--python", env, "install", "--dry-run", "--quiet", "--report", "-", *asked]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if "No matching distribution found" in done.stderr:
        pytest.skip("no index of packages can be reached")
    assert done.returncode == 0, done.stderr
    plan = {normalized(item["metadata"]["name"]) for item in json.loads(done.stdout)["install"]}
    assert {"av", "tokenizers", "faiss-cpu"} <= plan
    assert not [name for name in plan if name in ("torch", "torchvision") or name.startswith("nvidia-")]
