"""Who is timed: the public package, the reference, the compiler, the fused operator, native operators, a copy."""

from __future__ import annotations

from functools import partial
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import daam_kernels
from daam_kernels.backends import resolve

from .shapes import Case

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
UPSTREAM, REFERENCE, COMPILED, FUSED, COPY = "upstream eager", "reference eager", "torch.compile", "fused", "copy"


class Tolerance(NamedTuple):
    """Largest relative error (2-norm over the tensor) of y, dx and the parameters' gradients; None: not judged."""

    y: float
    dx: float
    parameters: float | None


_CONTRACT = {
    torch.float64: Tolerance(1e-12, 1e-12, 1e-12),
    torch.float32: Tolerance(2e-6, 5e-6, 1e-4),
    torch.bfloat16: Tolerance(2**-8, 2**-8, 1e-3),
    torch.float16: Tolerance(2**-11, 2**-11, 1e-3),
}
# What others get away with. In half types the public package's parameter gradients are known to be off by more than
# their own size; its speed is still of interest, so there the error is shown but not judged.
_OTHERS = {
    torch.float64: Tolerance(1e-9, 1e-9, 1e-9),
    torch.float32: Tolerance(1e-4, 1e-4, 1e-2),
    torch.bfloat16: Tolerance(0.1, 0.1, None),
    torch.float16: Tolerance(0.1, 0.1, None),
}


class Contender:
    """Something to time on one case. Called with a direction, x and grad, it does that direction's work once.

    Attributes:
        name: how it appears in tables.
        tolerance: what its results may be off by; None where it computes something else.
        compiled: it compiles itself at its first call, for one shape.
        many_launches: plain PyTorch, pass by pass: hundreds of kernels a call, so a graph should not hold many calls,
            and many times x's size in memory.
    """

    tolerance: Tolerance | None = None
    compiled = False
    many_launches = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError


class Differentiable(Contender):
    """A function of x alone: y, and with the backward the gradients of x and of ``parameters`` too."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor], parameters: Sequence[Tensor] = ()) -> None:
        super().__init__(name)
        self.function = function
        self.parameters = tuple(parameters)

    def __call__(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        if direction == FORWARD:
            with torch.no_grad():
                return (self.function(x),)
        y = self.function(x)
        return (y, *torch.autograd.grad(y, (x, *self.parameters), grad))


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
    """The copy into outputs made anew every time, as every other contender has to: what page faults cost on a CPU."""

    def __init__(self) -> None:
        super().__init__("copy, fresh output")

    @torch.no_grad()
    def __call__(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        y = torch.empty_like(x).copy_(x)
        return (y, x + grad) if direction == BOTH else (y,)


def contenders(case: Case) -> dict[str, Callable[[], Contender]]:
    """Makers of the contenders that make sense for this case, by name; a maker raises where one does not exist."""
    makers: dict[str, Callable[[], Contender]] = {
        UPSTREAM: lambda: _upstream(case),
        REFERENCE: lambda: _density(case, REFERENCE, daam_kernels.reference.density_attention, many_launches=True),
        COMPILED: lambda: _compiled(case),
        FUSED: lambda: _density(
            case, f"{FUSED} ({resolve('auto', case.x)})", daam_kernels.density_attention, tolerances=_CONTRACT
        ),
    }
    if case.x.is_contiguous():
        last = case.x.shape[-1:]
        for name, function in (
            ("layer_norm, last axis", lambda x: F.layer_norm(x, last)),
            ("softmax, last axis", lambda x: F.softmax(x, -1)),
        ):
            makers[name] = partial(Differentiable, name, function)
    if not case.x.is_cuda:
        makers["copy, fresh output"] = FreshCopy
    makers[COPY] = lambda: Copy(case.x)
    return makers


def parameter_gradients(contender: Differentiable, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """(dmean_offsets, dc), both [num_heads, num_gaussians], of gradients in the order of ``contender.parameters``."""
    half = len(gradients) // 2
    return [torch.stack(list(part)).view(-1, part[0].shape[-1]) for part in (gradients[:half], gradients[half:])]


def _density(case: Case, name: str, function: Callable, tolerances=_OTHERS, many_launches=False) -> Differentiable:
    mean_offsets, c = (p.clone().requires_grad_() for p in (case.mean_offsets, case.c))
    axis = case.shape.norm_axis
    contender = Differentiable(name, lambda x: function(x, mean_offsets, c, norm_axis=axis), (mean_offsets, c))
    contender.tolerance = tolerances[case.x.dtype]
    contender.many_launches = many_launches
    return contender


def _compiled(case: Case) -> Differentiable:
    torch._dynamo.reset()  # or the graphs of earlier shapes count against the recompilation limit
    function = torch.compile(daam_kernels.reference.density_attention, dynamic=False)
    contender = _density(case, COMPILED, function)
    contender.compiled = True
    return contender


def _upstream(case: Case) -> Differentiable:
    from gaussian_adaptive_attention import MultiHeadGaussianAdaptiveAttention

    num_heads, num_gaussians = case.c.shape
    module = MultiHeadGaussianAdaptiveAttention(case.shape.norm_axis, num_heads, num_gaussians).to(case.x.device)
    heads = module.attention_heads
    for i, head in enumerate(heads):  # .data, because float64 parameters must replace float32 ones
        head.mean_offsets.data, head.c.data = case.mean_offsets[i].clone(), case.c[i].clone()
    contender = Differentiable(UPSTREAM, module, [*(h.mean_offsets for h in heads), *(h.c for h in heads)])
    contender.tolerance = _OTHERS[case.x.dtype]
    contender.many_launches = True
    return contender
