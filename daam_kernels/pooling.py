"""attention_pool(): checks its arguments, then calls the operator. Validation of pooling lives here and only here."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    FLOATING_TYPES,
    check_choice,
    check_dense,
    check_dropout,
    check_mask,
    check_max_seqlen,
    check_scale,
    shape_of,
)
from .ops.attention_pool import apply
from .options import Pooling

BACKENDS = ("auto", "triton", "reference")


def attention_pool(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The rows of every bag, weighed with the softmax of learned scores: context[h] = sum over t of weights[h, t] x[t].

    The score of row t for hop h is scale * query[h] . phi(x[t]), where phi(x) is x itself (dot); with ``key_weight``
    tanh(x key_weight^T + key_bias) (additive); with ``gate_weight`` too, that times
    sigmoid(x gate_weight^T + gate_bias) (gated). Arithmetic is in float32, in float64 for float64. Nothing of x's size
    is made but its gradient, and no padding for bags of different sizes.
    Sources: Lin et al., arXiv 1703.03130; Ilse et al., arXiv 1802.04712.

    Args:
        x: [bags, rows, embed_dim]; or packed bags [total, embed_dim] with ``cu_seqlens``; or a nested tensor of the
            jagged layout, [bags, ragged, embed_dim]. float64, float32, bfloat16 or float16.
        query: [hops, features], or [features] for one hop; features is embed_dim, or hidden with ``key_weight``.
        key_weight, gate_weight: [hidden, embed_dim]. key_bias, gate_bias: [hidden]. These and query may be of any float
            type.
        key_padding_mask: boolean, [bags, rows], or [total] with ``cu_seqlens``: True where a row is padding, as in
            ``torch.nn.MultiheadAttention``. What is padding is not looked at.
        lengths: int32 or int64, [bags]: the rows of each bag that count, the first ones; the others are padding.
        cu_seqlens: int32 or int64, [bags + 1], ascending from 0 to total: bag i is the rows cu_seqlens[i] to
            cu_seqlens[i + 1]. On a GPU it is read once for each tensor.
        max_seqlen: the most rows that a packed bag may have. None: read from ``cu_seqlens``.
        scale: None is 1 / sqrt(embed_dim) for dot scores, else 1.
        dropout_p: the share of weights that are set to 0; the others are divided by 1 - ``dropout_p``.
        need_weights: return the weights too.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``, which is plain PyTorch, block by block.

    Returns:
        context: [bags, hops, embed_dim], or [bags, embed_dim] for a query of one dimension, of x's type. A bag without
            a valid row has context 0, weights 0, and gives no gradient.
        weights, with ``need_weights``: [bags, hops, rows]; [total, hops] with ``cu_seqlens``; for a nested x nested,
            [bags, hops, ragged]. Of x's type, and differentiable; after dropout, and 0 at padding.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        RuntimeError: the backend was asked for by name and cannot serve x.
    """
    context, weights, _ = pool(
        x, query, key_weight, key_bias, gate_weight, gate_bias, key_padding_mask=key_padding_mask, lengths=lengths,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, dropout_p=dropout_p, need_weights=need_weights,
        backend=backend,
    )  # fmt: skip
    context = context.to(x.dtype)
    return (context, weights.to(x.dtype)) if need_weights else context


def pool(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
    dropout_p: float,
    need_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(context, weights or None, whether a bag has a valid row [bags]); arguments are :func:`attention_pool`'s.

    Context and weights are of the arithmetic's type, at least float32.
    """
    offsets = None
    if isinstance(x, Tensor) and x.is_nested:
        x, cu_seqlens = _unnested(x, lengths, cu_seqlens)
        offsets = cu_seqlens
    _check_x(x, cu_seqlens)
    scorer = _checked_scorer(x, query, key_weight, key_bias, gate_weight, gate_bias)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
        if lengths is not None:
            raise ValueError("lengths must be None where cu_seqlens is given, which says as much")
        cu_seqlens = cu_seqlens.contiguous()
    max_seqlen = check_max_seqlen(max_seqlen, cu_seqlens)
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, x)
    if lengths is not None:
        _check_lengths(lengths, x)
        lengths = lengths.contiguous()
    scale = check_scale(scale, x.shape[-1] ** -0.5 if key_weight is None else 1.0)
    dropout_p = check_dropout("dropout_p", dropout_p)
    check_choice("backend", backend, BACKENDS)

    valid = None if key_padding_mask is None else ~key_padding_mask
    pooling = Pooling(x, *scorer, valid, lengths, cu_seqlens, None, scale, dropout_p, max_seqlen)
    if dropout_p > 0:
        keep = torch.rand(pooling.shape_of_scores, device=x.device) >= dropout_p
        pooling = pooling._replace(keep=keep)
    context, weights, found = apply(pooling, bool(need_weights), backend)
    if weights is not None and offsets is not None:
        weights = torch.nested.nested_tensor_from_jagged(weights.T.contiguous(), offsets).transpose(1, 2)
    elif weights is not None and cu_seqlens is not None:
        weights = weights.T
    return context.squeeze(1) if query.dim() == 1 else context, weights, found


def _unnested(x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(values, offsets) of a nested x."""
    if x.layout != torch.jagged:
        raise ValueError(
            f"x must be dense or a nested tensor of the layout torch.jagged, got a nested one of {x.layout}"
        )
    if x.dim() != 3 or x._ragged_idx != 1 or x.lengths() is not None:
        raise ValueError(
            "x, a nested tensor, must have shape [bags, ragged, embed_dim] and bags that follow one another without "
            f"gaps, got {x.dim()} dimensions, the ragged one being {x._ragged_idx}, "
            f"with{'out' if x.lengths() is None else ''} lengths() of its own"
        )
    for name, value in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            raise ValueError(f"{name} must be None for a nested x, which has offsets of its own")
    return x.values(), x.offsets()


def _check_x(x: Tensor, cu_seqlens: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING_TYPES:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    check_dense("x", x)
    if x.dim() != (3 if cu_seqlens is None else 2) or x.shape[-1] == 0:
        taken = "[bags, rows, embed_dim]" if cu_seqlens is None else "[total, embed_dim] where cu_seqlens is given"
        raise ValueError(f"x must have shape {taken}, embed_dim at least 1, got {shape_of(x)}")


def _checked_scorer(x: Tensor, query: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors that make the scores; query of two dimensions."""
    names = "query", "key_weight", "key_bias", "gate_weight", "gate_bias"
    named = dict(zip(names, (query, *others)))
    for name, t in named.items():
        if t is None and name != "query":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATING_TYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        check_dense(name, t)
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {t.device}")
    for name, weight in (("key_bias", "key_weight"), ("gate_weight", "key_weight"), ("gate_bias", "gate_weight")):
        if named[name] is not None and named[weight] is None:
            raise ValueError(f"{name} must be None without {weight}, got shape {shape_of(named[name])}")
    features, what = x.shape[-1], "embed_dim"
    if named["key_weight"] is not None:
        weight = named["key_weight"]
        if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
            raise ValueError(f"key_weight must have shape [hidden, embed_dim={features}], got {shape_of(weight)}")
        shapes = {"key_bias": weight.shape[:1], "gate_weight": weight.shape, "gate_bias": weight.shape[:1]}
        for name, shape in shapes.items():
            if named[name] is not None and named[name].shape != shape:
                raise ValueError(
                    f"{name} must have shape {list(shape)}, like key_weight's, got {shape_of(named[name])}"
                )
        features, what = weight.shape[0], "hidden"
    if query.dim() not in (1, 2) or query.shape[-1] != features or query.shape[0] == 0:
        raise ValueError(f"query must have shape [hops, {what}={features}] or [{features}], got {shape_of(query)}")
    return [query if query.dim() == 2 else query.unsqueeze(0), *others]


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    """All but its numbers, which are checked where they are there."""
    _check_counts("cu_seqlens", cu_seqlens, x)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [bags + 1], got {shape_of(cu_seqlens)}")


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    _check_counts("lengths", lengths, x)
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must have shape [bags={x.shape[0]}], got {shape_of(lengths)}")


def _check_counts(name: str, counts: Tensor, x: Tensor) -> None:
    if not isinstance(counts, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(counts).__name__}")
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {counts.dtype}")
    if counts.device != x.device:
        raise ValueError(f"{name} must be on x's device, {x.device}, got {counts.device}")


def _check_mask(mask: Tensor, x: Tensor) -> None:
    check_mask("key_padding_mask", mask, "where x is padding", "x", x)
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"key_padding_mask must have shape {list(x.shape[:-1])}, got {shape_of(mask)}")
