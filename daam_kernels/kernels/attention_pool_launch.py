"""Launch configurations of attention pooling, worked out by plain Python so that a test can check them. No kernel here.

A program owns a chunk of one bag, and sweeps its rows BLOCK_T at a time. Every bag is cut into as many chunks as any
other, of its own length: enough of them to fill a GPU where bags are few. Where a chunk's sums do not fit a program, it
takes them block by block, and so many rows at a time as stay in the cache till then. The gradient of a hidden layer is
in memory for some of the rows at a time, and its products with x are summed up by programs that own rows of any bags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from . import launch
from .tiling import power_of_two

PROGRAMS = 528  # that bags are cut for: four for each of an H200's 132 processors
_ELEMENTS = 8192  # of a tile, of float32; a quarter of float64
_MOST_ROWS, _MOST_HOPS, _MOST_WARPS = 64, 8, 8
_OF_LONG_ROWS = 8  # share of a tile that a row of a block of columns takes
# Bytes of x that a program reads again: of two on each of an H200's processors they fill two thirds of its L2 cache.
_CACHED = 1 << 17
_MOST_CACHED_ROWS = 256
_MULTIPLIED = 16  # the least that tl.dot takes of every size
_WIDE_HOPS, _WIDE_COLUMNS = 32, 64  # of a tile of sums
_WIDE_ROWS = 32  # of a tile of scores
_HIDDEN_ROWS, _HIDDEN_COLUMNS = 64, 64  # of x in a tile of half types
# With 64 rows Triton takes products of a warpgroup on NVIDIA's GPUs, and up to 3.7.1 reads out of bounds where a kernel
# has several of them.
_NVIDIA_ROWS, _NVIDIA_COLUMNS = 32, 32
_FEW_UNITS = 32  # that leave registers for more columns
_MOST_UNITS = {2: 128, 4: 128, 8: 32}  # in a tile, by the bytes of what is multiplied
_HIDDEN_ELEMENTS = 1 << 23  # of the hidden layer's gradient that are in memory at a time
_SUMMED_UNITS, _SUMMED_ROWS = 32, 32  # of a tile of the layers' gradients
_ROWS_PER_UNIT = 8  # at least, of a hidden layer or a hop, that are summed up at a time: the sums are small beside x
_TILES = 4  # at least, that a chunk of a bag has


@dataclass(frozen=True)
class PoolLaunch:
    """How one sweep cuts bags: ``num_chunks`` of each bag, ``hop_blocks`` of ``block_h`` hops, ``column_blocks``.

    ``vec`` divides embed_dim and the strides of x's other axes, as in ``tiling.Tile``.
    """

    block_e: int
    block_h: int
    block_t: int
    vec: int
    num_warps: int
    num_chunks: int
    hop_blocks: int
    column_blocks: int = 1

    @property
    def whole(self) -> bool:
        """Whether a row, and the sums of all its hops, fit a tile."""
        return self.hop_blocks == self.column_blocks == 1


@dataclass(frozen=True)
class HiddenLaunch:
    """A tile of the hidden layer: rows of x, hidden units, and ``block_k`` columns of x at a time."""

    block_t: int
    block_c: int
    block_k: int


@dataclass(frozen=True)
class HiddenPoolLaunch:
    """Scores and sums in one sweep: tiles of ``hidden``, summed up as many rows at a time as ``rows`` says."""

    hidden: HiddenLaunch
    rows: PoolLaunch


@dataclass(frozen=True)
class WidePoolLaunch:
    """The sweep whose sums do not fit a program: ``hop_blocks`` of ``block_h`` hops, ``block_e`` columns at a time.

    ``block_s`` rows have their scores, ``block_t`` rows and ``block_k`` columns at a time, before they are summed up;
    with a hidden layer in tiles of ``hidden``.
    """

    hidden: HiddenLaunch | None
    block_e: int
    block_h: int
    block_s: int
    block_t: int
    block_k: int
    vec: int
    num_chunks: int
    hop_blocks: int
    num_warps: int = _MOST_WARPS


@dataclass(frozen=True)
class HiddenGradientLaunch:
    """The sweeps of the backward pass, of ``segment_rows`` rows, then of the next.

    The sweep with the hidden layer has tiles of it, ``block_h`` hops and ``block_e`` columns at a time; dx has the same
    rows and columns. The layers' sums have tiles of ``block_r`` rows, and ``sum_blocks`` of ``rows_each`` rows times
    ``unit_blocks`` of ``block_u`` units of the ``layers`` times ``column_blocks`` of ``block_s`` columns.
    """

    hidden: HiddenLaunch
    whole: bool  # all hidden units and hops fit a program
    block_h: int
    block_e: int
    block_u: int
    block_s: int
    block_r: int
    vec: int
    num_chunks: int
    layers: int
    segment_rows: int
    sum_blocks: int
    rows_each: int
    unit_blocks: int
    column_blocks: int
    num_warps: int = _MOST_WARPS


def hidden_launch(hidden: int, embed_dim: int, strides: tuple[int, ...], itemsize: int) -> HiddenLaunch:
    """``strides``: of x, but along embed_dim; ``itemsize``: of what is multiplied, in bytes.

    Of all sizes tl.dot takes 16 at least.
    """
    block_c = min(_MOST_UNITS[itemsize], max(_MULTIPLIED, power_of_two(hidden)))
    rows, columns = _HIDDEN_ROWS, _HIDDEN_COLUMNS
    # an NVIDIA GPU, or an address for every element, which takes registers
    if launch.LIMIT_REGISTERS or gcd(8, embed_dim, *strides) == 1:
        rows, columns = _NVIDIA_ROWS, _HIDDEN_COLUMNS if block_c <= _FEW_UNITS else _NVIDIA_COLUMNS
    block_k = max(_MULTIPLIED, min(power_of_two(embed_dim), 2 * columns // itemsize))
    cached = max(_MULTIPLIED, 2 * _cached_rows(embed_dim, itemsize))  # one program's registers fill a processor
    return HiddenLaunch(min(rows, cached), block_c, block_k)


def wide_hidden_launch(hidden: int, embed_dim: int, strides: tuple[int, ...], itemsize: int) -> HiddenLaunch:
    """The same beside blocks of hops, whose products take registers too."""
    odd = gcd(8, embed_dim, *strides) == 1
    units = _FEW_UNITS * (2 if launch.LIMIT_REGISTERS and itemsize == 2 and not odd else 1)
    tile = hidden_launch(min(hidden, units), embed_dim, strides, itemsize)
    return replace(tile, block_t=min(tile.block_t, _MULTIPLIED if odd else _WIDE_ROWS))


def hidden_pool_launch(
    num_bags: int, longest: int, hops: int, hidden: int, embed_dim: int, strides: tuple[int, ...], itemsize: int,
    multiplied: int,
) -> HiddenPoolLaunch | None:  # fmt: skip
    """For scores of a hidden layer; None where a row, or the sums of its hops, do not fit a program.

    ``itemsize``: of x; ``multiplied``: of what the layer is multiplied in.
    """
    tile = hidden_launch(hidden, embed_dim, strides, multiplied)
    block_e, block_h = power_of_two(embed_dim), power_of_two(hops)
    most_rows = _elements(itemsize) // (block_h * block_e)
    if most_rows == 0 or block_h > _MOST_HOPS:
        return None
    num_chunks = _chunks(num_bags, longest, _TILES * tile.block_t)
    vec = gcd(16 // itemsize, embed_dim, *strides)
    block_t = min(tile.block_t, most_rows)
    return HiddenPoolLaunch(tile, PoolLaunch(block_e, block_h, block_t, vec, _MOST_WARPS, num_chunks, 1))


def wide_pool_launch(
    num_bags: int, longest: int, hops: int, hidden: int | None, embed_dim: int, strides: tuple[int, ...],
    itemsize: int, multiplied: int, gradient: bool = False,
) -> WidePoolLaunch:  # fmt: skip
    """For any hops and rows; ``hidden``: None where scores are products with the query; else as above.

    With ``gradient`` for the sweep that writes dx of such scores, and has all hops; ``strides`` are then of dx too.
    """
    vec = gcd(16 // itemsize, embed_dim, *strides)
    cached = _cached_rows(embed_dim, itemsize)
    tile = None if hidden is None else wide_hidden_launch(hidden, embed_dim, strides, multiplied)
    block_t = min(_WIDE_ROWS, cached) if tile is None else tile.block_t
    block_s = max(block_t, min(cached, power_of_two(max(1, longest))))
    most, hops_to = _elements(itemsize), power_of_two(hops)
    if block_t < _MULTIPLIED:
        block_h = min(hops_to, _MOST_HOPS)
        block_e = block_k = (most // 2 if gradient else most) // (block_h * block_t)
    else:
        block_h = max(_MULTIPLIED, min(hops_to, _WIDE_HOPS))
        block_k = max(_MULTIPLIED, 2 * _NVIDIA_COLUMNS // itemsize) if tile is None else tile.block_k
        columns = _WIDE_COLUMNS if itemsize < 8 else _WIDE_COLUMNS // 2
        block_e = max(_MULTIPLIED, min(power_of_two(embed_dim), columns))
    hop_blocks = 1 if gradient else -(-hops // block_h)
    least = max(_TILES * block_t, block_s, _ROWS_PER_UNIT * hops)
    num_chunks = _chunks(num_bags * hop_blocks, longest, least)
    return WidePoolLaunch(tile, block_e, block_h, block_s, block_t, block_k, vec, num_chunks, hop_blocks)


def hidden_gradient_launch(
    num_bags: int, longest: int, num_rows: int, hops: int, hidden: int, layers: int, embed_dim: int,
    strides: tuple[int, ...], itemsize: int, multiplied: int,
) -> HiddenGradientLaunch:  # fmt: skip
    """For x of ``num_rows`` rows in all. ``strides``: of x and dx, but along embed_dim.

    On AMD's GPUs no layer is whole where rows are read number by number: an address for each leaves too few registers.
    """
    tile, block_h = hidden_launch(hidden, embed_dim, strides, multiplied), power_of_two(hops)
    vec = gcd(16 // itemsize, embed_dim, *strides)
    whole = tile.block_c >= hidden and block_h <= _MOST_HOPS and (vec > 1 or launch.LIMIT_REGISTERS)
    if not whole:
        tile = wide_hidden_launch(hidden, embed_dim, strides, multiplied)
        block_h = max(_MULTIPLIED, min(block_h, _WIDE_HOPS))
    columns = _elements(itemsize) // (_SUMMED_ROWS if vec > 1 and itemsize < 8 else 2 * _SUMMED_ROWS)
    block_s = max(16, min(power_of_two(embed_dim), columns))
    block_e = max(16, block_s * _SUMMED_ROWS // (2 * tile.block_t))
    block_u = min(tile.block_c, _SUMMED_UNITS)
    kept = layers * hidden + (0 if whole else hidden + hops)  # numbers in memory for a row
    segment_rows = min(max(1, num_rows), max(1, _HIDDEN_ELEMENTS // (kept * tile.block_t)) * tile.block_t)
    segments = -(-num_rows // segment_rows)
    num_chunks = _chunks(num_bags, longest, _TILES * tile.block_t, PROGRAMS * segments)
    unit_blocks, column_blocks = -(-layers * hidden // block_u), -(-embed_dim // block_s)
    least = max(_TILES * _SUMMED_ROWS, _ROWS_PER_UNIT * max(hidden, hops))  # for the sums to be small beside x
    sum_blocks = max(1, min(-(-PROGRAMS // (unit_blocks * column_blocks)), segment_rows // least))
    rows_each = -(-segment_rows // (sum_blocks * _SUMMED_ROWS)) * _SUMMED_ROWS
    return HiddenGradientLaunch(
        tile, whole, block_h, block_e, block_u, block_s, _SUMMED_ROWS, vec, num_chunks, layers, segment_rows,
        sum_blocks, rows_each, unit_blocks, column_blocks,
    )  # fmt: skip


def pool_launch(
    num_bags: int,
    longest: int,
    hops: int,
    embed_dim: int,
    strides: tuple[int, ...],
    itemsize: int,
    gradient: bool = False,
) -> PoolLaunch:
    """The sweeps that sum rows up, or with ``gradient`` the one that writes dx, which takes its hops one by one.

    Where it is not ``whole``, it is of the query's gradient alone; the others are as ``wide_pool_launch`` says.
    ``strides``: of x, and of dx, but along embed_dim; ``itemsize``: of x, in bytes.
    """
    vec = gcd(16 // itemsize, embed_dim, *strides)
    block_e, most = power_of_two(embed_dim), _elements(itemsize)
    if block_e > most:
        block_e = most // _OF_LONG_ROWS
    block_h = 1 if gradient else min(power_of_two(hops), _MOST_HOPS, max(1, most // (2 * block_e)))
    if gradient:
        most //= 2  # of which x and dx have one tile each
    block_t = min(_MOST_ROWS, max(1, most // (block_h * block_e)), power_of_two(max(1, longest)))
    num_warps = min(_MOST_WARPS, max(1, block_t * block_e // (32 * (16 // itemsize))))
    hop_blocks = 1 if gradient else -(-hops // block_h)
    column_blocks = -(-embed_dim // block_e)
    num_chunks = _chunks(num_bags * hop_blocks * column_blocks, longest, _TILES * block_t)
    return PoolLaunch(block_e, block_h, block_t, vec, num_warps, num_chunks, hop_blocks, column_blocks)


def _chunks(programs: int, longest: int, least: int, wanted: int | None = None) -> int:
    """Of so many ``programs``, for ``wanted`` or PROGRAMS to be there; the longest bag has ``least`` rows in each."""
    return max(1, min(-(-(wanted or PROGRAMS) // max(1, programs)), -(-longest // least)))


def _cached_rows(embed_dim: int, itemsize: int) -> int:
    """As many as stay in the cache until they are read again; a power of two."""
    rows = max(1, _CACHED // (embed_dim * itemsize))
    return min(_MOST_CACHED_ROWS, 1 << (rows.bit_length() - 1))


def _elements(itemsize: int) -> int:
    return _ELEMENTS if itemsize < 8 else _ELEMENTS // 4
