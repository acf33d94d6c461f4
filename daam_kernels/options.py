"""The arguments of density attention that are no tensors, and all of additive attention and of attention pooling, on
their way to a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


class AdditiveProblem(NamedTuple):
    """The arguments of the operator, checked.

    query: [batch, heads, Tq, hidden], key: [batch, heads, Tk, hidden], value: [batch, heads, Tk, value_dim], weight:
    [heads, hidden]. ``attn_mask``, boolean or to be added, has 4 dimensions, each of the scores' size or 1;
    ``key_mask`` is boolean [batch, Tk]; ``seed`` is int64 [1], for dropout alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    attn_mask: Tensor | None
    key_mask: Tensor | None
    seed: Tensor | None
    is_causal: bool
    dropout_p: float
    scale: float
    fast_tanh: bool
    need_weights: bool
    average_weights: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:7]

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def shape_of_scores(self) -> tuple[int, int, int, int]:
        return *self.query.shape[:3], self.key.shape[2]

    def new_results(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(output, lse, weights or None), not filled: weights in query's type, the others in the arithmetic type."""
        batch, heads, queries, keys = self.shape_of_scores
        output = self.query.new_empty((batch, heads, queries, self.value.shape[3]), dtype=self.arithmetic)
        lse = self.query.new_empty((batch, heads, queries), dtype=self.arithmetic)
        if not self.need_weights:
            return output, lse, None
        return output, lse, self.query.new_empty((batch, 1 if self.average_weights else heads, queries, keys))


class Pooling(NamedTuple):
    """The arguments of the operator, checked. x: [bags, rows, embed_dim], or [total, embed_dim] with ``cu_seqlens``.

    The scorer's tensors are as in ``reference.attention_pool.Scorer``. ``valid``: boolean, [bags, rows] or [total];
    ``lengths``: [bags], of the first rows of x that count; ``keep``: boolean, [bags, hops, rows] or [hops, total].
    ``max_seqlen`` is of packed bags alone, and may be None for them too: not known on the host.
    """

    x: Tensor
    query: Tensor
    key_weight: Tensor | None
    key_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    valid: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    keep: Tensor | None
    scale: float
    dropout_p: float
    max_seqlen: int | None

    @property
    def scorer_tensors(self) -> tuple[Tensor | None, ...]:
        return self[1:6]

    @property
    def num_bags(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def shape_of_scores(self) -> tuple[int, ...]:
        hops = self.query.shape[0]
        if self.cu_seqlens is None:
            return self.x.shape[0], hops, self.x.shape[1]
        return hops, self.x.shape[0]

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    def valid_rows(self) -> Tensor | None:
        """``valid``, and ``lengths`` as such a mask."""
        if self.lengths is None:
            return self.valid
        within = torch.arange(self.x.shape[1], device=self.x.device) < self.lengths[:, None]
        return within if self.valid is None else within & self.valid
