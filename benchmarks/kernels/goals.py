"""The goals for speed and memory, judged from the rows of a run as far as these say."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from math import prod
from typing import Callable, Iterator

import torch

from daam_kernels.kernels.tiling import fits_block

from ..report import Row
from .bare import BARE
from .contender import BACKWARD, BOTH, FORWARD, STREAMS
from .contenders import CLOSED_FORM_COMPILED, FUSED, LAYER_NORM, UPSTREAM, UPSTREAM_COMPILED, without_backend
from .shapes import SHAPES
from .store import case_of

_LARGE = 256e6  # bytes of x that no cache holds
_LONG = 1 << 17  # elements of a slice that one block cannot hold
_CPU_MEMORY, _CPU_CACHE = 16 << 20, 4 << 20  # bytes of x: from here it comes from memory, up to there from a cache
_USUAL_L2 = 50.0  # MB, where the results do not say
_STATISTICS_FROM = 64  # elements of a slice
_SLACK_MB = 0.07  # parameters and their gradients
_PAPER = ("wavlm", "llama", "beit")


@dataclass
class Goal:
    """A goal, how many cells say something about it, and those that miss it."""

    text: str
    judged: int = 0
    missed: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "missed" if self.missed else "met" if self.judged else "not judged"


@dataclass(frozen=True)
class _Group:
    """The right results of one case in one direction, by contender."""

    rows: dict[str, Row]
    l2_mb: float

    @property
    def any(self) -> Row:
        return next(iter(self.rows.values()))

    def __getattr__(self, name: str):
        """What is the same in all rows, such as ``shape`` and ``direction``."""
        return self.any[name]

    @property
    def dims(self) -> list[int]:
        return [int(size) for size in self.any["dims"].split("x")]

    @property
    def length(self) -> int:
        return self.dims[self.norm_axis] // self.num_heads

    @property
    def longest(self) -> int:
        """Elements of the longest slice: packed sequences share the axis."""
        packed = SHAPES[self.shape].sequences if self.operator == "ragged" else ()
        return max(packed, default=self.dims[self.norm_axis]) // self.num_heads

    @property
    def inner(self) -> int:
        return prod(self.dims[self.norm_axis % len(self.dims) + 1 :])

    @property
    def x_bytes(self) -> float:
        return self.any["bytes"] / STREAMS[self.direction]

    def of(self, name: str, column: str) -> float | None:
        return self.rows[name].get(column) if name in self.rows else None

    def times(self, slower: str, faster: str) -> float | None:
        """How many times longer the first takes, by a clock that both have."""
        for column in ("kernel_us", "wall_us"):
            if self.of(slower, column) and self.of(faster, column):
                return self.of(slower, column) / self.of(faster, column)
        return None


# What a cell is worth and what it should be; nothing where it says nothing about the goal.
Check = Callable[[_Group], tuple[float | None, float] | None]


def judge(rows: list[Row], environment: dict) -> list[Goal]:
    """All goals, those of this device's kind judged."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            groups.setdefault((*case_of(row), row["direction"]), {})[without_backend(row["contender"])] = row
    l2_mb = environment.get("l2_mb") or _USUAL_L2
    found = [_Group(group, l2_mb) for group in groups.values()]
    on_gpu = environment.get("cuda") is not None
    goals = [*_each(found, on_gpu), _typical(found), _gaussians(found, on_gpu)]
    return [*goals, Goal("import: at most 0.1 s beyond torch's own (python -X importtime)")]


def _each(groups: list[_Group], on_gpu: bool) -> Iterator[Goal]:
    for for_gpu, at_least, text, check in _CHECKS:
        goal = Goal(text)
        for group in groups if for_gpu in (None, on_gpu) else ():
            value, bound = check(group) or (None, None)
            if value is not None:
                goal.judged += 1
                if value < bound if at_least else value > bound:
                    goal.missed.append(f"{_title(group)}: {value:.3g}, goal {bound:.3g}")
        yield goal


def _title(group: _Group) -> str:
    heads = f"H = {group.num_heads}, K = {group.num_gaussians}"
    return f"{group.shape} [{group.any['dims']}] {group.dtype}, {heads}, {group.direction}"


def _fits(direction: str, bound: float) -> Check:
    def check(group: _Group):
        if group.direction == direction and group.length < _LONG and group.x_bytes >= _LARGE:
            return group.of(FUSED, "of_copy"), bound

    return check


def _long(group: _Group):
    if group.direction == BOTH or group.length < _LONG:
        return None
    item = group.x_bytes / prod(group.dims)
    columns = min(group.inner, 128 / item)  # that a warp reads at a time
    if group.length * columns * item > 1e6 * group.l2_mb:
        return group.of(FUSED, "of_copy"), 0.45
    return group.of(FUSED, "of_copy"), 0.60 if group.direction == FORWARD else 0.55


def _launches(group: _Group):
    if group.direction == BOTH or group.operator == "gate":  # which has plain PyTorch around its kernels
        return None
    if group.operator == "block" and not _in_one_sweep(group):
        return None
    few = 1 if group.direction == FORWARD else 2
    return group.of(FUSED, "launches"), few if group.longest < _LONG else 3


def _in_one_sweep(group: _Group) -> bool:
    """Whether all layers of a block are launched at once, in this direction."""
    length, itemsize = group.dims[group.norm_axis], getattr(torch, group.dtype).itemsize
    backward = group.direction != FORWARD
    return fits_block(length, group.num_heads, group.layers, itemsize, backward, columns=group.inner > 1, padded=False)


def _call(group: _Group):
    usual, ours = (group.of(name, "wall_us") for name in (LAYER_NORM, FUSED))
    if group.shape == "wavlm" and group.num_heads == 8 and group.direction != BACKWARD and usual and ours:
        return ours / usual, 1.5


def _compiled(group: _Group):
    return group.times(CLOSED_FORM_COMPILED, FUSED), 1


def _public_package(group: _Group):
    elsewhere = 20 if group.num_gaussians >= 4 else 8
    return group.times(UPSTREAM, FUSED), 50 if group.shape in _PAPER else elsewhere


def _forward_memory(group: _Group):
    if group.direction == FORWARD:
        return group.of(FUSED, "peak_mb"), group.x_bytes / 1e6 + _SLACK_MB


def _saved(group: _Group):
    if group.operator in ("product", "mixture") and group.direction == BOTH:
        number = 8 if group.dtype == "float64" else 4
        slices = prod(group.dims) / group.length if group.length >= _STATISTICS_FROM else 0
        return group.of(FUSED, "saved_mb"), 3 * number * slices / 1e6 + _SLACK_MB


def _bare(of_kind: Callable[[_Group], bool], forward: float, both: float) -> Check:
    def check(group: _Group):
        if group.direction != BACKWARD and of_kind(group):
            return group.of(BARE, "of_copy"), forward if group.direction == FORWARD else both

    return check


def _compiled_package(group: _Group):
    return (group.times(UPSTREAM_COMPILED, BARE), 4) if group.num_gaussians >= 4 else None


def _eager_package(group: _Group):
    if group.shape in ("wavlm", "llama") and (group.num_gaussians, group.num_heads) == (4, 8):
        return group.times(UPSTREAM, BARE), 60


# For a GPU (None: for all), whether more is better, what it says, and how it is judged.
_CHECKS: tuple[tuple[bool | None, bool, str, Check], ...] = (
    (True, True, "forward, slices that fit on chip, 256 MB or more: 0.92 of the copy", _fits(FORWARD, 0.92)),
    (True, True, "backward, the same: 0.88 of a pass of three streams", _fits(BACKWARD, 0.88)),
    (True, True, "slices of 2¹⁷ and more: forward 0.60, backward 0.55 of the copy where they fit L2, else 0.45", _long),
    (True, False, "launches, of a block in one sweep too: forward 1, backward 2; from slices of 2¹⁷ 3 each", _launches),
    (None, False, "a call, paper shape, 8 heads: at most 1.5 × layer_norm", _call),
    (None, True, "never slower than torch.compile of the plain form", _compiled),
    (True, True, "the public package: 50 × at the paper's shapes; else 20 × from K = 4, 8 × below", _public_package),
    (None, False, "memory, forward: y alone (MB)", _forward_memory),
    (None, False, "saved for the backward: 3 numbers a slice of 64 or more (MB)", _saved),
    (
        False, True, "native kernels, rows from memory: 0.85 of the copy forward, 0.75 both",
        _bare(lambda g: g.x_bytes >= _CPU_MEMORY and g.inner == 1 and g.length < _LONG, 0.85, 0.75),
    ),
    (
        False, True, "native kernels, a middle axis from memory: 0.65 forward, 0.50 both",
        _bare(lambda g: g.x_bytes >= _CPU_MEMORY and g.inner > 1, 0.65, 0.50),
    ),
    (
        False, True, "native kernels, in cache: 0.45 forward, 0.30 both",
        _bare(lambda g: g.x_bytes <= _CPU_CACHE, 0.45, 0.30),
    ),
    (False, True, "native kernels, K from 4: 4 × torch.compile of the public package", _compiled_package),
    (False, True, "native kernels, wavlm and llama, K = 4, H = 8: 60 × the public package", _eager_package),
)  # fmt: skip


def _typical(groups: list[_Group]) -> Goal:
    ratios = [ratio for group in groups if (ratio := group.times(CLOSED_FORM_COMPILED, FUSED)) is not None]
    goal = Goal("typically 1.5 × as fast as torch.compile of the plain form (median)", len(ratios))
    if ratios and (median := statistics.median(ratios)) < 1.5:
        goal.missed.append(f"{median:.3g}")
    return goal


def _gaussians(groups: list[_Group], on_gpu: bool) -> Goal:
    goal = Goal("K = 64 takes at most 1.05 of the time of K = 1")
    flat = [g for g in groups if g.operator in ("product", "block")]  # whose exponentials do not grow with K
    same = [(g, (g.any["dims"], g.operator, g.norm_axis, g.num_heads, g.layers, g.dtype, g.direction)) for g in flat]
    ones = {key: g for g, key in same if g.num_gaussians == 1}
    for group, key in same if on_gpu else ():
        one = ones.get(key)
        if group.num_gaussians == 64 and one is not None and FUSED in group.rows and FUSED in one.rows:
            together = _Group({"many": group.rows[FUSED], "one": one.rows[FUSED]}, group.l2_mb)
            ratio = together.times("many", "one")
            goal.judged += 1
            if ratio > 1.05:
                goal.missed.append(f"{_title(group)}: {ratio:.3g}")
    return goal
