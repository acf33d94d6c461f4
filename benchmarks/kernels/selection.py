"""From the words of the command line to what is measured: shapes and groups of them, Gaussians, heads, contenders."""

from __future__ import annotations

from dataclasses import replace
from typing import Iterator, Sequence, TypeVar

from .contender import BACKWARD, BOTH, FORWARD
from .contenders import all_names, without_backend
from .scaling import GROUPS
from .shapes import SHAPES, Shape

DIRECTIONS_BY_OPTION = {"fwd": FORWARD, "bwd": BACKWARD, "both": BOTH}
DEFAULT_GAUSSIANS = 4

Value = TypeVar("Value")


def choose(text: str, known: dict[str, Value], what: str) -> list[Value]:
    """The values of the comma-separated names; ends the program with a message at an unknown one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown {what} {name!r}, known are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def choose_shapes(text: str, on_gpu: bool) -> list[Shape]:
    """The shapes of that name, or of the group of that name, each once."""
    known = {name: [shape] for name, shape in SHAPES.items()}
    groups = {name: group(on_gpu) for name, group in GROUPS.items()}
    of_groups = {shape.name: [shape] for shape in groups["scaling"]}
    for name in (name.strip() for name in text.split(",")):
        if name not in known | groups | of_groups:
            raise SystemExit(f"unknown shape {name!r}, known are {', '.join([*known, *groups])} and what is in these")
    chosen = choose(text, known | of_groups | groups, "shape")
    return list({shape.name: shape for shapes in chosen for shape in shapes}.values())


def multiply(
    shapes: Sequence[Shape], gaussians: Sequence[int] | None, heads: Sequence[int] | None
) -> tuple[list[Shape], list[str]]:
    """Every shape with each number of Gaussians and of heads, and a line for each that does not exist.

    A shape that is about its number of Gaussians keeps it, and the gate has no heads. None: what the shape says.
    """
    cases, notes = [], []
    for shape in shapes:
        for num_heads in heads if heads and shape.operator != "gate" else [shape.num_heads]:
            shortest = min(shape.sequences, default=shape.dims[shape.norm_axis]) // num_heads
            if shortest < 2:
                notes.append(f"{shape.name} is left out with {num_heads} heads: some would have less than two elements")
                continue
            for num_gaussians in [shape.num_gaussians] if shape.num_gaussians else gaussians or [DEFAULT_GAUSSIANS]:
                cases.append(replace(shape, num_heads=num_heads, num_gaussians=num_gaussians))
    return cases, notes


def choose_contenders(text: str) -> frozenset[str]:
    """The contenders whose names begin with one of the comma-separated words; a name may have a comma itself."""
    chosen: set[str] = set()
    for word in _words([word.strip() for word in text.split(",")]):
        found = [name for name in all_names() if word and name.startswith(without_backend(word))]
        if not found:
            raise SystemExit(f"unknown contender {word!r}, known are: {'; '.join(all_names())}")
        chosen.update(found)
    return frozenset(chosen)


def _words(parts: list[str]) -> Iterator[str]:
    """The parts, two of them joined again where that is the name of a contender."""
    while parts:
        joined = ", ".join(parts[:2])
        taken = 2 if without_backend(joined) in all_names() and len(parts) > 1 else 1
        yield ", ".join(parts[:taken])
        parts = parts[taken:]
