"""From the tensors of additive attention to launches of its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..options import AdditiveProblem
from ..reference.dropout import dropout_threshold
from .additive_launch import AdditiveTile
from .launch import Launch, launch_options

ON_NVIDIA = torch.version.hip is None
INTERPRETED = knobs.runtime.interpret
HELD = 1024  # of every kind, 4 KB each: in decoding the keys are others at every step, but not in every layer

# Plain numbers whose values must not make new kernels. Of hidden, value_dim and the strides the compiler must know what
# 16 divides, or it cannot use 16-byte accesses.
SIZES = ["heads", "queries", "slices", "threshold", "num_blocks", "keys_per_split", "rows", "num_splits"]

_AXES = {**dict.fromkeys(("query", "key", "value", "grad", "grad_weights"), "bht"), "mask": "bhqk", "key_mask": "bk"}
_STRIDES = {name: tuple(f"{name}_stride_{axis}" for axis in axes) for name, axes in _AXES.items()}


class AdditiveSizes(NamedTuple):
    """All that a launch depends on. ``strides``: of ``names``, but along a last axis that is contiguous; 0 of None."""

    device: torch.device
    dtype: torch.dtype
    scores: tuple[int, int, int, int]  # batch, heads, queries, keys
    hidden: int
    value_dim: int
    names: tuple[str, ...]
    strides: tuple[tuple[int, ...], ...]
    added: bool  # the mask, to the scores
    is_causal: bool
    dropout_p: float
    scale: float
    fast_tanh: bool
    average_weights: bool

    @property
    def slices(self) -> int:
        return self.scores[0] * self.scores[1]

    @property
    def itemsize(self) -> int:
        """Of the arithmetic type, in bytes."""
        return max(4, self.dtype.itemsize)

    @property
    def triton_arithmetic(self) -> tl.dtype:
        return tl.float64 if self.dtype == torch.float64 else tl.float32

    def launch(self, tile: AdditiveTile, grid: tuple[int, ...], **others: Any) -> Launch:
        """Of a kernel that takes, of the problem and ``others``, whatever it has arguments for."""
        _, heads, queries, keys = self.scores
        values = {
            "heads": heads, "queries": queries, "keys": keys, "hidden": self.hidden, "value_dim": self.value_dim,
            "slices": self.slices, "threshold": dropout_threshold(self.dropout_p),
            "ADDED": self.added, "CAUSAL": self.is_causal, "DROPOUT": self.dropout_p, "SCALE": self.scale,
            "FAST": self.fast_tanh and ON_NVIDIA and not INTERPRETED and self.dtype != torch.float64,
            "PRECISION": dot_precision(self.dtype), "ACC": self.triton_arithmetic,
            "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c, "BLOCK_V": tile.block_v,
            **others,
        }  # fmt: skip
        for name, strides in zip(self.names, self.strides):
            values.update(zip(_STRIDES[name], strides))
        return Launch(values, launch_options(tile.num_warps), grid=grid)


def prepare(problem: AdditiveProblem, **others: Tensor | None) -> tuple[AdditiveSizes, dict[str, Tensor | None]]:
    """The sizes of a problem, and its tensors as the kernels call them.

    A tensor is copied only where its last axis is not contiguous. ``others``, [batch, heads, T, size], get strides too.
    """
    query, key, value, weight, attn_mask, key_mask, seed = problem.tensors
    scores = problem.shape_of_scores
    tensors = {"query": query, "key": key, "value": value, **others}
    tensors = {name: t if t is None or t.stride(-1) == 1 else t.contiguous() for name, t in tensors.items()}
    if attn_mask is not None:
        attn_mask = attn_mask.expand(scores)
    names = *tensors, "mask", "key_mask"
    strides = [(0, 0, 0) if t is None else t.stride()[:3] for t in tensors.values()]
    strides += [(0, 0, 0, 0) if attn_mask is None else attn_mask.stride()]
    strides += [(0, 0) if key_mask is None else key_mask.stride()]
    sizes = AdditiveSizes(
        query.device, query.dtype, scores, query.shape[3], value.shape[3], names, tuple(strides),
        attn_mask is not None and attn_mask.dtype != torch.bool, problem.is_causal, problem.dropout_p, problem.scale,
        problem.fast_tanh, problem.average_weights,
    )  # fmt: skip
    pointers = {f"{name}_ptr": t for name, t in tensors.items()}
    pointers.update(
        weight_ptr=weight.contiguous(), seed_ptr=seed, mask_ptr=_bytes(attn_mask), key_mask_ptr=_bytes(key_mask)
    )
    return sizes, pointers


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32, or float64 for float64, without losing digits."""
    return "tf32x3" if ON_NVIDIA and dtype != torch.float64 else "ieee"


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
