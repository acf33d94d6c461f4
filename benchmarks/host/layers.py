"""The layers that a call of density attention goes through, the outermost first, each called by itself.

A layer's time holds those of the layers below it, so the difference between two of them is what the upper one adds.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import daam_kernels
from daam_kernels import native
from daam_kernels.backends import resolve
from daam_kernels.ops import density_attention as operator
from daam_kernels.options import DensityOptions

from ..kernels.bare import Bare
from ..kernels.contender import BOTH, FORWARD
from ..kernels.operators import leaves
from ..kernels.shapes import Case

MODULE, FUNCTION, DISPATCHED, DIRECT = "module", "function", "operator, dispatched", "operator, direct"
BACKEND, LAUNCH = "backend", "launch"
LAYER_NORM, LAYER_NORM_AFFINE, RELU = "layer_norm", "layer_norm, affine", "relu"


class Layer(NamedTuple):
    """``calls`` by direction; each returns y, and with the backward dx and the parameters' gradients too.

    ``judged``: whether it computes density attention.
    """

    name: str
    calls: dict[str, Callable[[], Sequence[Tensor]]]
    judged: bool = True


def layers(case: Case, backend: str) -> dict[str, Callable[[], Layer]]:
    """Makers by name. The layers are of ``backend``; what differs between backends is in the last two.

    MODULE is ``FusedMultiHeadDAAM``; FUNCTION checks the arguments, or remembers that it has; DISPATCHED is the
    registered operator, as torch.compile calls it; DIRECT the way past the dispatcher, with autograd; BACKEND prepares
    launches and makes the outputs, without autograd; LAUNCH is the launches alone, of what was prepared before.
    """
    served = resolve(backend, case.x)
    return {
        MODULE: lambda: _module(case, backend),
        FUNCTION: lambda: _function(case, backend),
        DISPATCHED: lambda: _dispatched(case, backend),
        DIRECT: lambda: _direct(case, backend),
        BACKEND: lambda: _backend(case, served),
        LAUNCH: lambda: _triton_launches(case) if served == "triton" else _native_calls(case, served),
        LAYER_NORM: lambda: _peer(LAYER_NORM, case, lambda x: F.layer_norm(x, x.shape[-1:])),
        LAYER_NORM_AFFINE: lambda: _affine(case),
        RELU: lambda: _peer(RELU, case, F.relu),
    }


def _differentiable(name: str, case: Case, function: Callable, parameters: Sequence[Tensor], judged=True) -> Layer:
    x, grad = case.x, case.grad
    inputs = (x, *parameters)

    def both() -> Sequence[Tensor]:
        y = function(x)
        return y, *torch.autograd.grad(y, inputs, grad)

    return Layer(name, {FORWARD: lambda: (function(x),), BOTH: both}, judged)


def _peer(name: str, case: Case, function: Callable, *parameters: Tensor) -> Layer:
    return _differentiable(name, case, function, parameters, judged=False)


def _affine(case: Case) -> Layer:
    size = case.x.shape[-1:]
    scale, shift = (make(size, device=case.x.device, requires_grad=True) for make in (torch.ones, torch.zeros))
    return _peer(LAYER_NORM_AFFINE, case, lambda x: F.layer_norm(x, size, scale, shift), scale, shift)


def _module(case: Case, backend: str) -> Layer:
    module = daam_kernels.FusedMultiHeadDAAM(case.shape.norm_axis, *case.c.shape, backend=backend, device=case.x.device)
    module.mean_offsets.data, module.c.data = (value.clone() for value in (case.mean_offsets, case.c))
    return _differentiable(MODULE, case, module, (module.mean_offsets, module.c))


def _function(case: Case, backend: str) -> Layer:
    mean_offsets, c = parameters = leaves(case)
    options = dict(norm_axis=case.shape.norm_axis, backend=backend)
    return _differentiable(
        FUNCTION, case, lambda x: daam_kernels.density_attention(x, mean_offsets, c, **options), parameters
    )


def _options(case: Case) -> DensityOptions:
    return DensityOptions(case.shape.norm_axis % case.x.dim(), None, "zero", "clamp", 1e-8, False)


def _dispatched(case: Case, backend: str) -> Layer:
    registered = torch.ops.daam_kernels.density_attention.default
    mean_offsets, c = parameters = leaves(case)
    *scalars, max_seqlen = _options(case)

    def call(x: Tensor) -> Tensor:
        saves = torch.is_grad_enabled()
        return registered(x, mean_offsets, c, None, None, *scalars, False, saves, backend, None, max_seqlen)[0]

    return _differentiable(DISPATCHED, case, call, parameters)


def _direct(case: Case, backend: str) -> Layer:
    mean_offsets, c = parameters = leaves(case)
    options = _options(case)

    def call(x: Tensor) -> Tensor:
        return operator.apply(x, mean_offsets, c, None, None, None, options, False, backend, None)

    return _differentiable(DIRECT, case, call, parameters)


def _backend(case: Case, served: str) -> Layer:
    x, grad, options = case.x.detach(), case.grad, _options(case)
    tensors = (x, case.mean_offsets, case.c, None, None, None)

    def forward() -> Sequence[Tensor]:
        return operator.forward(*tensors, options, False, None, served)[:1]

    def both() -> Sequence[Tensor]:
        stats = None
        if served == "triton":
            stats = operator.or_none(operator.new_stats(x, case.mean_offsets, None, options, served))
        y, _ = operator.forward(*tensors, options, False, stats, served)
        return y, *operator.backward(grad, *tensors, stats, options, served)

    return Layer(BACKEND, {FORWARD: forward, BOTH: both})


def _native_calls(case: Case, served: str) -> Layer:
    """The library's functions on a problem, and into outputs, that exist already."""
    if served != "native" or not native.status()[0]:
        raise RuntimeError(f"nothing is launched apart from its preparation by {served!r}")
    bare = Bare(LAUNCH, case)
    x, grad = case.x.detach(), case.grad
    return Layer(LAUNCH, {d: bare.prepare(d, x, grad) for d in (FORWARD, BOTH)})


def _triton_launches(case: Case) -> Layer:
    """The launches of Triton's kernels alone, as they were recorded when the layer above made them."""
    calls = {direction: _recorded(call) for direction, call in _backend(case, "triton").calls.items()}
    return Layer(LAUNCH, calls)


def _recorded(call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """What repeats the launches that ``call`` makes, on the tensors that it made, and returns its results."""
    from daam_kernels.kernels import density_backward, density_forward

    modules, launches = (density_forward, density_backward), []
    launch = density_forward.run

    def record(*arguments, **named):
        launches.append((arguments, named))
        return launch(*arguments, **named)

    try:
        for module in modules:
            module.run = record
        results = call()
    finally:
        for module in modules:
            module.run = launch
    if not launches:
        raise RuntimeError("the backend launched nothing through kernels.host.run")

    def repeat() -> Sequence[Tensor]:
        for arguments, named in launches:
            launch(*arguments, **named)
        return results

    return repeat
