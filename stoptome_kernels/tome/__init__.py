# SPDX-License-Identifier: Apache-2.0
"""The parts of merging that any model has: settings, schedules, traces, descriptions."""

from .config import ToMeConfig, add_tome_args
from .report import Description
from .schedule import Schedule, Step, parse_r, plan_layers
from .sweep import Recommendation, Sweep, SweepRow
from .trace import Trace

__all__ = [
    "Description",
    "Recommendation",
    "Schedule",
    "Step",
    "Sweep",
    "SweepRow",
    "ToMeConfig",
    "Trace",
    "add_tome_args",
    "parse_r",
    "plan_layers",
]
