# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the benchmark's tests."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from harness.trained import dinov2
from support import ROOT
from support import dinov2 as small


@pytest.fixture
def bench():
    """Import a module of the bench folder by its name."""
    return importlib.import_module


@pytest.fixture
def machine(bench, monkeypatch):
    """Leave the C library's heap and the number of threads as they are."""
    monkeypatch.setattr(bench("harness.measure"), "configure_heap", lambda pages: pages)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_clock(bench, machine, monkeypatch):
    """Fail where anything is timed."""
    monkeypatch.setattr(bench("harness.measure"), "measure", lambda *_: pytest.fail("timed something"))


@pytest.fixture(scope="session")
def run_script():
    """Run a command from the shell, as a user starts it on a machine without a GPU; return what it printed."""

    def run(script: str, *arguments: object) -> str:
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        env["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)], env=env,
            capture_output=True, text=True, timeout=500, cwd=ROOT.parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def weights(monkeypatch):
    """Random weights of a DINOv2 of a few channels, in place of the trained ones."""
    monkeypatch.setattr(dinov2, "WIDTH", small.WIDTH)
    monkeypatch.setattr(dinov2, "DECODED", small.DECODED)
    return small.random_weights()
