"""The learned densities of a module, head by head, as curves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules.daam import DensityAttention
from ..reference.gate import gate_widths


class Head(NamedTuple):
    """The Gaussians of one head in standard deviations from the mean; tensors [num_gaussians], float64."""

    name: str
    centers: Tensor
    widths: Tensor
    shares: Tensor | None  # of a mixture; None: a product

    @property
    def kind(self) -> str:
        return "product" if self.shares is None else "mixture"

    def span(self) -> tuple[float, float]:
        """What to show: where data are, and the middle of every Gaussian."""
        margin = (3 * self.widths).clamp(max=4)
        return min(-4.0, (self.centers - margin).min().item()), max(4.0, (self.centers + margin).max().item())

    def positions(self, low: float, high: float) -> Tensor:
        """Where to draw: evenly, and closer around what is narrow."""
        centers, widths = self.centers, self.widths
        if self.shares is None:
            center, width = self.product()
            centers, widths = torch.cat([centers, center[None]]), torch.cat([widths, width[None]])
        near = centers[:, None] + widths[:, None] * torch.linspace(-4, 4, 81, dtype=torch.float64)
        everywhere = torch.linspace(low, high, 401, dtype=torch.float64)
        return torch.cat([everywhere, near.flatten().clamp(low, high)]).unique()

    def product(self) -> tuple[Tensor, Tensor]:
        """Centre and width of the product, which is a Gaussian as well."""
        inverse = self.widths.pow(-2)
        return (self.centers * inverse).sum() / inverse.sum(), inverse.sum().rsqrt()

    def curves(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The density [positions], its peak 1, and the Gaussians [num_gaussians, positions] on the scale of a share."""
        logs = -0.5 * ((positions - self.centers[:, None]) / self.widths[:, None]).square()
        if self.shares is None:
            total = logs.sum(0)  # of many Gaussians far apart the product itself underflows
            return (total - total.max()).exp(), logs.exp()
        parts = self.shares[:, None] * logs.exp()
        total = parts.sum(0)
        return total / total.max(), parts / total.max()


def parts_with_gaussians(module: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    parts = [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(getattr(part, "mean_offsets", None), Tensor)
        and any(isinstance(getattr(part, parameter, None), Tensor) for parameter in ("c", "log_sigma"))
    ]
    if not parts:
        raise ValueError(
            "module must have mean_offsets and c, or log_sigma as a gate has, or contain modules that do, "
            f"got {type(module).__name__}"
        )
    return parts


def _gaussians(part: nn.Module) -> dict[str, Any]:
    """The Gaussians as density_attention takes them; of other classes by attribute, where weights make a mixture."""
    if isinstance(part, DensityAttention):
        return part.gaussians()
    if isinstance(getattr(part, "log_sigma", None), Tensor):
        widths, log_shares = gate_widths(torch.atleast_2d(part.log_sigma.detach().double()))
        shares = dict(weights=log_shares.exp(), weights_softmax=False)
        return dict(mean_offsets=part.mean_offsets, c=widths, density="mixture", **shares)
    names = ("mean_offsets", "c", "density", "weights", "weights_softmax")
    found = {name: getattr(part, name) for name in names if hasattr(part, name)}
    return {"density": "mixture" if "weights" in found else "product"} | found


def heads_of(name: str, part: nn.Module, rstd: float) -> list[Head]:
    """The heads of one module; those of the public package, [num_gaussians], are one head each."""
    gaussians = _gaussians(part)
    density, weights = gaussians.get("density", "product"), gaussians.get("weights")
    if density not in ("product", "mixture"):
        raise ValueError(f"density of {name or 'module'!r} must be 'product' or 'mixture' to be drawn, got {density!r}")
    offsets, c = (torch.atleast_2d(gaussians[each].detach().cpu().double()) for each in ("mean_offsets", "c"))
    if offsets.shape != c.shape or c.dim() != 2 or c.shape[1] != getattr(part, "num_gaussians", c.shape[1]):
        raise ValueError(
            f"mean_offsets and c of {name or 'module'!r} must have shape [num_heads, num_gaussians], "
            f"got {list(gaussians['mean_offsets'].shape)} and {list(gaussians['c'].shape)}"
        )
    shares = [None] * len(c)
    if density == "mixture":
        if not isinstance(weights, Tensor):
            raise ValueError(f"weights of {name or 'module'!r}, a mixture, must be a tensor, got {weights!r}")
        weights = weights.detach().cpu().double().expand_as(c)
        shares = weights.softmax(1) if gaussians.get("weights_softmax", True) else weights
    heads = []
    for index, values in enumerate(zip(offsets * rstd, c.abs(), shares), 1):
        title = f"{name}, head {index}" if name else f"head {index}"
        head = Head(title, *values)
        if head.shares is None:
            center, width = (value.item() for value in head.product())
            centered = f"{round(center, 2) + 0.0:.2f}".replace("-", "−")
            head = head._replace(name=f"{title}\ncentre {centered}, width {width:.2g}")
        heads.append(head)
    return heads
