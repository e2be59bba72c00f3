# SPDX-License-Identifier: Apache-2.0
"""No code of ours runs what is in a file: the calls that would do so occur nowhere in what is installed or run.

``torch.load(weights_only=True)`` is among them: it runs nothing, but some files end the process in it.
"""

import ast

import pytest

from support import ROOT

FOLDERS = ("stoptome_kernels", "python_ref", "examples", "bench")
RUN = {
    "eval", "exec", "compile", "torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "cloudpickle.load",
    "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "runpy.run_path",
    "os.system", "os.popen", "pandas.read_pickle",
}  # fmt: skip


def runs(source: str) -> list[str]:
    """The calls in a program that may run what a file holds, as ``line: call``."""
    tree = ast.parse(source)
    names = {}  # what imports call things
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(first, first) + dot + rest
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = called in ("numpy.load", "np.load") and options.get("allow_pickle", "False") != "False"
        if called in RUN or unsafe or options.get("weights_only", "True") != "True" or options.get("shell") == "True":
            found.append(f"{node.lineno}: {called}")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_call_runs_a_file(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [f"{file.relative_to(ROOT)}:{call}" for file in files for call in runs(file.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "import torch\ntorch.jit.load(path)", "from torch.jit import load as read\nread(path)",
        "from torch import jit\njit.load(path)", "import torch as t\nt.load(path)", "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)", "import torch\ntorch.load(path, weights_only=trusted)",
        "import pickle\npickle.load(file)", "from pickle import loads\nloads(data)", "import pickle as p\np.load(file)",
        "import numpy as np\nnp.load(path, allow_pickle=True)", "import subprocess\nsubprocess.run(line, shell=True)",
        "read(path, weights_only=False)",
    ],
)  # fmt: skip
def test_what_counts_as_such_a_call(source):
    assert len(runs(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "import numpy as np\nnp.load(path)",
     "import torch\ntorch.compile(model)", "import json\njson.load(file)", "re.compile(text)"],
)  # fmt: skip
def test_what_does_not(source):
    assert runs(source) == []
