"""Additive attention on a CPU by the native library: the sums over hidden units, which are nearly all of its work."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64

from torch import Tensor

from . import native
from .options import AdditiveProblem

_PAIRS = 1 << 18  # of a query and a key in a block: their scores are a megabyte
_KEY_NUMBERS = 1 << 16  # of the keys of a block: they and their gradients stay in a processor's cache


class _Additive(ctypes.Structure):
    """daam_additive: one block, all but its pointers."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "queries", "keys", "hidden")),
        *((name, 2 * c_int64) for name in ("query", "key", "d_query", "d_key")),
        ("scale", c_double),
    ]


class NativeActivations:
    """What ``reference.additive_attention_blocks.Activations`` does, in float32; activations are in registers alone."""

    def __init__(self, problem: AdditiveProblem):
        self.most_pairs = _PAIRS
        self.most_keys = max(64, _KEY_NUMBERS // problem.query.shape[3])

    def scores(self, query: Tensor, key: Tensor, weight: Tensor, scale: float) -> Tensor:
        """[batches, rows, columns] of query [batches, rows, hidden] and key [batches, columns, hidden]."""
        query, key, weight = _dense(query), _dense(key), weight.contiguous()
        scores = query.new_empty((*query.shape[:2], key.shape[1]))
        block = _block(query, key, scale=scale)
        pointers = (t.data_ptr() for t in (query, key, weight, scores))
        native.additive_scores(ctypes.addressof(block), *pointers)
        return scores

    def add_gradients(
        self,
        d_scores: Tensor,
        query: Tensor,
        key: Tensor,
        weight: Tensor,
        d_query: Tensor,
        d_key: Tensor,
        d_weight: Tensor,
    ) -> None:
        """Add what the gradient of the scores before their scale gives."""
        query, key, weight, d_scores = _dense(query), _dense(key), weight.contiguous(), d_scores.contiguous()
        block = _block(query, key, d_query, d_key)
        pointers = (t.data_ptr() for t in (d_scores, query, key, weight, d_query, d_key, d_weight))
        native.additive_gradients(ctypes.addressof(block), *pointers)


def _block(query: Tensor, key: Tensor, *gradients: Tensor, scale: float = 1.0) -> _Additive:
    strides = [(2 * c_int64)(*t.stride()[:2]) for t in (query, key, *gradients)]
    strides += [(2 * c_int64)()] * (4 - len(strides))
    return _Additive(*query.shape[:2], key.shape[1], query.shape[2], *strides, scale)


def _dense(t: Tensor) -> Tensor:
    """Copied where its rows are not contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
