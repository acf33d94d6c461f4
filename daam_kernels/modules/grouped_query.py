"""Grouped-query attention, as the paper's code has it and as it was published.

Source: Ioannides et al., arXiv 2401.11143, and its public code, whose names of parameters are kept, so that its
checkpoints load. Its attention is a grouped-query attention (Ainslie et al., arXiv 2305.13245) that differs from the
published one: the query heads of a group are summed before the softmax, so that there are kv_heads attention maps, and
the scores are divided by head_dim, not by its square root. That code's module takes no masks, and takes ``dropout``
without using it; both work here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import (
    FLOATING_TYPES,
    check_choice,
    check_count,
    check_dense,
    check_dropout,
    check_finite,
    check_mask,
)


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share keys and values: query head h reads head h * kv_heads // query_heads of these.

    Source: arXiv 2401.11143, public code (``variant="paper"``); Ainslie et al., arXiv 2305.13245 (``variant="gqa"``);
    the layer normalisation before the output projection and the initialisation, Wang et al., arXiv 2210.06423.

    Args:
        embed_dim: features of query, key, value and output; head_dim is embed_dim / query_heads.
        query_heads: number of query heads, a multiple of ``kv_heads``.
        kv_heads: number of key heads and of value heads.
        variant: ``"paper"`` adds up the query heads of a group and divides their scores by head_dim: kv_heads maps.
            ``"gqa"`` keeps them apart and divides by head_dim ** 0.5: query_heads maps.
        dropout: probability with which an attention weight is dropped in training.
        bias: whether the four projections have a bias.
        layer_norm: normalise the joined heads before the output projection. None: in ``"paper"`` only.
        layer_norm_eps: added to the variance there.
        gamma_init: gain of the initial value and output projections.

    Parameters: ``q_proj``, ``k_proj``, ``v_proj``, ``norm``, ``out_proj``, as in the public code. ``norm`` and
    ``out_proj`` take kv_heads * head_dim features in ``"paper"``, embed_dim in ``"gqa"``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        embed_dim: int,
        query_heads: int = 8,
        kv_heads: int = 2,
        *,
        variant: str = "paper",
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool | None = None,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("query_heads", query_heads), ("kv_heads", kv_heads)):
            check_count(name, value, 1)
        if query_heads % kv_heads:
            raise ValueError(f"query_heads must be a multiple of kv_heads={kv_heads}, got {query_heads}")
        if embed_dim % query_heads:
            raise ValueError(f"embed_dim must be a multiple of query_heads={query_heads}, got {embed_dim}")
        if check_finite("layer_norm_eps", layer_norm_eps) < 0:
            raise ValueError(f"layer_norm_eps must not be negative, got {layer_norm_eps}")
        self.embed_dim = embed_dim
        self.query_heads = query_heads
        self.kv_heads = kv_heads
        self.head_dim = embed_dim // query_heads
        self.variant = check_choice("variant", variant, ("paper", "gqa"))
        self.dropout = check_dropout("dropout", dropout)
        if check_finite("gamma_init", gamma_init) < 0:
            raise ValueError(f"gamma_init must not be negative, got {gamma_init}")
        self.gamma_init = gamma_init

        options = dict(device=device, dtype=dtype)
        kv_dim = kv_heads * self.head_dim
        joined_dim = kv_dim if variant == "paper" else embed_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **options)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, **options)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, **options)
        normalised = variant == "paper" if layer_norm is None else layer_norm
        self.norm = nn.LayerNorm(joined_dim, layer_norm_eps, **options) if normalised else None
        self.out_proj = nn.Linear(joined_dim, embed_dim, bias, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew, Xavier normal, with gain ``gamma_init`` for values and output; biases are 0."""
        gains = (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        )
        for projection, gain in gains:
            nn.init.xavier_normal_(projection.weight, gain)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights), the weights None unless they are needed. Masks mean what torch.nn.MultiheadAttention's do.

        A query that may attend to no key gets weights of 0.

        Args:
            query: [batch, query_length, embed_dim].
            key: [batch, key_length, embed_dim]; None: the query.
            value: of the key's shape; None: the key.
            key_padding_mask: boolean, [batch, key_length], True where a key is padding.
            attn_mask: boolean, True where a query may not attend to a key, or floating-point, added to the scaled
                scores; [query_length, key_length], or with [batch] or [batch, heads] before these. A size may be 1.
            is_causal: query i attends to the keys 0 to i only.
            need_weights: compute the weights too, which then exist in memory.

        Returns:
            output: [batch, query_length, embed_dim].
            weights: [batch, heads, query_length, key_length], after dropout. heads is kv_heads in ``"paper"``,
            query_heads in ``"gqa"``.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        """
        key = query if key is None else key
        value = key if value is None else value
        self._check_sequences(query, key, value)
        q = self.q_proj(query).unflatten(-1, (self.query_heads, self.head_dim)).transpose(1, 2)
        k, v = (
            projection(t).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
            for projection, t in ((self.k_proj, key), (self.v_proj, value))
        )
        scale = self.head_dim**-0.5
        if self.variant == "paper":
            q = q.unflatten(1, (self.kv_heads, self.query_heads // self.kv_heads)).sum(2)
            scale = 1 / self.head_dim

        check_masks(key_padding_mask, attn_mask, query, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
        # A causal mask that stands alone is left to scaled_dot_product_attention, which then skips what it hides.
        causal_alone = is_causal and key_padding_mask is None and attn_mask is None and not need_weights
        mask = None if causal_alone else _attended(q, k, key_padding_mask, attn_mask, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _attend(q, k, v, mask, scale, dropout)
        else:
            grouped = self.variant == "gqa" and self.kv_heads != self.query_heads  # fewer of torch's kernels take it
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=causal_alone, scale=scale, enable_gqa=grouped
            )  # fmt: skip
        out = out.transpose(1, 2).flatten(2)
        if self.norm is not None:
            out = self.norm(out)
        return self.out_proj(out), weights

    def _check_sequences(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
            if t.dtype not in FLOATING_TYPES:
                raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
            check_dense(name, t)
            if t.dim() != 3 or t.shape[2] != self.embed_dim or t.shape[0] != query.shape[0]:
                batch = "" if name == "query" else f"={query.shape[0]}"
                raise ValueError(
                    f"{name} must have shape [batch{batch}, length, embed_dim={self.embed_dim}], got {list(t.shape)}"
                )
        if key.shape != value.shape:
            raise ValueError(f"value must have the key's shape {list(key.shape)}, got {list(value.shape)}")

    def extra_repr(self) -> str:
        shown = ["embed_dim", "query_heads", "kv_heads", "variant"]
        shown += [name for name, default in (("dropout", 0), ("gamma_init", 1)) if getattr(self, name) != default]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _attended(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """All masks as one that broadcasts to the scores: boolean, True where attended, or of q's type, added. Or None."""
    blocked = [] if key_padding_mask is None else [key_padding_mask[:, None, None, :]]
    if is_causal:
        blocked.append(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1))
    if attn_mask is not None:
        attn_mask = attn_mask.unsqueeze(1) if attn_mask.dim() == 3 else attn_mask
        if attn_mask.dtype == torch.bool:
            blocked.append(attn_mask)
            attn_mask = None
    if not blocked:
        return None if attn_mask is None else attn_mask.to(q.dtype)
    anywhere = blocked[0]
    for mask in blocked[1:]:
        anywhere = anywhere | mask
    return ~anywhere if attn_mask is None else torch.where(anywhere, -math.inf, attn_mask.to(q.dtype))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention computes, and the weights that it does not hand out."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q * scale) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # The softmax of nothing is 0/0, in its gradient too: a query without keys is given scores, and then no weights.
    nowhere = None if mask is None else (scores == -math.inf).all(-1, keepdim=True)
    if nowhere is not None:
        scores = scores.masked_fill(nowhere, 0)
    weights = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    if nowhere is not None:
        weights = weights.masked_fill(nowhere, 0)
    weights = F.dropout(weights, dropout)
    return weights @ v, weights


def check_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, query: Tensor, sizes: tuple[int, int, int, int]
) -> None:
    """Masks that fit scores of ``sizes`` [batch, heads, query_length, key_length]."""
    batch, _, _, keys = sizes
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask, "where a key is padding", "query", query)
        if key_padding_mask.shape != (batch, keys):
            raise ValueError(
                f"key_padding_mask must have shape [batch={batch}, key_length={keys}], "
                f"got {list(key_padding_mask.shape)}"
            )
    if attn_mask is not None:
        check_mask("attn_mask", attn_mask, "where a query may not attend to a key", "query", query, added=True)
        shape = {2: sizes[2:], 3: (batch, *sizes[2:]), 4: sizes}.get(attn_mask.dim())
        if shape is None or any(m != 1 and m != n for m, n in zip(attn_mask.shape, shape)):
            raise ValueError(
                f"attn_mask must have shape {list(sizes[2:])}, {[batch, *sizes[2:]]} or {list(sizes)}, or 1 in the "
                f"place of a size, got {list(attn_mask.shape)}"
            )
