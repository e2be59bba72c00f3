# SPDX-License-Identifier: Apache-2.0
"""Every test body runs on every backend; outputs start as NaN, so that an element nobody writes is seen."""

import os
import platform
import sys
from importlib.util import find_spec

# Of the tests, and of what they start. Threads that wait for a core spin: beside two busy processes on two cores, work
# of bench/stop.py that takes 11 s with two threads and 17 s with one takes 60 s with two and 26 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else torch 2.6 starts a process for each core

import pytest
import torch

from support import GOLDEN, GPU
from support.lanes import (  # noqa: F401
    pytest_addoption,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure_node,
    pytest_runtest_protocol,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    pytest_xdist_make_scheduler,
)

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    if find_spec("triton"):
        from support import old_triton

        old_triton.mend()

import hypothesis
import numpy as np
import stoptome_kernels as stk

hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")

# What files of tests import that a machine may lack: there they are left out, and named at the end of the run. In CI,
# which must have everything, importing them fails.
NEEDED = {
    **dict.fromkeys(("ops/test_native.py", "ops/test_native_attention.py"), ("stoptome_kernels._native",)),
    "retrieval/*": ("av", "faiss", "filelock", "ftfy", "msgspec", "PIL", "safetensors", "tokenizers"),
    **dict.fromkeys(
        ("models/test_layouts.py", "models/test_report.py", "models/test_trial.py", "models/test_warnings.py"),
        ("open_clip", "timm", "torchvision", "transformers"),
    ),
    "vit/*": ("accelerate", "onnxruntime", "open_clip", "peft", "timm", "torchvision", "transformers"),
}
MISSING = {
    files: [name for name in names if find_spec(name) is None]
    for files, names in NEEDED.items()
    if not os.environ.get("CI")
}
collect_ignore_glob = [files for files, names in MISSING.items() if names]


def pytest_terminal_summary(terminalreporter):
    for files in collect_ignore_glob:
        terminalreporter.write_line(f"left out: tests/{files}, for want of {', '.join(MISSING[files])}")


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request) -> str:
    """A backend that must be able to run here; only a system that Triton has no packages for may go without it."""
    name = request.param
    reason = stk.backends()[name]
    if name == "triton" and reason and not (sys.platform == "linux" and platform.machine() == "x86_64"):
        pytest.skip(reason)
    assert reason is None, f"{name} must run in the tests: {reason}"
    return name


@pytest.fixture
def device(backend) -> str:
    return "cuda" if GPU and backend == "triton" else "cpu"


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN (floats) and the largest value (integers); on a CPU nondeterministic algorithms raise."""
    torch.use_deterministic_algorithms(True, warn_only=GPU)  # the eager peers of a GPU have no other way
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """The cases of matching_upstream.npz (see golden/README.md) as dictionaries of tensors."""
    data = np.load(GOLDEN / "matching_upstream.npz")
    cases = []
    for i, name in enumerate(data["cases"]):
        prefix = f"{i}/"
        case = {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)}
        case = {key: int(value) if value.ndim == 0 else torch.from_numpy(value) for key, value in case.items()}
        cases.append(case | {"name": str(name)})
    return cases
