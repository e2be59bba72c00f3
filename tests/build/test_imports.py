# SPDX-License-Identifier: Apache-2.0
"""The package's modules import each other in one direction: from the top of the list below to its end."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support import ROOT

# What stands in a line may import what stands in the lines below it, and its own folder. ``""`` is the package itself.
ORDER = """
    ""
    compat visualize stop sweeps
    patch
    video vit
    patching
    tome
    api
    ops
    _backends
    plan
    checks onnx
    layout normalization timing
    reference
"""
PLACES = {name.strip('"'): line for line, names in enumerate(ORDER.split("\n")) for name in names.split()}


def imported(file: Path, module: str) -> dict[str, bool]:
    """Return the modules and names that a file imports of its package, dotted, and whether a function does."""
    tree = ast.parse(file.read_text())
    at_import = {id(node) for node in tree.body}
    folder = [part for part in module.split(".") if part]
    folder = folder if file.name == "__init__.py" else folder[:-1]
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            start = ".".join([*above, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                found[f"{start}.{alias.name}".strip(".")] = id(node) not in at_import
    return found


def modules(root: Path) -> dict[str, Path]:
    """Return the files of a package by their dotted names."""
    names = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def faults(root: Path) -> list[str]:
    """Return the imports of a package against the order, and its circles."""
    files, wrong, graph = modules(root), [], {}
    for module, file in files.items():
        here = module.partition(".")[0]
        for name, inside in imported(file, module).items():
            target = name if name in files else name.rpartition(".")[0]
            there = name.partition(".")[0]
            there = there if there in PLACES else ""
            graph.setdefault(module, set()).add(target)
            if here != there and PLACES[here] >= PLACES[there]:
                wrong.append(f"{module or 'the package'} imports {name}")
            if inside and there in ("patch", "video", "vit"):
                wrong.append(f"{module} imports {name} in a function")
    graph = {module: {name for name in names if name in files and name} for module, names in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " → ".join(error.args[1]))
    return wrong


def test_imports_go_down():
    assert faults(ROOT / "stoptome_kernels") == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("plan.py", "from .tome import x", "plan imports tome.x"),
        ("vit/timm.py", "from ..video import y", "vit.timm imports video.y"),
        ("api.py", "from . import __version__", "api imports __version__"),
        ("stop/model.py", "def f():\n    from ..vit import z", "stop.model imports vit.z in a function"),
        ("vit/block.py", "from .timm import a", "a circle: "),
    ],
)
def test_others_are_seen(tmp_path, file, line, said):
    for name in PLACES:
        if name not in ("", "reference"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "vit/block.py").write_text("")
    (tmp_path / "vit/timm.py").write_text("from .block import b\nfrom ..patching import c")
    (tmp_path / file).write_text(f"{(tmp_path / file).read_text() if (tmp_path / file).exists() else ''}\n{line}\n")
    assert [text[: len(said)] for text in faults(tmp_path)] == [said]
