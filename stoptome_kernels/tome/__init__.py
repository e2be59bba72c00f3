# SPDX-License-Identifier: Apache-2.0
"""Token merging in whole models: settings, schedules, patches, traces."""

from .config import ToMeConfig, add_tome_args
from .patch import apply_from_config, apply_tome_patch, describe, is_patched, remove_tome_patch, tome_trace
from .report import Description
from .schedule import Schedule, Step, parse_r, plan_layers
from .trace import Trace

__all__ = [
    "Description",
    "Schedule",
    "Step",
    "ToMeConfig",
    "Trace",
    "add_tome_args",
    "apply_from_config",
    "apply_tome_patch",
    "describe",
    "is_patched",
    "parse_r",
    "plan_layers",
    "remove_tome_patch",
    "tome_trace",
]
