"""The choice of a tile from sizes alone: plain Python, so that a test without a GPU can check it. No kernel here.

A kernel sees x as [outer, R, inner]: slices run along R, cut into heads. A program owns a tile of BLOCK_R elements
along R by BLOCK_S slices of one head. Where ``inner`` is the contiguous axis the slices of a tile are neighbours in
it (``columns``); otherwise they are counted through outer and inner together. Of packed sequences, which outer counts,
every slice has a length of its own: then the slices of a tile are always of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from ..slices import SliceView


@dataclass(frozen=True)
class Budget:
    """What a program may hold: elements of x in a tile for float32 arithmetic, a quarter of them for float64.

    A thread also holds some twenty numbers for each slice that it has a part of, and in columns it has a part of as
    many slices as it loads elements at once, so columns get smaller tiles and fewer warps.
    """

    forward_rows: int = 16384
    forward_columns: int = 8192
    backward_rows: int = 8192
    backward_columns: int = 4096
    split: int = 2048
    split_forward: int = 8192  # of the product, where there is enough for all, because threads exchange a tile's sums
    usual: int = 2048  # where slices are short: that many elements' worth of them
    merged: int = 2048  # partial results that a program merges at once


BUDGET = Budget()
_WARPS_ROWS, _WARPS_COLUMNS = 16, 8
_THREAD_ELEMENTS = 8
_WIDE_ROW, _NARROW_ROW = 256, 64  # bytes of neighbouring slices in a row of a tile, at best and at least
_REGISTERS, _FEWEST_REGISTERS = 255, 32  # of a thread, at most, and at least
PROCESSORS = 132  # of an H200, where nobody knows those of the device
_PROGRAMS_EACH = 4  # for each of its processors, that long slices are split for
_MOST_WARPS = 16
_CACHED = 2**17  # bytes of x that a processor's programs go over again: half its cache, beside as much of the gradient
_LOOPED_ROW = 128  # bytes of neighbouring slices in a row of their tiles, where there is a choice
_LOOPED_BYTES = 2**13  # of x that a warp goes over in columns, half of it in rows: what is cached has to hold all
_LOOPED_EACH = 8  # warps for each processor, at least
_LOOPED_ELEMENTS = 32  # of rows, that a thread goes over, at least: they share what is done once for a slice
_LOOPED_SLICES = 8  # in a tile of rows, at most: of each, four threads then have 64 bytes side by side
_LOOPED_LENGTH = {2: 2**17, 4: 2048, 8: 0}  # of rows that a tile could hold with more instructions than a loop takes
_LOOPED_REGISTERS = (128, 168), (168, 255)  # of a thread, forward and backward; where elements can be padding
MOST_LAYERS = 6  # that one sweep takes: each makes the kernels longer, and they take longer to compile
_FEW_LAYERS = 3  # and in columns of float64 or with padding, where six spill


@dataclass(frozen=True)
class Problem:
    """What the choice of a tile depends on, beside the device.

    ``length`` is that of the longest slice, all heads together; of ``packed`` sequences outer counts them. ``vec``:
    see :class:`Tile`. ``num_mixed`` are the Gaussians of a mixture, else 0.
    """

    density: str
    outer: int
    length: int
    inner: int
    packed: bool
    columns: bool
    vec: int
    num_heads: int
    itemsize: int
    backward: bool
    padded: bool
    num_layers: int
    num_mixed: int

    @property
    def chunk(self) -> int:
        """Elements of a slice of any head but the last."""
        return self.length // self.num_heads

    @property
    def longest(self) -> int:
        """Elements of the longest slice."""
        longest = self.length - (self.num_heads - 1) * self.chunk
        if self.packed:  # a sequence one element short of another whole chunk leaves the last head the most
            longest = max(longest, self.chunk + self.num_heads - 2)
        return longest

    @property
    def apart(self) -> bool:
        """Whether the slices of a tile are of one place in outer."""
        return self.columns or self.packed

    @property
    def slices(self) -> int:
        """Slices of a head that tiles can share."""
        return self.inner if self.apart else self.outer * self.inner


@dataclass(frozen=True)
class Choice:
    """What of a tile is free to choose; ``registers`` of a thread, at most."""

    block_r: int
    block_s: int
    num_warps: int
    registers: int


@dataclass(frozen=True)
class Tile:
    """How one launch cuts the slices.

    ``vec`` divides every size and stride that is not along the contiguous axis; the kernel gets those divided by it
    and multiplies them back, which is how the compiler learns that 16-byte accesses are aligned.
    A slice is ``resident`` (one tile, no chunks), ``looped`` over by one program (several tiles, no chunks), or split
    into ``num_chunks`` runs of ``tiles`` tiles. Where every tile is ``whole``, with no row or slice too many, nothing
    has to be masked.
    """

    columns: bool
    block_r: int
    block_s: int
    vec: int
    num_warps: int
    registers: int  # of a thread, at most
    num_blocks: int
    tiles: int
    num_chunks: int
    whole: bool

    @property
    def resident(self) -> bool:
        """Whether a tile holds slices whole."""
        return self.num_chunks == 0 and self.tiles == 1

    @property
    def looped(self) -> bool:
        """Whether one program goes over its slices a tile at a time."""
        return self.num_chunks == 0 and self.tiles > 1


def density_tile(
    view: SliceView,
    num_heads: int,
    itemsize: int,
    backward: bool,
    padded: bool = False,
    num_layers: int = 1,
    num_mixed: int = 0,
    processors: int = PROCESSORS,
) -> Tile:
    """The tile that the ladder gives one direction; ``padded`` where elements can be padding, and ``num_layers`` of a
    block whose slices fit, both of which cost registers, as do the ``num_mixed`` Gaussians of a mixture, which 0 says
    it is not."""
    problem = density_problem(view, num_heads, itemsize, backward, padded, num_layers, num_mixed)
    return cut(problem, ladder(problem, processors), processors)


def density_problem(
    view: SliceView,
    num_heads: int,
    itemsize: int,
    backward: bool,
    padded: bool = False,
    num_layers: int = 1,
    num_mixed: int = 0,
    density: str = "product",
) -> Problem:
    """What there is to cut; the arguments are those of :func:`density_tile`."""
    unit_r = all(s[1] == 1 for s in view.strides)
    unit_i = view.inner > 1 and all(s[2] == 1 for s in view.strides)
    sizes = dict(density=density, outer=view.outer, length=view.length, inner=view.inner, packed=view.packed)
    others = dict(num_heads=num_heads, itemsize=itemsize, backward=backward, padded=padded)
    problem = Problem(**sizes, **others, columns=False, vec=1, num_layers=num_layers, num_mixed=num_mixed)
    columns = unit_i and not unit_r and (view.inner >= 32 or problem.longest * view.inner >= 1024)
    if columns and num_layers > 1:  # a block is never split, and fits along rows where it does not in columns
        largest, narrow, _ = _room(itemsize, backward, True, padded, num_layers)
        columns = power_of_two(problem.longest) * narrow <= largest
    return replace(problem, columns=columns, vec=_vector(view, problem.chunk, columns, unit_r, itemsize))


def fits_block(
    length: int, num_heads: int, num_layers: int, itemsize: int, backward: bool, columns: bool, padded: bool
) -> bool:
    """Whether a tile can hold whole slices, so that one sweep does for all layers of a block.

    ``columns`` where the norm axis is not the contiguous one, whatever the tile will be. The lengths may be symbols of
    torch.compile.
    """
    largest, narrow, _ = _room(itemsize, backward, columns, padded, num_layers)
    most_layers = _FEW_LAYERS if columns and (padded or itemsize == 8) else MOST_LAYERS
    return num_layers <= most_layers and length - (num_heads - 1) * (length // num_heads) <= largest // narrow


def ladder(problem: Problem, processors: int = PROCESSORS) -> Choice:
    """The choice worked out from sizes alone, right without a measurement."""
    itemsize, slices, longest = problem.itemsize, problem.slices, problem.longest
    largest, narrow, wide = _room_of(problem)
    scale = max(itemsize, 4) // 4
    available = power_of_two(slices)
    narrow, wide = min(available, narrow), min(available, wide)
    usual, merged = BUDGET.usual // scale**2, _merged(problem)
    block_r = power_of_two(longest)
    split = block_r * narrow > largest
    # A thread of columns can go over slices by itself. Backward it has more of a row so than its registers would hold.
    long_row = problem.backward and (problem.density == "mixture" or longest < _LOOPED_LENGTH[itemsize])
    if split or problem.columns or long_row:
        looped = _looped_tile(problem, narrow if split else _LOOPED_ROW // itemsize, processors)
        if looped is not None:
            return looped
    if split:
        block_s, programs = wide, _PROGRAMS_EACH * processors
        runs = problem.outer * problem.num_heads
        while block_s > narrow and runs * -(-slices // block_s) * (merged // block_s) < programs:
            block_s //= 2
        budget, numel = BUDGET.split, problem.outer * problem.length * problem.inner
        if problem.density == "product" and not (problem.backward or problem.padded):
            if numel >= programs * BUDGET.split_forward:
                budget = BUDGET.split_forward
        block_r = max(1, budget // scale**2 // block_s)
    elif problem.columns:
        block_s = max(narrow, min(wide, largest // block_r), min(available, usual // block_r))
    else:
        block_s = max(1, min(available, usual // block_r))

    # Fewer warps have more registers for a thread.
    few_warps = problem.columns or split or (problem.backward and (itemsize == 8 or problem.num_layers > 1))
    most_warps = _WARPS_COLUMNS if few_warps else _WARPS_ROWS
    elements, registers = _THREAD_ELEMENTS, _REGISTERS
    if not (few_warps or itemsize == 8):
        # What a thread does once for its slices is shared by its elements, but masks take registers, and slices do.
        shared = _is_whole(problem, block_r, block_s) and not problem.padded and block_r >= 256
        programs = _programs(problem, block_s)
        if problem.num_mixed and not problem.backward:
            elements = 16
            if shared:
                most = itemsize == 2 and block_r >= 4096 and problem.num_mixed <= 4
                elements, registers = (64, _REGISTERS) if most else (32, _REGISTERS // 2 + 1)
        elif problem.density == "product" and problem.num_layers == 1 and shared:
            if programs >= 2 * _PROGRAMS_EACH * processors:  # fewer are sooner done by more threads each
                elements = 16 if problem.backward else 32
                if problem.backward and block_s == 1:  # without a spill, and more programs at a time
                    registers = _REGISTERS // 2 + 1
    num_warps = min(most_warps, max(1, block_r * block_s * scale // (32 * elements)))
    return Choice(block_r, block_s, num_warps, min(registers, most_registers(num_warps)))


def _looped_tile(problem: Problem, narrow: int, processors: int) -> Choice | None:
    """That of programs which go over their slices a tile at a time, where there are enough; ``narrow``: slices in a row
    of the columns' tile, at least."""
    itemsize, rows, available = problem.itemsize, power_of_two(problem.longest), power_of_two(problem.slices)
    registers = _REGISTERS if itemsize == 8 else _LOOPED_REGISTERS[problem.padded][problem.backward]
    each = _LOOPED_EACH
    if problem.columns:  # the fewer rows a tile has, the less is exchanged between threads
        of_warp, of_warp_bytes = 32 * _THREAD_ELEMENTS // (max(itemsize, 4) // 4), _LOOPED_BYTES
        if problem.density == "mixture":  # numbers of each slice for each Gaussian: half as many warps, of more rows
            registers, of_warp_bytes, each = _REGISTERS, 2 * of_warp_bytes, each // 2
        narrow = min(available, narrow)
        wide = max(_LOOPED_ROW // itemsize, min(of_warp, of_warp_bytes // (itemsize * rows)))
    else:  # a thread has a part of one slice, which it loads 16 bytes at a time if their addresses allow it
        of_warp = 32 * min(_THREAD_ELEMENTS, 16 // itemsize)
        of_warp_bytes = max(_LOOPED_BYTES // 2, 32 * _LOOPED_ELEMENTS * itemsize)
        narrow = max(1, 32 * _LOOPED_ELEMENTS // rows)
        wide = min(_LOOPED_SLICES, of_warp_bytes // (itemsize * rows)) if problem.vec * itemsize == 16 else 1
        if narrow > min(available, max(1, wide)):
            return None
    block_s = min(available, max(narrow, wide))
    while True:
        num_warps = max(1, min(_WARPS_COLUMNS, rows * block_s * itemsize // of_warp_bytes))
        enough = _programs(problem, block_s) * num_warps >= each * processors
        if enough and _loops(problem, block_s, processors):
            break
        if block_s <= narrow:
            return None
        block_s //= 2
    block_r = max(1, num_warps * of_warp // block_s)
    if block_r >= problem.longest:
        return None
    return Choice(block_r, block_s, num_warps, registers)


def _loops(problem: Problem, block_s: int, processors: int) -> bool:
    """Whether a program may go over its slices a tile at a time: each processor has one, and the cache holds what they
    read. Only the product has such kernels, and backward the mixture."""
    fits = problem.longest * block_s * problem.itemsize <= _CACHED
    has = problem.density == "product" and problem.num_layers == 1
    has = has or (problem.density == "mixture" and problem.backward)
    return has and fits and _programs(problem, block_s) >= processors


def _programs(problem: Problem, block_s: int) -> int:
    return -(-problem.slices // block_s) * (problem.outer if problem.apart else 1) * problem.num_heads


def cut(problem: Problem, choice: Choice, processors: int = PROCESSORS) -> Tile:
    """The tile of a choice: a slice that it does not hold whole is looped over where the cache holds it, or else split
    over enough programs to fill the device."""
    block_r, block_s = choice.block_r, choice.block_s
    num_blocks = _programs(problem, block_s) // problem.num_heads
    num_chunks, tiles = 0, -(-problem.longest // block_r)
    if tiles > 1 and not _loops(problem, block_s, processors):
        most = min(tiles, max(1, _merged(problem) // block_s))
        runs = min(most, -(-_PROGRAMS_EACH * processors // (num_blocks * problem.num_heads)))
        row_tiles, tiles = tiles, -(-tiles // runs)
        num_chunks = -(-row_tiles // tiles)
    whole = _is_whole(problem, block_r * tiles * max(1, num_chunks), block_s)
    return Tile(
        problem.columns, block_r, block_s, problem.vec, choice.num_warps, choice.registers, num_blocks, tiles,
        num_chunks, whole,
    )  # fmt: skip


def fault(problem: Problem, choice: Choice) -> str:
    """What is wrong with a choice that the ladder did not make; empty where it may be launched."""
    sizes = {"block_r": choice.block_r, "block_s": choice.block_s, "num_warps": choice.num_warps}
    for name, size in sizes.items():
        if type(size) is not int or size < 1 or size & (size - 1):
            return f"{name} must be a power of two, got {size!r}"
    if choice.num_warps > _MOST_WARPS:
        return f"num_warps must be at most {_MOST_WARPS}, got {choice.num_warps}"
    most = most_registers(choice.num_warps)
    if type(choice.registers) is not int or not _FEWEST_REGISTERS <= choice.registers <= most:
        return f"registers of {choice.num_warps} warps must be {_FEWEST_REGISTERS} to {most}, got {choice.registers!r}"
    largest, narrow, _ = _room_of(problem)
    largest = max(largest, _room_of(replace(problem, columns=False))[0])
    rows, slices = power_of_two(problem.longest), power_of_two(problem.slices)
    if choice.block_r > rows or choice.block_s > slices:
        return f"a tile of {choice.block_r} by {choice.block_s} is larger than {rows} by {slices}, which hold all"
    if choice.block_r * choice.block_s > largest:
        return f"a tile must have at most {largest} elements, got {choice.block_r} by {choice.block_s}"
    if choice.block_s < min(narrow, slices):
        return f"block_s must be at least {min(narrow, slices)}, got {choice.block_s}"
    if 32 * choice.num_warps > max(32, choice.block_r * choice.block_s):
        return f"{choice.num_warps} warps are more threads than {choice.block_r} by {choice.block_s} elements"
    if choice.block_r < problem.longest and problem.num_layers > 1:
        return f"a block must not be split: block_r must be {rows}, got {choice.block_r}"
    if choice.block_r < problem.longest and choice.block_s > _merged(problem):
        return f"block_s of split slices must be at most {_merged(problem)}, got {choice.block_s}"
    return ""


def most_registers(num_warps: int) -> int:
    """That a thread of so many warps may have."""
    return min(_REGISTERS, 65536 // (32 * num_warps))


def _is_whole(problem: Problem, rows: int, block_s: int) -> bool:
    """Whether ``rows`` of tiles of ``block_s`` slices have no row and no slice too many."""
    equal = not problem.packed and problem.length == problem.num_heads * problem.chunk
    return equal and problem.chunk == rows and problem.slices % block_s == 0


def _merged(problem: Problem) -> int:
    return BUDGET.merged // (max(problem.itemsize, 4) // 4) ** 2


def _room_of(problem: Problem) -> tuple[int, int, int]:
    return _room(problem.itemsize, problem.backward, problem.columns, problem.padded, problem.num_layers)


def _room(itemsize: int, backward: bool, columns: bool, padded: bool, num_layers: int) -> tuple[int, int, int]:
    """(elements in a tile at most, slices in a row of it at least, and at best)."""
    if backward:
        largest = BUDGET.backward_columns if columns else BUDGET.backward_rows
    else:
        largest = BUDGET.forward_columns if columns else BUDGET.forward_rows
    largest //= (max(itemsize, 4) // 4) ** 2
    if backward and num_layers > 1:  # the inputs of all layers stay in registers
        largest //= 2 if num_layers <= 3 else 4
    if not columns:
        return largest, 1, 1
    narrow, wide = _NARROW_ROW // itemsize, _WIDE_ROW // itemsize
    if padded:
        largest //= 2
    if padded or num_layers > 1:
        narrow //= 2
    return largest, narrow, wide


def _vector(view: SliceView, chunk: int, columns: bool, unit_r: bool, itemsize: int) -> int:
    """Elements, at most 16 bytes of them, that divide every size and stride beside the contiguous axis."""
    if columns:
        numbers = [view.inner, *(n for s in view.strides for n in s[:2])]
    elif unit_r and not view.packed:  # packed, a slice may start anywhere
        numbers = [chunk, view.length, *(n for s in view.strides for n in (s[0], s[2]))]
    else:
        return 1
    return gcd(16 // itemsize, *numbers)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
