"""The scalar arguments of density attention, as they travel from the public function to a backend."""

from __future__ import annotations

from typing import NamedTuple


class DensityOptions(NamedTuple):
    """Checked options: ``norm_axis`` is not negative, the strings are among the allowed ones."""

    norm_axis: int
    padding_value: float | None
    padding_stats: str
    normalize: str
    eps: float
    residual: bool
