# SPDX-License-Identifier: Apache-2.0
"""Launches that are prepared reach the driver as those that Triton looks at anew: kernel, grid and arguments."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from support import ROOT

pytestmark = [
    pytest.mark.slow,  # it compiles some 80 variants of the kernels: half a minute where Triton's cache is empty
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux"),
]


def test_what_a_prepared_launch_is():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [ROOT, ROOT / "bench", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/prepared_launches.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["prepares"] == (answer["keys"] > 0)
    for op, arguments, prepared, plain in answer["found"]:
        assert plain, (op, arguments)
        assert prepared == plain, (op, arguments)
