"""What the paper's modules refuse, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from daam_kernels.modules.grouped_query import GroupedQueryAttention
from daam_kernels.modules.paper import DensityAdaptiveTransformer, GroupedQueryDAAM


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: GroupedQueryDAAM(0), ValueError, "embed_dim must be an int of at least 1, got 0"),
        (lambda: GroupedQueryDAAM(512, 8.0), ValueError, "query_heads must be an int of at least 1, got 8.0"),
        (lambda: GroupedQueryDAAM(512, 8, 0), ValueError, "kv_heads must be an int of at least 1, got 0"),
        (lambda: GroupedQueryDAAM(512, 8, 3), ValueError, "query_heads must be a multiple of kv_heads=3, got 8"),
        (lambda: GroupedQueryDAAM(512, 2, 4), ValueError, "query_heads must be a multiple of kv_heads=4, got 2"),
        (lambda: GroupedQueryDAAM(510, 8, 2), ValueError, "embed_dim must be a multiple of query_heads=8, got 510"),
        (lambda: GroupedQueryDAAM(512, variant="no"), ValueError, "variant must be one of paper, gqa, got 'no'"),
        (lambda: GroupedQueryDAAM(512, dropout=1), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: GroupedQueryDAAM(512, dropout="a"), TypeError, "dropout must be a number, got str"),
        (lambda: GroupedQueryDAAM(512, layer_norm_eps=-1), ValueError, "layer_norm_eps must not be negative, got -1"),
        (lambda: GroupedQueryDAAM(512, gamma_init=None), TypeError, "gamma_init must be a number, got NoneType"),
        (lambda: GroupedQueryDAAM(512, gamma_init=-1), ValueError, "gamma_init must not be negative, got -1"),
        (lambda: GroupedQueryDAAM(512, input_dim=0), ValueError, "input_dim must be an int of at least 1, got 0"),
        (lambda: GroupedQueryDAAM(512, daam=8), TypeError, "daam must be a torch.nn.Module, got 8"),
        (
            lambda: DensityAdaptiveTransformer(None, 24, 1024, 4),
            TypeError,
            "attention must be a torch.nn.Module, got N",
        ),
        (lambda: decoder(num_layers=0), ValueError, "num_layers must be an int of at least 1, got 0"),
        (lambda: decoder(feature_size=1.5), ValueError, "feature_size must be an int of at least 1, got 1.5"),
        (lambda: decoder(num_classes=True), ValueError, "num_classes must be an int of at least 1, got True"),
        (lambda: decoder(hidden_channels=0), ValueError, "hidden_channels must be an int of at least 1, got 0"),
        (lambda: decoder(grid=(4, 5)), ValueError, r"product is feature_size=16, got \(4, 5\)"),
        (lambda: decoder(grid=(-4, -4)), ValueError, r"product is feature_size=16, got \(-4, -4\)"),
        (lambda: decoder(grid=16), TypeError, "grid must be two ints, height and width, or None, got 16"),
        (lambda: decoder(grid=(2.0, 8)), TypeError, r"grid must be two ints, .*got \(2.0, 8\)"),
    ],
)
def test_constructor_names_what_does_not_fit(make, error, words):
    with pytest.raises(error, match=words):
        make()


def decoder(num_layers=3, feature_size=16, num_classes=2, **keywords):
    return DensityAdaptiveTransformer(
        keywords.pop("attention", nn.Identity()), num_layers, feature_size, num_classes, **keywords
    )


X = torch.randn(2, 20, 16)

HIDDEN = torch.zeros(2, 20, dtype=torch.bool)

ATTENTION = GroupedQueryAttention(16, 4, 2)

GQDAAM = GroupedQueryDAAM(16, 4, 2)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ATTENTION([1.0]), TypeError, "query must be a tensor, got list"),
        (lambda: ATTENTION(X[0]), ValueError, r"query must have shape \[batch, length, embed_dim=16\], got \[20, 16\]"),
        (lambda: ATTENTION(X[..., :8]), ValueError, r"query must have shape .*, got \[2, 20, 8\]"),
        (lambda: ATTENTION(X, X[:1]), ValueError, r"key must have shape \[batch=2, length, .*, got \[1, 20, 16\]"),
        (lambda: ATTENTION(X, X, X[:, :3]), ValueError, r"value must have the key's shape .*, got \[2, 3, 16\]"),
        (lambda: ATTENTION(X, X, 3), TypeError, "value must be a tensor, got int"),
        (
            lambda: ATTENTION(X, key_padding_mask=HIDDEN.float()),
            TypeError,
            "key_padding_mask must be a boolean tensor, True where a key is padding, got torch.float32",
        ),
        (
            lambda: ATTENTION(X, X[:, :7], key_padding_mask=HIDDEN),
            ValueError,
            r"key_padding_mask must have shape \[batch=2, key_length=7\], got \[2, 20\]",
        ),
        (
            lambda: ATTENTION(X, attn_mask=HIDDEN),
            ValueError,
            r"attn_mask must have shape \[20, 20\], \[2, 20, 20\] or \[2, 2, 20, 20\], or 1 .*, got \[2, 20\]",
        ),
        (lambda: ATTENTION(X, attn_mask=HIDDEN[0]), ValueError, r"attn_mask must have shape .*, got \[20\]"),
        (
            lambda: ATTENTION(X, attn_mask=HIDDEN.int()),
            TypeError,
            "attn_mask must be a boolean tensor, .* or one of a floating-point type, .* got torch.int32",
        ),
        (lambda: ATTENTION(X, attn_mask="causal"), TypeError, "attn_mask must be .*, got str"),
        (lambda: GQDAAM("x"), TypeError, "x must be a tensor, got str"),
        (lambda: GQDAAM(X[0]), ValueError, r"x must have shape \[batch, length, 16\], got \[20, 16\]"),
        (
            lambda: GroupedQueryDAAM(16, 4, 2, input_dim=5)(X),
            ValueError,
            r"x must have shape \[batch, length, 5\], got \[2, 20, 16\]",
        ),
        (lambda: GQDAAM(X, key_padding_mask=HIDDEN[:1]), ValueError, r"key_padding_mask must have .*got \[1, 20\]"),
        (lambda: GQDAAM(X, key_padding_mask=1), TypeError, "key_padding_mask must be a boolean tensor, .*got int"),
        (lambda: GQDAAM(X[:, :15]), ValueError, "at least 2 elements per head"),
        (lambda: decoder()(None), TypeError, "x must be a tensor, got NoneType"),
        (
            lambda: decoder()(X),
            ValueError,
            r"x must have shape \[batch, num_layers=3, features\] or .*got \[2, 20, 16\]",
        ),
        (
            lambda: decoder(20, 8)(X),
            ValueError,
            r"attention must return shape \[batch=2, num_layers=20, feature_size=8\], got \[2, 20, 16\]",
        ),
        (lambda: decoder(20, attention=ATTENTION)(X), ValueError, "attention must return shape .*, got tuple"),
    ],
)
def test_forward_names_what_does_not_fit(call, error, words):
    with pytest.raises(error, match=words):
        call()
