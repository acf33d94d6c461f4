"""Density adaptive attention as modules: one head, many heads, and a block of residual layers.

Source: Ioannides et al., arXiv 2401.11143, Algorithms 2 to 4, and the PyPI package gaussian-adaptive-attention 0.1.5,
whose arguments, outputs and checkpoints these modules take. Two things differ from that package. ``c`` is drawn as
exp(N(0, 1)), as its GitHub code does, where the release on PyPI draws N(0, 1): to compare, copy the parameters. And
``eps`` reaches the heads, where its multi-head passes it in the place of ``mean_offset_init``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_finite, check_first
from ..functional import (
    BACKENDS,
    check_axis,
    check_heads,
    check_valid_mask,
    check_x,
    check_padding_value,
    density_attention,
    density_block,
    sweeps_blocks,
)

PARAMETERS = ("mean_offsets", "c")
HEADS = "attention_heads."  # what the public package calls the list of a multi-head's single heads
_HOOKS_OF_A_CALL = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


class DensityAttention(nn.Module):
    """What the modules share: parameters [heads, num_gaussians], one call, the options of that call."""

    _SHOWN = ("norm_axis", "num_heads", "num_gaussians", "padding_value", "eps")

    def __init__(
        self,
        heads: int,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        padding_value: float | None,
        mean_offset_init: float,
        eps: float | Sequence[float],
        padding_stats: str,
        normalize: str,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.norm_axis = norm_axis
        self.num_heads = num_heads
        self.num_gaussians = num_gaussians
        self.padding_value = padding_value
        self.mean_offset_init = check_first("mean_offset_init", mean_offset_init, dtype)
        self.eps = _check_eps(eps, heads)
        self.padding_stats = check_choice("padding_stats", padding_stats, ("zero", "exclude"))
        self.normalize = check_choice("normalize", normalize, ("clamp", "softmax"))
        self.backend = check_choice("backend", backend, ("auto", *BACKENDS))
        check_padding_value(padding_value)
        self.mean_offsets = nn.Parameter(torch.empty(heads, num_gaussians, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.empty(heads, num_gaussians, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw the parameters anew: the offsets are constant, ``c`` = exp(N(0, 1))."""
        nn.init.constant_(self.mean_offsets, self.mean_offset_init)
        with torch.no_grad():
            self.c.normal_().exp_()

    def forward(
        self,
        x: Tensor,
        return_attention_details: bool = False,
        *,
        mask: Tensor | None = None,
        residual: bool = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y = x * weights(x), or (y, weights); see :func:`daam_kernels.density_attention`.

        Args:
            x: any shape; ``norm_axis`` is cut into heads of at least 2 elements each.
            return_attention_details: return (y, weights), the weights detached and of x's shape.
            mask: boolean, broadcastable to x, True where x is valid.
            residual: add x to the result.
            cu_seqlens, max_seqlen: sequences packed along ``norm_axis``, which must be 0; or x is a nested tensor of
                the jagged layout, and ``norm_axis`` 1. Either takes one eps for all heads.
        """
        if isinstance(self.eps, tuple):
            if cu_seqlens is not None or max_seqlen is not None or (isinstance(x, Tensor) and x.is_nested):
                raise ValueError(f"eps must be one number for all heads with packed sequences, got {self.eps}")
            return self._forward_head_by_head(x, return_attention_details, mask, residual)
        return self._attend(
            x, self.gaussians(), self.eps, return_attention_details, mask, residual, cu_seqlens, max_seqlen
        )

    def gaussians(self) -> dict:
        """The Gaussians of all heads, as :func:`daam_kernels.density_attention` takes them."""
        return {"mean_offsets": self.mean_offsets, "c": self.c}

    def _forward_head_by_head(self, x, return_weights, mask, residual):
        check_x(x)
        axis = check_axis(self.norm_axis, x)
        check_heads(x.shape[axis], self.num_heads, axis)
        if mask is not None:
            check_valid_mask(mask, x)
            mask = mask.expand_as(x)
        chunk = x.shape[axis] // self.num_heads
        parts = []
        for head, eps in enumerate(self.eps):
            start = head * chunk
            length = x.shape[axis] - start if head == self.num_heads - 1 else chunk
            gaussians = self.gaussians()
            gaussians |= {name: t[head : head + 1] for name, t in gaussians.items() if isinstance(t, Tensor)}
            part_mask = None if mask is None else mask.narrow(axis, start, length)
            part = x.narrow(axis, start, length)
            parts.append(self._attend(part, gaussians, eps, return_weights, part_mask, residual))
        if return_weights:
            outputs, weights = zip(*parts)
            return torch.cat(outputs, axis), torch.cat(weights, axis)
        return torch.cat(parts, axis)

    def _attend(self, x, gaussians, eps, return_weights, mask, residual, cu_seqlens=None, max_seqlen=None):
        return density_attention(
            x,
            **gaussians,
            norm_axis=self.norm_axis,
            padding_value=self.padding_value,
            mask=mask,
            padding_stats=self.padding_stats,
            normalize=self.normalize,
            eps=eps,
            residual=residual,
            return_weights=return_weights,
            backend=self.backend,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )

    def extra_repr(self) -> str:
        defaults = {"mean_offset_init": 0, "padding_stats": "zero", "normalize": "clamp", "backend": "auto"}
        shown = [*self._SHOWN, *(name for name, default in defaults.items() if getattr(self, name) != default)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own, absent = self._own_state_dict(dict(state_dict), prefix, errors)
        named: list[str] = []
        super()._load_from_state_dict(own, prefix, metadata, strict, named, unexpected, errors)
        missing += [key for name in named for key in absent.get(name, [name])]

    def _own_state_dict(self, state_dict: dict, prefix: str, errors: list[str]) -> tuple[dict, dict[str, list[str]]]:
        """A checkpoint of ours or the public package's as ours, and the keys to report for each key it lacks.

        May change ``state_dict``. What cannot be right, strict or not, is added to ``errors``.
        """
        raise NotImplementedError


class MultiHead(DensityAttention):
    """Many heads; the public packages hold each by itself in ``attention_heads``, under the same parameter names."""

    def _parameter_names(self) -> tuple[str, ...]:
        return PARAMETERS

    def upstream_state_dict(self) -> dict[str, Tensor]:
        """The parameters as the public package's multi-head loads them: copies, detached, [num_gaussians] each."""
        return {
            f"{HEADS}{head}.{name}": getattr(self, name).detach()[head].clone()
            for head in range(self.num_heads)
            for name in self._parameter_names()
        }

    def _own_state_dict(self, state_dict, prefix, errors):
        heads = _head_tensors(state_dict, prefix, self._parameter_names())
        count = 1 + max((head for tensors in heads.values() for head in tensors), default=-1)
        if count and count != self.num_heads:
            errors.append(
                f"the checkpoint has {count} attention heads at {prefix + HEADS + '*'!r}, "
                f"and this module has num_heads={self.num_heads}"
            )
        absent = {}
        for name, tensors in heads.items():
            keys = {head: f"{prefix}{HEADS}{head}.{name}" for head in range(max(count, self.num_heads))}
            taken = [state_dict.pop(keys[head]) for head in sorted(tensors)]
            absent[prefix + name] = [keys[head] for head in range(self.num_heads) if head not in tensors]
            if count != self.num_heads:
                absent[prefix + name] = []  # said above, better
            elif len({t.shape for t in taken}) > 1:
                absent[prefix + name] = []
                shapes = ", ".join(str(list(t.shape)) for t in taken)
                errors.append(f"the heads of {prefix + HEADS + '*.' + name!r} must have one shape, got {shapes}")
            elif not absent[prefix + name]:
                state_dict[prefix + name] = torch.stack(taken)
        return state_dict, absent


class FusedDAAM(DensityAttention):
    """One head of density adaptive attention: y = x * w, w the normalised product of Gaussians of x itself.

    Drop-in for ``GaussianAdaptiveAttention`` of the public package, whose checkpoints ``load_state_dict`` takes.
    Source: arXiv 2401.11143, Algorithm 2.

    Args:
        norm_axis: the axis that statistics and weights are taken along; may be negative.
        num_heads: kept as an attribute and otherwise unused, as in the public package.
        num_gaussians: number of Gaussians whose product is the density.
        padding_value: elements equal to it are padding. None: no such value.
        mean_offset_init: what the offsets start from.
        eps: positive, added to the variance and the floor of the normalising sum.
        padding_stats, normalize, backend: as in :func:`daam_kernels.density_attention`.

    Parameters: ``mean_offsets`` and ``c``, both [1, num_gaussians].

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        padding_value: float | None = None,
        mean_offset_init: float = 0,
        eps: float = 1e-8,
        *,
        padding_stats: str = "zero",
        normalize: str = "clamp",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_shape(norm_axis, num_heads, num_gaussians)
        super().__init__(
            1, norm_axis, num_heads, num_gaussians, padding_value, mean_offset_init, _check_eps(eps, 0),
            padding_stats, normalize, backend, device, dtype,
        )  # fmt: skip
        self.reset_parameters()

    def upstream_state_dict(self) -> dict[str, Tensor]:
        """The parameters as the public package's single head loads them: copies, detached, [num_gaussians]."""
        return {name: getattr(self, name).detach()[0].clone() for name in PARAMETERS}

    def _own_state_dict(self, state_dict, prefix, errors):
        add_axis_of_heads(state_dict, prefix, PARAMETERS)
        return state_dict, {}


class FusedMultiHeadDAAM(MultiHead):
    """Density adaptive attention with many heads, each on its own chunk of ``norm_axis``, in one kernel.

    Drop-in for ``MultiHeadGaussianAdaptiveAttention`` of the public package, whose checkpoints ``load_state_dict``
    takes. Source: arXiv 2401.11143, Algorithm 3.

    Args:
        norm_axis: the axis that is cut into heads, the last one taking the remainder; may be negative.
        num_heads: number of heads.
        num_gaussians: number of Gaussians of each head.
        padding_value: elements equal to it are padding. None: no such value.
        eps: positive, added to the variance and the floor of the normalising sum. Or one for each head, which costs
            one call per head.
        padding_stats, normalize, backend: as in :func:`daam_kernels.density_attention`.

    Parameters: ``mean_offsets`` and ``c``, both [num_heads, num_gaussians].

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        padding_value: float | None = None,
        eps: float | Sequence[float] = 1e-8,
        *,
        padding_stats: str = "zero",
        normalize: str = "clamp",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_shape(norm_axis, num_heads, num_gaussians)
        super().__init__(
            num_heads, norm_axis, num_heads, num_gaussians, padding_value, 0, eps,
            padding_stats, normalize, backend, device, dtype,
        )  # fmt: skip
        self.reset_parameters()


class FusedDensityBlock(nn.Module):
    """Layers of multi-head density adaptive attention, each y = x + attention(x) in one kernel.

    Drop-in for ``GaussianBlock`` of the public package, whose checkpoints ``load_state_dict`` takes.
    Source: arXiv 2401.11143, Algorithm 4.

    Args:
        norm_axes, num_heads, num_gaussians: one for each layer, as in :class:`FusedMultiHeadDAAM`.
        num_layers: number of layers.
        padding_value: elements of a layer's input equal to it are padding. A layer doubles padding, so a value other
            than 0 is lost after the first one, as in the public package; a ``mask`` stays.
        eps: positive, of every layer.
        padding_stats, normalize, backend: as in :func:`daam_kernels.density_attention`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        norm_axes: Sequence[int],
        num_heads: Sequence[int],
        num_gaussians: Sequence[int],
        num_layers: int,
        padding_value: float | None = None,
        eps: float = 1e-8,
        *,
        padding_stats: str = "zero",
        normalize: str = "clamp",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_layers", num_layers, 0)
        for name, values in (("norm_axes", norm_axes), ("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise TypeError(f"{name} must be a list of num_layers={num_layers} ints, got {values!r}")
            if len(values) != num_layers:
                raise ValueError(f"{name} must have length num_layers={num_layers}, got {len(values)}: {values!r}")
        keywords = dict(padding_stats=padding_stats, normalize=normalize, backend=backend, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            FusedMultiHeadDAAM(axis, heads, gaussians, padding_value, _check_eps(eps, 0), **keywords)
            for axis, heads, gaussians in zip(norm_axes, num_heads, num_gaussians)
        )

    def reset_parameters(self) -> None:
        """Draw the parameters of every layer anew."""
        for layer in self.layers:
            layer.reset_parameters()

    def forward(
        self,
        x: Tensor,
        return_attention_details: bool = False,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """x + attention(x), layer after layer; or (y, {"layer_0": weights, ...}), the weights detached, of x's shape.

        Args:
            x: any shape; every layer's axis is cut into its heads.
            mask: boolean, broadcastable to x, True where x is valid; the same for every layer.
            cu_seqlens, max_seqlen: as :class:`FusedMultiHeadDAAM` takes them; the same for every layer.
        """
        options = {"mask": mask, "residual": True, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        if return_attention_details:
            details = {}
            for index, layer in enumerate(self.layers):
                x, details[f"layer_{index}"] = layer(x, True, **options)
            return x, details
        layers = list(self.layers)
        packed = cu_seqlens is not None or max_seqlen is not None
        shared = [None if packed else _shared_in_a_sweep(x, layer) for layer in layers]
        first = 0
        while first < len(layers):
            end = first + 1
            while shared[first] is not None and end < len(layers) and shared[end] == shared[first]:
                end += 1
            if end - first > 1:
                sweep = layers[first:end]
                parameters = [layer.mean_offsets for layer in sweep], [layer.c for layer in sweep]
                x = density_block(x, *parameters, mask=mask, **shared[first][1])
            else:
                x = layers[first](x, **options)
            first = end
        return x

    def upstream_state_dict(self) -> dict[str, Tensor]:
        """The parameters as the public package's block loads them: copies, detached, [num_gaussians] each."""
        return {
            f"layers.{index}.{key}": value
            for index, layer in enumerate(self.layers)
            for key, value in layer.upstream_state_dict().items()
        }


def add_axis_of_heads(state_dict: dict, prefix: str, names: Sequence[str]) -> bool:
    """Make [1, num_gaussians] of the [num_gaussians] of a public single head; whether there was any."""
    found = False
    for key in (prefix + name for name in names):
        if isinstance(state_dict.get(key), Tensor) and state_dict[key].dim() == 1:
            state_dict[key] = state_dict[key].unsqueeze(0)
            found = True
    return found


def _shared_in_a_sweep(x: Tensor, layer: nn.Module) -> tuple[int, dict] | None:
    """The heads and options that layers of one sweep have in common; None for a layer that is called by itself.

    That is one with its own way of being called, and any layer where no backend has such a sweep.
    """
    if type(layer) is not FusedMultiHeadDAAM or isinstance(layer.eps, tuple) or not sweeps_blocks(x, layer.backend):
        return None
    if any(getattr(layer, name) for name in _HOOKS_OF_A_CALL):
        return None
    axis = check_axis(layer.norm_axis, x)
    names = "padding_value", "eps", "padding_stats", "normalize", "backend"
    return layer.num_heads, {"norm_axis": axis, **{name: getattr(layer, name) for name in names}}


def _head_tensors(state_dict: dict, prefix: str, names: Sequence[str]) -> dict[str, dict[int, Tensor]]:
    """The public package's tensors of a multi-head by parameter name and head, where ours are not there as well."""
    found: dict[str, dict[int, Tensor]] = {name: {} for name in names if prefix + name not in state_dict}
    for key, value in state_dict.items():
        if key.startswith(prefix + HEADS):
            head, _, name = key[len(prefix + HEADS) :].partition(".")
            if name in found and head.isascii() and head.isdigit() and str(int(head)) == head:
                found[name][int(head)] = value
    return found if any(found.values()) else {}


def check_shape(norm_axis: int, num_heads: int, num_gaussians: int) -> None:
    if isinstance(norm_axis, bool) or not isinstance(norm_axis, int):
        raise ValueError(f"norm_axis must be an int, got {norm_axis!r}")
    check_count("num_heads", num_heads, 1)
    check_count("num_gaussians", num_gaussians, 1)


def _check_eps(eps: float | Sequence[float], heads: int) -> float | tuple[float, ...]:
    """eps as a float, or as a tuple of one for each head where they differ; ``heads`` = 0 takes a number only."""
    if heads and isinstance(eps, (tuple, list)):
        if len(eps) != heads:
            raise ValueError(f"eps must be a number, or one for each of num_heads={heads} heads, got {eps!r}")
        each = tuple(_check_eps(e, 0) for e in eps)
        return each if len(set(each)) > 1 else each[0]
    number = check_finite("eps", eps)
    if number <= 0:
        raise ValueError(f"eps must be positive, got {eps!r}")
    return number
