# SPDX-License-Identifier: Apache-2.0
"""Launches that are prepared reach the driver as those that Triton looks at anew: kernel, grid and arguments."""

import sys
from importlib.util import find_spec

import pytest

from support import no_gpu

pytestmark = [
    pytest.mark.slow,  # it compiles some 80 variants of the kernels: half a minute where Triton's cache is empty
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux"),
]


def test_what_a_prepared_launch_is():
    answer = no_gpu.answers("prepared_launches.py")
    assert answer["prepares"] == (answer["keys"] > 0)
    for op, arguments, prepared, plain in answer["found"]:
        assert plain, (op, arguments)
        assert prepared == plain, (op, arguments)
