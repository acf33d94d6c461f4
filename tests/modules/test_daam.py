"""The modules against the public package itself, their checkpoints, and what every torch module must survive."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from gaussian_adaptive_attention import (
    GaussianAdaptiveAttention,
    GaussianBlock,
    MultiHeadGaussianAdaptiveAttention,
)
from torch import nn

from daam_kernels import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM, density_attention


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def public_and_ours(kind: str, axis: int, heads: int, gaussians: int, padding=None) -> tuple[nn.Module, nn.Module]:
    """A module of the public package with offsets of order 1 and c = exp(N(0, 1)), and ours with its checkpoint."""
    if kind == "head":
        public = GaussianAdaptiveAttention(axis, heads, gaussians, padding)
        ours = FusedDAAM(axis, heads, gaussians, padding)
    elif kind == "heads":
        public = MultiHeadGaussianAdaptiveAttention(axis, heads, gaussians, padding)
        ours = FusedMultiHeadDAAM(axis, heads, gaussians, padding)
    else:
        arguments = [axis, axis], [heads, 1], [gaussians, 2], 2, padding
        public, ours = GaussianBlock(*arguments), FusedDensityBlock(*arguments)
    public, ours = public.double(), ours.double()
    with torch.no_grad():
        for name, parameter in public.named_parameters():
            parameter.normal_()
            if name.endswith("c"):
                parameter.exp_()
    ours.load_state_dict(public.state_dict())
    return public, ours


def sample(*shape: int, padding: float | None = None) -> torch.Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    if padding is not None:
        x[torch.rand(shape) < 0.2] = padding
    return x


@pytest.mark.parametrize("padding", [None, 0, 7.0])
@pytest.mark.parametrize(
    "kind, shape, axis, heads, gaussians",
    [
        ("head", (3, 10), 1, 4, 3),
        ("head", (2, 6, 5), -2, 2, 16),
        ("heads", (3, 17), -1, 4, 5),
        ("heads", (2, 9, 3, 2), 1, 2, 1),
        ("heads", (12, 3), 0, 3, 4),
        ("block", (3, 17), 1, 4, 5),
        ("block", (2, 11, 3), -2, 3, 2),
    ],
)
def test_equals_public_package(kind, shape, axis, heads, gaussians, padding):
    torch.manual_seed(0)
    public, ours = public_and_ours(kind, axis, heads, gaussians, padding)
    x = sample(*shape, padding=padding)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    (y, details), (y_ours, details_ours) = (m(t, return_attention_details=True) for m, t in zip((public, ours), xs))
    assert relative(y_ours, y) < 1e-12
    assert torch.equal(ours(x), y_ours)
    if kind != "block":
        details, details_ours = {"": details}, {"": details_ours}
    assert list(details) == list(details_ours)
    for name in details:
        assert not details_ours[name].requires_grad
        assert relative(details_ours[name], details[name]) < 1e-12

    g = torch.randn_like(y)
    y.backward(g)
    y_ours.backward(g)
    assert relative(xs[1].grad, xs[0].grad) < 1e-12
    theirs = {key: parameter.grad for key, parameter in public.named_parameters()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)  # upstream_state_dict then names the gradients
    by_their_names = ours.upstream_state_dict()
    for name in ("mean_offsets", "c"):
        keys = [key for key in theirs if key.endswith(name)]
        assert relative(*(torch.cat([grads[key] for key in keys]) for grads in (by_their_names, theirs))) < 1e-12


def test_block_keeps_layer_names_and_return_types():
    block = FusedDensityBlock([1, -1, 1], [2, 3, 1], [1, 2, 3], 3)
    x = torch.randn(4, 12)
    y, details = block(x, True)
    assert torch.equal(block(x), y)
    assert list(details) == ["layer_0", "layer_1", "layer_2"]
    assert all(weights.shape == x.shape for weights in details.values())
    assert list(block.state_dict()) == [f"layers.{i}.{name}" for i in range(3) for name in ("mean_offsets", "c")]


def test_block_adds_x_in_each_layer_and_passes_the_mask_to_each():
    block = FusedDensityBlock([1, 1], [2, 3], [2, 2], 2, padding_stats="exclude").double()
    x = sample(5, 13)
    mask = torch.rand(5, 13) < 0.7
    expected = x
    for layer in block.layers:
        attended = density_attention(
            expected, layer.mean_offsets, layer.c, norm_axis=1, mask=mask, padding_stats="exclude"
        )
        expected = expected + attended
    assert relative(block(x, mask=mask), expected) < 1e-14
    assert relative(block(x), expected) > 1e-3
    assert torch.equal(block(x, mask=mask)[~mask], 4 * x[~mask])


@pytest.mark.parametrize("module", [FusedDAAM(1, 2, 3), FusedMultiHeadDAAM(1, 2, 3)])
def test_forward_passes_mask_residual_and_options(module):
    module = copy.deepcopy(module).double()
    module.padding_stats, module.normalize, module.padding_value, module.eps = "exclude", "softmax", 7.0, 1e-3
    x = sample(4, 10, padding=7.0)
    mask = torch.rand(4, 10) < 0.8
    expected = density_attention(
        x, module.mean_offsets, module.c, norm_axis=1, padding_value=7.0, mask=mask, padding_stats="exclude",
        normalize="softmax", eps=1e-3, residual=True,
    )  # fmt: skip
    assert torch.equal(module(x, mask=mask, residual=True), expected)


def test_backend_is_passed_on():
    with pytest.raises(RuntimeError, match="cuda"):
        FusedDAAM(1, 1, 2, backend="cuda")(torch.randn(2, 4))


@pytest.mark.parametrize("norm_axis", [1, -2])
def test_eps_of_each_head(norm_axis):
    eps = (1e-8, 0.5, 3.0)
    module = FusedMultiHeadDAAM(norm_axis, 3, 2, 0.0, eps).double()
    x = sample(2, 11, 4, padding=0.0).requires_grad_()
    mask = torch.rand(2, 11, 1) < 0.8
    y, weights = module(x, True, mask=mask, residual=True)
    parts = zip(x.split([3, 3, 5], 1), mask.split([3, 3, 5], 1), module.mean_offsets, module.c, eps)
    expected = [
        density_attention(
            part, o[None], c[None], norm_axis=1, padding_value=0.0, mask=m, eps=e, residual=True, return_weights=True
        )
        for part, m, o, c, e in parts
    ]
    assert torch.equal(y, torch.cat([part for part, _ in expected], 1))
    assert torch.equal(weights, torch.cat([part for _, part in expected], 1))
    assert torch.equal(module(x, mask=mask, residual=True), y)
    y.sum().backward()
    assert x.grad.isfinite().all() and module.c.grad.abs().min() > 0


def test_eps_of_each_head_checks_its_input_as_usual():
    module = FusedMultiHeadDAAM(1, 2, 2, eps=[1e-8, 1e-3])
    with pytest.raises(ValueError, match="norm_axis"):
        module(torch.randn(3))
    with pytest.raises(ValueError, match="at least 2 elements per head"):
        module(torch.randn(2, 3))
    with pytest.raises(ValueError, match="mask must broadcast"):
        module(torch.randn(2, 8), mask=torch.ones(3, 8, dtype=torch.bool))
    assert FusedMultiHeadDAAM(1, 2, 2, eps=[1e-3, 1e-3]).eps == 1e-3


def test_initialisation():
    torch.manual_seed(0)
    module = FusedMultiHeadDAAM(1, 100, 100)
    assert module.c.shape == module.mean_offsets.shape == (100, 100)
    assert not module.mean_offsets.any()
    logs = module.c.detach().log()
    assert abs(logs.mean()) < 0.05 and abs(logs.std() - 1) < 0.05
    before = module.c.detach().clone()
    nn.init.ones_(module.mean_offsets)
    module.reset_parameters()
    assert not torch.equal(module.c, before) and not module.mean_offsets.any()

    single = FusedDAAM(1, 8, 5, None, 0.25)
    assert single.num_heads == 8 and single.c.shape == (1, 5)
    assert torch.equal(single.mean_offsets, torch.full((1, 5), 0.25))
    nn.init.zeros_(single.mean_offsets)
    single.reset_parameters()
    assert (single.mean_offsets == 0.25).all()
    assert not FusedDAAM(1, 8, 5).mean_offsets.any()

    block = FusedDensityBlock([1, 1], [2, 2], [3, 3], 2)
    before = [p.detach().clone() for p in block.parameters()]
    block.reset_parameters()
    assert not torch.equal(block.layers[1].c, before[3])


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: FusedDAAM("1", 2, 3), ValueError, "norm_axis must be an int, got '1'"),
        (lambda: FusedDAAM(True, 2, 3), ValueError, "norm_axis must be an int, got True"),
        (lambda: FusedDAAM(1, 0, 3), ValueError, "num_heads must be an int of at least 1, got 0"),
        (lambda: FusedMultiHeadDAAM(1, 2.0, 3), ValueError, "num_heads must be an int of at least 1, got 2.0"),
        (lambda: FusedMultiHeadDAAM(1, 2, -1), ValueError, "num_gaussians must be an int of at least 1, got -1"),
        (lambda: FusedMultiHeadDAAM(1, 2, True), ValueError, "num_gaussians must be an int of at least 1, got True"),
        (lambda: FusedMultiHeadDAAM(1, 2, 3, "0"), TypeError, "padding_value must be a number or None, got str"),
        (lambda: FusedDAAM(1, 2, 3, None, "a"), TypeError, "mean_offset_init must be a number, got str"),
        (lambda: FusedDAAM(1, 2, 3, None, float("nan")), ValueError, "mean_offset_init must be finite, got nan"),
        (lambda: FusedDAAM(1, 2, 3, eps=(1e-8,)), TypeError, "eps must be a number, got"),
        (lambda: FusedMultiHeadDAAM(1, 2, 3, eps=0), ValueError, "eps must be positive, got 0"),
        (lambda: FusedMultiHeadDAAM(1, 2, 3, eps=[1e-8]), ValueError, "eps must be a number, or one for each of num_"),
        (lambda: FusedMultiHeadDAAM(1, 2, 3, eps=[1e-8, -1]), ValueError, "eps must be positive, got -1"),
        (lambda: FusedMultiHeadDAAM(1, 2, 3, padding_stats="no"), ValueError, "padding_stats must be one of"),
        (lambda: FusedMultiHeadDAAM(1, 2, 3, normalize="no"), ValueError, "normalize must be one of"),
        (lambda: FusedMultiHeadDAAM(1, 2, 3, backend="no"), ValueError, "backend must be one of"),
        (lambda: FusedDensityBlock([1], [2, 2], [3, 3], 2), ValueError, "norm_axes must have length num_layers=2, got"),
        (lambda: FusedDensityBlock([1], [2, 2], [3], 1), ValueError, "num_heads must have length num_layers=1, got 2"),
        (lambda: FusedDensityBlock([1], [2], [], 1), ValueError, "num_gaussians must have length num_layers=1, got 0"),
        (lambda: FusedDensityBlock(1, [2], [3], 1), TypeError, "norm_axes must be a list of num_layers=1 ints, got 1"),
        (lambda: FusedDensityBlock([1], [2], [3], 1.0), ValueError, "num_layers must be an int of at least 0, got 1.0"),
        (lambda: FusedDensityBlock([1], [0], [3], 1), ValueError, "num_heads must be an int of at least 1, got 0"),
        (lambda: FusedDensityBlock([1], [2], [3], 1, eps=[1, 2]), TypeError, "eps must be a number, got list"),
    ],
)
def test_constructor_names_what_does_not_fit(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_repr_shows_arguments_and_options_that_are_not_the_default():
    assert repr(FusedMultiHeadDAAM(1, 4, 5)) == (
        "FusedMultiHeadDAAM(norm_axis=1, num_heads=4, num_gaussians=5, padding_value=None, eps=1e-08)"
    )
    options = repr(FusedDAAM(-1, 4, 5, 0, 0.5, padding_stats="exclude", normalize="softmax", backend="reference"))
    assert options.endswith(
        "padding_value=0, eps=1e-08, mean_offset_init=0.5, padding_stats='exclude', normalize='softmax', "
        "backend='reference')"
    )
    assert repr(FusedDensityBlock([1, 1], [2, 2], [3, 3], 2)).count("num_gaussians=3") == 1  # torch folds equal ones


MODULES = {
    "head": lambda **keywords: FusedDAAM(1, 2, 3, 0.0, 0.5, **keywords),
    "heads": lambda **keywords: FusedMultiHeadDAAM(1, 2, 3, **keywords),
    "eps of each head": lambda **keywords: FusedMultiHeadDAAM(1, 2, 3, None, (1e-8, 1e-2), **keywords),
    "block": lambda **keywords: FusedDensityBlock([1, 1], [2, 1], [3, 4], 2, **keywords),
}


@pytest.fixture(params=MODULES)
def make(request):
    return MODULES[request.param]


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_compute_the_same_and_take_checkpoints(make, copied):
    module = make(normalize="softmax")
    other = copied(module)
    x = torch.randn(3, 9)
    assert torch.equal(other(x), module(x))
    assert repr(other) == repr(module)
    fresh = make()
    other.load_state_dict(fresh.upstream_state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), fresh.parameters()))
    assert not torch.equal(list(module.parameters())[-1], list(fresh.parameters())[-1])


def test_state_dict_round_trip_through_a_file_of_weights_only(make):
    module, other = make(), make()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert str(other.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
    assert torch.equal(other(torch.ones(1, 8).cumsum(1)), module(torch.ones(1, 8).cumsum(1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_parameters_and_input(make, dtype):
    module = make()
    x = torch.randn(3, 9)
    y = module(x)
    converted = copy.deepcopy(module).to(dtype)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert converted(x.to(dtype)).dtype == dtype
    assert torch.allclose(converted(x.to(dtype)).float(), y, rtol=0.1, atol=0.05)
    assert module(x.to(dtype)).dtype == dtype
    assert {p.dtype for p in make(dtype=dtype).parameters()} == {dtype}


def test_half_and_double_shorthands(make):
    assert {p.dtype for p in make().half().parameters()} == {torch.float16}
    assert {p.dtype for p in make().double().parameters()} == {torch.float64}


def test_meta_device_then_materialised(make):
    module = make(device="meta")
    assert all(p.is_meta for p in module.parameters())
    assert module(torch.empty(3, 9, device="meta")).shape == (3, 9)
    module.to_empty(device="cpu").reset_parameters()
    assert module(torch.randn(3, 9)).isfinite().all()
    assigned = make(device="meta")
    assigned.load_state_dict(module.upstream_state_dict(), assign=True)
    assert torch.equal(assigned(torch.ones(1, 8).cumsum(1)), module(torch.ones(1, 8).cumsum(1)))


def test_training_changes_every_parameter(make):
    module = make()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.randn(4, 9)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(module.parameters(), before))


def test_compiles_without_graph_breaks(make):
    module, x = make(), torch.randn(3, 9)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(compiled(x, mask=x > -1), module(x, mask=x > -1))


PUBLIC = {
    "head": (lambda: GaussianAdaptiveAttention(1, 4, 5, None), lambda: FusedDAAM(1, 4, 5)),
    "heads": (lambda: MultiHeadGaussianAdaptiveAttention(1, 4, 5), lambda: FusedMultiHeadDAAM(1, 4, 5)),
    "block": (
        lambda: GaussianBlock([1, 1], [12, 2], [5, 3], 2),
        lambda: FusedDensityBlock([1, 1], [12, 2], [5, 3], 2),
    ),
}


@pytest.fixture(params=PUBLIC)
def pair(request):
    public, ours = PUBLIC[request.param]
    return public(), ours()


def test_checkpoints_travel_both_ways_bit_for_bit(pair):
    public, ours = pair
    checkpoint = public.state_dict()
    ours.load_state_dict(checkpoint, strict=True)
    back = ours.upstream_state_dict()
    assert list(back) == list(checkpoint)
    assert all(torch.equal(back[key], checkpoint[key]) and not back[key].requires_grad for key in back)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert all(torch.equal(back[key], checkpoint[key]) for key in back)  # copies, not views
    public.load_state_dict(ours.upstream_state_dict(), strict=True)
    assert all(torch.equal(a, b + 1) for a, b in zip(public.state_dict().values(), back.values()))


def test_heads_land_in_numerical_order():
    public, ours = MultiHeadGaussianAdaptiveAttention(1, 12, 2), FusedMultiHeadDAAM(1, 12, 2)
    ours.load_state_dict(dict(sorted(public.state_dict().items())))  # "10" sorts before "2"
    assert all(torch.equal(ours.c[i], public.attention_heads[i].c) for i in range(12))


def wrapped(inner: nn.Module) -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 3), inner), "head": nn.Linear(3, 2)})


def test_checkpoint_of_a_bigger_model_is_taken_whole_and_not_changed(pair):
    public, ours = map(wrapped, pair)
    checkpoint = public.state_dict()
    keys, values = list(checkpoint), [v.clone() for v in checkpoint.values()]
    ours.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == keys and all(torch.equal(a, b) for a, b in zip(checkpoint.values(), values))
    back = ours["encoder"][1].upstream_state_dict()
    assert all(torch.equal(back[key], value) for key, value in pair[0].state_dict().items())
    assert torch.equal(ours["head"].weight, public["head"].weight)


def test_missing_and_unexpected_keys_have_the_checkpoints_own_names():
    public, ours = wrapped(PUBLIC["heads"][0]()), wrapped(PUBLIC["heads"][1]())
    checkpoint = public.state_dict()
    before = ours["encoder"][1].c.detach().clone()
    del checkpoint["encoder.1.attention_heads.2.c"]
    checkpoint["encoder.1.attention_heads.0.extra"] = torch.zeros(1)
    checkpoint["encoder.1.attention_heads.one.c"] = torch.zeros(5)
    result = ours.load_state_dict(checkpoint, strict=False)
    assert result.missing_keys == ["encoder.1.attention_heads.2.c"]
    assert result.unexpected_keys == ["encoder.1.attention_heads.0.extra", "encoder.1.attention_heads.one.c"]
    assert torch.equal(ours["encoder"][1].c, before)
    assert torch.equal(ours["encoder"][1].mean_offsets[3], public["encoder"][1].attention_heads[3].mean_offsets)
    with pytest.raises(RuntimeError, match="Missing key.*encoder.1.attention_heads.2.c"):
        ours.load_state_dict(checkpoint)


def test_missing_and_unexpected_keys_of_our_own_checkpoints(make):
    module = make()
    checkpoint = module.state_dict()
    name = list(checkpoint)[-1]
    checkpoint["more"] = checkpoint.pop(name)
    result = make().load_state_dict(checkpoint, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([name], ["more"])
    assert make().load_state_dict({}, strict=False).missing_keys == list(module.state_dict())


def test_both_forms_at_once_leave_the_public_keys_unexpected():
    ours, public = FusedMultiHeadDAAM(1, 2, 3), MultiHeadGaussianAdaptiveAttention(1, 2, 3)
    other = FusedMultiHeadDAAM(1, 2, 3)
    result = ours.load_state_dict({**public.state_dict(), **other.state_dict()}, strict=False)
    assert torch.equal(ours.c, other.c)
    assert result.unexpected_keys == list(public.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("heads", [3, 5])
def test_another_number_of_heads_is_an_error_in_words(heads, strict):
    ours = FusedDensityBlock([1, 1], [2, 4], [5, 5], 2)
    before = [p.detach().clone() for p in ours.layers[1].parameters()]
    public = GaussianBlock([1, 1], [2, heads], [5, 5], 2)
    with pytest.raises(RuntimeError, match=rf"{heads} attention heads at 'layers.1.attention_heads.\*'.*num_heads=4"):
        ours.load_state_dict(public.state_dict(), strict=strict)
    assert all(torch.equal(a, b) for a, b in zip(ours.layers[1].parameters(), before))


def test_another_number_of_gaussians_or_layers_is_an_error_in_words():
    with pytest.raises(RuntimeError, match=r"size mismatch for c.*\[2, 4\].*\[2, 3\]"):
        FusedMultiHeadDAAM(1, 2, 3).load_state_dict(MultiHeadGaussianAdaptiveAttention(1, 2, 4).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for c.*\[1, 4\].*\[1, 3\]"):
        FusedDAAM(1, 2, 3).load_state_dict(GaussianAdaptiveAttention(1, 2, 4, None).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected.*"layers.1.attention_heads.0.c"'):
        FusedDensityBlock([1], [1], [3], 1).load_state_dict(GaussianBlock([1, 1], [1, 1], [3, 3], 2).state_dict())
    checkpoint = MultiHeadGaussianAdaptiveAttention(1, 2, 3).state_dict()
    checkpoint["attention_heads.1.c"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"must have one shape, got \[3\], \[4\]"):
        FusedMultiHeadDAAM(1, 2, 3).load_state_dict(checkpoint)
