"""Grouped-query attention, the paper's and the published one, against its formulas, head by head in float64."""

from __future__ import annotations

import pytest
import torch
from paper import VARIANTS, randomised, sample, written_out
from support import relative_error
from torch import Tensor, nn

from daam_kernels.modules.grouped_query import GroupedQueryAttention

HEADS = [(8, 2), (6, 6), (4, 1), (6, 3)]  # groups, one query head each, one group, an odd number of groups


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("layer_norm, bias", [(None, True), (True, False), (False, True)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_formulas(variant, heads, layer_norm, bias, need_weights):
    embed_dim = 5 * heads[0]
    module = randomised(GroupedQueryAttention(embed_dim, *heads, variant=variant, layer_norm=layer_norm, bias=bias))
    assert (module.norm is not None) == (variant == "paper" if layer_norm is None else layer_norm)
    inputs = [sample(3, length, embed_dim, seed=i).requires_grad_() for i, length in enumerate((7, 4, 4))]
    state = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}

    y, weights = module(*inputs, need_weights=need_weights)
    truth, true_weights = written_out(state, *heads, variant, *inputs)
    assert relative_error(y, truth) < 1e-12
    assert y.shape == (3, 7, embed_dim)
    if need_weights:
        assert weights.shape == (3, heads[1] if variant == "paper" else heads[0], 7, 4)
        assert relative_error(weights, true_weights) < 1e-12
    else:
        assert weights is None

    g = sample(*y.shape, seed=9)
    ours = torch.autograd.grad(y, [*inputs, *module.parameters()], g)
    theirs = torch.autograd.grad(truth, [*inputs, *state.values()], g)
    names = ["query", "key", "value", *state]
    for name, a, b in zip(names, ours, theirs):
        # A bias of the keys moves all scores of a query alike: its gradient is 0 but for rounding.
        assert (a.abs().max() < 1e-12) if name == "k_proj.bias" else (relative_error(a, b) < 1e-11), name


def test_the_variants_differ_and_key_and_value_default_to_what_comes_before():
    module = randomised(GroupedQueryAttention(16, 4, 2, layer_norm=False))
    x, memory = sample(2, 5, 16), sample(2, 3, 16, seed=1)
    assert torch.equal(module(x)[0], module(x, x, x)[0])
    assert torch.equal(module(x, memory)[0], module(x, memory, memory)[0])
    other = randomised(GroupedQueryAttention(16, 4, 4, variant="gqa"))
    summed = randomised(GroupedQueryAttention(16, 4, 4, layer_norm=False))
    summed.load_state_dict(other.state_dict())  # equal heads: only the scale is left to differ
    with torch.no_grad():
        summed.q_proj.weight.mul_(2)
        summed.q_proj.bias.mul_(2)
    assert relative_error(summed(x)[0], other(x)[0]) < 1e-12  # 2 / head_dim = 1 / sqrt(head_dim) for head_dim = 4
    other.load_state_dict(summed.state_dict())
    assert relative_error(summed(x)[0], other(x)[0]) > 1e-3


@pytest.mark.parametrize("need_weights", [False, True])
def test_gqa_with_equal_heads_is_torchs_multihead_attention(need_weights):
    torchs = randomised(nn.MultiheadAttention(24, 4, batch_first=True))
    ours = GroupedQueryAttention(24, 4, 4, variant="gqa").double()
    with torch.no_grad():
        for i, projection in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            projection.weight.copy_(torchs.in_proj_weight[24 * i : 24 * i + 24])
            projection.bias.copy_(torchs.in_proj_bias[24 * i : 24 * i + 24])
    ours.out_proj.load_state_dict(torchs.out_proj.state_dict())
    q, k, v = sample(3, 5, 24), sample(3, 6, 24, seed=1), sample(3, 6, 24, seed=2)
    masks = dict(
        key_padding_mask=torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [2]]),
        attn_mask=torch.arange(6) > torch.arange(5)[:, None],
    )
    y, weights = ours(q, k, v, need_weights=need_weights, **masks)
    truth, true_weights = torchs(q, k, v, average_attn_weights=False, **masks)
    assert relative_error(y, truth) < 1e-12
    if need_weights:
        assert relative_error(weights, true_weights) < 1e-12


def masks(heads: int, batch: int, queries: int, keys: int) -> dict[str, dict]:
    """Arguments by name, none of which hides every key from a query."""
    rng = torch.Generator().manual_seed(3)

    def blocked(*shape):
        mask = torch.rand(shape, generator=rng) < 0.4
        mask[..., 0] = False
        return mask

    padding = torch.arange(keys) >= torch.tensor([keys, 2, 1])[:batch, None]
    floats = torch.randn(batch, heads, queries, keys, generator=rng)
    return {
        "padding": dict(key_padding_mask=padding),
        "2-D": dict(attn_mask=blocked(queries, keys)),
        "3-D": dict(attn_mask=blocked(batch, queries, keys)),
        "4-D": dict(attn_mask=blocked(batch, heads, queries, keys)),
        "sizes of 1": dict(attn_mask=blocked(batch, 1, 1, keys)),
        "added": dict(attn_mask=floats.double()),
        "added, of another type": dict(attn_mask=floats[0, 0]),
        "added, with infinities": dict(attn_mask=floats[0, 0].masked_fill(blocked(queries, keys), -torch.inf)),
        "causal": dict(is_causal=True),
        "padding and 3-D": dict(key_padding_mask=padding, attn_mask=blocked(batch, queries, keys)),
        "padding and added": dict(key_padding_mask=padding, attn_mask=floats.double()),
        "causal and padding": dict(is_causal=True, key_padding_mask=padding),
        "all": dict(is_causal=True, key_padding_mask=padding, attn_mask=floats),
    }


def added(arguments: dict, scores: tuple[int, int, int, int]) -> Tensor:
    """The masks as one tensor of the scores' shape, 0 or -inf or what a mask adds."""
    total = torch.zeros(scores, dtype=torch.float64)
    if "key_padding_mask" in arguments:
        total = total.masked_fill(arguments["key_padding_mask"][:, None, None], -torch.inf)
    if "attn_mask" in arguments:
        mask = arguments["attn_mask"]
        mask = mask[:, None] if mask.dim() == 3 else mask
        total = total.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else total + mask
    if arguments.get("is_causal"):
        total = total.masked_fill(torch.arange(scores[3]) > torch.arange(scores[2])[:, None], -torch.inf)
    return total


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", masks(2, 3, 5, 4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks(variant, name, need_weights):
    module = randomised(GroupedQueryAttention(24, 4, 2, variant=variant))
    maps = 2 if variant == "paper" else 4
    query, key = sample(3, 5, 24), sample(3, 4, 24, seed=1)
    arguments = masks(maps, 3, 5, 4)[name]
    y, weights = module(query, key, need_weights=need_weights, **arguments)
    mask = added(arguments, (3, maps, 5, 4))
    truth, true_weights = written_out(dict(module.named_parameters()), 4, 2, variant, query, key, key, mask)
    assert relative_error(y, truth) < 1e-12
    assert relative_error(y, written_out(dict(module.named_parameters()), 4, 2, variant, query, key, key)[0]) > 1e-3
    if need_weights:
        assert relative_error(weights, true_weights) < 1e-12
        assert not weights[mask == -torch.inf].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_query_without_keys_gets_nothing_and_no_gradient(variant, need_weights, floating, dtype):
    module = randomised(GroupedQueryAttention(16, 4, 2, variant=variant, layer_norm=False)).to(dtype)
    x = sample(2, 5, 16).to(dtype).requires_grad_()
    padding = torch.tensor([[True] * 5, [False] * 5])
    masks = dict(key_padding_mask=padding)
    if floating:
        masks = dict(attn_mask=torch.zeros(2, 1, 5).masked_fill(padding[:, None], -torch.inf))
    y, weights = module(x, need_weights=need_weights, **masks)
    assert torch.equal(y[0], module.out_proj.bias.expand(5, 16))
    assert y.isfinite().all() and (weights is None or not weights[0].any())
    y.square().sum().backward()
    assert not x.grad[0].any() and x.grad[1].any()
    assert all(p.grad.isfinite().all() for p in (x, *module.parameters()))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_training_only(need_weights):
    module = randomised(GroupedQueryAttention(16, 4, 2, dropout=0.5))
    x = sample(2, 50, 16)
    y, weights = module(x, need_weights=need_weights)
    assert not torch.equal(y, module(x)[0])
    if need_weights:
        kept = weights != 0
        assert 0.45 < kept.double().mean() < 0.55
        assert relative_error(weights[kept], 2 * module.eval()(x, need_weights=True)[1][kept]) < 1e-12
    assert torch.equal(module.eval()(x)[0], module(x)[0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_types(variant, heads, need_weights, dtype, tolerance):
    module = randomised(GroupedQueryAttention(8 * heads[0], *heads, variant=variant)).to(dtype)
    x = sample(4, 16, 8 * heads[0]).to(dtype)
    padding = torch.arange(16).expand(4, 16) >= torch.tensor([[16], [9], [3], [1]])
    y, weights = module(x, key_padding_mask=padding, need_weights=need_weights)
    assert y.dtype == dtype and (weights is None or weights.dtype == dtype)
    state = {name: p.detach().double() for name, p in module.named_parameters()}
    mask = added(dict(key_padding_mask=padding), (4, heads[1] if variant == "paper" else heads[0], 16, 16))
    truth, _ = written_out(state, *heads, variant, x.double(), x.double(), x.double(), mask)
    assert relative_error(y, truth) < tolerance


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, need_weights):
    module = randomised(GroupedQueryAttention(8, 4, 2, variant=variant))
    names, parameters = zip(*module.named_parameters())
    bias = sample(1, 2, 3, seed=2).requires_grad_()

    def call(query, key, bias, *values):
        arguments = dict(attn_mask=bias, need_weights=need_weights)
        y, weights = torch.func.functional_call(module, dict(zip(names, values)), (query, key), arguments)
        return (y, weights) if need_weights else y

    inputs = [sample(1, 2, 8).requires_grad_(), sample(1, 3, 8, seed=1).requires_grad_(), bias]
    assert torch.autograd.gradcheck(call, [*inputs, *(p.detach().requires_grad_() for p in parameters)])
