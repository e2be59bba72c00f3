# SPDX-License-Identifier: Apache-2.0
"""Triton's cache, noting which entries it was read for: TRITON_CACHE_MANAGER=harness.cache_marks:MarkingCache, with
bench/ in PYTHONPATH. ``bench/warm_cache.py used`` counts the marks."""

from __future__ import annotations

from pathlib import Path

from triton.runtime.cache import FileCacheManager

MARKS = ".used"  # a folder beside the entries, with an empty file for each that was read


class MarkingCache(FileCacheManager):
    """A folder of compiled kernels, as without it."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        found = super().get_group(filename)
        if found and filename in found:  # Triton compiles nothing then
            entry = Path(self.cache_dir)
            marks = entry.parent / MARKS
            marks.mkdir(exist_ok=True)
            (marks / entry.name).touch()
        return found
