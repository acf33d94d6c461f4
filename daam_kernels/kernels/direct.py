"""Launches past Triton's own dispatch, which takes several times as long as a small kernel.

``kernel[grid](...)`` binds the arguments, works out what the machine code is specialised for, and looks it up. What it
launched at last is held and launched again by itself where nothing that it is specialised for has changed: the numbers
of a :class:`Launch`, which belongs to one device, and of each pointer the type and whether 16 divides it. Stream and
hooks are the current ones of every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .launch import Launch

HOLDS = torch.version.hip is None  # on AMD's GPUs machine code is specialised for the size of a tensor too

Pointer = Tensor | tuple[Tensor, ...] | None


class Plan:
    """How one launch launches one kernel: ``pointers`` are those that it takes, all others are the launch's numbers."""

    def __init__(self, kernel: Any, launch: Launch, pointers: dict[str, Pointer]) -> None:
        self.kernel, self.chosen = kernel, launch.arguments(kernel)
        self.pointers = [name for name in kernel.arg_names if name in pointers]
        self.places = [kernel.arg_names.index(name) for name in self.pointers]
        self.arguments = [self.chosen.get(name) for name in kernel.arg_names]
        self.held: dict[tuple, CompiledKernel] = {}

    def __call__(self, pointers: dict[str, Pointer], grid: tuple[int, int, int]) -> None:
        taken = [pointers[name] for name in self.pointers]
        specialised = tuple([_specialised(pointer) for pointer in taken])
        compiled = self.held.get(specialised)
        if compiled is None or self.kernel.pre_run_hooks:
            compiled = self.kernel[grid](**dict(zip(self.pointers, taken)), **self.chosen)
            if HOLDS and isinstance(compiled, CompiledKernel):  # of the interpreter it is nothing
                self.held[specialised] = compiled
            return
        arguments = self.arguments.copy()
        for place, pointer in zip(self.places, taken):
            arguments[place] = pointer
        compiled[grid](*arguments)


def _specialised(pointer: Pointer) -> Any:
    """What Triton specialises for, of a pointer or several."""
    if pointer is None:
        return None
    if isinstance(pointer, tuple):
        return tuple([_specialised(one) for one in pointer])
    return pointer.dtype, pointer.data_ptr() % 16 == 0
