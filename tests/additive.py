"""What the tests of additive attention share: problems, the float64 truth, what a backend gives."""

from __future__ import annotations

import daam_kernels
import torch
from daam_kernels import reference
from daam_kernels.ops import additive_attention as operator
from daam_kernels.options import AdditiveProblem
from support import TOLERANCES, assert_close, generator, relative_error

NAMES = ("output", "weights", "dquery", "dkey", "dvalue", "dweight", "dattn_mask")


def problem(shape=(2, 2, 5, 7), hidden=3, value_dim=4, dtype=torch.float64, device="cpu", seed=0):
    """(query, key, value, weight, output's incoming gradient, the weights') for shape [batch, heads, Tq, Tk]."""
    rng = generator(seed)
    batch, heads, queries, keys = shape
    sizes = [
        *((batch, heads, queries, hidden), (batch, heads, keys, hidden), (batch, heads, keys, value_dim)),
        *((heads, hidden), (batch, heads, queries, value_dim), shape),
    ]
    tensors = [torch.randn(s, generator=rng, dtype=torch.float64).to(device) for s in sizes]
    parameter = tensors[3].to(torch.promote_types(dtype, torch.float32))
    return *(t.to(dtype) for t in tensors[:3]), parameter, *(t.to(dtype) for t in tensors[4:])


def masks(kind, shape, device="cpu"):
    """Named arguments; each kind forbids some query of the first batch every key, but for None and "causal"."""
    batch, heads, queries, keys = shape
    rng = generator(5)
    boolean = torch.rand(queries, keys, generator=rng) < 0.3
    boolean[-1] = True
    padding = torch.rand(batch, keys, generator=rng) < 0.3
    padding[0] = True
    added = torch.randn(heads, queries, keys, generator=rng, dtype=torch.float64)
    found = {
        None: {},
        "causal": dict(is_causal=True),
        "boolean": dict(attn_mask=boolean),
        "added": dict(attn_mask=added.masked_fill(boolean, -torch.inf)),
        "padding": dict(key_padding_mask=padding),
        "all": dict(attn_mask=added, key_padding_mask=padding, is_causal=True),
    }[kind]
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in found.items()}


def results(function, query, key, value, weight, grad, grad_weights, attn_mask=None, **options):
    """(output, weights, their gradients' gradients in NAMES' order), the last one where a mask is added."""
    tensors = [t.detach().clone().requires_grad_() for t in (query, key, value, weight)]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.detach().clone().requires_grad_()
        tensors.append(attn_mask)
    found = function(*tensors[:4], attn_mask=attn_mask, need_weights=True, **options)
    return *(t.detach() for t in found), *torch.autograd.grad(found, tensors, (grad, grad_weights))


def exact(query, key, value, weight, grad, grad_weights, **options):
    """The reference's results in float64, on the CPU."""
    tensors = (t.double().cpu() for t in (query, key, value, weight, grad, grad_weights))
    options = {
        name: (v.double() if v.is_floating_point() else v).cpu() if torch.is_tensor(v) else v
        for name, v in options.items()
    }
    return results(reference.additive_attention, *tensors, **options)


def seeded(backend, seed, dropout_p, need_weights=True):
    """The operator with a seed of its own for dropout, called as the reference is."""

    def function(query, key, value, weight, *, attn_mask=None, key_padding_mask=None, is_causal=False, need_weights):
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        tensors = query, key, value, weight, attn_mask, key_padding_mask, seed.to(query.device)
        options = is_causal, dropout_p, 1.0, False, need_weights, False
        return operator.apply(AdditiveProblem(*tensors, *options), backend)

    return function


def public(backend, **options):
    return lambda *tensors, **more: daam_kernels.additive_attention(*tensors, backend=backend, **options, **more)


def check_average(backend, dtype, device="cpu"):
    """The mean of the weights over three heads, and the gradients that go through it."""
    shape = 2, 3, 5, 7
    *tensors, grad_weights = problem(shape, dtype=dtype, device=device)
    tensors, options = (*tensors, grad_weights[:, 0]), masks("all", shape, device)

    def averaged(*tensors, need_weights, **options):
        output, weights = reference.additive_attention(*tensors, need_weights=True, **options)
        return output, weights.mean(1)

    expected = results(averaged, *(t.double().cpu() for t in tensors), **masks("all", shape))
    assert_contract(results(public(backend, average_weights=True), *tensors, **options), expected, dtype)


def assert_contract(got, expected, dtype, moved=()):
    """Output and weights within the tolerance of y, gradients of what has queries or keys of dx, weight's its own.

    Of a problem that nobody chose a sum may cancel by accident. ``moved`` are its truths where the inputs are rounded:
    four times as far as they are from ``expected`` is allowed.
    """
    y, dx, parameters = TOLERANCES[dtype]
    tolerances = dict(zip(NAMES, (y, y, dx, dx, dx, parameters, parameters)))
    for index, (name, g, e) in enumerate(zip(NAMES, got, expected, strict=False)):
        assert torch.isfinite(g).all(), name
        assert_close(g, e, max([tolerances[name], *(4 * relative_error(m[index], e) for m in moved)]), name)
    assert len(got) == len(expected)
