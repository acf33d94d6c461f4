"""From the tensors of additive attention to launches of its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from ..options import AdditiveProblem
from ..reference.dropout import dropout_threshold
from .additive_launch import AdditiveTile, _power_of_two

ON_NVIDIA = torch.version.hip is None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Plain numbers whose values must not make new kernels. Of hidden, value_dim and the strides the compiler must know what
# 16 divides, or it cannot use 16-byte accesses.
SIZES = ["heads", "queries", "slices", "threshold", "num_blocks", "keys_per_split", "rows", "num_splits"]


def prepare(problem: AdditiveProblem, **others: Tensor | None) -> Callable[..., None]:
    """run(kernel, grid, tile, **arguments) on the problem's tensors: gives a kernel what it takes of all.

    A tensor is copied only where its last axis is not contiguous. ``others``, [batch, heads, T, size], get strides too.
    """
    query, key, value, weight, attn_mask, key_mask, seed = problem.tensors
    batch, heads, queries, keys = problem.shape_of_scores
    tensors = {"query": query, "key": key, "value": value, **others}
    tensors = {name: t if t is None or t.stride(-1) == 1 else t.contiguous() for name, t in tensors.items()}
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, queries, keys)
    dtype = query.dtype
    values = {
        "weight_ptr": weight.contiguous(), "seed_ptr": seed, "mask_ptr": _bytes(attn_mask),
        "key_mask_ptr": _bytes(key_mask), "heads": heads, "queries": queries, "keys": keys,
        "hidden": query.shape[3], "value_dim": value.shape[3], "slices": batch * heads,
        "threshold": dropout_threshold(problem.dropout_p),
        "ADDED": attn_mask is not None and attn_mask.dtype != torch.bool, "CAUSAL": problem.is_causal,
        "DROPOUT": problem.dropout_p, "SCALE": problem.scale,
        "FAST": problem.fast_tanh and ON_NVIDIA and not INTERPRETED and dtype != torch.float64,
        "PRECISION": dot_precision(dtype),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    for name, t in tensors.items():
        values[f"{name}_ptr"] = t
        strides = (0, 0, 0) if t is None else t.stride()[:3]
        values.update(zip((f"{name}_stride_{axis}" for axis in "bht"), strides))
    strides = (0,) * 4 if attn_mask is None else attn_mask.stride()
    values.update(zip((f"mask_stride_{axis}" for axis in "bhqk"), strides))
    values.update(zip(("key_mask_stride_b", "key_mask_stride_k"), (0, 0) if key_mask is None else key_mask.stride()))

    def run(kernel, grid: tuple[int, ...], tile: AdditiveTile, **arguments) -> None:
        blocks = {
            "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c, "BLOCK_V": tile.block_v,
            "BLOCK_N": _power_of_two(tile.num_splits),
        }  # fmt: skip
        known = values | blocks | arguments
        taken = {name: known[name] for name in kernel.arg_names if name in known}
        if ON_NVIDIA:  # told that all registers may be used, ptxas does not spill to use fewer
            taken["maxnreg"] = min(255, 65536 // (32 * tile.num_warps))
        kernel[grid](**taken, num_warps=tile.num_warps, num_stages=1, enable_fp_fusion=True)

    return run


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32, or float64 for float64, without losing digits."""
    return "tf32x3" if ON_NVIDIA and dtype != torch.float64 else "ieee"


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
