"""Numbers that nothing can hold, and tensors that are not dense: refused by name, wherever one is taken."""

import pytest
import torch

from daam_kernels import (
    AdditiveAttention,
    AttentionMechanism,
    AttentionPool,
    DensityAdaptiveTransformer,
    FusedDAAM,
    FusedDensityGate,
    FusedMultiHeadDAAM,
    FusedMultiHeadFeatureDAAM,
    FusedMultiHeadGAAM,
    GroupedQueryAttention,
    GroupedQueryDAAM,
    additive_attention,
    attention_pool,
    density_attention,
    explain,
)

HUGE = 10**400
X, OFFSETS, C = torch.arange(16.0).view(2, 8), torch.zeros(2, 3), torch.ones(2, 3)
ROWS, ENDS = torch.ones(2, 3), torch.tensor([0, 2])
HEADS = torch.ones(1, 1, 2, 4)


def fit(**options):
    AttentionMechanism(3, 2).fit([X[:, :3], X[:, 3:6]], [0, 1], progress=False, **options)


@pytest.mark.parametrize(
    "name, call",
    [
        ("eps", lambda n: density_attention(X, OFFSETS, C, eps=n)),
        ("padding_value", lambda n: density_attention(X, OFFSETS, C, padding_value=n)),
        ("max_seqlen", lambda n: attention_pool(ROWS, ROWS[0], cu_seqlens=ENDS, max_seqlen=n)),
        ("scale", lambda n: attention_pool(ROWS[None], ROWS[0], scale=n)),
        ("dropout_p", lambda n: attention_pool(ROWS[None], ROWS[0], dropout_p=n)),
        ("scale", lambda n: additive_attention(HEADS, HEADS, HEADS, HEADS[0, 0, :1], scale=n)),
        ("num_heads", lambda n: FusedMultiHeadDAAM(1, n, 3)),
        ("eps", lambda n: FusedMultiHeadDAAM(1, 2, 3, eps=n)),
        ("padding_value", lambda n: FusedMultiHeadDAAM(1, 2, 3, padding_value=n)),
        ("mean_offset_init", lambda n: FusedDAAM(1, 2, 3, mean_offset_init=n)),
        ("initial_c", lambda n: FusedMultiHeadGAAM(1, 2, 3, initial_c=n)),
        ("alpha", lambda n: FusedDensityGate(4, alpha=n)),
        ("c", lambda n: FusedMultiHeadFeatureDAAM(24, 4, c=n)),
        ("eps", lambda n: FusedMultiHeadFeatureDAAM(24, 4, eps=n)),
        ("dropout", lambda n: GroupedQueryAttention(16, dropout=n)),
        ("gamma_init", lambda n: GroupedQueryAttention(16, gamma_init=n)),
        ("layer_norm_eps", lambda n: GroupedQueryAttention(16, layer_norm_eps=n)),
        ("hidden_dim", lambda n: AdditiveAttention(4, n)),
        ("dropout", lambda n: AttentionPool(4, dropout=n)),
        ("learning_rate", lambda n: fit(learning_rate=n)),
        ("penalty", lambda n: fit(penalty=n)),
        ("limit", lambda n: explain.collect(FusedMultiHeadDAAM(1, 2, 3), [X], limit=n, progress=False)),
        ("rstd", lambda n: explain.plot_density(FusedMultiHeadDAAM(1, 2, 3), rstd=n)),
    ],
)
def test_an_int_beyond_every_type_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name} must be .* got "):
        call(HUGE)


@pytest.mark.parametrize("value", [1e300, -(10**30)])
@pytest.mark.parametrize(
    "name, make",
    [
        ("mean_offset_init", FusedDAAM),
        ("initial_c", FusedMultiHeadGAAM),
        ("alpha", lambda **options: FusedDensityGate(4, **options)),
        ("c", lambda *_, **options: FusedMultiHeadFeatureDAAM(24, 4, **options)),
    ],
)
def test_what_the_parameters_type_cannot_hold_is_refused_by_name(name, make, value):
    shape = () if name in ("alpha", "c") else (1, 2, 3)
    make(*shape, **{name: value}, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{name} must be within the range of the parameters' type, torch.float16"):
        make(*shape, **{name: value}, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, "float32"])
@pytest.mark.parametrize(
    "make, arguments",
    [
        (FusedMultiHeadDAAM, (1, 2, 3)),
        (FusedMultiHeadGAAM, (1, 2, 3)),
        (FusedDensityGate, (4,)),
        (FusedMultiHeadFeatureDAAM, (24, 4)),
    ],
)
def test_parameters_are_of_a_floating_point_type(make, arguments, dtype):
    with pytest.raises(TypeError, match=f"dtype must be a floating-point type or None, got {dtype!r}"):
        make(*arguments, dtype=dtype)


MODULES = [
    FusedMultiHeadDAAM(1, 2, 3),
    FusedMultiHeadDAAM(1, 2, 3, eps=[1e-3, 1e-5]),
    FusedMultiHeadFeatureDAAM(24, 16),
    FusedDensityGate(24),
    GroupedQueryAttention(16, 4, 2),
    GroupedQueryDAAM(16, 4, 2),
    DensityAdaptiveTransformer(GroupedQueryDAAM(16, 4, 2), 24, 16, 3, hidden_channels=4),
    AdditiveAttention(16, 8),
    AttentionPool(16),
]
BATCH = torch.ones(2, 24, 16)
NOT_DENSE = {
    "strided": lambda t: torch.nested.nested_tensor(list(t)),
    "sparse": torch.Tensor.to_sparse,
    "csr": lambda t: t[0].to_sparse_csr(),
}


def call(module, x, **masks):
    return module(x, x, **masks) if isinstance(module, AdditiveAttention) else module(x, **masks)


@pytest.mark.parametrize("form", NOT_DENSE)
@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_an_input_that_is_not_dense_is_refused_by_name(module, form):
    with pytest.raises((TypeError, ValueError), match="^(x|query|eps) must be "):
        call(module, NOT_DENSE[form](BATCH))


@pytest.mark.parametrize("form", ["strided", "sparse"])
@pytest.mark.parametrize(
    "name, module",
    [
        ("mask", FusedDensityGate(24)),
        *((name, GroupedQueryAttention(16, 4, 2)) for name in ("key_padding_mask", "attn_mask")),
        ("key_padding_mask", GroupedQueryDAAM(16, 4, 2)),
        ("attn_mask", AdditiveAttention(16, 8)),
    ],
)
def test_a_mask_that_is_not_dense_is_refused_by_name(name, module, form):
    with pytest.raises(TypeError, match=f"^{name} must be one dense tensor"):
        call(module, BATCH, **{name: NOT_DENSE[form](torch.ones(2, 24) > 0)})


def test_ragged_sequences_are_refused_by_grouped_query_attention():
    ragged = torch.nested.nested_tensor([torch.ones(5, 16), torch.ones(3, 16)], layout=torch.jagged)
    for module, name in ((GroupedQueryAttention(16, 4, 2), "query"), (GroupedQueryDAAM(16, 4, 2), "x")):
        with pytest.raises(TypeError, match=f"{name} must be one dense tensor, got a nested one"):
            module(ragged)
    with pytest.raises(TypeError, match="query must be float64, .* got torch.int64"):
        GroupedQueryAttention(16, 4, 2)(BATCH.long())
