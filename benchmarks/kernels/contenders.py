"""Who is timed: the public package and the closed form, each eager and compiled, the fused operator, its kernels
without Python, native operators, a copy."""

from __future__ import annotations

from functools import partial
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import daam_kernels
from daam_kernels.backends import resolve

from .bare import bare_kernels
from .contender import BOTH, CONTRACT, OTHERS, Contender, Differentiable
from .shapes import Case

UPSTREAM, UPSTREAM_COMPILED = "upstream eager", "upstream compiled"
CLOSED_FORM, CLOSED_FORM_COMPILED = "closed form eager", "closed form compiled"  # daam_kernels.reference
FUSED, FRESH_COPY, COPY = "fused", "copy, fresh output", "copy"


class Copy(Contender):
    """The limit: the same bytes, two streams forward and three backward, into outputs that exist already."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(COPY)
        self.y, self.dx = torch.empty_like(x, requires_grad=False), torch.empty_like(x, requires_grad=False)

    @torch.no_grad()
    def __call__(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        self.y.copy_(x)
        if direction == BOTH:
            torch.add(x, grad, out=self.dx)
        return ()


class FreshCopy(Contender):
    """The copy into outputs made anew every time, as every operator has to: what page faults cost on a CPU."""

    def __init__(self) -> None:
        super().__init__(FRESH_COPY)

    @torch.no_grad()
    def __call__(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        y = torch.empty_like(x).copy_(x)
        return (y, x + grad) if direction == BOTH else (y,)


def contenders(case: Case) -> dict[str, Callable[[], Contender]]:
    """Makers of the contenders that make sense for this case, by name; a maker raises where one does not exist."""
    makers: dict[str, Callable[[], Contender]] = {
        UPSTREAM: lambda: _upstream(case, compiled=False),
        UPSTREAM_COMPILED: lambda: _upstream(case, compiled=True),
        CLOSED_FORM: lambda: _closed_form(case, compiled=False),
        CLOSED_FORM_COMPILED: lambda: _closed_form(case, compiled=True),
        FUSED: lambda: _density(case, f"{FUSED} ({resolve('auto', case.x)})", daam_kernels.density_attention, CONTRACT),
        **bare_kernels(case),
    }
    if case.x.is_contiguous():
        last = case.x.shape[-1:]
        for name, function in (
            ("layer_norm, last axis", lambda x: F.layer_norm(x, last)),
            ("softmax, last axis", lambda x: F.softmax(x, -1)),
        ):
            makers[name] = partial(Differentiable, name, function)
    if not case.x.is_cuda:
        makers[FRESH_COPY] = FreshCopy
    makers[COPY] = lambda: Copy(case.x)
    return makers


def parameter_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """(dmean_offsets, dc), both [num_heads, num_gaussians], of gradients of the one, then of the other.

    Each may be one tensor, or one [num_gaussians] per head.
    """
    half = len(gradients) // 2
    return [torch.stack(list(part)).view(-1, part[0].shape[-1]) for part in (gradients[:half], gradients[half:])]


def _density(case: Case, name: str, function: Callable, tolerances: dict) -> Differentiable:
    mean_offsets, c = (p.clone().requires_grad_() for p in (case.mean_offsets, case.c))
    axis = case.shape.norm_axis
    contender = Differentiable(name, lambda x: function(x, mean_offsets, c, norm_axis=axis), (mean_offsets, c))
    contender.tolerance = tolerances[case.x.dtype]
    return contender


def _closed_form(case: Case, compiled: bool) -> Differentiable:
    function = daam_kernels.reference.density_attention
    if compiled:
        contender = _density(case, CLOSED_FORM_COMPILED, torch.compile(function, dynamic=False), OTHERS)
    else:
        contender = _density(case, CLOSED_FORM, function, OTHERS)
    contender.compiled, contender.many_launches = compiled, not compiled
    return contender


def _upstream(case: Case, compiled: bool) -> Differentiable:
    module = _upstream_module(case)
    heads = module.attention_heads
    parameters = [*(h.mean_offsets for h in heads), *(h.c for h in heads)]
    if compiled:
        contender = Differentiable(UPSTREAM_COMPILED, torch.compile(module, dynamic=False), parameters)
    else:
        contender = Differentiable(UPSTREAM, module, parameters)
    contender.tolerance = OTHERS[case.x.dtype]
    contender.compiled = contender.slow_to_compile = compiled
    contender.many_launches = not compiled
    return contender


def _upstream_module(case: Case) -> nn.Module:
    """The public package's module with the parameters of the case."""
    from gaussian_adaptive_attention import MultiHeadGaussianAdaptiveAttention

    num_heads, num_gaussians = case.c.shape
    module = MultiHeadGaussianAdaptiveAttention(case.shape.norm_axis, num_heads, num_gaussians).to(case.x.device)
    for i, head in enumerate(module.attention_heads):  # .data, because float64 parameters must replace float32 ones
        head.mean_offsets.data, head.c.data = case.mean_offsets[i].clone(), case.c[i].clone()
    return module
