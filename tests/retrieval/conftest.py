# SPDX-License-Identifier: Apache-2.0
"""A handful of videos, weights and a run of two steps, made once for each file of tests that asks for them."""

import pytest

from retrieval import run
from support.retrieval import clip_weights, layout, msrvtt


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos in MSR-VTT's layout."""
    return layout(tmp_path_factory.mktemp("msrvtt") / "set")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Weights of CLIP."""
    return clip_weights(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, clip):
    """A run of two steps by the command of the README."""
    out = tmp_path_factory.mktemp("run") / "out"
    argv = msrvtt(data, clip, out, "--tome_r", "2", "--tome_prop_attn", "--do_train", "1")
    assert run.main(argv) == 0
    return out
