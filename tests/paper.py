"""The formulas of the paper's attentions, written out head by head, and their inputs, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VARIANTS = ("paper", "gqa")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with every parameter drawn, so that none is 0 or 1 by chance of its initialisation."""
    rng = torch.Generator().manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
            if parameter.dim() > 1:
                parameter.div_(parameter[0].numel() ** 0.5)
            if name.endswith(".c") or name == "norm.weight":
                parameter.exp_()
    return module


def linear(state: dict, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"])
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def written_out(
    state: dict, query_heads: int, kv_heads: int, variant: str, query: Tensor, key: Tensor, value: Tensor, mask=None
) -> tuple[Tensor, Tensor]:
    """(output, weights) by the formulas; ``mask`` [batch, heads, query, key] is added to the scores."""
    q, k, v = (linear(state, f"{name}_proj", t) for name, t in (("q", query), ("k", key), ("v", value)))
    head_dim = q.shape[-1] // query_heads
    q, k, v = (t.split(head_dim, -1) for t in (q, k, v))
    group = query_heads // kv_heads
    if variant == "paper":
        q = [torch.stack(q[head * group : head * group + group]).sum(0) for head in range(kv_heads)]
        scale, group = 1 / head_dim, 1
    else:
        scale = 1 / head_dim**0.5
    outputs, weights = [], []
    for head, q_head in enumerate(q):
        scores = scale * torch.einsum("bnd,bsd->bns", q_head, k[head // group])
        if mask is not None:
            scores = scores + mask[:, head]
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
        weights.append(exponentials / exponentials.sum(-1, keepdim=True))
        outputs.append(torch.einsum("bns,bsd->bnd", weights[-1], v[head // group]))
    y = torch.cat(outputs, -1)
    if "norm.weight" in state:
        d = y - y.mean(-1, keepdim=True)
        y = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
    return linear(state, "out_proj", y), torch.stack(weights, 1)


def feature_density(x: Tensor, offset: Tensor, c: Tensor) -> Tensor:
    """Algorithm 1 of the paper over the layers of x [batch, layers, features]: the weights, one Gaussian a feature."""
    mean = x.mean(1, keepdim=True)
    var = (x.square().mean(1, keepdim=True) - mean.square()).abs() + 1e-8
    return torch.exp(-((x - mean - offset) ** 2) / (2 * c * (var + 1e-5)))


class FeatureDensities(nn.Module):
    """The density attention of the paper's GQDAAM, with its names of parameters: heads split the layers."""

    def __init__(self, feature_size: int, num_heads: int = 8, name: str = "gcts", device=None) -> None:
        super().__init__()
        self.name = name
        heads = [
            nn.ParameterDict({n: torch.ones(1, feature_size, device=device) for n in ("c", "mean_offset")})
            for _ in range(num_heads)
        ]
        setattr(self, name, nn.ModuleList(heads))

    def forward(self, x: Tensor, return_attention_details: bool = False):
        heads = getattr(self, self.name)
        chunks = zip(x.chunk(len(heads), 1), heads)
        weights = torch.cat([feature_density(part, head["mean_offset"], head["c"]) for part, head in chunks], 1)
        return (x * weights, weights.detach()) if return_attention_details else x * weights
