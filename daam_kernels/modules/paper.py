"""The paper's grouped-query density adaptive attention (GQDAAM), and the decoder of its experiments.

Source: Ioannides et al., arXiv 2401.11143, and its public code, whose names of parameters are kept, so that its
checkpoints load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_choice, check_count, check_dense
from .daam import FusedMultiHeadDAAM
from .feature import FusedMultiHeadFeatureDAAM
from .grouped_query import GroupedQueryAttention, check_masks

_DENSITY_NAMES = ("daam", "gct")  # what the public code calls its density attention


class GroupedQueryDAAM(nn.Module):
    """GQDAAM: density adaptive attention, then grouped-query attention of what it leaves.

    Source: arXiv 2401.11143 and its public code, which weighs the layers of an encoder, [batch, num_layers,
    feature_size], by their density, projects the features to embed_dim, and lets the layers attend to each other.

    Args:
        embed_dim, query_heads, kv_heads, variant, dropout, bias, layer_norm, layer_norm_eps, gamma_init: as in
            :class:`GroupedQueryAttention`.
        daam: the density attention, any module that maps [batch, length, input_dim] to the same shape and takes
            ``return_attention_details`` and ``mask`` as :class:`FusedMultiHeadDAAM` does, where these are used. None:
            ``FusedMultiHeadDAAM(norm_axis=-2, num_heads=8, num_gaussians=4)``, which needs a length of at least 16.
            The public code's is per feature (Algorithm 1); its checkpoints need such a module here.
        input_dim: features of x, which a linear layer then projects to embed_dim. None: embed_dim, and no such layer.

    Submodules: ``daam``, ``embed_transform`` (None without ``input_dim``) and ``gqa``, as in the public code, whose
    checkpoints may also call the first one ``gct``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        embed_dim: int,
        query_heads: int = 8,
        kv_heads: int = 2,
        *,
        daam: nn.Module | None = None,
        input_dim: int | None = None,
        variant: str = "paper",
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool | None = None,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = dict(device=device, dtype=dtype)
        if daam is None:
            daam = FusedMultiHeadDAAM(norm_axis=-2, num_heads=8, num_gaussians=4, **options)
        self.daam = _check_module("daam", daam)
        self.gqa = GroupedQueryAttention(
            embed_dim, query_heads, kv_heads, variant=variant, dropout=dropout, bias=bias, layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, **options,
        )  # fmt: skip
        if input_dim is not None:
            check_count("input_dim", input_dim, 1)
        self.embed_transform = None if input_dim is None else nn.Linear(input_dim, embed_dim, **options)

    def forward(
        self,
        x: Tensor,
        return_attention_details: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """y, or (y, {"daam": weights, "gqa": weights}), the weights detached.

        ``attn_mask`` and ``is_causal`` hold for the grouped-query attention. The density's statistics are taken over
        the whole length, so y at one place depends on x at later ones even where ``is_causal``.

        Args:
            x: [batch, length, input_dim].
            return_attention_details: return the weights of both attentions: the density's, of x's shape, and those of
                :class:`GroupedQueryAttention`, [batch, heads, length, length].
            key_padding_mask: boolean, [batch, length], True where x is padding. The density attention gets its
                opposite as ``mask``, [batch, length, 1].
            attn_mask, is_causal: as in :class:`GroupedQueryAttention`.

        Returns:
            y: [batch, length, embed_dim].

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        """
        input_dim = self.gqa.embed_dim if self.embed_transform is None else self.embed_transform.in_features
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        check_dense("x", x)
        if x.dim() != 3 or x.shape[2] != input_dim:
            raise ValueError(f"x must have shape [batch, length, {input_dim}], got {list(x.shape)}")
        batch, length, _ = x.shape
        check_masks(key_padding_mask, None, x, (batch, 1, length, length))
        masks = {} if key_padding_mask is None else {"mask": ~key_padding_mask.unsqueeze(-1)}
        y, details = _call(self.daam, x, return_attention_details, **masks)
        if self.embed_transform is not None:
            y = self.embed_transform(y)
        y, weights = self.gqa(
            y,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
            need_weights=return_attention_details,
        )
        return (y, {"daam": details, "gqa": weights.detach()}) if return_attention_details else y

    def upstream_state_dict(self, density: str = "daam", heads: str = "daams") -> dict[str, Tensor]:
        """The parameters as the public code's model loads them: copies, detached.

        Args:
            density: what that model calls its density attention, ``"daam"`` or ``"gct"``.
            heads: what that attention, if it is the one per feature, calls its heads, ``"daams"`` or ``"gcts"``.
        """
        check_choice("density", density, _DENSITY_NAMES)
        parts = {density: self.daam, "embed_transform": self.embed_transform, "gqa": self.gqa}
        return _upstream_parts({name: part for name, part in parts.items() if part is not None}, heads)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        _rename(state_dict, prefix, dict.fromkeys(_DENSITY_NAMES, "daam"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class DensityAdaptiveTransformer(nn.Module):
    """The decoder of the paper's experiments: an attention over an encoder's layers, two 3x3 convolutions, a linear.

    Each layer's features are laid out as a grid; the first convolution takes the num_layers grids to hidden_channels,
    the second takes these back, each followed by a ReLU. Source: arXiv 2401.11143 and its public code, which uses it
    with every attention it compares. Its GQDAAM for an encoder of 24 layers of 1024 features is
    ``DensityAdaptiveTransformer(GroupedQueryDAAM(512, input_dim=1024, daam=...), 24, 512, num_classes, grid=(8, 64))``;
    the density attention alone is ``DensityAdaptiveTransformer(daam, 24, 1024, num_classes)``.

    Args:
        attention: any module that maps [batch, num_layers, features] to [batch, num_layers, feature_size] and, where
            they are asked for, takes ``return_attention_details=True`` and returns (y, details).
        num_layers: layers of the encoder, which are the channels of the convolutions.
        feature_size: features of a layer as ``attention`` returns them.
        num_classes: size of the result.
        hidden_channels: channels between the convolutions.
        grid: height and width of a layer's features. None: the factors of feature_size that are closest to each
            other, height first: the paper's 32 x 32 for 1024 and 64 x 80 for 5120.

    Parameters: ``attention``'s, ``conv1``, ``conv2``, ``fc``. A checkpoint of the public code, where the attention's
    are not below ``attention`` but at ``daam`` (or ``gct``), ``embed_transform`` and ``gqa``, loads too.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        attention: nn.Module,
        num_layers: int,
        feature_size: int,
        num_classes: int,
        *,
        hidden_channels: int = 512,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(num_layers=num_layers, feature_size=feature_size, num_classes=num_classes)
        for name, value in (*sizes.items(), ("hidden_channels", hidden_channels)):
            check_count(name, value, 1)
        self.attention = _check_module("attention", attention)
        self.num_layers = num_layers
        self.feature_size = feature_size
        self.grid = _nearest_factors(feature_size) if grid is None else _check_grid(grid, feature_size)
        options = dict(device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(num_layers, hidden_channels, 3, padding=1, **options)
        self.conv2 = nn.Conv2d(hidden_channels, num_layers, 3, padding=1, **options)
        self.fc = nn.Linear(num_layers * feature_size, num_classes, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions and the linear layer anew, weights Xavier uniform, biases as torch does."""
        for layer in (self.conv1, self.conv2, self.fc):
            layer.reset_parameters()
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, return_attention_details: bool = False) -> Tensor | tuple[Tensor, object]:
        """Class scores [batch, num_classes], or (scores, details), the details as ``attention`` returns them.

        Args:
            x: [batch, num_layers, features], or [batch, num_layers, time, features], whose mean over time is taken.
            return_attention_details: return the attention's details too.

        Raises:
            ValueError, TypeError: x or what ``attention`` makes of it has another shape.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        check_dense("x", x)
        if x.dim() not in (3, 4) or x.shape[1] != self.num_layers:
            raise ValueError(
                f"x must have shape [batch, num_layers={self.num_layers}, features] or [batch, "
                f"num_layers={self.num_layers}, time, features], got {list(x.shape)}"
            )
        if x.dim() == 4:
            x = x.mean(2)
        y, details = _call(self.attention, x, return_attention_details)
        if not isinstance(y, Tensor) or y.shape != (x.shape[0], self.num_layers, self.feature_size):
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"attention must return shape [batch={x.shape[0]}, num_layers={self.num_layers}, "
                f"feature_size={self.feature_size}], got {got}"
            )
        y = F.relu(self.conv1(y.unflatten(2, self.grid)))
        y = F.relu(self.conv2(y))
        scores = self.fc(y.flatten(1))
        return (scores, details) if return_attention_details else scores

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, feature_size={self.feature_size}, grid={self.grid}"

    def upstream_state_dict(self, density: str = "daam", heads: str = "daams") -> dict[str, Tensor]:
        """The parameters as the public code's model loads them: copies, detached. See :class:`GroupedQueryDAAM`."""
        check_choice("density", density, _DENSITY_NAMES)
        if isinstance(self.attention, GroupedQueryDAAM):
            attention = self.attention.upstream_state_dict(density, heads)
        else:
            attention = _upstream_parts({density: self.attention}, heads)
        return attention | _upstream_parts({"conv1": self.conv1, "conv2": self.conv2, "fc": self.fc}, heads)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if isinstance(self.attention, GroupedQueryDAAM):
            names = dict.fromkeys(_DENSITY_NAMES, "attention.daam")
            names |= {name: f"attention.{name}" for name in ("embed_transform", "gqa")}
        else:
            names = dict.fromkeys(_DENSITY_NAMES, "attention")
        _rename(state_dict, prefix, names)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _call(module: nn.Module, x: Tensor, return_attention_details: bool, **masks: Tensor) -> tuple[Tensor, object]:
    """(y, details) of an attention module, which need not know of details where none are asked for."""
    if return_attention_details:
        return module(x, return_attention_details=True, **masks)
    return module(x, **masks), None


def _upstream_parts(parts: dict[str, nn.Module], heads: str) -> dict[str, Tensor]:
    """The parameters of all parts below their names; a part that is no density attention has the public names."""
    parameters = {}
    for name, part in parts.items():
        if isinstance(part, FusedMultiHeadFeatureDAAM):
            own = part.upstream_state_dict(heads)
        elif hasattr(part, "upstream_state_dict"):
            own = part.upstream_state_dict()
        else:
            own = {key: value.detach().clone() for key, value in part.state_dict().items()}
        parameters |= {f"{name}.{key}": value for key, value in own.items()}
    return parameters


def _rename(state_dict: dict, prefix: str, names: dict[str, str]) -> None:
    """Move the keys below ``prefix`` + one name to ``prefix`` + another, where nothing is there yet.

    In place, so that the submodules see it; load_state_dict hands every module a dict of its own.
    """
    for key in list(state_dict):
        first, dot, rest = key.removeprefix(prefix).partition(".")
        if dot and key.startswith(prefix) and first in names:
            own = f"{prefix}{names[first]}.{rest}"
            if own not in state_dict:
                state_dict[own] = state_dict.pop(key)


def _nearest_factors(number: int) -> tuple[int, int]:
    height = math.isqrt(number)
    while number % height:
        height -= 1
    return height, number // height


def _check_grid(grid: tuple[int, int], feature_size: int) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or any(type(size) is not int for size in grid):
        raise TypeError(f"grid must be two ints, height and width, or None, got {grid!r}")
    if min(grid) < 1 or grid[0] * grid[1] != feature_size:
        raise ValueError(f"grid must be height and width whose product is feature_size={feature_size}, got {grid!r}")
    return tuple(grid)


def _check_module(name: str, module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {module!r}")
    return module
