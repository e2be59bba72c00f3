# SPDX-License-Identifier: Apache-2.0
"""Damaged copies of a file, the same ones every time: what disks, networks and strangers make of it."""

import random
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512  # bytes of a sector


class Copy(NamedTuple):
    """A damaged copy: what was done to the file, for messages, and its bytes."""

    what: str
    data: bytes


def flips(data: bytes, count: int, seed: int = 0) -> Iterator[Copy]:
    """Yield copies with one bit flipped: in the first bytes, in the last ones, and spread over all."""
    for place in _places(len(data), count, seed):
        bit = random.Random(seed * 1_000_003 + place).randrange(8)
        yield Copy(
            f"bit {bit} of byte {place} flipped", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        )


def truncations(data: bytes, count: int, seed: int = 0) -> Iterator[Copy]:
    """Yield copies that break off, the empty one first."""
    for place in {0: None, **dict.fromkeys(_places(len(data), count, seed))}:
        yield Copy(f"cut off after {place} bytes", data[:place])


def zeroed(data: bytes, count: int, seed: int = 0, size: int = BLOCK) -> Iterator[Copy]:
    """Yield copies with a block of zeros in them, as a file system leaves it that lost power."""
    for place in _places(len(data), count, seed):
        length = len(data[place : place + size])
        yield Copy(f"{length} bytes from {place} on zeroed", data[:place] + bytes(length) + data[place + length :])


def doubled(data: bytes, count: int, seed: int = 0, size: int = BLOCK) -> Iterator[Copy]:
    """Yield copies in which a block comes twice."""
    for place in _places(len(data), count, seed):
        block = data[place : place + size]
        yield Copy(f"{len(block)} bytes from {place} on doubled", data[: place + len(block)] + data[place:])


def every(data: bytes, count: int, seed: int = 0) -> Iterator[Copy]:
    """Yield ``count`` copies of each kind that differ from the file."""
    for kind in (flips, truncations, zeroed, doubled):
        yield from (copy for copy in kind(data, count, seed) if copy.data != data)


def _places(length: int, count: int, seed: int) -> list[int]:
    """A quarter each from the first and last bytes, where headers and directories are, the rest by lot."""
    edge = min(count // 4, length)
    lot = random.Random(seed)
    near = [lot.randrange(min(length, 256)) for _ in range(edge)]
    far = [length - 1 - lot.randrange(min(length, 256)) for _ in range(edge)]
    return [*near, *far, *(lot.randrange(length) for _ in range(count - 2 * edge))] if length else []
