# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
GPU = torch.cuda.is_available()
