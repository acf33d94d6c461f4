"""The paper's grouped-query attention and decoder against their formulas, written out below head by head in float64."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support import relative_error
from torch import Tensor, nn

from daam_kernels import FusedMultiHeadDAAM, FusedMultiHeadFeatureDAAM, density_attention
from daam_kernels.modules.grouped_query import GroupedQueryAttention
from daam_kernels.modules.paper import DensityAdaptiveTransformer, GroupedQueryDAAM

VARIANTS = ("paper", "gqa")
HEADS = [(8, 2), (6, 6), (4, 1), (6, 3)]  # groups, one query head each, one group, an odd number of groups


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with every parameter drawn, so that none is 0 or 1 by chance of its initialisation."""
    rng = torch.Generator().manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
            if parameter.dim() > 1:
                parameter.div_(parameter[0].numel() ** 0.5)
            if name.endswith(".c") or name == "norm.weight":
                parameter.exp_()
    return module


def linear(state: dict, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"])
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def written_out(
    state: dict, query_heads: int, kv_heads: int, variant: str, query: Tensor, key: Tensor, value: Tensor, mask=None
) -> tuple[Tensor, Tensor]:
    """(output, weights) by the formulas; ``mask`` [batch, heads, query, key] is added to the scores."""
    q, k, v = (linear(state, f"{name}_proj", t) for name, t in (("q", query), ("k", key), ("v", value)))
    head_dim = q.shape[-1] // query_heads
    q, k, v = (t.split(head_dim, -1) for t in (q, k, v))
    group = query_heads // kv_heads
    if variant == "paper":
        q = [torch.stack(q[head * group : head * group + group]).sum(0) for head in range(kv_heads)]
        scale, group = 1 / head_dim, 1
    else:
        scale = 1 / head_dim**0.5
    outputs, weights = [], []
    for head, q_head in enumerate(q):
        scores = scale * torch.einsum("bnd,bsd->bns", q_head, k[head // group])
        if mask is not None:
            scores = scores + mask[:, head]
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
        weights.append(exponentials / exponentials.sum(-1, keepdim=True))
        outputs.append(torch.einsum("bns,bsd->bnd", weights[-1], v[head // group]))
    y = torch.cat(outputs, -1)
    if "norm.weight" in state:
        d = y - y.mean(-1, keepdim=True)
        y = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
    return linear(state, "out_proj", y), torch.stack(weights, 1)


def feature_density(x: Tensor, offset: Tensor, c: Tensor) -> Tensor:
    """Algorithm 1 of the paper over the layers of x [batch, layers, features]: the weights, one Gaussian a feature."""
    mean = x.mean(1, keepdim=True)
    var = (x.square().mean(1, keepdim=True) - mean.square()).abs() + 1e-8
    return torch.exp(-((x - mean - offset) ** 2) / (2 * c * (var + 1e-5)))


class FeatureDensities(nn.Module):
    """The density attention of the paper's GQDAAM, with its names of parameters: heads split the layers."""

    def __init__(self, feature_size: int, num_heads: int = 8, name: str = "gcts", device=None) -> None:
        super().__init__()
        self.name = name
        heads = [
            nn.ParameterDict({n: torch.ones(1, feature_size, device=device) for n in ("c", "mean_offset")})
            for _ in range(num_heads)
        ]
        setattr(self, name, nn.ModuleList(heads))

    def forward(self, x: Tensor, return_attention_details: bool = False):
        heads = getattr(self, self.name)
        chunks = zip(x.chunk(len(heads), 1), heads)
        weights = torch.cat([feature_density(part, head["mean_offset"], head["c"]) for part, head in chunks], 1)
        return (x * weights, weights.detach()) if return_attention_details else x * weights


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


# Twice the largest error of rounding a number to the type once; what is measured is 0.5 to 0.9 of that error.
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


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with zeros around x [batch, channels, height, width], tap by tap."""
    height, width = x.shape[2:]
    x = nn.functional.pad(x, (1, 1, 1, 1))
    taps = [
        torch.einsum("bihw,oi->bohw", x[:, :, i : i + height, j : j + width], weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(taps).sum(0) + bias[:, None, None]


def decoded(state: dict, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The paper's decoder after its attention: [batch, layers, features] to class scores."""
    y = x.reshape(*x.shape[:2], *grid)
    for name in ("conv1", "conv2"):
        y = convolve(y, state[f"{name}.weight"], state[f"{name}.bias"]).clamp(min=0)
    return linear(state, "fc", y.flatten(1))


def paper_checkpoint(layers: int, features: int, density: str, densities: str, gqa: bool = True) -> dict[str, Tensor]:
    """A checkpoint with the names and shapes of the paper's public code, scaled down: 4 density heads, embed_dim 32."""
    shapes = {
        f"{density}.{densities}.{head}.{name}": (1, features) for head in range(4) for name in ("c", "mean_offset")
    }
    embedded = 32 if gqa else features
    if gqa:
        for name, outputs, inputs in (("q", 32, 32), ("k", 8, 32), ("v", 8, 32), ("out", 32, 8)):
            shapes |= {f"gqa.{name}_proj.weight": (outputs, inputs), f"gqa.{name}_proj.bias": (outputs,)}
        shapes |= {"gqa.norm.weight": (8,), "gqa.norm.bias": (8,)}
        shapes |= {"embed_transform.weight": (32, features), "embed_transform.bias": (32,)}
    shapes |= {"conv1.weight": (6, layers, 3, 3), "conv1.bias": (6,)}
    shapes |= {"conv2.weight": (layers, 6, 3, 3), "conv2.bias": (layers,)}
    shapes |= {"fc.weight": (5, layers * embedded), "fc.bias": (5,)}
    return {
        key: sample(*shape, seed=i).exp() if key.endswith(".c") else sample(*shape, seed=i) / 3
        for i, (key, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("density, densities", [("gct", "gcts"), ("daam", "gcts"), ("daam", "daams")])
def test_checkpoints_of_the_paper_load_and_compute_its_formulas(density, densities):
    checkpoint = paper_checkpoint(8, 12, density, densities)
    keys = list(checkpoint)
    attention = GroupedQueryDAAM(32, 8, 2, input_dim=12, daam=FeatureDensities(12, 4, densities))
    model = DensityAdaptiveTransformer(attention, 8, 32, 5, hidden_channels=6, grid=(2, 16)).double()
    assert str(model.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    assert list(checkpoint) == keys

    x = sample(3, 8, 12, seed=100)
    weights = torch.cat(
        [
            feature_density(part, *(checkpoint[f"{density}.{densities}.{head}.{n}"] for n in ("mean_offset", "c")))
            for head, part in enumerate(x.chunk(4, 1))
        ],
        1,
    )
    embedded = linear(checkpoint, "embed_transform", x * weights)
    gqa = {key.removeprefix("gqa."): value for key, value in checkpoint.items() if key.startswith("gqa.")}
    attended, attention_weights = written_out(gqa, 8, 2, "paper", embedded, embedded, embedded)
    truth = decoded(checkpoint, attended, (2, 16))
    scores, details = model(x, return_attention_details=True)
    assert relative_error(scores, truth) < 1e-12 and relative_error(model(x), truth) < 1e-12
    assert relative_error(details["daam"], weights) < 1e-12
    assert relative_error(details["gqa"], attention_weights) < 1e-12

    alone = GroupedQueryAttention(32, 8, 2).double()
    alone.load_state_dict(gqa)
    assert relative_error(alone(embedded)[0], attended) < 1e-12

    wrapped = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": copy.deepcopy(model)}).double()
    inner = {f"decoder.{key}": value + 1 for key, value in checkpoint.items()}
    wrapped.load_state_dict(inner | {f"encoder.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()})
    assert all(torch.equal(a, b + 1) for a, b in zip(wrapped["decoder"].parameters(), model.parameters()))


@pytest.mark.parametrize("density, densities", [("gct", "gcts"), ("daam", "daams")])
def test_the_decoder_takes_checkpoints_of_density_attention_alone(density, densities):
    checkpoint = paper_checkpoint(8, 12, density, densities, gqa=False)
    model = DensityAdaptiveTransformer(FeatureDensities(12, 4, densities), 8, 12, 5, hidden_channels=6).double()
    assert str(model.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    x = sample(3, 8, 12, seed=100)
    attended, weights = model.attention(x, return_attention_details=True)
    scores, details = model(x, True)
    assert torch.equal(details, weights)
    assert relative_error(scores, decoded(checkpoint, attended, (3, 4))) < 1e-12


@pytest.mark.parametrize("gqa", [True, False])
@pytest.mark.parametrize("density, heads", [("gct", "gcts"), ("daam", "gcts"), ("daam", "daams")])
def test_checkpoints_travel_back_bit_for_bit(density, heads, gqa):
    checkpoint = paper_checkpoint(8, 12, density, heads, gqa)
    attention = FusedMultiHeadFeatureDAAM(8, 12, 4)
    attention = GroupedQueryDAAM(32, 8, 2, input_dim=12, daam=attention) if gqa else attention
    model = DensityAdaptiveTransformer(attention, 8, 32 if gqa else 12, 5, hidden_channels=6).double()
    model.load_state_dict(checkpoint)
    back = model.upstream_state_dict(density, heads)
    assert sorted(back) == sorted(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # copies, not views
    assert all(torch.equal(back[key], checkpoint[key]) and not back[key].requires_grad for key in back)


def test_other_densities_in_checkpoints_for_the_public_code():
    with_product = GroupedQueryDAAM(32, 8, 2)
    product = with_product.daam.upstream_state_dict()
    assert {f"gct.{key}" for key in product} < with_product.upstream_state_dict("gct").keys()
    foreign = GroupedQueryDAAM(32, 8, 2, daam=FeatureDensities(32, 4))
    assert "daam.gcts.3.c" in foreign.upstream_state_dict()
    with pytest.raises(ValueError, match="density must be one of"):
        foreign.upstream_state_dict("attention")


def test_the_decoder_takes_the_mean_over_time_first():
    model = DensityAdaptiveTransformer(FusedMultiHeadDAAM(1, 2, 3), 6, 16, 5, hidden_channels=4).double()
    x = sample(2, 6, 7, 16)
    assert torch.equal(model(x), model(x.mean(2)))
    assert model.grid == (4, 4)


@pytest.mark.parametrize("feature_size, grid", [(1024, (32, 32)), (5120, (64, 80)), (384, (16, 24)), (13, (1, 13))])
def test_grid_of_the_decoder(feature_size, grid):
    assert DensityAdaptiveTransformer(nn.Identity(), 1, feature_size, 2, device="meta").grid == grid


def test_missing_and_unexpected_keys():
    checkpoint = paper_checkpoint(8, 12, "gct", "gcts")
    del checkpoint["gqa.norm.bias"]
    checkpoint["gqa.more"] = checkpoint["mha.in_proj_bias"] = torch.zeros(3)
    attention = GroupedQueryDAAM(32, 8, 2, input_dim=12, daam=FeatureDensities(12, 4))
    model = DensityAdaptiveTransformer(attention, 8, 32, 5, hidden_channels=6)
    result = model.load_state_dict(checkpoint, strict=False)
    assert result.missing_keys == ["attention.gqa.norm.bias"]
    assert sorted(result.unexpected_keys) == ["attention.gqa.more", "mha.in_proj_bias"]
    both = {**model.state_dict(), "gct.gcts.0.c": torch.zeros(1, 12)}
    result = model.load_state_dict(both, strict=False)
    assert not result.missing_keys and result.unexpected_keys == ["gct.gcts.0.c"]
    assert model.attention.daam.gcts[0]["c"].any()


@pytest.mark.parametrize(
    "layers, features, heads, gqdaam, density_alone",
    # The counts are comments of the public code: without the linear layer, but for the two with 4 classes.
    [
        (24, 1024, 8, 1_223_192, 238_104),
        (24, 1024, 1, 1_208_856, None),
        (40, 5120, 8, 3_533_352, 451_112),
    ],
)
def test_parameter_counts_of_the_paper(layers, features, heads, gqdaam, density_alone):
    with torch.device("meta"):
        attention = GroupedQueryDAAM(512, input_dim=features, daam=FeatureDensities(features, heads))
        model = DensityAdaptiveTransformer(attention, layers, 512, 4)
        plain = DensityAdaptiveTransformer(FeatureDensities(features, heads), layers, features, 4)

    def count(module, without=None):
        return sum(p.numel() for p in module.parameters()) - (count(without) if without is not None else 0)

    assert count(model, model.fc) == gqdaam
    if density_alone is not None:
        assert count(plain, plain.fc) == density_alone
    if layers == 24:
        assert count(plain) == {8: 336_412, 1: 322_076}[heads]
    assert count(GroupedQueryDAAM(512).daam) == 64


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
            "attn_mask must be a boolean or floating-point tensor, got torch.int32",
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
