"""Launches past Triton's own dispatch, which takes several times as long as a small kernel.

``kernel[grid](...)`` binds the arguments, works out what the machine code is specialised for, and looks it up. What it
launched at last is held and launched again by itself where nothing that it is specialised for has changed: of each
tensor the type and whether 16 divides its address, of a number whether it is 1, whether 16 divides it, and its bits.
Launches that differ in nothing else share what is held, so that a batch of another length is not dispatched either.
Stream and hooks are the current ones of every call.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

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

    def __init__(self, kernel: Any, launch: Launch, given: Container[str]) -> None:
        self.kernel, self.launch = kernel, launch
        self.names = [name for name in kernel.arg_names if name in given]
        self.places = [place for place, name in enumerate(kernel.arg_names) if name in given]
        self.arguments = [launch.values.get(name) for name in kernel.arg_names]
        self.held = self._find_held() if HOLDS and isinstance(kernel, JITFunction) else {}

    def __call__(self, given: dict[str, Given], grid: tuple[int, int, int]) -> None:
        taken = [given[name] for name in self.names]
        specialised = tuple([_specialised(one) for one in taken])
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

    def _find_held(self) -> dict[tuple, CompiledKernel]:
        """That of all launches of the kernel, on the current device, which the same machine code does for."""
        known = [
            value if parameter.is_constexpr else _specialised(value, parameter.do_not_specialize)
            for parameter, value in zip(self.kernel.params, self.arguments)
        ]
        device = driver.active.get_current_device()
        return _held(self.kernel.fn, device, *known, *self.places, *self.launch.options.items())


@remembered(4096, typed=True)
def _held(*_: Any) -> dict[tuple, CompiledKernel]:
    return {}


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
