"""What machine code for NVIDIA's GPUs costs, counted in nvdisasm's listing of a kernel, and what an H200 affords."""

from __future__ import annotations

import re
from collections import deque

# An H200: bytes a second, processors, clocks a second; of each processor, threads' instructions a clock, and such of
# the unit for exponentials, reciprocals, roots and conversions.
_BYTES, _PROCESSORS, _CLOCK = 4.8e12, 132, 1.98e9
_ISSUED, _SPECIAL = 128, 16
_ATTAINED = 0.9  # of the bytes, by a kernel that does nothing but copy: assumed, until it is measured

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_SPECIAL_NAMES = {"MUFU", "I2F", "F2I", "F2F"}


def shortest_path(listing: str) -> list[str]:
    """The instructions from a kernel's entry to its exit by way of the fewest: around loops, and what is rarely so."""
    instructions, labels = [], {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append(found.groups())
    before, queue = {0: None}, deque([0])
    while queue:
        at = queue.popleft()
        predicate, name, operands = instructions[at]
        if name == "EXIT" and not predicate:
            path = []
            while at is not None:
                path.append(instructions[at][1])
                at = before[at]
            return path[::-1]
        branch = name.split(".")[0] == "BRA"
        following = [labels[re.search(r"\.L_x_\d+", operands)[0]]] if branch else []
        if not branch or predicate or name == "BRA.U":
            following.append(at + 1)
        for step in following:
            if step not in before:
                before[step] = at
                queue.append(step)
    raise ValueError("no way from the entry to an exit")


def count(listing: str) -> dict[str, int]:
    """Instructions, those of the special unit and exponentials on the shortest path of one thread."""
    path = shortest_path(listing)
    return dict(
        instructions=len(path),
        special=sum(name.split(".")[0] in _SPECIAL_NAMES for name in path),
        exponentials=path.count("MUFU.EX2"),
    )


def affordable(size: int) -> dict[str, float]:
    """Of each kind, how many an H200 issues for an element while it reads and writes it, of ``size`` bytes."""
    clocks = 2 * size / (_ATTAINED * _BYTES) * _PROCESSORS * _CLOCK
    return dict(instructions=_ISSUED * clocks, special=_SPECIAL * clocks)
