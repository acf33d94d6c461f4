"""Who is timed: the public package and the closed form, each eager and compiled, the fused operator, its kernels
without Python, native operators, a copy. What differs between the family's operators is in operators.py."""

from __future__ import annotations

import re
from functools import partial
from typing import Callable, Sequence

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import daam_kernels
from daam_kernels.backends import resolve

from .bare import BARE, BARE_FRESH, BARE_HUGE, bare_kernels
from .contender import BACKWARD, CONTRACT, FORWARD, OTHERS, Call, Contender, Differentiable, Tolerance
from .operators import OPERATORS, Form, leaves
from .shapes import Case

UPSTREAM, UPSTREAM_COMPILED = "upstream eager", "upstream compiled"
CLOSED_FORM, CLOSED_FORM_COMPILED = "closed form eager", "closed form compiled"  # daam_kernels.reference
LAYER_NORM, SOFTMAX = "layer_norm, last axis", "softmax, last axis"
FUSED, FRESH_COPY, COPY = "fused", "copy, fresh output", "copy"

_OTHERS = ("cuda",)  # backends that auto takes only where its first choice is missing; this one has no float64
_MOST_COMPILED = 16  # Gaussians of every head, or sequences, which the compiler sees one by one


class Copy(Contender):
    """The limit: the same bytes, two streams forward and three backward, into outputs that exist already."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(COPY)
        self.y, self.dx = torch.empty_like(x, requires_grad=False), torch.empty_like(x, requires_grad=False)

    def prepare(self, direction: str, x: Tensor, grad: Tensor) -> Call:
        return partial(self._copy, direction, x, grad)

    @torch.no_grad()
    def _copy(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        if direction != BACKWARD:
            self.y.copy_(x)
        if direction != FORWARD:
            torch.add(x, grad, out=self.dx)
        return ()


class FreshCopy(Contender):
    """The copy into outputs made anew every time, as every operator has to: what page faults cost on a CPU."""

    def __init__(self) -> None:
        super().__init__(FRESH_COPY)

    def prepare(self, direction: str, x: Tensor, grad: Tensor) -> Call:
        return partial(self._copy, direction, x, grad)

    @torch.no_grad()
    def _copy(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        y = () if direction == BACKWARD else (torch.empty_like(x).copy_(x),)
        return y if direction == FORWARD else (*y, x + grad)


def contenders(case: Case) -> dict[str, Callable[[], Contender]]:
    """Makers of the contenders that make sense for this case, by name; a maker raises where one does not exist."""
    operator = OPERATORS[case.shape.operator]
    makers: dict[str, Callable[[], Contender]] = {}
    if operator.has_upstream:
        makers[UPSTREAM] = lambda: _upstream(case, compiled=False)
        if case.shape.layers == 1 and case.num_gaussians <= _MOST_COMPILED:
            makers[UPSTREAM_COMPILED] = lambda: _upstream(case, compiled=True)
    makers[CLOSED_FORM] = lambda: _closed_form(case, compiled=False)
    if len(case.shape.sequences) <= _MOST_COMPILED:
        makers[CLOSED_FORM_COMPILED] = lambda: _closed_form(case, compiled=True)
    for variant in operator.variants:
        makers[_fused_name(variant)] = partial(_fused, case, variant)
    for backend in _other_backends(case):
        makers[_fused_name(backend)] = partial(_fused_by, case, backend)
    makers |= bare_kernels(case)
    if case.x.is_contiguous():
        last = case.x.shape[-1:]
        for name, function in (
            (LAYER_NORM, lambda x: F.layer_norm(x, last)),
            (SOFTMAX, lambda x: F.softmax(x, -1)),
        ):
            makers[name] = partial(Differentiable, name, function)
    if not case.x.is_cuda:
        makers[FRESH_COPY] = FreshCopy
    makers[COPY] = lambda: Copy(case.x)
    return makers


def all_names() -> list[str]:
    """The contenders that some case has, in their order."""
    variants = dict.fromkeys(variant for operator in OPERATORS.values() for variant in operator.variants)
    ours = [*map(_fused_name, (*variants, *_OTHERS)), BARE, BARE_FRESH, BARE_HUGE]
    others = [UPSTREAM, UPSTREAM_COMPILED, CLOSED_FORM, CLOSED_FORM_COMPILED]
    return [*others, *ours, LAYER_NORM, SOFTMAX, FRESH_COPY, COPY]


def without_backend(contender: str) -> str:
    """The name of a contender as it is asked for: where it is shown, the fused operator's backend stands behind it."""
    return re.sub(r" \(\w+\)$", "", contender)


def _fused_name(variant: str) -> str:
    return f"{FUSED}, {variant}" if variant else FUSED


def _fused(case: Case, variant: str) -> Differentiable:
    operator = OPERATORS[case.shape.operator]
    backend = resolve("auto", case.x, operator.density)
    return _contender(case, f"{_fused_name(variant)} ({backend})", operator.fused(case, variant), CONTRACT)


def _other_backends(case: Case) -> list[str]:
    """Those that serve the case beside the one that auto takes."""
    if case.shape.operator != "product" or not case.x.is_cuda or case.x.dtype == torch.float64:
        return []
    taken, there = resolve("auto", case.x), daam_kernels.available_backends()
    return [backend for backend in _OTHERS if backend != taken and there[backend]]


def _fused_by(case: Case, backend: str) -> Differentiable:
    mean_offsets, c = parameters = leaves(case)
    options = dict(norm_axis=case.shape.norm_axis, backend=backend)
    form = Form(lambda x: daam_kernels.density_attention(x, mean_offsets, c, **options), parameters)
    return _contender(case, _fused_name(backend), form, CONTRACT)


def _closed_form(case: Case, compiled: bool) -> Differentiable:
    plain, parameters = partial(OPERATORS[case.shape.operator].reference, case.shape), leaves(case)
    if compiled:
        plain = _compiled(plain)
    form = Form(lambda x: plain(x, *parameters), parameters)
    contender = _contender(case, CLOSED_FORM_COMPILED if compiled else CLOSED_FORM, form, OTHERS)
    contender.compiled, contender.many_launches = compiled, not compiled
    return contender


def _upstream(case: Case, compiled: bool) -> Differentiable:
    form = OPERATORS[case.shape.operator].upstream(case)
    if compiled:
        form = form._replace(function=_compiled(form.function))
    contender = _contender(case, UPSTREAM_COMPILED if compiled else UPSTREAM, form, OTHERS)
    contender.compiled = contender.slow_to_compile = compiled
    contender.many_launches = not compiled
    return contender


def _compiled(function: Callable) -> Callable:
    # A backward that is timed by itself keeps its graph, whose buffers the compiled code must then not write over.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def _contender(case: Case, name: str, form: Form, tolerances: dict) -> Differentiable:
    contender = Differentiable(name, *form)
    contender.tolerance = _for_layers(tolerances[case.x.dtype], case)
    return contender


def _for_layers(tolerance: Tolerance, case: Case) -> Tolerance:
    """What is allowed is once for every layer, each of which rounds its result.

    In half types that moves the next layers' inputs, of which the parameters' gradients are sums that cancel: there
    the contract, which is of the same rounded input, says nothing of them.
    """
    layers = case.shape.layers
    parameters = None if layers > 1 and case.x.dtype.itemsize < 4 else tolerance.parameters
    return Tolerance(layers * tolerance.y, layers * tolerance.dx, parameters and layers * parameters)
