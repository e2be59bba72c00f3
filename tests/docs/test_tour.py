# SPDX-License-Identifier: Apache-2.0
"""examples/tour.ipynb: its committed outputs are there, and are what its cells give today."""

import ast
import contextlib
import io
import json

import pytest

from harness import libraries  # noqa: F401  (first of all that may import torchvision)
from support import ROOT

NOTEBOOK = ROOT / "examples/tour.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    """The code cells."""
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_it_is_committed_as_it_ran(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    text = NOTEBOOK.read_text()
    assert len(text) < 1_500_000
    assert not any(word in text for word in ("/home/", "/root/", "/tmp/", "stderr", "Warning"))
    for cell in cells:
        ast.parse("".join(cell["source"]))


@pytest.mark.full  # half a minute: every function in it has its own tests
def test_it_runs_and_prints_the_same(cells, monkeypatch, tmp_path):
    pytest.importorskip("timm")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for cell in cells:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec("".join(cell["source"]), namespace)
        if "varies" not in cell["metadata"].get("tags", []):
            assert said.getvalue() == printed(cell)
    plt.close("all")
    assert all(0.5 < value <= 1.001 for value in namespace["fidelity"])
    assert namespace["fidelity"][0] == pytest.approx(1)
