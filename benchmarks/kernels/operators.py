"""What the family's operators differ in, for the benchmark: parameters, the plain form, the fused form, the peers.

A form is a function of x alone and the parameters that it is differentiable in, one after the other in the order of
:attr:`Case.parameters`, each whole or as a list of tensors that fill it.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor, nn

import daam_kernels
from daam_kernels import reference

from .shapes import Case, Normal, Shape


class Form(NamedTuple):
    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()


class Operator:
    """One of the family.

    Attributes:
        density: as :func:`daam_kernels.density_attention` calls it.
        variants: the ways in which daam_kernels computes it, the one that users get first, ``""``.
        has_upstream: whether the public package computes it.
    """

    density = "product"
    variants = ("",)
    has_upstream = False

    def parameters(self, shape: Shape, num_gaussians: int, normal: Normal) -> dict[str, Tensor]:
        """Their values by name, float32."""
        raise NotImplementedError

    def reference(self, shape: Shape, x: Tensor, *parameters: Tensor) -> Tensor:
        """y in plain PyTorch, in x's type."""
        raise NotImplementedError

    def truth(self, shape: Shape, x: Tensor, grad: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """(y, dx, gradients of the parameters) of float64 tensors."""
        inputs = [t.detach().requires_grad_() for t in (x, *parameters)]
        with torch.enable_grad():
            y = self.reference(shape, *inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, grad)

    def parts(self, shape: Shape, rows: int) -> int | list[int]:
        """Rows of axis 0 that can be computed apart from the others: ``rows``, where there is a choice."""
        return rows

    def fused(self, case: Case, variant: str) -> Form:
        """The form of daam_kernels that is called ``variant``."""
        raise NotImplementedError

    def upstream(self, case: Case) -> Form:
        """The public package's form."""
        raise NotImplementedError


class Product(Operator):
    has_upstream = True

    def parameters(self, shape, num_gaussians, normal):
        heads = (shape.layers * shape.num_heads, num_gaussians)
        return {"mean_offsets": 0.05 * normal(*heads), "c": normal(*heads).exp()}

    def reference(self, shape, x, mean_offsets, c):
        return reference.density_attention(x, mean_offsets, c, norm_axis=shape.norm_axis)

    def truth(self, shape, x, grad, *parameters):
        y = self.reference(shape, x, *parameters)
        return y, *reference.density_attention_backward(grad, x, *parameters, norm_axis=shape.norm_axis)

    def fused(self, case, variant):
        mean_offsets, c = parameters = leaves(case)
        axis = case.shape.norm_axis
        return Form(lambda x: daam_kernels.density_attention(x, mean_offsets, c, norm_axis=axis), parameters)

    def upstream(self, case):
        from gaussian_adaptive_attention import MultiHeadGaussianAdaptiveAttention

        module = MultiHeadGaussianAdaptiveAttention(case.shape.norm_axis, *case.c.shape)
        return _upstream(module, list(module.attention_heads), case)


class Mixture(Operator):
    density = "mixture"

    def parameters(self, shape, num_gaussians, normal):
        heads = (shape.num_heads, num_gaussians)
        return {"mean_offsets": 0.05 * normal(*heads), "c": normal(*heads).exp(), "weights": normal(*heads)}

    def reference(self, shape, x, mean_offsets, c, weights):
        log_shares = weights.log_softmax(1)
        return reference.density_attention(
            x, mean_offsets, c, density="mixture", log_shares=log_shares, norm_axis=shape.norm_axis
        )

    def fused(self, case, variant):
        mean_offsets, c, weights = parameters = leaves(case)
        options = dict(density="mixture", weights=weights, norm_axis=case.shape.norm_axis)
        return Form(lambda x: daam_kernels.density_attention(x, mean_offsets, c, **options), parameters)


class Block(Product):
    """Layers of y = x + attention(x); the heads of all layers, one after the other, are the rows of the parameters."""

    variants = ("", "layer by layer")

    def reference(self, shape, x, mean_offsets, c):
        for one in zip(mean_offsets.chunk(shape.layers), c.chunk(shape.layers)):
            x = reference.density_attention(x, *one, norm_axis=shape.norm_axis, residual=True)
        return x

    truth = Operator.truth

    def fused(self, case, variant):
        shape = case.shape
        num_gaussians = case.c.shape[1]
        block = daam_kernels.FusedDensityBlock(*self._layers(shape, num_gaussians), device=case.x.device)
        offsets, widths = (t.chunk(shape.layers) for t in (case.mean_offsets, case.c))
        for layer, *values in zip(block.layers, offsets, widths):
            layer.mean_offsets.data, layer.c.data = (value.clone() for value in values)
        own = [*(layer.mean_offsets for layer in block.layers), *(layer.c for layer in block.layers)]

        def layer_by_layer(x: Tensor) -> Tensor:
            for layer in block.layers:
                x = layer(x, residual=True)
            return x

        return Form(layer_by_layer if variant else block, own)

    def upstream(self, case):
        from gaussian_adaptive_attention import GaussianBlock

        block = GaussianBlock(*self._layers(case.shape, case.c.shape[1]))
        return _upstream(block, [head for layer in block.layers for head in layer.attention_heads], case)

    @staticmethod
    def _layers(shape: Shape, num_gaussians: int) -> tuple:
        count = shape.layers
        return [shape.norm_axis] * count, [shape.num_heads] * count, [num_gaussians] * count, count


class Ragged(Product):
    """The product of sequences that are packed along axis 0, each normalised by itself."""

    variants = ("", "one by one")
    has_upstream = False

    def reference(self, shape, x, mean_offsets, c):
        one = super().reference
        return torch.cat([one(shape, part, mean_offsets, c) for part in x.split(_cut(shape.sequences, len(x)))])

    def truth(self, shape, x, grad, *parameters):
        y = super().reference(shape, x, *parameters)  # of the one sequence that a part is
        return y, *reference.density_attention_backward(grad, x, *parameters, norm_axis=0)

    def parts(self, shape, rows):
        return list(shape.sequences)

    def fused(self, case, variant):
        mean_offsets, c = parameters = leaves(case)
        lengths = case.shape.sequences
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=case.x.device)

        def packed(x: Tensor) -> Tensor:
            return daam_kernels.density_attention(
                x, mean_offsets, c, norm_axis=0, cu_seqlens=bounds, max_seqlen=max(lengths)
            )

        def one_by_one(x: Tensor) -> Tensor:
            return torch.cat(
                [daam_kernels.density_attention(part, mean_offsets, c, norm_axis=0) for part in x.split(lengths)]
            )

        return Form(one_by_one if variant else packed, parameters)


class Gate(Operator):
    density = "gate"

    def parameters(self, shape, num_gaussians, normal):
        channels = shape.dims[1]
        return {
            "weight": normal(1, channels, 1) / math.sqrt(channels), "bias": normal(1),
            "mean_offsets": 0.05 * normal(num_gaussians), "log_sigma": normal(num_gaussians), "alpha": normal(),
        }  # fmt: skip

    def reference(self, shape, x, *parameters):
        return reference.density_gate(x, *parameters)[0]

    def fused(self, case, variant):
        gate = daam_kernels.FusedDensityGate(case.shape.dims[1], len(case.parameters["log_sigma"]))
        gate.to(case.x.device)
        own = [gate.to_attn.weight, gate.to_attn.bias, gate.gaa["mean_offsets"], gate.gaa["log_sigma"], gate.alpha]
        for parameter, value in zip(own, case.parameters.values()):
            parameter.data = value.clone()
        return Form(lambda x: gate(x)[0], own)


OPERATORS: dict[str, Operator] = {
    "product": Product(), "mixture": Mixture(), "block": Block(), "ragged": Ragged(), "gate": Gate(),
}  # fmt: skip


def leaves(case: Case) -> list[Tensor]:
    """The parameters as leaves of a graph of their own."""
    return [parameter.clone().requires_grad_() for parameter in case.parameters.values()]


def _cut(lengths: Sequence[int], total: int) -> list[int]:
    """The first of the lengths that make ``total``, the last one shortened."""
    starts = accumulate(lengths, initial=0)
    return [min(length, total - start) for start, length in zip(starts, lengths) if start < total]


def _upstream(module: nn.Module, heads: list[nn.Module], case: Case) -> Form:
    """The public package's module with the parameters of the case, a row for every head."""
    module.to(case.x.device)
    for head, offsets, c in zip(heads, case.mean_offsets, case.c, strict=True):
        # .data, because float64 parameters must replace float32 ones
        head.mean_offsets.data, head.c.data = offsets.clone(), c.clone()
    return Form(module, [*(head.mean_offsets for head in heads), *(head.c for head in heads)])
