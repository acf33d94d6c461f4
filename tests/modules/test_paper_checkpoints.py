"""Checkpoints of the paper's public code: they load, give its formulas, and travel back; counts of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from paper import FeatureDensities, feature_density, linear, sample, written_out
from support import relative_error
from torch import Tensor, nn

from daam_kernels import FusedMultiHeadFeatureDAAM
from daam_kernels.modules.grouped_query import GroupedQueryAttention
from daam_kernels.modules.paper import DensityAdaptiveTransformer, GroupedQueryDAAM


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
