"""Which tiles are worth a try: those one step away from one that is known."""

from __future__ import annotations

from dataclasses import replace

from daam_kernels.kernels.tiling import Choice, Problem, fault, most_registers

# Powers of two that rows, slices and warps of a tile are multiplied by.
_STEPS = (
    (-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1),
    (1, -1, 0), (-1, 1, 0),  # as many elements, otherwise cut
    (0, -1, -1), (0, 1, 1), (-1, 0, -1), (1, 0, 1),  # as many elements of a thread
)  # fmt: skip


def neighbours(problem: Problem, choice: Choice) -> list[Choice]:
    """The choices one step away that may be launched: half or twice a size, or two of them, or half the registers.

    A choice that has all registers that its warps may have keeps all of them.
    """
    found = []
    has_all = choice.registers == most_registers(choice.num_warps)
    for rows, slices, warps in _STEPS:
        block_r, block_s = (_scaled(size, by) for size, by in ((choice.block_r, rows), (choice.block_s, slices)))
        num_warps = _scaled(choice.num_warps, warps)
        most = most_registers(num_warps) if num_warps else 0
        found.append(Choice(block_r, block_s, num_warps, most if has_all else min(choice.registers, most)))
    found += [replace(choice, registers=r) for r in (choice.registers // 2, most_registers(choice.num_warps))]
    return [c for c in dict.fromkeys(found) if c != choice and not fault(problem, c)]


def _scaled(size: int, power: int) -> int:
    return size << power if power >= 0 else size >> -power
