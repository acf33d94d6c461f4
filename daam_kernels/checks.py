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
    if value >= 2**63:  # more than torch takes for a size
        raise ValueError(f"{name} must be an int below 2**63, got one of {value.bit_length()} bits")


def check_number(name: str, value: float, takes: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {takes}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        got = f"an int of {value.bit_length()} bits"
        raise ValueError(f"{name} must be within float64's range, got {got}") from None


def check_finite(name: str, value: float, takes: str = "a number") -> float:
    number = check_number(name, value, takes)
    if not -math.inf < number < math.inf:  # comparisons alone: torch.compile may hand over a symbol for a number
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_first(name: str, value: float, dtype: torch.dtype | None) -> float:
    """What a parameter of this type, None being torch's default, is to start from."""
    number = check_finite(name, value)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type or None, got {dtype!r}")
    if abs(number) > torch.finfo(dtype).max:
        raise ValueError(f"{name} must be within the range of the parameters' type, {dtype}, got {number}")
    return number


def check_scale(scale: float | None, default: float) -> float:
    return default if scale is None else check_finite("scale", scale, "a number or None")


def check_dropout(name: str, p: float) -> float:
    number = check_number(name, p)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), got {number}")
    return number


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
    if max_seqlen >= 2**63:  # more than an operator takes
        raise ValueError(f"max_seqlen must be below 2**63, got {max_seqlen}")
    return max_seqlen


def shape_of(t: Tensor) -> list[int]:
    return list(t.shape)
