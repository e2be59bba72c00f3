# SPDX-License-Identifier: Apache-2.0
"""A fixture for tests of each instruction set of the native kernels."""

import pytest

from support.native import ISAS


@pytest.fixture(params=ISAS)
def isa(request):
    """Run a test with the kernels of each instruction set that this processor has."""
    from stoptome_kernels import _native  # which need not be built for the others

    try:
        _native.use_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _native.use_instruction_set("")
