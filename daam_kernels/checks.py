"""Checks of arguments that several public functions and modules share; messages name the argument and what it takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def check_finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_scale(scale: float | None, default: float) -> float:
    if scale is None:
        return default
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # comparisons alone: torch.compile may hand over a symbol for a number
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def check_dropout(name: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
    return float(p)


def check_dense(name: str, t: Tensor) -> None:
    if t.is_nested or t.layout != torch.strided:
        got = "a nested one" if t.is_nested else f"one of layout {t.layout}"
        raise TypeError(f"{name} must be one dense tensor, got {got}")


def check_mask(name: str, mask: Tensor, true_where: str, owner: str, x: Tensor, added: bool = False) -> None:
    """A boolean mask, True ``true_where``, or with ``added`` one of numbers too, on the device of ``owner``, x."""
    fits = isinstance(mask, Tensor) and (mask.dtype == torch.bool or added and mask.dtype.is_floating_point)
    if not fits:
        takes = f"a boolean tensor, True {true_where}"
        if added:
            takes += ", or one of a floating-point type, to be added to the scores"
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be {takes}, got {got}")
    check_dense(name, mask)
    if mask.device != x.device:
        raise ValueError(f"{name} must be on {owner}'s device, {x.device}, got {mask.device}")


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor | None) -> int | None:
    if max_seqlen is None:
        return None
    if cu_seqlens is None:
        raise ValueError(f"max_seqlen must be None without cu_seqlens, got {max_seqlen!r}")
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"max_seqlen must be an int or None, got {type(max_seqlen).__name__}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
    return max_seqlen


def shape_of(t: Tensor) -> list[int]:
    return list(t.shape)
