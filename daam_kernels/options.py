"""The scalar arguments of density attention, as they travel from the public function to a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DensityOptions(NamedTuple):
    """Checked options: ``norm_axis`` is not negative, the strings are among the allowed ones.

    ``max_seqlen`` is of packed sequences alone, and may be None for them too: not known on the host.
    """

    norm_axis: int
    padding_value: float | None
    padding_stats: str
    normalize: str
    eps: float
    residual: bool
    density: str = "product"
    multiply: bool = True  # False: the weights in the place of y, of a density that is not normalised
    max_seqlen: int | None = None

    @property
    def normalised(self) -> bool:
        return self.density in ("product", "mixture")

    @property
    def fewest(self) -> int:
        """Elements that a slice must have: the unbiased variance, which only densities that are not normalised lack,
        takes two."""
        return 2 if self.normalised else 1

    def padding_in(self, dtype: torch.dtype) -> float | None:
        """The padding value rounded to x's type, as torch compares; None for a NaN too, which nothing equals."""
        if self.padding_value is None:
            return None
        value = torch.tensor(self.padding_value, dtype=dtype).item()
        return value if value == value else None

    def of_reference(self) -> dict:
        """What the reference takes of them, by name: ``max_seqlen`` decides nothing there."""
        named = self._asdict()
        del named["max_seqlen"]
        return named
