#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Print the machine, the driver, and every package that a result may hang on; for reports of faults too."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

import stoptome_kernels as stk
import torch

from harness import gpu_stages

PACKAGES = ("torch", "triton", "numpy", "matplotlib", "pytest", "pytest-xdist", "hypothesis", "timm", "transformers")
TOOLS = ("ncu", "compute-sanitizer", "nvcc", "gcc")


def main() -> int:
    if shutil.which("nvidia-smi"):
        sys.stdout.flush()
        subprocess.run(["nvidia-smi"])
    print("python", platform.python_version(), "cores", os.cpu_count())
    for name in PACKAGES:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "missing")
    for tool in TOOLS:
        print(tool, shutil.which(tool) or "missing")
    print("package", stk.__file__, stk.backends())
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False")
        return gpu_stages.NO_GPU
    print("cuda", torch.version.cuda, "device", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    return 0 if stk.backends()["triton"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
