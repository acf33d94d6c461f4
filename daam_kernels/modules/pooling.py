"""Attention pooling as a module: a bag of rows to one vector, or one for each hop.

Sources: Lin et al., arXiv 1703.03130; Ilse et al., arXiv 1802.04712; Lee et al., arXiv 1810.00825.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import FLOATING_TYPES, check_choice, check_count, check_dropout
from ..pooling import BACKENDS, check_cu_seqlens, pool
from ..reference.attention_pool import penalty
from ..sequences import check_packing

_SCORES = ("dot", "additive", "gated", "multihead")


class AttentionPool(nn.Module):
    """The rows of a bag, weighed with the softmax of learned scores, for several hops at once.

    ``score``: ``"dot"`` is a learned query's product with the row, over sqrt(embed_dim); ``"additive"`` is
    w . tanh(V x + b), structured self-attention and multiple-instance pooling; ``"gated"`` is
    w . (tanh(V x + b) * sigmoid(U x + c)), the gated multiple-instance form; ``"multihead"`` is multi-head attention of
    learned seeds, one for each hop, to the rows, with projected values and output, as in pooling by multi-head
    attention. Without rows there is no context: a bag without a valid one has context 0.

    Keys and values of ``"multihead"`` are never made: a seed's score is linear in the row, and so is what it sums up,
    so each head is a dot product with the row itself, and the projections act on what was summed up.

    Args:
        embed_dim: numbers in a row.
        hops: how many contexts are wanted of each bag.
        hidden_dim: of the hidden layer of additive and gated scores. None: embed_dim.
        score: as above.
        dropout: the share of the weights that is set to 0 in training. The values' bias of ``"multihead"`` stays.
        num_heads: of ``"multihead"``. None: the largest of 8, 4, 2 and 1 that divides embed_dim.
        bias: whether the hidden layers, or the projections of ``"multihead"``, have one. The papers of additive and
            gated scores have none, their public code has.
        backend: as in :func:`daam_kernels.attention_pool`.

    Parameters: ``query`` [hops, embed_dim] or [hops, hidden_dim]; ``key.weight`` and ``gate.weight``
    [hidden_dim, embed_dim], ``key.bias`` and ``gate.bias`` [hidden_dim]. For ``"multihead"`` ``query`` are the seeds,
    and ``in_proj_weight``, ``in_proj_bias`` and ``out_proj`` those of ``torch.nn.MultiheadAttention``, which may be
    copied; the keys' bias makes no difference there either, and its gradient is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        embed_dim: int,
        hops: int = 1,
        hidden_dim: int | None = None,
        score: str = "dot",
        dropout: float = 0.0,
        *,
        num_heads: int | None = None,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("embed_dim", embed_dim, 1)
        check_count("hops", hops, 1)
        self.embed_dim, self.hops = embed_dim, hops
        self.score = check_choice("score", score, _SCORES)
        self.dropout = check_dropout("dropout", dropout)
        self.backend = check_choice("backend", backend, BACKENDS)
        hidden = score in ("additive", "gated")
        if hidden_dim is not None:
            if not hidden:
                raise ValueError(f"hidden_dim must be None for score={score!r}, which has no hidden layer, got "
                                 f"{hidden_dim!r}")  # fmt: skip
            check_count("hidden_dim", hidden_dim, 1)
        self.hidden_dim = (hidden_dim or embed_dim) if hidden else None
        self.num_heads = self._checked_heads(num_heads)
        options = dict(device=device, dtype=dtype)
        self.query = nn.Parameter(torch.empty(hops, self.hidden_dim or embed_dim, **options))
        self.key = nn.Linear(embed_dim, self.hidden_dim, bias, **options) if hidden else None
        self.gate = nn.Linear(embed_dim, self.hidden_dim, bias, **options) if score == "gated" else None
        if score == "multihead":
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **options))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **options)) if bias else None
            self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **options)
        self.reset_parameters()

    def _checked_heads(self, num_heads: int | None) -> int:
        if self.score != "multihead":
            if num_heads is not None:
                raise ValueError(f"num_heads must be None for score={self.score!r}, got {num_heads!r}")
            return 1
        if num_heads is None:
            return next(n for n in (8, 4, 2, 1) if self.embed_dim % n == 0)
        check_count("num_heads", num_heads, 1)
        if self.embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, {self.embed_dim}, got {num_heads}")
        return num_heads

    def reset_parameters(self) -> None:
        """Draw the parameters anew: uniform Glorot for the query and projections, as torch does for linear layers."""
        nn.init.xavier_uniform_(self.query)
        for layer in (self.key, self.gate):
            if layer is not None:
                layer.reset_parameters()
        if self.score == "multihead":
            nn.init.xavier_uniform_(self.in_proj_weight)
            self.out_proj.reset_parameters()
            for bias in (self.in_proj_bias, self.out_proj.bias):
                if bias is not None:
                    nn.init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        need_weights: bool = False,
        *,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(context, weights), the weights None without ``need_weights``; both of x's type.

        Args:
            x: [bags, rows, embed_dim]; or [total, embed_dim] with ``cu_seqlens``; or nested, of the jagged layout.
            key_padding_mask, lengths, cu_seqlens, max_seqlen: as in :func:`daam_kernels.attention_pool`.

        Returns:
            context: [bags, embed_dim] for one hop, else [bags, hops, embed_dim].
            weights: [bags, hops, rows], or [total, hops] with ``cu_seqlens``, after dropout; of ``"multihead"`` the
                mean over heads.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        """
        strided = isinstance(x, Tensor) and x.is_nested and x.layout != torch.jagged  # such a one has no shape
        if isinstance(x, Tensor) and not strided and x.dim() and x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must have embed_dim={self.embed_dim} numbers in a row, got shape {list(x.shape)}")
        options = dict(
            key_padding_mask=key_padding_mask, lengths=lengths, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            dropout_p=self.dropout if self.training else 0.0, need_weights=need_weights, backend=self.backend,
        )  # fmt: skip
        if self.score == "multihead":
            context, weights = self._multihead(x, options)
        else:
            layers = [t for layer in (self.key, self.gate) if layer is not None for t in (layer.weight, layer.bias)]
            context, weights, _ = pool(x, self.query, *layers, scale=None, **options)
        context = context.to(x.dtype)
        return context.squeeze(1) if self.hops == 1 else context, None if weights is None else weights.to(x.dtype)

    def _multihead(self, x: Tensor, options: dict) -> tuple[Tensor, Tensor | None]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        query_weight, key_weight, value_weight = self.in_proj_weight.chunk(3)
        heads = (self.num_heads, self.embed_dim // self.num_heads)
        query = nn.functional.linear(self.query, query_weight, biases[0]).unflatten(-1, heads)
        # What every row's score has in common, the keys' bias, a softmax does not see.
        of_rows = torch.einsum("shd,hde->she", query, key_weight.unflatten(0, heads)).flatten(0, 1)
        context, weights, found = pool(x, of_rows, scale=heads[1] ** -0.5, **options)
        context = context.to(value_weight.dtype).unflatten(1, (self.hops, self.num_heads))
        context = torch.einsum("bshe,hde->bshd", context, value_weight.unflatten(0, heads)).flatten(2)
        if biases[2] is not None:
            context = context + biases[2]
        context = self.out_proj(context).masked_fill(~found[:, None, None], 0)
        if weights is None:
            return context, None
        if weights.is_nested:
            mean = weights.transpose(1, 2).values().unflatten(-1, (self.hops, self.num_heads)).mean(-1)
            return context, torch.nested.nested_tensor_from_jagged(mean, x.offsets()).transpose(1, 2)
        axis = 1 if weights.dim() == 3 else -1
        return context, weights.unflatten(axis, (self.hops, self.num_heads)).mean(axis + 1 if axis == 1 else -1)

    def penalty(self, weights: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """||A A^T - I||^2 of every bag, [bags]: how far the hops are from looking at different rows, one each.

        Source: Lin et al., arXiv 1703.03130, equation 8; it is added to the loss, times a number.

        Args:
            weights: A, from :meth:`forward`: [bags, hops, rows]; or [total, hops] with ``cu_seqlens``; or nested.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        """
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights must be a tensor, got {type(weights).__name__}: ask for need_weights=True")
        if weights.dtype not in FLOATING_TYPES:
            raise TypeError(f"weights must be float64, float32, bfloat16 or float16, got {weights.dtype}")
        if weights.is_nested:
            weights, cu_seqlens = weights.transpose(1, 2).values(), weights.offsets()
        axis, dims = (1, 3) if cu_seqlens is None else (-1, 2)
        if weights.dim() != dims or weights.shape[axis] != self.hops:
            taken = f"[bags, hops={self.hops}, rows]" if cu_seqlens is None else f"[total, hops={self.hops}]"
            raise ValueError(f"weights must have shape {taken}, got {list(weights.shape)}")
        if cu_seqlens is None:
            return penalty(weights)
        check_cu_seqlens(cu_seqlens, weights)
        check_packing(cu_seqlens, weights.shape[0], 1, None, 0)
        products = (weights.unsqueeze(1) * weights.unsqueeze(2)).flatten(1)
        sums = torch.segment_reduce(products, "sum", lengths=cu_seqlens.long().diff(), axis=0)
        identity = torch.eye(self.hops, dtype=weights.dtype, device=weights.device)
        return (sums.unflatten(1, (self.hops, self.hops)) - identity).square().sum((1, 2))

    def extra_repr(self) -> str:
        shown = f"{self.embed_dim}, hops={self.hops}, score={self.score!r}"
        if self.score == "multihead":
            shown += f", num_heads={self.num_heads}"
        return shown + (f", dropout={self.dropout}" if self.dropout else "")
