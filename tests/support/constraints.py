# SPDX-License-Identifier: Apache-2.0
"""Writes constraints.txt, the versions that make and CI install, from environments that they made:

    make clean && make constraints PIP="-m pip install --quiet"

No hashes: torch's builds differ from one index to the next. Torch and what it chooses by itself are left out. On Python
3.10 only what make oldest-torch installs has a version.
"""

import json
import subprocess
import sys
from pathlib import Path

FREE = ("torch", "torchvision", "triton", "stoptome-kernels", "sympy", "mpmath", "networkx", "fsspec")
PREFIXES = ("nvidia-", "cuda-")
HEADER = """\
# The versions that make and CI install; users' requirements are the ranges in pyproject.toml.
# Written by tests/support/constraints.py. Torch and what it chooses by itself are not in here.
"""


def installed(python: str, *options: str) -> dict[str, str]:
    """Return the packages of an environment with their versions and the marker that they are for; options are of
    ``pip list``."""
    ask = [python, "-c", "import sys; print(sys.version_info < (3, 11))"]
    oldest = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip() == "True"
    found = subprocess.run(
        [python, "-m", "pip", "list", "--format=json", *options], check=True, capture_output=True, text=True
    )
    marker = "<" if oldest else ">="
    return {
        f'{name}; python_version {marker} "3.11"': package["version"]
        for package in json.loads(found.stdout)
        if (name := package["name"].lower().replace("_", "-")) not in FREE and not name.startswith(PREFIXES)
        if name != "pip" or not oldest  # that one came with Python
    }


def main(target: str, folder: str, *pythons: str) -> None:
    """Write the file from a folder of packages and from environments; the first environment's versions count."""
    found = installed(pythons[0], "--path", folder)
    for python in reversed(pythons):
        found |= installed(python)
    lines = [key.replace(";", f"=={version};") for key, version in sorted(found.items())]
    Path(target).write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
