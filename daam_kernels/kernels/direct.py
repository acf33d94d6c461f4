"""Launches past Triton's own dispatch, which takes several times as long as a small kernel.

``kernel[grid](...)`` binds the arguments, works out what the machine code is specialised for, and looks it up. What it
launched at last is held and launched again by itself where nothing that it is specialised for has changed: of each
tensor the type and whether 16 divides its address, of a number whether it is 1, whether 16 divides it, and its bits.
Launches that differ in nothing else share what is held, so that a batch of another length is not dispatched either.
Stream and hooks are the current ones of every call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from .launch import Launch
from .remembered import remembered

HOLDS = torch.version.hip is None  # on AMD's GPUs machine code is specialised for the size of a tensor too

Given = Tensor | tuple[Tensor, ...] | int | None


class Plan:
    """How one launch launches one kernel: ``given`` are the arguments that calls bring, tensors above all, and numbers
    that are others every time; all others are the launch's."""

    def __init__(self, kernel: Any, launch: Launch, given: Iterable[str]) -> None:
        self.kernel, self.launch = kernel, launch
        self.arguments = list(map(launch.values.get, kernel.arg_names))
        self.names, self.places, self.only_bits, *others = _signature(kernel, given)
        self.held = self._find_held(*others) if HOLDS and isinstance(kernel, JITFunction) else {}

    def __call__(self, given: dict[str, Given], grid: tuple[int, int, int]) -> None:
        taken = [given[name] for name in self.names]
        specialised = tuple(map(_specialised, taken, self.only_bits))
        compiled = self.held.get(specialised)
        if compiled is None or self.kernel.pre_run_hooks:
            compiled = self._dispatch(taken, grid)
            if HOLDS and isinstance(compiled, CompiledKernel):  # of the interpreter it is nothing
                self.held[specialised] = compiled
            return
        arguments = self.arguments.copy()
        for place, one in zip(self.places, taken):
            arguments[place] = one
        compiled[grid](*arguments)

    def _dispatch(self, taken: list[Given], grid: tuple[int, int, int]) -> Any:
        values, given = self.launch.values, dict(zip(self.names, taken))
        chosen = {name: values[name] for name in self.kernel.arg_names if name in values and name not in given}
        return self.kernel[grid](**given, **chosen, **self.launch.options)

    def _find_held(self, constants: list[int], numbers: list[int], bits: list[int]) -> dict[tuple, CompiledKernel]:
        """That of all launches of the kernel, on the current device, for which the same machine code does."""
        known = self.arguments
        return _held(
            self.kernel.fn, driver.active.get_current_device(), self.places, *self.launch.options.items(),
            *[known[place] for place in constants], *[_specialised(known[place]) for place in numbers],
            *[_specialised(known[place], only_bits=True) for place in bits],
        )  # fmt: skip


@remembered(4096, typed=True)
def _held(*_: Any) -> dict[tuple, CompiledKernel]:
    return {}


class _Signature(NamedTuple):
    """The arguments of a kernel that calls bring, and the places of all others: constants of its code, numbers that
    this is specialised for, and those of which it knows the bits alone, as ``only_bits`` says of what calls bring."""

    names: tuple[str, ...]
    places: tuple[int, ...]
    only_bits: tuple[bool, ...]
    constants: list[int]
    numbers: list[int]
    bits: list[int]


_signatures: dict[tuple, _Signature] = {}


def _signature(kernel: Any, given: Iterable[str]) -> _Signature:
    key = kernel.fn, *given
    if key not in _signatures:
        places = tuple(place for place, name in enumerate(kernel.arg_names) if name in given)
        parameters = getattr(kernel, "params", ())  # the interpreter knows none
        only_bits = [p.do_not_specialize for p in parameters] or [False] * len(kernel.arg_names)
        constants = [p.num for p in parameters if p.is_constexpr and p.num not in places]
        numbers = [p.num for p in parameters if not p.is_constexpr and p.num not in places]
        _signatures[key] = _Signature(
            tuple(kernel.arg_names[place] for place in places), places, tuple(only_bits[place] for place in places),
            constants, *([place for place in numbers if only_bits[place] is free] for free in (False, True)),
        )  # fmt: skip
    return _signatures[key]


def _specialised(given: Given, only_bits: bool = False) -> Any:
    """What Triton specialises for, of an argument or several; ``only_bits``: of a number that it must not look at."""
    if given is None:
        return None
    if isinstance(given, tuple):
        return tuple([_specialised(one) for one in given])
    if isinstance(given, int):
        bits = 32 if given < 1 << 31 else 64
        return bits if only_bits else (bits, given == 1, given % 16 == 0)
    return given.dtype, given.data_ptr() % 16 == 0
