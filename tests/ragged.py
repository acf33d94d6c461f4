"""What the tests of packed sequences share: lengths, and the truth, sequence by sequence."""

from __future__ import annotations

from itertools import accumulate

import mixture
import support
import torch
from torch import Tensor

LENGTHS = (9, 4, 15, 5)  # a remainder for the last head, none, the longest, and short at the end


def packed(lengths=LENGTHS, dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=device)


def rows(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(*pair) for pair in zip(bounds, bounds[1:])]


def inputs(features=(3,), lengths=LENGTHS, dtype=torch.float64, device="cpu", density="product", mean=1.0, heads=2):
    """(x, grad, cu_seqlens, parameters, what names the density), x of shape [total, *features]."""
    rng = support.generator()
    cu_seqlens = packed(lengths, device=device)
    shape = (sum(lengths), *features)
    x, grad = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    options = dict(offsets=0.05, dtype=torch.promote_types(dtype, torch.float32), device=device)
    if density == "mixture":
        parameters = mixture.mixture(heads, 2, rng, **options)
    else:
        parameters = support.gaussians(heads, 3, rng, **options)
    return (x + mean).to(device, dtype), grad.to(device, dtype), cu_seqlens, parameters


def tests_of(parameters):
    """The module whose evaluate, truth and assert_contract take these parameters."""
    return support if len(parameters) == 2 else mixture


def truth(x, cu_seqlens, parameters, grad, *, mask=None, **options):
    """(y, dx, gradients of the parameters): every sequence by itself, in extended precision or in float64."""
    mask = None if mask is None else mask.expand(x.shape)
    each = [
        tests_of(parameters).truth(
            x[part], *parameters, grad[part], norm_axis=0, mask=None if mask is None else mask[part], **options
        )
        for part in rows(cu_seqlens)
    ]
    y, dx, *gradients = zip(*each)
    return torch.cat(y), torch.cat(dx), *(sum(gradient) for gradient in gradients)


def check(backend, x, grad, cu_seqlens, parameters, **options):
    """y and all gradients of a backend are within the contract of x's type."""
    case = tests_of(parameters)
    sequences = dict(norm_axis=0, cu_seqlens=cu_seqlens, max_seqlen=options.pop("max_seqlen", None))
    got = case.evaluate(backend, x, *parameters, grad, **sequences, **options)
    case.assert_contract(got, truth(x, cu_seqlens, parameters, grad, **options), x.dtype, str(options))
    return got
