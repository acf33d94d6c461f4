"""Shapes, their tensors, and what computes attention pooling of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from daam_kernels import attention_pool, reference

OURS = "daam_kernels"
_MOST_COMPILED = 16  # ragged bags, which the compiler sees one by one


class Shape(NamedTuple):
    """``lengths``: of the bags; all the same, x is [bags, rows, embed_dim], else packed [total, embed_dim]."""

    name: str
    lengths: tuple[int, ...]
    embed_dim: int
    hops: int = 1
    hidden: int | None = None  # None: dot scores
    gated: bool = False

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def score(self) -> str:
        return "dot" if self.hidden is None else "gated" if self.gated else "additive"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", (50,) * 16, 64),
        Shape("tiny ragged", (900, 10, 300, 1), 64, hidden=32, gated=True),
        Shape("sentences", (64,) * 256, 600, hops=30, hidden=350),  # arXiv 1703.03130
        Shape("seeds", (4096,) * 8, 512, hops=8),  # one hop of eight heads
        Shape("long", (100_000,), 512),
        Shape("slides", (10_000, 20_000, 40_000, 90_000), 512, hidden=128, gated=True),  # arXiv 1802.04712
        Shape("skewed", (20_000, *(50,) * 100), 64),  # padded, it is 80 times as much
    )
}


class Case(NamedTuple):
    """The tensors of a shape: x, the scorer's, and the context's gradient."""

    shape: Shape
    x: Tensor
    parameters: tuple[Tensor, ...]  # query, key_weight, key_bias, gate_weight, gate_bias; the first ones of them
    cu_seqlens: Tensor
    grad: Tensor

    @property
    def scale(self) -> float:
        return self.shape.embed_dim**-0.5 if self.shape.hidden is None else 1.0

    @property
    def scorer(self) -> reference.Scorer:
        missing = (None,) * (5 - len(self.parameters))
        return reference.Scorer(*self.parameters, *missing, self.scale)


Call = Callable[[Tensor, "tuple[Tensor, ...]"], Tensor]  # context of x and the parameters


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """x, grad and the parameters ~ N(0, 1), matrices over the square root of their columns."""
    rng = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng).to(device, dtype)

    bags, total = len(shape.lengths), sum(shape.lengths)
    x = normal(total, shape.embed_dim) if shape.ragged else normal(bags, shape.lengths[0], shape.embed_dim)
    parameters = [normal(shape.hops, shape.hidden or shape.embed_dim)]
    for _ in range(0 if shape.hidden is None else 1 + shape.gated):
        parameters += [normal(shape.hidden, shape.embed_dim) / shape.embed_dim**0.5, normal(shape.hidden)]
    ends = torch.nn.functional.pad(torch.tensor(shape.lengths).cumsum(0), (1, 0)).to(device)
    grad = normal(bags, shape.hops, shape.embed_dim)
    return Case(shape, x.requires_grad_(), tuple(p.requires_grad_() for p in parameters), ends, grad)


def contenders(case: Case) -> dict[str, Call]:
    """By name; of ragged bags the padded form has to make the padding, and the one that goes bag by bag does not."""
    shape = case.shape
    found: dict[str, Call] = {}
    if shape.ragged:
        found["bag by bag"] = lambda x, p: torch.cat([_formula(part[None], p, case) for part in x.split(shape.lengths)])
        found["padded"] = lambda x, p: _padded(x, p, case)
    else:
        found["eager"] = lambda x, p: _formula(x, p, case)
    name, plain = list(found.items())[-1]
    if not shape.ragged or len(shape.lengths) <= _MOST_COMPILED:
        found[f"{name}, compiled"] = torch.compile(plain, dynamic=False)
    cu_seqlens = case.cu_seqlens if shape.ragged else None
    found[OURS] = lambda x, p: attention_pool(x, *p, cu_seqlens=cu_seqlens, scale=case.scale)
    return found


def _scores(x: Tensor, parameters: tuple[Tensor, ...], case: Case) -> Tensor:
    query, *layers = parameters
    phi = x
    if layers:
        phi = torch.nn.functional.linear(x, *layers[:2]).tanh()
    if layers[2:]:
        phi = phi * torch.nn.functional.linear(x, *layers[2:]).sigmoid()
    return (phi @ (case.scale * query).T).mT


def _formula(x: Tensor, parameters: tuple[Tensor, ...], case: Case) -> Tensor:
    return _scores(x, parameters, case).softmax(-1) @ x


def _padded(x: Tensor, parameters: tuple[Tensor, ...], case: Case) -> Tensor:
    valid = torch.arange(max(case.shape.lengths), device=x.device) < case.cu_seqlens.diff()[:, None]
    padded = x.new_zeros((*valid.shape, x.shape[1]))
    padded[valid] = x
    scores = _scores(padded, parameters, case).masked_fill(~valid.unsqueeze(1), -torch.inf)
    return scores.softmax(-1) @ padded


def truth(case: Case) -> list[Tensor]:
    """(context, dx, gradients of the parameters) in float64, bag by bag."""
    shape = case.shape
    x = case.x.detach().flatten(0, -2).split(shape.lengths)
    scorer = case.scorer.to(torch.float64)
    tensors = [t.detach().requires_grad_() for t in scorer.tensors if t is not None]
    contexts, gradients, sums = [], [], [torch.zeros_like(t) for t in tensors]
    for rows, grad in zip(x, case.grad.double()):
        rows = rows.double().requires_grad_()
        missing = (None,) * (5 - len(tensors))
        context, _ = reference.attention_pool(rows[None], reference.Scorer(*tensors, *missing, case.scale))
        dx, *of_tensors = torch.autograd.grad(context, (rows, *tensors), grad[None])
        contexts.append(context.detach())
        gradients.append(dx)
        sums = [total + gradient for total, gradient in zip(sums, of_tensors)]
    return [torch.cat(contexts), torch.cat(gradients).view(case.x.shape), *sums]
