# SPDX-License-Identifier: Apache-2.0
"""What merging is for any model: settings, schedules, traces, descriptions."""
