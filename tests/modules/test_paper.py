"""The paper's attention and decoder as modules: what they are made of, copies, types, compilation."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from paper import VARIANTS, linear, randomised, sample, written_out
from support import relative_error
from torch import Tensor, nn

from daam_kernels import FusedMultiHeadDAAM, density_attention
from daam_kernels.modules.grouped_query import GroupedQueryAttention
from daam_kernels.modules.paper import DensityAdaptiveTransformer, GroupedQueryDAAM


def test_daam_then_attention():
    module = randomised(GroupedQueryDAAM(16, 4, 2, input_dim=6, daam=FusedMultiHeadDAAM(-2, 3, 2)))
    x = sample(2, 9, 6)
    state = module.state_dict()
    density, weights = density_attention(x, module.daam.mean_offsets, module.daam.c, norm_axis=1, return_weights=True)
    embedded = linear(state, "embed_transform", density)
    gqa = {key.removeprefix("gqa."): value for key, value in state.items() if key.startswith("gqa.")}
    truth, attention = written_out(gqa, 4, 2, "paper", embedded, embedded, embedded)
    y, details = module(x, return_attention_details=True)
    assert relative_error(y, truth) < 1e-12 and relative_error(module(x), truth) < 1e-12
    assert list(details) == ["daam", "gqa"] and not any(t.requires_grad for t in details.values())
    assert torch.equal(details["daam"], weights)
    assert relative_error(details["gqa"], attention) < 1e-12
    assert torch.autograd.gradcheck(lambda x: module(x), [sample(1, 6, 6).requires_grad_()])


@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_reach_the_attention(variant):
    module = GroupedQueryDAAM(
        24, 6, 3, variant=variant, dropout=0.25, bias=False, layer_norm=True, layer_norm_eps=1e-3, gamma_init=0.5
    )
    assert isinstance(module.daam, FusedMultiHeadDAAM) and module.embed_transform is None
    assert (module.daam.norm_axis, module.daam.num_heads, module.daam.num_gaussians) == (-2, 8, 4)
    gqa = module.gqa
    assert (gqa.query_heads, gqa.kv_heads, gqa.variant, gqa.dropout) == (6, 3, variant, 0.25)
    assert gqa.norm.eps == 1e-3 and gqa.gamma_init == 0.5
    assert all(p.bias is None for p in (gqa.q_proj, gqa.k_proj, gqa.v_proj, gqa.out_proj))
    assert repr(gqa).startswith("GroupedQueryAttention(\n  embed_dim=24, query_heads=6, kv_heads=3")
    assert "dropout=0.25, gamma_init=0.5" in repr(gqa)


def test_masks_reach_both_attentions():
    daam = FusedMultiHeadDAAM(-2, 1, 2, padding_stats="exclude")
    module = randomised(GroupedQueryDAAM(16, 4, 2, daam=daam))
    x = sample(3, 9, 16)
    lengths = torch.tensor([9, 6, 4])
    padding = torch.arange(9) >= lengths[:, None]
    y, details = module(x, True, key_padding_mask=padding)
    for i, length in enumerate(lengths):
        alone, alone_details = module(x[i : i + 1, :length], True)
        assert relative_error(y[i, :length], alone[0]) < 1e-12
        assert relative_error(details["daam"][i, :length], alone_details["daam"][0]) < 1e-12
        assert relative_error(details["gqa"][i, :, :length, :length], alone_details["gqa"][0]) < 1e-12
    causal = module(x, True, is_causal=True)[1]["gqa"]
    assert torch.equal(causal, module(x, True, attn_mask=torch.ones(9, 9, dtype=torch.bool).triu(1))[1]["gqa"])
    assert not causal.triu(1).any() and details["gqa"].triu(1).any()


def test_initialisation():
    torch.manual_seed(0)
    gqa = GroupedQueryAttention(256, 8, 2, gamma_init=3.0)
    deviations = {"q_proj": (2 / 512) ** 0.5, "k_proj": (2 / 320) ** 0.5, "v_proj": 3 * (2 / 320) ** 0.5}
    for name, deviation in (*deviations.items(), ("out_proj", 3 * (2 / 320) ** 0.5)):
        projection = getattr(gqa, name)
        assert abs(projection.weight.std() / deviation - 1) < 0.02 and not projection.bias.any()
    decoder = DensityAdaptiveTransformer(nn.Identity(), 4, 36, 10, hidden_channels=32)
    for layer, fans in ((decoder.conv1, 36 * 9), (decoder.conv2, 36 * 9), (decoder.fc, 4 * 36 + 10)):
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    before = [p.detach().clone() for p in (*gqa.parameters(), *decoder.parameters())]
    for parameter in (*gqa.parameters(), *decoder.parameters()):
        nn.init.constant_(parameter, 7.0)
    gqa.reset_parameters()
    decoder.reset_parameters()
    after = list((*gqa.parameters(), *decoder.parameters()))
    assert not any((p == 7).any() for p in after)
    assert all(p.dim() == 1 or not torch.equal(p, b) for p, b in zip(after, before))


def test_the_decoder_takes_the_mean_over_time_first():
    model = DensityAdaptiveTransformer(FusedMultiHeadDAAM(1, 2, 3), 6, 16, 5, hidden_channels=4).double()
    x = sample(2, 6, 7, 16)
    assert torch.equal(model(x), model(x.mean(2)))
    assert model.grid == (4, 4)


@pytest.mark.parametrize("feature_size, grid", [(1024, (32, 32)), (5120, (64, 80)), (384, (16, 24)), (13, (1, 13))])
def test_grid_of_the_decoder(feature_size, grid):
    assert DensityAdaptiveTransformer(nn.Identity(), 1, feature_size, 2, device="meta").grid == grid


MODULES = {
    "attention": (lambda **options: GroupedQueryAttention(16, 4, 2, **options), (16,)),
    "gqa": (lambda **options: GroupedQueryAttention(16, 4, 2, variant="gqa", **options), (16,)),
    "daam": (lambda **options: GroupedQueryDAAM(16, 4, 2, input_dim=12, **options), (12,)),
    "decoder": (
        lambda **options: DensityAdaptiveTransformer(
            GroupedQueryDAAM(16, 4, 2, variant="gqa", **options), 20, 16, 3, hidden_channels=4, **options
        ),
        (16,),
    ),
}


@pytest.fixture(params=MODULES)
def make(request):
    return MODULES[request.param][0]


@pytest.fixture
def x(request):
    features = MODULES[request.node.callspec.params["make"]][1]
    return torch.randn(2, 20, *features, generator=torch.Generator().manual_seed(4))


def output(module, *arguments) -> Tensor:
    y = module(*arguments)
    return y[0] if isinstance(y, tuple) else y


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_compute_the_same(make, x, copied):
    module = make()
    other = copied(module)
    assert torch.equal(output(other, x), output(module, x))
    assert repr(other) == repr(module)


def test_state_dict_round_trip_through_a_file_of_weights_only(make, x):
    module, other = make(), make()
    assert not torch.equal(output(other, x), output(module, x))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert str(other.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
    assert torch.equal(output(other, x), output(module, x))
    assert other.load_state_dict({}, strict=False).missing_keys == list(module.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_parameters_and_input(make, x, dtype):
    module = make()
    y = output(module, x)
    converted = copy.deepcopy(module).to(dtype)
    assert output(converted, x.to(dtype)).dtype == dtype
    assert relative_error(output(converted, x.to(dtype)), y.double()) < 0.03
    assert {p.dtype for p in make(dtype=dtype).parameters()} == {dtype}


def test_autocast(make, x):
    module = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = output(module, x)
    assert relative_error(y, output(module, x).double()) < 0.03


def test_meta_device(make, x):
    module = make(device="meta")
    assert all(p.is_meta for p in module.parameters())
    assert output(module, x.to("meta")).shape == output(make(), x).shape
    module.load_state_dict(make().state_dict(), assign=True)
    assert output(module, x).isfinite().all()


def test_empty_batch(make, x):
    module = make()
    y = output(module, x[:0].requires_grad_())
    assert y.shape == (0, *output(module, x).shape[1:])
    y.sum().backward()
    assert all(not p.grad.any() for p in module.parameters())


def test_training_changes_every_parameter(make, x):
    module = make()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    y = output(module, x)
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()
    assert [name for name, p in module.named_parameters() if torch.equal(p, before[name])] == []


def test_compiles_without_graph_breaks(make, x):
    module = make()
    padding = torch.arange(20).expand(2, 20) >= torch.tensor([[20], [11]])
    calls = [{}]
    if not isinstance(module, DensityAdaptiveTransformer):
        mask = torch.zeros(20, 20).fill_diagonal_(-1.0)
        calls += [dict(key_padding_mask=padding), dict(key_padding_mask=padding, attn_mask=mask, is_causal=True)]
    if isinstance(module, GroupedQueryAttention):
        calls += [dict(need_weights=True, is_causal=True)]
    else:
        calls += [dict(return_attention_details=True)]
    for keywords in calls:
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got, truth = compiled(x, **keywords), module(x, **keywords)
        got, truth = (t if isinstance(t, tuple) else (t,) for t in (got, truth))
        torch.testing.assert_close(got[0], truth[0])
        grads = [torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (got[0], truth[0])]
        torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces(make, x):
    """torch.jit.trace, as older exporters use it, sees sizes as tensors."""
    module = make().eval().requires_grad_(False)
    traced = torch.jit.trace(lambda x: output(module, x), x)
    torch.testing.assert_close(traced(x), output(module, x))
