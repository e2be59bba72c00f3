# SPDX-License-Identifier: Apache-2.0
"""The parts of merging that any model has: settings, schedules, traces, descriptions."""

from .config import ToMeConfig, add_tome_args
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
    "parse_r",
    "plan_layers",
]
