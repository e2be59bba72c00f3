# SPDX-License-Identifier: Apache-2.0
"""How long the fuzzers run: a moment in the lanes, minutes under ``make fuzz``. Their seeds are fixed."""

import os


def rounds(short: int) -> int:
    """Return how many rounds a fuzzer makes that makes ``short`` of them in the lanes."""
    return short * int(os.environ.get("STOPTOME_FUZZ", "1"))
