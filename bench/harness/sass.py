# SPDX-License-Identifier: Apache-2.0
"""How many instructions a warp of a compiled kernel executes: read from its machine code, as cuobjdump prints it.

A kernel is taken for one way through it, the shortest, with a way through the body of each loop. Whoever knows the
kernel says how often a loop runs. Rare branches (a group of several tokens in a merge, the slow way of a division) are
on no shortest way, so they count as never taken.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass

LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+);")
PREDICATE = re.compile(r"^@!?(U?P\w+)\s+")
LEAVE = -1  # where a way ends


@dataclass(frozen=True)
class Instruction:
    """An instruction: its name with all suffixes, whether it is executed for some warps alone, where it may jump."""

    name: str
    conditional: bool
    target: int | None  # an address

    @property
    def slots(self) -> int:
        """Issue slots that it takes."""
        return 0 if self.name.startswith("NOP") else 1

    @property
    def shared(self) -> int:
        """Cycles in which it keeps a multiprocessor's path to shared memory, which moves 128 bytes a cycle; exchanges
        between the lanes of a warp take the same path."""
        name = self.name
        if name.startswith(("LDSM", "STSM")):
            return 4 if ".4" in name else 2 if ".2" in name else 1
        if name.startswith(("LDS", "STS")):
            return 4 if "128" in name else 2 if "64" in name else 1
        return {"SHFL": 1, "REDU": 2}.get(name[:4], 0)


Code = list[tuple[int, Instruction]]  # by address


def read(text: str) -> Code:
    """Return the instructions of the first function that cuobjdump printed."""
    found = []
    for address, words in LINE.findall(text.split("Function : ")[1]):
        predicate = PREDICATE.match(words)
        rest = words[predicate.end() if predicate else 0 :].split()
        jumps = rest[0].startswith("BRA")
        conditional = predicate is not None and predicate[1] not in ("PT", "UPT")
        conditional |= jumps and len(rest) > 2 and re.match(r"!?U?P\d", rest[1]) is not None
        target = int(re.findall(r"0x[0-9a-f]+", words)[-1], 16) if jumps else None
        found.append((int(address, 16), Instruction(rest[0], conditional, target)))
    return found


def successors(code: Code) -> list[list[int]]:
    """Return where each instruction may go on, as places in the code."""
    place = {address: index for index, (address, _) in enumerate(code)}
    found = []
    for index, (address, instruction) in enumerate(code):
        after = [index + 1] if index + 1 < len(code) else []
        if instruction.target is not None:
            ends = instruction.target == address  # the jump to itself behind the last EXIT
            after = [] if ends else [place[instruction.target], *(after if instruction.conditional else [])]
        elif instruction.name.startswith("EXIT"):
            after = [LEAVE, *(after if instruction.conditional else [])]
        elif instruction.name.startswith(("RET", "BRX")):
            after = []
        found.append(after)
    return found


def loops(code: Code, ways: list[list[int]]) -> list[tuple[int, int]]:
    """Return the first and the last instruction of each loop, in order of the first. A block that lies behind the rest
    and jumps back to it is none: nothing leads from where it jumps to down to it."""
    found = []
    for last, after in enumerate(ways):
        for first in after:
            if LEAVE < first <= last and _leads(ways, first, last):
                found.append((first, last))
    return sorted(found)


def _leads(ways: list[list[int]], first: int, last: int) -> bool:
    """Return whether ``last`` is reached from ``first`` by going forward alone."""
    seen, waiting = {first}, [first]
    while waiting:
        at = waiting.pop()
        if at == last:
            return True
        more = {after for after in ways[at] if at < after <= last} - seen
        seen |= more
        waiting += more
    return False


def shortest(ways: list[list[int]], cost: list[int], first: int, last: int) -> int:
    """Return the least that a way from ``first`` to ``last`` costs, both included.

    Raises:
        ValueError: there is none.
    """
    least, queue = {first: cost[first]}, [(cost[first], first)]
    while queue:
        so_far, at = heapq.heappop(queue)
        if at == last:
            return so_far
        for after in ways[at]:
            more = so_far + (0 if after == LEAVE else cost[after])
            if more < least.get(after, more + 1):
                least[after] = more
                heapq.heappush(queue, (more, after))
    raise ValueError("the end of the code is not reached")


def executed(text: str, through_loops: bool) -> dict[str, list]:
    """Return what a warp executes: ``outside`` of the loops, and once through the body of each of ``loops`` without
    the loops inside of it, as pairs of issue slots and cycles of shared memory.

    Args:
        text: of ``cuobjdump -sass``.
        through_loops: whether the way goes through all loops; False: past them where it can.
    """
    code = read(text)
    ways = successors(code)
    all_loops = loops(code, ways) if through_loops else []
    columns = [_along(ways, [getattr(i, what) for _, i in code], all_loops) for what in ("slots", "shared")]
    outside, *bodies = ([*pair] for pair in zip(*columns, strict=True))
    return {"outside": outside, "loops": bodies}


def _along(ways: list[list[int]], cost: list[int], all_loops: list[tuple[int, int]]) -> list[int]:
    """Return the cost outside of the loops, then of each loop's body."""
    found = dict.fromkeys(all_loops, 0)

    def between(first: int, last: int, inside: list[tuple[int, int]]) -> int:
        total, at, past = 0, first, -1
        for loop in inside:
            if loop[0] <= past:
                continue  # a loop of the one before
            begin, past = loop
            within = [other for other in inside if other != loop and begin <= other[0] and other[1] <= past]
            found[loop] = between(begin, past, within)
            total += shortest(ways, cost, at, begin) - cost[begin]
            at = past + 1
        return total + shortest(ways, cost, at, last)

    return [between(0, LEAVE, all_loops), *found.values()]
