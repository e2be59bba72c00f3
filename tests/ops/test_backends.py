# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, and what importing the package does not do."""

import importlib
import subprocess
import sys

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels._backends import NATIVE, choose, native

from support import GPU

METRIC = torch.randn(2, 9, 4)


def run(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_clean() | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _clean() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "STOPTOME_BACKEND")}


@pytest.mark.slow
def test_importing_prints_nothing_and_loads_no_triton():
    assert run("import sys, stoptome_kernels; assert not any('triton' == m.split('.')[0] for m in sys.modules)") == ""


@pytest.mark.slow
def test_cpu_work_loads_no_triton():
    code = """
import sys, torch, stoptome_kernels as stk
stk.merge(torch.randn(2, 9, 4), stk.match(torch.randn(2, 9, 4), 2))
assert "triton" not in sys.modules
"""
    assert run(code) == ""


def test_auto_on_the_cpu_is_native():
    assert choose("auto", METRIC).name == "native"


@pytest.mark.slow
def test_what_is_there_is_told():
    found = stk.backends()
    assert set(found) == {"triton", "native", "reference"}
    assert found["native"] is None
    assert found["reference"] is None
    if not GPU:
        reason = run("import stoptome_kernels as stk; print(stk.backends()['triton'])")
        assert "NVIDIA" in reason


@pytest.mark.parametrize("name", ["native", "reference"])
def test_environment_variable(monkeypatch, name):
    monkeypatch.setenv("STOPTOME_BACKEND", name)
    assert choose("auto", METRIC).name == name
    other = {"native": "reference", "reference": "native"}[name]
    assert choose(other, METRIC).name == other  # an explicit one is taken at its word


def test_environment_variable_is_checked(monkeypatch):
    monkeypatch.setenv("STOPTOME_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"STOPTOME_BACKEND must be one of .*'cuda'"):
        stk.match(METRIC, 2)
    monkeypatch.setenv("STOPTOME_BACKEND", "")
    stk.match(METRIC, 2)


@pytest.mark.slow
def test_explicit_backend_that_can_not_run_says_why():
    code = """
import torch, stoptome_kernels as stk
try:
    stk.match(torch.randn(2, 9, 4), 2, backend="triton")
except RuntimeError as error:
    print(error)
"""
    message = run(code)
    assert "backend='triton' can't run this:" in message
    assert "backend='auto' takes one that can" in message
    assert "run on CPU tensors, not on cuda" in NATIVE.unavailable_reason("cuda", torch.float32, explicit=True)


def test_float64_on_triton_says_why():
    device = "cuda" if GPU else "cpu"
    with pytest.raises(RuntimeError, match="float64"):
        stk.match(METRIC.double().to(device), 2, backend="triton")


def test_native_kernels_of_another_version_are_not_called(monkeypatch):
    kernels = pytest.importorskip("stoptome_kernels._native", reason="the native kernels were not built")
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "INTERFACE", 1)
        importlib.reload(native)
        assert "of another version" in stk.backends()["native"]
        with pytest.raises(RuntimeError, match=r"another version of this package; reinstall"):
            stk.match(METRIC, 2, backend="native")
        assert stk.match(METRIC, 2).r == 2
    importlib.reload(native)
    assert stk.backends()["native"] is None


@pytest.mark.slow
def test_without_native_kernels_the_reference_runs():
    code = """
import sys
sys.modules["stoptome_kernels._native"] = None  # as if it had not been built
import torch, stoptome_kernels as stk
from stoptome_kernels._backends import choose
assert "not built" in stk.backends()["native"], stk.backends()
x = torch.randn(2, 9, 4)
assert choose("auto", x).name == "reference"
stk.merge(x, stk.match(x, 2))
try:
    stk.match(x, 2, backend="native")
except RuntimeError as error:
    assert "not built" in str(error) and "compiler" in str(error)
else:
    raise AssertionError
"""
    assert run(code) == ""
