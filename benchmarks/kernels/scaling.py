"""Groups of shapes in which one size grows: a cliff between two of them is a rule that is wrong somewhere."""

from __future__ import annotations

from typing import Callable

from .shapes import Shape

# Elements of x where it stays the same: beyond every cache, and on a GPU 256 MB in half types too.
_TOTAL_CPU, _TOTAL_GPU = 1 << 24, 1 << 27
_LENGTHS = (8, 32, 128, 512, 2048, 8192, 1 << 15, 1 << 17, 1 << 19, 1 << 21, 1 << 23, 1 << 24)
_INNER = (1, 2, 8, 32, 128, 512, 2048, 8192)
_FRAMES = 512  # the slice of the group in which inner grows
_ROWS = (4, 32, 256, 2048, 1 << 14, 1 << 17, 1 << 20, 1 << 21)
_FEATURES = 1024  # the last one makes 2³¹ elements: 8 GB in float32
_MOST_CPU = 1 << 24


def _slice(on_gpu: bool) -> list[Shape]:
    total = _TOTAL_GPU if on_gpu else _TOTAL_CPU
    return [Shape(f"slice_{length}", (total // length, length), -1, 1) for length in _LENGTHS]


def _inner(on_gpu: bool) -> list[Shape]:
    rows = (_TOTAL_GPU if on_gpu else _TOTAL_CPU) // _FRAMES
    return [Shape(f"inner_{inner}", (rows // inner, _FRAMES, inner), 1, 1) for inner in _INNER]


def _size(on_gpu: bool) -> list[Shape]:
    shapes = [Shape(f"size_{rows * _FEATURES}", (rows, _FEATURES), -1, 1) for rows in _ROWS]
    return [shape for shape in shapes if on_gpu or shape.numel <= _MOST_CPU]


GROUPS: dict[str, Callable[[bool], list[Shape]]] = {
    "slice": _slice,
    "inner": _inner,
    "size": _size,
    "scaling": lambda on_gpu: [*_slice(on_gpu), *_inner(on_gpu), *_size(on_gpu)],
}
