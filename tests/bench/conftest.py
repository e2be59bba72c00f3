# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the benchmark's tests."""

import importlib

import pytest


@pytest.fixture
def bench():
    """Import a module of the bench folder by its name."""
    return importlib.import_module
