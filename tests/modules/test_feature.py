"""The per-feature module: the paper's code, its checkpoints and counts, and what every torch module must survive."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support import assert_close, device_of
from torch import Tensor, nn

from daam_kernels import FusedMultiHeadDAAM, available_backends
from daam_kernels.explain import collect, plot_density
from daam_kernels.modules.feature import FusedMultiHeadFeatureDAAM
from daam_kernels.modules.paper import DensityAdaptiveTransformer, GroupedQueryDAAM
from daam_kernels.reference import feature_density_attention


class PaperHead(nn.Module):
    """One head with the paper's formulas and parameters, over [batch, layers, features]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.rand(1, features) + 0.5)
        self.mean_offset = nn.Parameter(torch.randn(1, features))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = ((x**2).mean(1, keepdim=True) - mean**2).abs() + 1e-8
        z = (x - (mean + self.mean_offset)) / torch.sqrt(var + 1e-5)
        return x * torch.exp(-(z**2) / (2 * self.c))


class Paper(nn.Module):
    """Many heads, each on its own layers, in a list called as the paper's code calls it."""

    def __init__(self, features: int, num_heads: int, heads: str = "daams") -> None:
        super().__init__()
        self.heads = heads
        setattr(self, heads, nn.ModuleList(PaperHead(features) for _ in range(num_heads)))

    def forward(self, x: Tensor) -> Tensor:
        heads = getattr(self, self.heads)
        return torch.cat([head(part) for head, part in zip(heads, x.chunk(len(heads), 1))], 1)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("heads", ["daams", "gcts"])
@pytest.mark.parametrize("num_heads", [1, 4, 6])
def test_equals_the_papers_code_with_its_checkpoint(num_heads, heads):
    public, ours = Paper(5, num_heads, heads).double(), FusedMultiHeadFeatureDAAM(12, 5, num_heads).double()
    assert str(ours.load_state_dict(public.state_dict())) == "<All keys matched successfully>"
    xs = [sample(3, 12, 5).requires_grad_() for _ in range(2)]
    ys = [module(x) for module, x in zip((ours, public), xs)]
    assert_close(*ys, 1e-12)
    for y in ys:
        y.backward(sample(3, 12, 5, seed=1))
    assert_close(xs[0].grad, xs[1].grad, 1e-12)
    for name, own in (("c", ours.c), ("mean_offset", ours.mean_offsets)):
        theirs = torch.cat([getattr(head, name).grad for head in getattr(public, heads)])
        assert_close(own.grad, theirs, 1e-12, name)

    one_step = ours(xs[0].detach().unsqueeze(2))
    assert_close(one_step.squeeze(2), ys[0], 1e-12)


def test_time_is_averaged_and_every_step_weighed_alike():
    module = FusedMultiHeadFeatureDAAM(9, 4, 2).double()
    x = sample(2, 9, 5, 4)
    y, weights = module(x, return_attention_details=True)
    _, expected = module(x.mean(2), True)
    assert weights.shape == x.shape and not weights.requires_grad
    assert_close(weights, expected.unsqueeze(2).expand_as(x), 1e-12)
    assert_close(y, x * expected.unsqueeze(2), 1e-12)


@pytest.mark.parametrize("features, eight, one", [(1024, 0.016, 0.002), (1280, 0.020, 0.003), (5120, 0.082, 0.010)])
def test_parameter_counts_of_the_papers_table_1(features, eight, one):
    """Millions, for encoders of 1024 to 5120 features."""
    for num_heads, expected in ((8, eight), (1, one)):
        module = FusedMultiHeadFeatureDAAM(24, features, num_heads, device="meta")
        count = sum(p.numel() for p in module.parameters())
        assert count == 2 * num_heads * features and round(count / 1e6, 3) == expected
    assert sum(p.numel() for p in FusedMultiHeadDAAM(-1, 8, 4).parameters()) == 64


def test_initialisation():
    module = FusedMultiHeadFeatureDAAM(24, 6)
    assert module.density == "gaussian"
    assert module.c.shape == module.mean_offsets.shape == (8, 6)
    assert (module.c == 2).all() and not module.mean_offsets.any()
    module = FusedMultiHeadFeatureDAAM(24, 6, 3, 0.5)
    nn.init.ones_(module.mean_offsets)
    nn.init.ones_(module.c)
    module.reset_parameters()
    assert (module.c == 0.5).all() and not module.mean_offsets.any()


def test_forward_passes_mask_residual_and_options():
    module = FusedMultiHeadFeatureDAAM(7, 4, 3, eps=1e-3, padding_value=7.0, padding_stats="exclude").double()
    nn.init.normal_(module.mean_offsets, std=0.1)
    x = sample(3, 7, 4)
    x[torch.rand(x.shape) < 0.2] = 7.0
    mask = torch.rand(3, 7, 1) < 0.8
    expected = feature_density_attention(
        x, module.mean_offsets, module.c, eps=1e-3, padding_value=7.0, mask=mask, padding_stats="exclude",
        residual=True, return_weights=True,
    )  # fmt: skip
    got = module(x, True, mask=mask, residual=True)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(module(x, mask=mask, residual=True), expected[0])
    padded = (x == 7) | ~mask
    assert torch.equal(got[0][padded], 2 * x[padded]) and not got[1][padded].any()


@pytest.mark.parametrize("heads", ["daams", "gcts"])
def test_in_the_papers_decoder(heads):
    """A checkpoint of the paper's decoder, and what its attentions pass on to the density."""
    density = FusedMultiHeadFeatureDAAM(8, 12, 4)
    attention = GroupedQueryDAAM(16, 4, 2, input_dim=12, daam=density)
    model = DensityAdaptiveTransformer(attention, 8, 16, 5, hidden_channels=4)
    own = model.state_dict()
    public = Paper(12, 4, heads)
    checkpoint = {f"gct.{key}": value for key, value in public.state_dict().items()}
    checkpoint |= {key.removeprefix("attention."): v for key, v in own.items() if not key.startswith("attention.daam")}
    assert str(model.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    assert torch.equal(density.c[2], getattr(public, heads)[2].c[0])
    x = sample(3, 8, 12).float()
    padding = torch.zeros(3, 8, dtype=torch.bool)
    padding[1, 5:] = True
    y, details = attention(x, True, key_padding_mask=padding)
    _, weights = density(x, True, mask=~padding.unsqueeze(-1))
    assert y.isfinite().all() and torch.equal(details["daam"], weights)


def test_explanations_take_the_weights_and_refuse_the_curves():
    module = FusedMultiHeadFeatureDAAM(4, 3, 2)
    x = sample(6, 4, 3).float()
    (average,) = collect(module, [x[:2], x[2:]], progress=False).values()
    assert_close(average, module(x, True)[1].mean(0), 1e-6)
    with pytest.raises(ValueError, match="must be 'product' or 'mixture' to be drawn, got 'gaussian'"):
        plot_density(module)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: FusedMultiHeadFeatureDAAM(0, 4), ValueError, "num_layers must be an int of at least 1, got 0"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4.0), ValueError, "feature_size must be an int of at least 1, got 4.0"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4, True), ValueError, "num_heads must be an int of at least 1, got True"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4), ValueError, "num_heads must be at most num_layers=4, got 8"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4, 2, "2"), TypeError, "c must be a number, got str"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4, 2, 0), ValueError, "c must not be 0, got 0"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4, 2, eps=0), ValueError, "eps must be positive, got 0"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4, 2, eps=float("nan")), ValueError, "eps must be finite, got nan"),
        (
            lambda: FusedMultiHeadFeatureDAAM(4, 4, 2, padding_value="0"),
            TypeError,
            "padding_value must be a number or None, got str",
        ),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4, 2, padding_stats="no"), ValueError, "padding_stats must be one of"),
        (lambda: FusedMultiHeadFeatureDAAM(4, 4, 2).upstream_state_dict("heads"), ValueError, "heads must be one of"),
    ],
)
def test_constructor_names_what_does_not_fit(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "x, mask, error, words",
    [
        ([1.0], None, TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 6, 4, dtype=torch.int32), None, TypeError, "x must be float64, float32, bfloat16 or float16"),
        (torch.ones(6, 4), None, ValueError, r"x must have shape \[batch, num_layers=6, feature_size=4\].*got \[6, 4"),
        (torch.ones(2, 5, 4), None, ValueError, r"x must have shape .*got \[2, 5, 4\]"),
        (torch.ones(2, 6, 3, 5), None, ValueError, r"x must have shape .*got \[2, 6, 3, 5\]"),
        (torch.ones(2, 6, 0, 4), None, ValueError, r"time at least 1, got \[2, 6, 0, 4\]"),
        (torch.ones(2, 6, 4, device="meta"), None, ValueError, "mean_offsets must be on x's device, meta, got cpu"),
        (torch.ones(2, 6, 4), torch.ones(2, 6, 1), TypeError, "mask must be a boolean tensor, True where x is valid"),
        (torch.ones(2, 6, 4), torch.ones(3, 6, 1).bool(), ValueError, r"mask must broadcast to x's shape \[2, 6, 4\]"),
    ],
)
def test_forward_names_what_does_not_fit(x, mask, error, words):
    with pytest.raises(error, match=words):
        FusedMultiHeadFeatureDAAM(6, 4, 2)(x, mask=mask)


def test_an_eps_that_rounds_to_zero_is_refused_where_it_does():
    module = FusedMultiHeadFeatureDAAM(6, 4, 2, eps=1e-60)
    with pytest.raises(ValueError, match="eps must not round to 0"):
        module(torch.ones(2, 6, 4))
    assert module.double()(sample(2, 6, 4)).isfinite().all()


def test_repr_shows_arguments_and_options_that_are_not_the_default():
    assert repr(FusedMultiHeadFeatureDAAM(24, 1024)) == (
        "FusedMultiHeadFeatureDAAM(num_layers=24, feature_size=1024, num_heads=8, c=2.0, eps=1e-05)"
    )
    assert repr(FusedMultiHeadFeatureDAAM(4, 4, 2, padding_value=0, padding_stats="exclude")).endswith(
        "eps=1e-05, padding_value=0, padding_stats='exclude')"
    )


def make(**options) -> FusedMultiHeadFeatureDAAM:
    module = FusedMultiHeadFeatureDAAM(7, 4, 2, **options)
    with torch.no_grad():
        module.mean_offsets.normal_(std=0.1)
        module.c.normal_().exp_()
    return module


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied):
    module = make(padding_stats="exclude")
    other = copied(module)
    x = torch.randn(3, 7, 4)
    assert torch.equal(other(x), module(x)) and repr(other) == repr(module)


def test_state_dict_round_trip_through_a_file_of_weights_only():
    module, other = make(), make()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert str(other.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
    x = torch.randn(3, 7, 4)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_parameters_and_input(dtype):
    module, x = make(), torch.randn(3, 7, 4)
    y = module(x)
    converted = copy.deepcopy(module).to(dtype)
    assert converted(x.to(dtype)).dtype == module(x.to(dtype)).dtype == dtype
    assert torch.allclose(converted(x.to(dtype)).float(), y, rtol=0.1, atol=0.05)
    assert {p.dtype for p in make(dtype=dtype).parameters()} == {dtype}


def test_meta_device_then_materialised():
    module = FusedMultiHeadFeatureDAAM(7, 4, 2, device="meta")
    assert module(torch.empty(3, 7, 5, 4, device="meta")).shape == (3, 7, 5, 4)
    module.to_empty(device="cpu").reset_parameters()
    assert module(torch.randn(3, 7, 4)).isfinite().all()
    assigned = FusedMultiHeadFeatureDAAM(7, 4, 2, device="meta")
    assigned.load_state_dict(module.upstream_state_dict(), assign=True)
    assert torch.equal(assigned.c, module.c)


def test_training_changes_every_parameter():
    module = make()
    before = [p.detach().clone() for p in module.parameters()]
    module(torch.randn(4, 7, 4)).square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert all((p != b).all() for p, b in zip(module.parameters(), before))


@pytest.mark.parametrize(
    "options, shape",
    [({}, (3, 7, 4)), ({"padding_value": 0.0}, (3, 7, 4)), ({"padding_stats": "exclude"}, (3, 7, 5, 4))],
    ids=str,
)
def test_compiles_without_graph_breaks(options, shape):
    module = make(**options)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    mask = xs[0] > -1 if options else None
    ys = [m(x, True, mask=mask) for m, x in zip((compiled, module), xs)]
    assert all(torch.equal(*pair) for pair in zip(*ys))
    grads = [torch.autograd.grad(y.square().sum(), (x, *module.parameters())) for (y, _), x in zip(ys, xs)]
    assert all(torch.allclose(*pair) for pair in zip(*grads))


@pytest.mark.parametrize("heads", ["daams", "gcts"])
def test_checkpoints_travel_both_ways_bit_for_bit(heads):
    public, ours = Paper(5, 3, heads), FusedMultiHeadFeatureDAAM(6, 5, 3)
    checkpoint = public.state_dict()
    ours.load_state_dict(checkpoint)
    back = ours.upstream_state_dict(heads)
    assert list(back) == list(checkpoint)
    assert all(torch.equal(back[key], checkpoint[key]) and not back[key].requires_grad for key in back)
    with torch.no_grad():
        ours.c.add_(1)
    assert all(torch.equal(back[key], checkpoint[key]) for key in back)  # copies, not views
    public.load_state_dict(ours.upstream_state_dict(heads))


def test_heads_land_in_numerical_order():
    public, ours = Paper(3, 12), FusedMultiHeadFeatureDAAM(12, 3, 12)
    ours.load_state_dict(dict(sorted(public.state_dict().items())))  # "10" sorts before "2"
    assert all(torch.equal(ours.c[i], public.daams[i].c[0]) for i in range(12))


def test_missing_and_unexpected_keys_have_the_checkpoints_own_names():
    ours = nn.ModuleDict({"encoder": FusedMultiHeadFeatureDAAM(8, 3, 4), "head": nn.Linear(3, 2)})
    public = nn.ModuleDict({"encoder": Paper(3, 4, "gcts"), "head": nn.Linear(3, 2)})
    checkpoint = public.state_dict()
    before = ours["encoder"].c.detach().clone()
    del checkpoint["encoder.gcts.2.c"]
    more = ["encoder.gcts.0.more", "encoder.gcts.02.c"]
    checkpoint |= {key: torch.zeros(1, 3) for key in more}
    keys = list(checkpoint)
    result = ours.load_state_dict(checkpoint, strict=False)
    assert result.missing_keys == ["encoder.gcts.2.c"]
    assert result.unexpected_keys == more
    assert list(checkpoint) == keys  # taken whole and not changed
    assert torch.equal(ours["encoder"].c, before)
    assert torch.equal(ours["encoder"].mean_offsets[3], public["encoder"].gcts[3].mean_offset[0])
    with pytest.raises(RuntimeError, match="Missing key.*encoder.gcts.2.c"):
        ours.load_state_dict(checkpoint)
    assert FusedMultiHeadFeatureDAAM(8, 3, 4).load_state_dict({}, strict=False).missing_keys == ["mean_offsets", "c"]


def test_both_forms_at_once_leave_the_public_keys_unexpected():
    ours, other, public = FusedMultiHeadFeatureDAAM(4, 3, 2), FusedMultiHeadFeatureDAAM(4, 3, 2, c=5), Paper(3, 2)
    result = ours.load_state_dict({**public.state_dict(), **other.state_dict()}, strict=False)
    assert torch.equal(ours.c, other.c)
    assert result.unexpected_keys == list(public.state_dict())
    both = {**public.state_dict(), **Paper(3, 2, "gcts").state_dict()}
    result = ours.load_state_dict(both, strict=False)
    assert torch.equal(ours.c[1], public.daams[1].c[0])
    assert not result.missing_keys and all(key.startswith("gcts.") for key in result.unexpected_keys)


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoints_that_cannot_be_right_are_errors_in_words(strict):
    ours = FusedMultiHeadFeatureDAAM(8, 3, 4)
    with pytest.raises(
        RuntimeError, match=r"the checkpoint has 2 heads at 'daams.\*', and this module has num_heads=4"
    ):
        ours.load_state_dict(Paper(3, 2).state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"gcts.0.c must have shape \[1, feature_size=3\], got \[1, 5\]"):
        ours.load_state_dict(Paper(5, 4, "gcts").state_dict(), strict=strict)
    assert (ours.c == 2).all()


@pytest.mark.parametrize("shape", [(3, 7, 4), (2, 7, 5, 4)])
def test_in_tritons_kernels(shape):
    if not available_backends()["triton"]:
        pytest.skip("triton is not installed")
    device = device_of("triton")
    module, x = make(padding_value=0.0).to(device), torch.randn(shape, device=device)
    x[:, 2] = 0
    fused = FusedMultiHeadFeatureDAAM(7, 4, 2, padding_value=0.0, backend="triton", device=device)
    fused.load_state_dict(module.state_dict())
    ys = [m(x) for m in (fused, module)]
    assert_close(*ys, 2e-6)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), m.parameters()) for m, y in zip((fused, module), ys))):
        assert_close(a, b, 1e-4)
