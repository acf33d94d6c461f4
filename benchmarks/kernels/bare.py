"""The native CPU kernels with no Python around them: what of a call is the kernel, and what is fresh memory."""

from __future__ import annotations

import ctypes
import math
from functools import partial
from typing import Callable, Sequence

import torch
from torch import Tensor

from daam_kernels import native
from daam_kernels.options import DensityOptions

from .contender import BACKWARD, CONTRACT, FORWARD, Call, Contender
from .shapes import Case

BARE, BARE_FRESH, BARE_HUGE = "bare kernel", "bare kernel, fresh output", "bare kernel, huge pages"
_FRESH_MATTERS = 32 << 20  # bytes of x; glibc keeps smaller results, and hands them out again with their pages


class Bare(Contender):
    """The kernels' own C functions on a problem that was prepared before.

    y, dx [like x] and the gradients of the parameters [num_heads, num_gaussians] exist already; with ``fresh``, y and
    dx are made anew at every call, and with ``huge_pages`` too the system is asked for huge pages below them.
    """

    def __init__(self, name: str, case: Case, fresh: bool = False, huge_pages: bool = False) -> None:
        super().__init__(name)
        self.tolerance = CONTRACT[case.x.dtype]
        self.mean_offsets, self.c = case.mean_offsets, case.c
        x = case.x.detach()
        options = DensityOptions(case.shape.norm_axis % x.dim(), None, "zero", "clamp", 1e-8, False)
        self.forward = _problem(huge_pages, self.mean_offsets, self.c, None, options, x, x)
        self.backward = _problem(huge_pages, self.mean_offsets, self.c, None, options, x, x, case.grad)
        self.fill_y = native.bound_forward(self.forward)
        self.outputs = None if fresh else tuple(torch.full_like(x, math.nan) for _ in range(2))
        self.of_parameters = tuple(torch.full_like(p, math.nan) for p in (self.mean_offsets, self.c))

    def prepare(self, direction: str, x: Tensor, grad: Tensor) -> Call:
        return partial(self._fill, direction, x, grad)

    @torch.no_grad()
    def _fill(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        results: tuple[Tensor, ...] = ()
        if direction != BACKWARD:
            y = torch.empty_like(x) if self.outputs is None else self.outputs[0]
            self.fill_y(x, self.mean_offsets, self.c, y)
            results = (y,)
        if direction != FORWARD:
            dx = torch.empty_like(x) if self.outputs is None else self.outputs[1]
            self._fill_gradients(grad, x, dx)
            results += dx, *self.of_parameters
        return results

    def _fill_gradients(self, grad: Tensor, x: Tensor, dx: Tensor) -> None:
        library = native._library()
        inputs = (t.data_ptr() for t in (grad, x, self.mean_offsets, self.c))
        outputs = (t.data_ptr() for t in (dx, *self.of_parameters))
        status = library.backward(self.backward.address, *inputs, None, *outputs, library.parallel_for)
        if status:
            raise RuntimeError(f"daam_density_backward failed with status {status}")


def bare_kernels(case: Case) -> dict[str, Callable[[], Contender]]:
    """Makers of those that make sense for this case, by name: none where the native library is not there."""
    if case.shape.operator != "product" or case.x.is_cuda or not native.status()[0]:
        return {}
    makers: dict[str, Callable[[], Contender]] = {BARE: lambda: Bare(BARE, case)}
    if case.x.nbytes >= _FRESH_MATTERS:
        makers[BARE_FRESH] = lambda: Bare(BARE_FRESH, case, fresh=True)
        makers[BARE_HUGE] = lambda: Bare(BARE_HUGE, case, fresh=True, huge_pages=True)
    return makers


def _problem(huge_pages: bool, *arguments) -> native.Problem:
    """The problem with the flag as it is asked for here, whatever DAAM_KERNELS_HUGE_PAGES says."""
    known = native.problem(*arguments)
    if known is None:
        raise ValueError("x has no strides [outer, R, inner], so the bare kernel would need a copy of it")
    structure = type(known.structure).from_buffer_copy(known.structure)  # the library's own is shared by all calls
    structure.flags = structure.flags & ~native._HUGE_PAGES | (native._HUGE_PAGES if huge_pages else 0)
    return native.Problem(ctypes.addressof(structure), structure)
