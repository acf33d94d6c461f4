"""What the tests of attention pooling share: problems with every kind of padding, results, and their truth."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from support import BACKENDS, TOLERANCES, assert_close, generator
from torch import Tensor

import daam_kernels
from daam_kernels import reference

POOL_BACKENDS = tuple(
    name for name in BACKENDS
    if name == "reference" or name == "triton" and find_spec("daam_kernels.kernels.attention_pool")
)  # fmt: skip
SCORES = ("dot", "additive", "gated")


class Problem(NamedTuple):
    """x, the scorer's tensors (query, key_weight, ...), the keywords that say what is padding, and both gradients."""

    x: Tensor
    tensors: tuple[Tensor | None, ...]
    bags: dict
    grad: Tensor  # of the context
    grad_weights: Tensor


def tensors_of(score: str, embed_dim: int, hops: int, hidden: int, dtype=torch.float64, device="cpu"):
    rng = generator(1)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)

    if score == "dot":
        return normal(hops, embed_dim), None, None, None, None
    layers = [(normal(hidden, embed_dim) / embed_dim**0.5, normal(hidden)) for _ in range(2)]
    return normal(hops, hidden), *layers[0], *(layers[1] if score == "gated" else (None, None))


def problem(
    score="dot", kind="dense", dtype=torch.float64, device="cpu", lengths=(9, 0, 14, 3), embed_dim=8, hops=3, hidden=5,
    mean=0.0,
) -> Problem:  # fmt: skip
    """Bags of these lengths: "dense" as lengths and a mask with holes; "packed"; "full", without padding."""
    rng, bags, rows = generator(), len(lengths), max(lengths)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    counts, total = torch.tensor(lengths), sum(lengths)
    parameters = tensors_of(score, embed_dim, hops, hidden, torch.promote_types(dtype, torch.float32), device)
    if kind == "packed":
        shape, weights, keywords = (total,), (total, hops), {"cu_seqlens": offsets(counts).int()}
    else:
        shape, weights, keywords = (bags, rows), (bags, hops, rows), {}
    x = normal(*shape, embed_dim) + mean
    if kind != "full":
        holes = torch.rand(shape, generator=rng) < 0.2
        keywords["key_padding_mask"] = holes
        x[holes] = torch.nan  # what is padding is not looked at
    if kind == "dense":
        keywords["lengths"] = counts
        x[torch.arange(rows) >= counts[:, None]] = torch.nan
    keywords = {name: t.to(device) for name, t in keywords.items()}
    x, grad, grad_weights = (t.to(device, dtype) for t in (x, normal(bags, hops, embed_dim), normal(*weights)))
    return Problem(x, parameters, keywords, grad, grad_weights)


def offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def evaluate(p: Problem, backend: str, **options) -> tuple[Tensor, ...]:
    """(context, weights, dx, gradients of the scorer's tensors)."""
    inputs = [t.detach().requires_grad_() for t in (p.x, *p.tensors) if t is not None]
    context, weights = daam_kernels.attention_pool(*inputs, **p.bags, need_weights=True, backend=backend, **options)
    return context, weights, *torch.autograd.grad((context, weights), inputs, (p.grad, p.grad_weights))


def truth(p: Problem, keep: Tensor | None = None, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """The same of the plain formulas in float64, on the CPU."""
    x, *tensors, grad, grad_weights = (
        None if t is None else t.detach().cpu().double() for t in (p.x, *p.tensors, p.grad, p.grad_weights)
    )
    inputs = [t.requires_grad_() for t in (x, *tensors) if t is not None]
    scale = 1.0 if p.tensors[1] is not None else x.shape[-1] ** -0.5
    scorer, bags = reference.Scorer(*tensors, scale), {name: t.cpu() for name, t in p.bags.items()}
    mask = bags.get("key_padding_mask")
    valid = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else ~mask
    options = dict(keep=keep, dropout_p=dropout_p)
    if "cu_seqlens" in bags:
        context, weights = reference.ragged_attention_pool(x, bags["cu_seqlens"], scorer, valid=valid, **options)
        weights = weights.T
    else:
        if "lengths" in bags:
            valid = valid & (torch.arange(x.shape[1]) < bags["lengths"][:, None])
        context, weights = reference.attention_pool(x, scorer, valid=valid, **options)
    return context, weights, *torch.autograd.grad((context, weights), inputs, (grad, grad_weights))


def assert_contract(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    output, dx, parameters = TOLERANCES[dtype]
    tolerances = output, output, dx, *[parameters] * (len(expected) - 3)
    names = "context", "weights", "dx", "dquery", "dkey_weight", "dkey_bias", "dgate_weight", "dgate_bias"
    assert len(got) == len(expected)
    for name, result, exact, tolerance in zip(names, got, expected, tolerances):
        assert_close(result, exact, tolerance, name)


def check(p: Problem, backend: str, **options) -> tuple[Tensor, ...]:
    got = evaluate(p, backend, **options)
    assert_contract(got, truth(p), p.x.dtype)
    return got
