"""The first generation of the public code: heads that are a mixture of Gaussians, one or many of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules.daam import PARAMETERS
from ..modules.gaam import FusedMultiHeadGAAM
from .product import Heads, heads_of, sampled
from .recognition import Skip


class MixtureHeads(Heads):
    """``GaussianAdaptiveAttention`` and ``MultiHeadGaussianAdaptiveAttention`` with ``weights``, learned or given.

    Learned weights are a parameter of a head; given ones, the shares, are a tensor that is only an attribute.
    """

    attributes = {"norm_axis", "num_gaussians", "padding_value", "eps"}
    buffers = frozenset({"shares"})  # ours

    def __init__(self, role: str, learned: bool) -> None:
        super().__init__(role)
        self.learned = learned
        self.parameters = (*PARAMETERS, "weights") if learned else PARAMETERS

    def fits_head(self, head):
        return super().fits_head(head) and (self.learned or isinstance(vars(head).get("weights"), Tensor))

    def fits(self, module):
        return super().fits(module) and bool(heads_of(module)) and all(map(self.fits_head, heads_of(module)))

    def make(self, module, heads):
        learnable_weights = True if self.learned else heads[0].weights
        if not self.learned:
            if any(head.weights.requires_grad for head in heads):
                raise Skip("its weights are no parameter, and require a gradient")
            if any(not _same(head.weights, learnable_weights) for head in heads):
                raise Skip("its heads have different shares as their weights")
        new = FusedMultiHeadGAAM(
            module.norm_axis, len(heads), heads[0].num_gaussians,
            getattr(module, "initial_variance", 2),  # what the widths started from; a head alone does not keep it
            learnable_weights, heads[0].padding_value, [head.eps for head in heads], device="meta",
        )  # fmt: skip
        if not self.learned:
            # Whose type says how exactly they are worked with: never less than the other parameters are.
            dtype = torch.promote_types(learnable_weights.dtype, heads[0].c.dtype)
            new.shares = torch.stack([head.weights.to(dtype) for head in heads])
        return new

    def restore(self, fused, module, context):
        super().restore(fused, module, context)
        if not self.learned:
            for head, shares in zip(heads_of(module), fused.shares):
                head.weights = shares.clone()
        return module

    def note(self, module):
        if len(heads_of(module)) == 1:
            return ""
        return "where the heads do not divide the axis, the last one takes the remainder, which the original leaves out"

    def sample(self, trial, twin):
        heads = heads_of(trial)
        for head in heads:
            if isinstance(vars(head).get("device"), torch.device):
                head.device = torch.device("cpu")  # where the original moves its input
            if not self.learned:
                head.weights = head.weights.double().cpu()
        if not self.learned:
            twin.shares = torch.stack([head.weights for head in heads])
        yield from sampled(trial, twin, heads, [twin], details=False, remainder=0)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.device == other.device and torch.equal(one, other))
