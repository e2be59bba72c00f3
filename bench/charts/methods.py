# SPDX-License-Identifier: Apache-2.0
"""Ways to have fewer tokens, as tables and charts name them, and marks for those that differ from merging."""

METHODS = {
    "merge": "merging", "merge, sizes off": "sizes off", "random pairs": "random pairs", "drop": "dropped at random",
    "pool": "average pool",
}  # fmt: skip
COLOURS = {"merge": "ours", "merge, sizes off": "other", "random pairs": "third", "drop": "ideal", "pool": "theirs"}


def mark(more: tuple[float, float] | None) -> str:
    """Return a star if an interval of how much more is lost is above 0, a dagger if it is below."""
    return "" if more is None else "*" if more[0] > 0 else "†" if more[1] < 0 else ""
