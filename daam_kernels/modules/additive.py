"""Additive attention as a module, and the weights of other libraries' layers in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import FLOATING_TYPES, check_choice, check_count, check_dense, check_dropout, shape_of
from ..additive import check_attn_mask, additive_attention
from ..backends import BACKENDS

_STREAMED = 1 << 24  # weights of a block, of all heads


class ProjectedKeys(NamedTuple):
    """Keys and values after their projections, as :meth:`AdditiveAttention.project_keys` makes them.

    ``key``: [batch, heads, Tk, hidden_dim // heads]; ``value``: [batch, heads, Tk, value_dim of a head].
    """

    key: Tensor
    value: Tensor
    is_batched: bool

    def append(self, more: ProjectedKeys) -> ProjectedKeys:
        """These keys and then ``more``, as a decoder that attends to its own past needs them."""
        if not isinstance(more, ProjectedKeys):
            raise TypeError(f"more must be ProjectedKeys, as project_keys gives them, got {type(more).__name__}")
        if more.is_batched != self.is_batched:
            raise ValueError("more must be batched where these keys are, and only there")
        pairs = (self.key, more.key), (self.value, more.value)
        for name, (own, other) in zip(("key", "value"), pairs):
            batch, heads, _, size = own.shape
            if other.dtype != own.dtype or (*other.shape[:2], other.shape[3]) != (batch, heads, size):
                raise ValueError(
                    f"more must have a {name} of {own.dtype} and shape [batch={batch}, heads={heads}, Tk, {size}], as "
                    f"these have, got {other.dtype} {shape_of(other)}"
                )
        return ProjectedKeys(*(torch.cat(pair, dim=2) for pair in pairs), self.is_batched)

    def reorder(self, batches: Tensor) -> ProjectedKeys:
        """Those of these ``batches``, int64 or int32 [new batch], of which some may be repeated: as beams go on."""
        if not self.is_batched:
            raise ValueError("batches can be chosen of batched keys alone, got keys without a batch")
        fits = isinstance(batches, Tensor) and batches.dtype in (torch.int64, torch.int32) and batches.dim() == 1
        if not fits:
            got = f"{batches.dtype} {shape_of(batches)}" if isinstance(batches, Tensor) else type(batches).__name__
            raise TypeError(f"batches must be a tensor of int64 or int32, [new batch], got {got}")
        return ProjectedKeys(*(t.index_select(0, batches) for t in (self.key, self.value)), True)


class _Call(NamedTuple):
    """What a call of the module attends with: batched, projected, checked against the module."""

    query: Tensor  # [batch, heads, Tq, hidden_dim // heads]
    keys: ProjectedKeys
    key_padding_mask: Tensor | None  # [batch, Tk]
    attn_mask: Tensor | None
    is_batched: bool


class AdditiveAttention(nn.Module):
    """Additive (Bahdanau) attention: score_ij = sum_c weight_c tanh(W_q query_i + b + W_k key_j)_c, softmax over keys.

    Fused: no tensor [batch, Tq, Tk, hidden_dim] is made; see :func:`daam_kernels.additive_attention`.

        attention = AdditiveAttention(input_dim=20, hidden_dim=32)
        context, weights = attention(query, key, value)

    For query [1, 20] and key, value [10, 20] the context is [1, 20], one vector per query, and the weights are [1, 10].
    (Code that sums over the other axis gets one number per key, which is no context.)

    Decoding step by step, with the keys projected once:

        keys = attention.project_keys(encoded)
        context, weights = attention(query_of_this_step, keys)
        keys = keys.reorder(beams)  # where a beam search goes on with some of the batch

    Source: Bahdanau et al., arXiv 1409.0473, appendix A.1.2.

    Args:
        input_dim: size of a query.
        hidden_dim: units of the scores, over all heads, which must divide it; None: ``input_dim``.
        num_heads: one head takes the values as they are. Several project values to ``input_dim``, cut them, and
            project what they found to ``input_dim`` again, as ``torch.nn.MultiheadAttention`` does.
        kdim, vdim: sizes of a key and of a value; None: ``input_dim``. One head takes values of any size unless
            ``vdim`` says which.
        dropout: the share of the weights that is dropped in training.
        bias: whether queries, and with several heads values and output, are projected with a bias. Keys need none: it
            would be added to the queries'.
        normalize: ``weight`` counts by its direction alone, times a learned length per head, ``gain``. Source: Salimans
            and Kingma, arXiv 1602.07868.
        fast_tanh, backend: as in :func:`daam_kernels.additive_attention`.

    Parameters: ``weight`` [num_heads, hidden_dim // num_heads]; ``query_proj`` and ``key_proj``, with several heads
    ``value_proj`` and ``out_proj``, all ``torch.nn.Linear``; with ``normalize`` ``gain`` [num_heads].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | None = None,
        num_heads: int = 1,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        normalize: bool = False,
        fast_tanh: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = input_dim if hidden_dim is None else hidden_dim
        kdim = input_dim if kdim is None else kdim
        for name, count in (("input_dim", input_dim), ("hidden_dim", hidden_dim), ("num_heads", num_heads)):
            check_count(name, count, 1)
        check_count("kdim", kdim, 1)
        if vdim is not None:
            check_count("vdim", vdim, 1)
        for name, size in (("hidden_dim", hidden_dim), ("input_dim", input_dim)):
            if size % num_heads:
                raise ValueError(f"{name} must be a multiple of num_heads={num_heads}, got {size}")
        self.input_dim, self.hidden_dim, self.num_heads = input_dim, hidden_dim, num_heads
        self.kdim, self.vdim = kdim, vdim
        self.dropout = check_dropout("dropout", dropout)
        self.fast_tanh = bool(fast_tanh)
        self.backend = check_choice("backend", backend, ("auto", *BACKENDS))
        options = dict(device=device, dtype=dtype)
        self.query_proj = nn.Linear(input_dim, hidden_dim, bias=bias, **options)
        self.key_proj = nn.Linear(kdim, hidden_dim, bias=False, **options)
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_dim // num_heads, **options))
        self.gain = nn.Parameter(torch.empty(num_heads, **options)) if normalize else None
        self.value_proj = self.out_proj = None
        if num_heads > 1:
            self.value_proj = nn.Linear(input_dim if vdim is None else vdim, input_dim, bias=bias, **options)
            self.out_proj = nn.Linear(input_dim, input_dim, bias=bias, **options)
        self.linear_out = None  # of OpenNMT's layer alone
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters anew: projections by Xavier's uniform rule, biases 0, ``weight`` as a Linear to one."""
        for projection in (self.query_proj, self.key_proj, self.value_proj, self.out_proj, self.linear_out):
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.gain is not None:
            nn.init.constant_(self.gain, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None).

        Args:
            query: [batch, Tq, input_dim], or [Tq, input_dim] with everything else unbatched too.
            key: [batch, Tk, kdim] or [Tk, kdim]; or what :meth:`project_keys` made of it.
            value: [batch, Tk, vdim] or [Tk, vdim]; None: the keys are the values, or the projected keys have them.
            key_padding_mask: [batch, Tk] or [Tk], boolean, True for keys that no query sees; or to be added.
            need_weights: False gives None in the place of the weights, and takes no memory for them.
            attn_mask: [Tq, Tk], [batch * num_heads, Tq, Tk], or broadcastable to [batch, num_heads, Tq, Tk]. Boolean,
                True where a query must not see a key; or added to the scores.
            average_attn_weights: weights averaged over the heads, else those of every head.
            is_causal: query i sees keys 0 to i alone. Not for decoding step by step, where a step may see all keys
                that are there.

        Returns:
            output: [batch, Tq, value's size], with several heads [batch, Tq, input_dim]; unbatched without batch.
            weights: [batch, Tq, Tk], or [batch, num_heads, Tq, Tk] without the average; after dropout.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        """
        call = self._call(query, key, value, key_padding_mask, attn_mask)
        results = additive_attention(
            call.query, call.keys.key, call.keys.value, self._weight(), attn_mask=call.attn_mask,
            key_padding_mask=call.key_padding_mask, is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0, need_weights=need_weights,
            average_weights=average_attn_weights, fast_tanh=self.fast_tanh, backend=self.backend,
        )  # fmt: skip
        output, weights = results if need_weights else (results, None)
        output = output.transpose(1, 2).flatten(2)
        if self.out_proj is not None:
            output = self.out_proj(output)
        if not call.is_batched:
            output = output.squeeze(0)
        if self.linear_out is not None:
            output = self.linear_out(torch.cat((output, query), -1))
        if weights is not None and not call.is_batched:
            weights = weights.squeeze(0)
        return output, weights

    @torch.no_grad()
    def weights_by_rows(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        rows: int | None = None,
    ) -> Iterator[Tensor]:
        """The weights that :meth:`forward` gives in evaluation, some queries at a time, without gradients.

        For weights that do not fit into memory: those of 65536 queries and keys take 17 GB. Without a mask of their
        size, memory is what one block takes. ``explain.plot_alignment`` draws them as they come.

        Args:
            query, key, key_padding_mask, attn_mask, average_attn_weights, is_causal: as of :meth:`forward`.
            rows: queries at a time; None: so many that a block has about 16 million weights.

        Returns:
            an iterator of weights, [batch, rows, Tk], or [batch, num_heads, rows, Tk] without the average; unbatched
            without batch. The last one may have fewer rows.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        """
        call = self._call(query, key, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        (batch, heads, queries, _), keys = call.query.shape, call.keys.key.shape[2]
        if attn_mask is not None:
            call = call._replace(attn_mask=check_attn_mask(call.attn_mask, call.query, (batch, heads, queries, keys)))
        if rows is None:
            rows = max(1, _STREAMED // (batch * heads * keys))
        check_count("rows", rows, 1)
        return self._blocks_of_weights(call, average_attn_weights, is_causal, rows)

    @torch.no_grad()
    def _blocks_of_weights(self, call: _Call, average: bool, is_causal: bool, rows: int) -> Iterator[Tensor]:
        key, value = call.keys.key, call.keys.value[..., :1]  # the output is not asked for
        there = torch.arange(key.shape[2], device=key.device)
        for first in range(0, call.query.shape[2], rows):
            query, mask = call.query[:, :, first : first + rows], call.attn_mask
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, first : first + rows]
            if is_causal:  # which the operator counts from its own first query
                later = there > torch.arange(first, first + query.shape[2], device=key.device).unsqueeze(-1)
                if mask is None or mask.dtype == torch.bool:
                    mask = later if mask is None else mask | later
                else:
                    mask = mask.masked_fill(later, -torch.inf)
            _, weights = additive_attention(
                query, key, value, self._weight(), attn_mask=mask, key_padding_mask=call.key_padding_mask,
                need_weights=True, average_weights=average, fast_tanh=self.fast_tanh, backend=self.backend,
            )  # fmt: skip
            yield weights if call.is_batched else weights.squeeze(0)

    def project_keys(self, key: Tensor, value: Tensor | None = None) -> ProjectedKeys:
        """Keys and values as :meth:`forward` uses them, to be projected once and passed as ``key`` at every step.

        Args and errors are as there.
        """
        is_batched = self._check_input("key", key, self.kdim, "kdim")
        if value is None:
            value = key
        vdim = self.vdim if self.value_proj is None else self.value_proj.in_features
        if isinstance(value, Tensor) and value.dim() != key.dim():
            raise ValueError(f"value must have key's {key.dim()} dimensions, got shape {shape_of(value)}")
        self._check_input("value", value, vdim, "vdim")
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"value must have one row for each key, {shape_of(key)[:-1]}, got shape {shape_of(value)}")
        if not is_batched:
            key, value = key.unsqueeze(0), value.unsqueeze(0)
        key = self._heads(self.key_proj(key))
        if self.value_proj is not None:
            value = self.value_proj(value)
        elif value.dtype != key.dtype and torch.is_autocast_enabled(value.device.type):
            value = value.to(key.dtype)
        return ProjectedKeys(key, self._heads(value), is_batched)

    def _call(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> _Call:
        is_batched = self._check_input("query", query, self.input_dim, "input_dim")
        if not isinstance(key, ProjectedKeys):
            key = self.project_keys(key, value)
        elif value is not None:
            raise ValueError("value must be None where key is ProjectedKeys, which have the values already")
        if key.is_batched != is_batched:
            names = "[batch, T, size]", "[T, size]"
            first, second = names if is_batched else names[::-1]
            raise ValueError(f"query and key must both be batched or neither, got query {first} and key {second}")
        batch = query.shape[0] if is_batched else 1
        if key.key.shape[0] != batch:
            raise ValueError(f"key must have query's batch of {batch}, got {key.key.shape[0]}")
        if isinstance(key_padding_mask, Tensor) and not is_batched:
            if key_padding_mask.dim() != 1:
                keys = key.key.shape[2]
                raise ValueError(
                    f"key_padding_mask must have shape [Tk={keys}] where query is unbatched, "
                    f"got {shape_of(key_padding_mask)}"
                )
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if isinstance(attn_mask, Tensor):
            check_dense("attn_mask", attn_mask)
        if isinstance(attn_mask, Tensor) and attn_mask.dim() == 3 and len(attn_mask) == batch * self.num_heads:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        projected = self._heads(self.query_proj(query if is_batched else query.unsqueeze(0)))
        return _Call(projected, key, key_padding_mask, attn_mask, is_batched)

    def _check_input(self, name: str, t: Tensor, size: int | None, of: str) -> bool:
        """Whether the input is batched; ``size`` None where any will do."""
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATING_TYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        if t.is_nested:
            raise TypeError(f"{name} must be one dense tensor, got a nested one: pad it, with a key_padding_mask")
        check_dense(name, t)
        expected = of if size is None else f"{of}={size}"
        if t.dim() not in (2, 3) or size is not None and t.shape[-1] != size:
            raise ValueError(f"{name} must have shape [batch, T, {expected}] or [T, {expected}], got {shape_of(t)}")
        if name == "key" and t.shape[-2] == 0:
            raise ValueError(f"key must have at least 1 key, got an empty set of keys, shape {shape_of(t)}")
        if t.device != self.weight.device:
            raise ValueError(f"{name} must be on the module's device, {self.weight.device}, got {t.device}")
        own = self.query_proj.weight.dtype if isinstance(self.query_proj, nn.Linear) else t.dtype
        if t.dtype != own and not torch.is_autocast_enabled(t.device.type):
            raise TypeError(f"{name} must be of the module's type, {own}, got {t.dtype}")
        return t.dim() == 3

    def _heads(self, t: Tensor) -> Tensor:
        """[batch, T, size] as [batch, heads, T, size of a head]."""
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _weight(self) -> Tensor:
        if self.gain is None:
            return self.weight
        return nn.functional.normalize(self.weight, dim=1) * self.gain.unsqueeze(1)

    @classmethod
    def from_keras(cls, weights: Sequence, dim: int | None = None, **options) -> AdditiveAttention:
        """The module that computes what Keras' layer ``AdditiveAttention`` does: score_ij = sum scale tanh(q_i + k_j).

        Nothing is projected. Keras passes [query, value, key], in this order, and its masks are True for what may be
        seen; here they are True for what must not.

        Args:
            weights: the layer's ``get_weights()``: [scale], scale of shape [dim], or [] with ``use_scale=False``.
            dim: the size of queries and keys, needed where there is no scale.
            options: ``dropout``, ``fast_tanh``, ``backend``, ``device``, ``dtype`` of the module.
        """
        if not isinstance(weights, Sequence) or len(weights) > 1:
            raise ValueError("weights must be [scale] or [], as get_weights() of Keras' AdditiveAttention gives them")
        if not weights and dim is None:
            raise ValueError("dim must be given for a layer without scale, got None")
        if dim is not None:
            check_count("dim", dim, 1)
        try:
            scale = torch.as_tensor(weights[0]) if weights else torch.ones(dim)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"weights must be [scale], scale an array, got {weights[0]!r}") from error
        if scale.dim() != 1 or len(scale) == 0 or dim not in (None, len(scale)):
            expected = "[dim]" if dim is None else f"[dim={dim}]"
            raise ValueError(f"weights must be [scale], scale of shape {expected}, got {shape_of(scale)}")
        module = cls(len(scale), **options)
        module.query_proj, module.key_proj = nn.Identity(), nn.Identity()
        with torch.no_grad():
            module.weight.copy_(scale)
        module.weight.requires_grad_(bool(weights))
        return module

    @classmethod
    def from_opennmt(cls, state_dict: Mapping[str, Tensor], **options) -> AdditiveAttention:
        """The module that computes what OpenNMT's ``GlobalAttention(dim, attn_type="mlp")`` does.

        That is, with its names, linear_out([sum_j p_ij memory_j; query_i]), p_i = softmax_j(v . tanh(linear_query
        query_i + linear_context memory_j)). The module takes (query, memory) for its (source, memory_bank), with the
        batch first.

        Args:
            state_dict: of the layer: ``linear_query.weight``, ``linear_query.bias``, ``linear_context.weight``,
                ``v.weight``, ``linear_out.weight``, ``linear_out.bias``.
            options: ``dropout``, ``fast_tanh``, ``backend``, ``device``, ``dtype`` of the module.
        """
        dim = _check_opennmt(state_dict)
        if "num_heads" in options:
            raise TypeError(f"num_heads must not be given: the layer has one head, got {options['num_heads']!r}")
        module = cls(dim, **options)
        module.linear_out = nn.Linear(2 * dim, dim, device=module.weight.device, dtype=module.weight.dtype)
        own = {"linear_query": "query_proj", "linear_context": "key_proj", "v.weight": "weight"}
        renamed = {}
        for name, tensor in state_dict.items():
            for old, new in own.items():
                name = name.replace(old, new)
            renamed[name] = tensor
        module.load_state_dict(renamed)
        return module

    def extra_repr(self) -> str:
        shown = f"input_dim={self.input_dim}, hidden_dim={self.hidden_dim}, num_heads={self.num_heads}"
        defaults = {"dropout": 0.0, "fast_tanh": False, "backend": "auto"}
        own = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join((shown, *(f"{name}={value!r}" for name, value in own.items())))


def _check_opennmt(state_dict: Mapping[str, Tensor]) -> int:
    """The layer's dim."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping from names to tensors, got {type(state_dict).__name__}")
    query = state_dict.get("linear_query.weight")
    dim = query.shape[-1] if isinstance(query, Tensor) and query.dim() else 0
    shapes = {
        "linear_query.weight": [dim, dim], "linear_query.bias": [dim], "linear_context.weight": [dim, dim],
        "v.weight": [1, dim], "linear_out.weight": [dim, 2 * dim], "linear_out.bias": [dim],
    }  # fmt: skip
    if set(state_dict) != set(shapes):
        raise ValueError(
            f"state_dict must have the names {', '.join(sorted(shapes))}, as GlobalAttention('mlp') has without "
            f"coverage, got {', '.join(sorted(map(str, state_dict)))}"
        )
    for name, shape in shapes.items():
        tensor = state_dict[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict must hold tensors, got {type(tensor).__name__} for {name}")
        if shape_of(tensor) != shape:
            taken = "[dim, dim]" if name == "linear_query.weight" else f"{shape}, for linear_query.weight's dim={dim}"
            raise ValueError(f"state_dict must hold {name} of shape {taken}, got {shape_of(tensor)}")
    return dim
