# SPDX-License-Identifier: Apache-2.0
"""STOP (Liu et al., CVPR 2025) on this package's operators, with upstream's parameter names."""

from .checkpoint import convert_weights
from .config import StopConfig
from .model import StopModel

__all__ = ["StopConfig", "StopModel", "convert_weights"]
