"""What every contender is: a name, a tolerance, and a call that does a direction's work once."""

from __future__ import annotations

from functools import partial
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
DIRECTIONS = (FORWARD, BACKWARD, BOTH)
STREAMS = {FORWARD: 2, BACKWARD: 3, BOTH: 5}  # tensors of x's size that have to be read or written: x, y; x, g, dx
Call = Callable[[], Sequence[Tensor]]


class Tolerance(NamedTuple):
    """Largest relative error (2-norm over the tensor) of y, dx and the parameters' gradients; None: not judged."""

    y: float
    dx: float
    parameters: float | None


CONTRACT = {
    torch.float64: Tolerance(1e-12, 1e-12, 1e-12),
    torch.float32: Tolerance(2e-6, 5e-6, 1e-4),
    torch.bfloat16: Tolerance(2**-8, 2**-8, 1e-3),
    torch.float16: Tolerance(2**-11, 2**-11, 1e-3),
}
# What others get away with. In half types the public package's parameter gradients are known to be off by more than
# their own size; its speed is still of interest, so there the error is shown but not judged.
OTHERS = {
    torch.float64: Tolerance(1e-9, 1e-9, 1e-9),
    torch.float32: Tolerance(1e-4, 1e-4, 1e-2),
    torch.bfloat16: Tolerance(0.1, 0.1, None),
    torch.float16: Tolerance(0.1, 0.1, None),
}


class Contender:
    """Something to time on one case, in a direction at a time.

    Attributes:
        name: how it appears in tables.
        tolerance: what its results may be off by; None where it computes something else.
        compiled: it compiles itself at its first call, for one shape.
        slow_to_compile: that takes a minute or more, because the compiler sees the heads one by one.
        many_launches: plain PyTorch, pass by pass: hundreds of kernels a call, so a graph should not hold many calls,
            and many times x's size in memory.
    """

    tolerance: Tolerance | None = None
    compiled = False
    slow_to_compile = False
    many_launches = False

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, direction: str, x: Tensor, grad: Tensor) -> Call:
        """A call that does the direction's work once, as often as it is called; what comes before it is done here.

        It returns y where the direction has a forward, then dx and the parameters' gradients where it has a backward;
        nothing where the tolerance is None.
        """
        raise NotImplementedError

    def __call__(self, direction: str, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        """What the prepared call returns."""
        return self.prepare(direction, x, grad)()


class Differentiable(Contender):
    """A function of x alone: y, and with the backward the gradients of x and of ``parameters`` too."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor], parameters: Sequence[Tensor] = ()) -> None:
        super().__init__(name)
        self.function = function
        self.parameters = tuple(parameters)

    def prepare(self, direction: str, x: Tensor, grad: Tensor) -> Call:
        if direction == FORWARD:
            return partial(self._forward, x)
        if direction == BOTH:
            return partial(self._both, x, grad)
        # The graph is kept, because the call is repeated, and a CUDA graph of it reads what the forward saved.
        return partial(torch.autograd.grad, self.function(x), (x, *self.parameters), grad, retain_graph=True)

    @torch.no_grad()
    def _forward(self, x: Tensor) -> Sequence[Tensor]:
        return (self.function(x),)

    def _both(self, x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        y = self.function(x)
        return (y, *torch.autograd.grad(y, (x, *self.parameters), grad))
