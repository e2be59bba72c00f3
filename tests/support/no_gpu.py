# SPDX-License-Identifier: Apache-2.0
"""Scripts that run Triton's launch path over a driver that launches nothing."""

import json
import os
import subprocess
import sys

from support import ROOT


def answers(script: str) -> dict:
    """Return what a script of this folder writes to stdout as JSON. It has a process of its own, since the tests' has
    Triton's interpreter; Triton's own cache keeps what it compiled from run to run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [ROOT, ROOT / "bench", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, str(ROOT / "tests/support" / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
