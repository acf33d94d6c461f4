"""The public names, and fuse and unfuse: what they swap, what they keep, what they leave alone and say so."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import gaussian_adaptive_attention as public
import pytest
import torch
from torch import nn

import daam_kernels
from daam_kernels import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM, compat, fuse, fusion_report, unfuse

FUSED = (FusedDAAM, FusedMultiHeadDAAM, FusedDensityBlock)
ROOT = Path(__file__).resolve().parent.parent


def trained(module: nn.Module) -> nn.Module:
    """The module in float64 with offsets of order 1 and c = exp(N(0, 1))."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("mean_offsets", "c")):
                parameter.normal_()
            if name.endswith("c"):
                parameter.exp_()
    return module.double()


def head(*arguments, **keywords):
    return trained(public.GaussianAdaptiveAttention(*(arguments or (1, 4, 3, None)), **keywords))


def heads(*arguments, **keywords):
    return trained(public.MultiHeadGaussianAdaptiveAttention(*(arguments or (1, 4, 3)), **keywords))


def block(*arguments, **keywords):
    return trained(public.GaussianBlock(*(arguments or ([1, 1], [4, 2], [3, 5], 2, 0)), **keywords))


def sample(*shape: int) -> torch.Tensor:
    x = torch.randn(*(shape or (5, 13)), dtype=torch.float64)
    return torch.where(torch.rand_like(x) < 0.1, 0, x)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ((a - b).norm() <= 1e-12 * b.norm()).item()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def fused_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FUSED)]


@pytest.fixture(autouse=True)
def seed_and_no_stray_optimizers():
    torch.manual_seed(0)
    gc.collect()


# ---- the names


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("GaussianAdaptiveAttention", (1, 4, 5, 7.0)),
        ("MultiHeadGaussianAdaptiveAttention", (1, 4, 5, 7.0, 1e-8)),
        ("GaussianBlock", ([1, -1], [4, 2], [5, 1], 2, 7.0, 1e-8)),
    ],
)
def test_names_take_the_public_packages_arguments_and_checkpoints(name, arguments):
    theirs = trained(getattr(public, name)(*arguments))
    density_name = name.replace("Gaussian", "Density")
    for ours in (getattr(compat, name)(*arguments), getattr(compat, density_name)(*arguments)):
        assert type(ours).__name__ in (name, density_name)
        ours.double().load_state_dict(theirs.state_dict())
        x = sample()
        x[0, :5] = 7
        assert close(ours(x), theirs(x))
        details, expected = ours(x, True)[1], theirs(x, True)[1]
        for key in details if isinstance(details, dict) else (...,):
            assert close(details[key], expected[key])
        copied = pickle.loads(pickle.dumps(ours))
        assert type(copied) is type(ours) and torch.equal(copied(x), ours(x))


def test_order_of_the_single_heads_arguments():
    module = compat.GaussianAdaptiveAttention(-1, 2, 3, 7.0, 0.5, 1e-3)
    assert (module.padding_value, module.mean_offset_init, module.eps) == (7.0, 0.5, 1e-3)
    assert (module.mean_offsets == 0.5).all()
    module = compat.DensityAdaptiveAttention(-1, 2, 3, 7.0, 0.5, 1e-3, normalize="softmax")
    assert (module.padding_value, module.mean_offset_init, module.eps, module.normalize) == (7.0, 0.5, 1e-3, "softmax")


def test_eps_arrives():
    assert compat.MultiHeadGaussianAdaptiveAttention(1, 2, 3, None, 1e-3).eps == 1e-3
    assert [layer.eps for layer in compat.GaussianBlock([1], [2], [3], 1, None, 1e-3).layers] == [1e-3]


SHARES = torch.tensor([0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    "arguments, keywords, initial_c, learned",
    [
        ((1, 2, 3, 2, True, None, 1e-3), {}, 2, True),  # as its README prints it
        ((1, 2, 3, 1.5, SHARES, 7.0), dict(eps=1e-3), 1.5, False),
        ((1, 2, 3), dict(initial_c=1.5, eps=1e-3), 1.5, True),
        ((1, 2, 3), dict(initial_variance=1.5, eps=1e-3), 1.5, True),
        ((1, 2, 3, 1.5), dict(learnable_weights=SHARES, eps=1e-3), 1.5, False),
        ((), dict(norm_axis=1, num_heads=2, num_gaussians=3, learnable_weights=True, eps=1e-3), 2, True),
    ],
)
def test_the_first_generations_arguments_make_its_mixture(arguments, keywords, initial_c, learned):
    module = compat.MultiHeadGaussianAdaptiveAttention(*arguments, **keywords)
    assert type(module) is daam_kernels.FusedMultiHeadGAAM
    assert (module.norm_axis, module.num_heads, module.num_gaussians, module.eps) == (1, 2, 3, 1e-3)
    assert module.initial_c == initial_c and (module.c == initial_c).all()
    assert hasattr(module, "weights") == learned and hasattr(module, "shares") != learned
    x = torch.randn(2, 9)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


@pytest.mark.parametrize("arguments, keywords", [((1, 2, 3, 7.0, 1e-3), {}), ((1, 2, 3), dict(eps=1e-3))])
def test_five_arguments_make_the_packages_product(arguments, keywords):
    module = compat.MultiHeadGaussianAdaptiveAttention(*arguments, **keywords)
    assert type(module) is compat.MultiHeadGaussianAdaptiveAttention
    assert isinstance(module, daam_kernels.FusedMultiHeadDAAM) and module.eps == 1e-3


def test_a_subclass_of_the_name_keeps_its_own_arguments():
    class Own(compat.MultiHeadGaussianAdaptiveAttention):
        def __init__(self, size, *rest, initial_c):
            super().__init__(1, 2, 3)
            self.own = size, rest, initial_c

    assert Own(1, 2, 3, 4, 5, 6, initial_c=7).own == (1, (2, 3, 4, 5, 6), 7)


def test_the_first_generations_errors():
    make = compat.MultiHeadGaussianAdaptiveAttention
    with pytest.raises(ValueError, match="learnable_weights must be True, or a tensor .* False alone"):
        make(1, 2, 3, 2, False, None, 1e-8)
    for arguments, keywords in (((1, 2, 3), dict(initial_c=2)), ((1, 2, 3, 2), {})):
        with pytest.raises(TypeError, match="takes initial_c or initial_variance, got both"):
            make(*arguments, initial_variance=2, **keywords)


def test_fuse_and_unfuse_leave_the_mixture_alone():
    model = nn.Sequential(compat.MultiHeadGaussianAdaptiveAttention(1, 2, 3, initial_c=2))
    before = model[0]
    assert fuse(model, verbose=False)[0] is before and unfuse(model, verbose=False)[0] is before


def test_num_densities_is_another_name():
    assert compat.DensityAdaptiveAttention(1, 4, num_densities=5, padding_value=None).c.shape == (1, 5)
    assert compat.MultiHeadDensityAdaptiveAttention(1, 4, num_densities=5).c.shape == (4, 5)
    module = compat.DensityBlock([1], [4], num_densities=[5], num_layers=1)
    assert module.layers[0].c.shape == (4, 5)


@pytest.mark.parametrize(
    "name, arguments",
    [("DensityAdaptiveAttention", (1, 4)), ("MultiHeadDensityAdaptiveAttention", (1, 4)), ("DensityBlock", ([1], [4]))],
)
def test_num_densities_both_or_neither(name, arguments):
    make, rest = getattr(compat, name), {"num_layers": 1} if name == "DensityBlock" else {}
    number = [5] if rest else 5
    with pytest.raises(TypeError, match=f"{name} takes num_gaussians or num_densities, got neither"):
        make(*arguments, **rest)
    with pytest.raises(TypeError, match="got both"):
        make(*arguments, number, num_densities=number, **rest)
    with pytest.raises(TypeError, match="num_layers"):
        compat.DensityBlock([1], [4], [5])


def test_bad_arguments_are_value_errors_as_in_the_public_package():
    for arguments in (("1", 4, 5, None), (1, 0, 5, None), (1, 4, -5, None)):
        for package in (public, compat):
            with pytest.raises(ValueError):
                package.GaussianAdaptiveAttention(*arguments)
    for package in (public, compat):
        with pytest.raises(ValueError):
            package.GaussianBlock([1], [4, 4], [5, 5], 2)
        with pytest.raises(ValueError):
            package.MultiHeadGaussianAdaptiveAttention(1, 4, 5)(torch.randn(2, 3))
        with pytest.raises(ValueError):
            package.GaussianAdaptiveAttention(2, 4, 5, None)(torch.randn(2, 3))


def test_readme_example_runs_as_typed():
    from daam_kernels.compat import DensityBlock

    model = nn.Sequential(DensityBlock([1, 1, 1], [4, 4, 4], [5, 5, 5], 3, None, 1e-8), nn.Linear(128, 128))
    y = model(torch.rand(10, 128))
    assert y.shape == (10, 128) and y.isfinite().all()


# ---- fuse


def nested() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(13, 13), block(), nn.Sequential(heads(), nn.ReLU())),
            "head": head(),
        }
    ).double()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model["head"](model["encoder"](x))


def test_fuse_swaps_everything_in_place_and_says_so(capsys):
    model = nested()
    x = sample()
    expected = run(model, x)
    assert fuse(model) is model
    assert fused_in(model) == ["encoder.1", "encoder.1.layers.0", "encoder.1.layers.1", "encoder.2.0", "head"]
    assert not any(cls.__module__.startswith("gaussian_adaptive_attention") for cls in classes(model))
    assert close(run(model, x), expected)
    said = capsys.readouterr().out
    assert "3 module(s) swapped, 0 skipped" in said
    assert "encoder.1: GaussianBlock -> FusedDensityBlock" in said
    report = fusion_report(model)
    assert report.swapped == {
        "encoder.1": "GaussianBlock -> FusedDensityBlock",
        "encoder.2.0": "MultiHeadGaussianAdaptiveAttention -> FusedMultiHeadDAAM",
        "head": "GaussianAdaptiveAttention -> FusedDAAM",
    }
    assert report.skipped == {}
    fuse(model, verbose=False)
    assert capsys.readouterr().out == "" and len(fused_in(model)) == 5


@pytest.mark.parametrize("make", [head, heads, block])
def test_fuse_of_the_module_itself_returns_a_new_one(make):
    module = make()
    x = sample()
    expected, details = module(x, True)
    fused = fuse(module)
    assert isinstance(fused, FUSED)
    y, weights = fused(x, True)
    assert close(y, expected) and torch.equal(module(x), expected)
    for key in details if isinstance(details, dict) else (...,):
        assert close(weights[key], details[key])
    assert list(fusion_report(fused).swapped) == [""] and "(the model)" in str(fusion_report(fused))
    assert "not fused yet" in fusion_report(module).skipped[""]
    restored = unfuse(fused)
    assert type(restored) is type(module) and torch.equal(restored(x), expected)


def test_gradients_and_training_go_on_as_before():
    model = nested()
    twin = fuse(copy.deepcopy(model), verbose=False)
    x = sample()
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.parameters(), 1e-5)  # large steps would multiply rounding
        for _ in range(5):
            optimizer.zero_grad()
            run(m, x).square().sum().backward()
            optimizer.step()
    del optimizer
    restored = unfuse(twin, verbose=False).state_dict()
    assert list(restored) == list(model.state_dict())
    assert all(close(restored[key], value) for key, value in model.state_dict().items())


def test_fuse_leaves_the_random_generator_where_it_is():
    model = nested()
    torch.manual_seed(3)
    fuse(model, verbose=False)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)


def test_each_heads_eps_arrives():
    module = heads(1, 3, 2, None, 1e-3)  # the public package never sees this eps
    assert fuse(copy.deepcopy(module)).eps == 1e-8
    for eps, h in zip((1e-8, 0.3, 2.0), module.attention_heads):
        h.eps = eps
    x = sample()
    expected, weights = module(x, True)
    fused = fuse(module)
    assert fused.eps == (1e-8, 0.3, 2.0)
    assert all(close(a, b) for a, b in zip(fused(x, True), (expected, weights)))
    assert [h.eps for h in unfuse(fused).attention_heads] == [1e-8, 0.3, 2.0]

    layered = block()
    layered.layers[1].attention_heads[0].eps = 0.5
    expected = layered(x)
    fused = fuse(layered)
    assert fused.layers[1].eps == (0.5, 1e-8) and close(fused(x), expected)


def test_mode_device_dtype_and_requires_grad_stay():
    model = nested()
    model["encoder"].eval()
    model["head"].to(torch.bfloat16).requires_grad_(False)
    for h in model["encoder"][2][0].attention_heads:
        h.mean_offsets.requires_grad_(False)
    before = [(m.training, type(m)) for m in model.modules()]
    parameters = {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    fuse(model)
    assert not model["encoder"][1].training and not model["encoder"][1].layers[0].training and model["head"].training
    assert model["head"].c.dtype == torch.bfloat16 and not model["head"].c.requires_grad
    assert model["encoder"][2][0].c.requires_grad and not model["encoder"][2][0].mean_offsets.requires_grad
    unfuse(model)
    assert [(m.training, type(m)) for m in model.modules()] == before
    assert {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())


def test_meta_models_are_fused_too():
    with torch.device("meta"):
        model = nn.Sequential(public.GaussianBlock([1], [2], [3], 1))
    fuse(model)
    assert model[0].layers[0].c.is_meta and model[0].layers[0].c.shape == (2, 3)
    assert unfuse(model)[0].layers[0].attention_heads[1].c.is_meta


def test_a_module_used_twice_stays_one():
    shared, layer = block(), heads()
    model = nn.Sequential(shared, nn.Linear(13, 13).double(), shared, nn.ModuleList([layer]), layer)
    fuse(model)
    assert model[0] is model[2] and isinstance(model[0], FusedDensityBlock)
    assert model[3][0] is model[4] and isinstance(model[4], FusedMultiHeadDAAM)
    assert list(fusion_report(model).swapped) == ["0", "2", "3.0", "4"]
    unfuse(model)
    assert model[0] is model[2] and model[3][0] is model[4]
    assert isinstance(model[0], public.GaussianBlock)


def test_a_layer_of_a_block_used_outside_of_it_too_stays_one():
    shared = block()
    model = nn.ModuleDict({"block": shared, "first": shared.layers[0]})
    fuse(model)
    assert model["block"].layers[0] is model["first"]
    unfuse(model)
    assert model["block"].layers[0] is model["first"]


def test_tied_parameters_stay_tied():
    one, two = heads(), heads()
    for a, b in zip(one.attention_heads, two.attention_heads):
        b.c = a.c
    model = nn.ModuleList([one, two])
    fuse(model)
    assert model[0].c is model[1].c and model[0].mean_offsets is not model[1].mean_offsets
    model = pickle.loads(pickle.dumps(model))
    unfuse(model)
    assert model[0].attention_heads[2].c is model[1].attention_heads[2].c
    assert model[0].attention_heads[2].c is not model[1].attention_heads[1].c


def tied_within(model):
    model[0].attention_heads[0].c = model[0].attention_heads[1].c


def tied_to_another_module(model):
    model[1].weight = model[0].attention_heads[0].c


def tied_to_a_head_elsewhere(model):
    model.append(model[0].attention_heads[0])


def a_forward_hook(model):
    model[0].register_forward_hook(lambda *_: None)


def a_hook_on_a_head(model):
    model[0].attention_heads[1].register_full_backward_hook(lambda *_: None)


def a_hook_on_a_parameter(model):
    model[0].attention_heads[1].c.register_hook(lambda g: g)


def a_state_dict_hook(model):
    model[0]._register_load_state_dict_pre_hook(lambda *_: None)


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model[0].attention_heads[0], "c", nn.Softplus())


def a_forward_of_its_own(model):
    model[0].forward = lambda x: x


def compiled_in_place(model):
    model[0].compile(backend="eager")


def a_buffer(model):
    model[0].register_buffer("count", torch.zeros(1))


def another_num_gaussians(model):
    model[0].attention_heads[2] = head(1, 4, 7, None)


def another_padding_value(model):
    model[0].attention_heads[2].padding_value = 7.0


def another_norm_axis(model):
    model[0].attention_heads[2].norm_axis = 0


def a_frozen_head(model):
    model[0].attention_heads[2].c.requires_grad_(False)


def a_head_of_another_type(model):
    model[0].attention_heads[2].float()


def a_head_too_few(model):
    del model[0].attention_heads[3]


def an_eps_of_zero(model):
    model[0].attention_heads[0].eps = 0


def a_parameter_more(model):
    model[0].attention_heads[0].bias = nn.Parameter(torch.zeros(3))


def a_cached_graph(model):
    model[0].last = model[0].attention_heads[0].c * 2


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (tied_within, "used elsewhere"),
        (tied_to_another_module, "used elsewhere"),
        (tied_to_a_head_elsewhere, "used elsewhere"),
        (a_forward_hook, "MultiHeadGaussianAdaptiveAttention has hooks"),
        (a_hook_on_a_head, "GaussianAdaptiveAttention has hooks"),
        (a_hook_on_a_parameter, "has hooks on its parameters"),
        (a_state_dict_hook, "has hooks"),
        (parametrized, "is parametrized"),
        (a_forward_of_its_own, "has a forward of its own"),
        (compiled_in_place, "is compiled"),
        (a_buffer, "has buffers"),
        (another_num_gaussians, "num_gaussians"),
        (another_padding_value, "padding_value"),
        (another_norm_axis, "norm_axis"),
        (a_frozen_head, "requires_grad"),
        (a_head_of_another_type, "dtype"),
        (a_head_too_few, "num_heads is 4, and there are 3"),
        (an_eps_of_zero, "eps must be positive, got 0"),
        (a_parameter_more, "not its base, attributes and parameters"),
        (a_cached_graph, "cannot be copied"),
    ],
)
def test_what_is_not_sure_is_left_alone_with_a_reason(spoil, reason, capsys):
    model = nn.ModuleList([heads(), nn.Linear(3, 1, bias=False), block()])
    spoil(model)
    before, parameters = list(model.modules()), list(model.parameters())
    assert reason in fusion_report(model).skipped["0"]
    assert [id(m) for m in model.modules()] == [id(m) for m in before]
    fuse(model)
    assert [id(m) for m in model[0].modules()] == [id(m) for m in before[1 : 1 + len(list(model[0].modules()))]]
    assert isinstance(model[2], FusedDensityBlock)  # the rest is not held back
    assert "0: skipped, " in capsys.readouterr().out
    assert {id(p) for p in model[0].parameters()} <= {id(p) for p in parameters}


def test_a_block_with_one_unsure_layer_is_left_alone_whole():
    model = nn.Sequential(block())
    model[0].layers[1].attention_heads[1].padding_value = 5.0
    fuse(model)
    assert fused_in(model) == [] and "padding_value" in fusion_report(model).skipped["0"]


class Subclass(public.GaussianBlock):
    pass


class GrownSubclass(public.GaussianBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = nn.LayerNorm(13)


@pytest.mark.parametrize("cls", [Subclass, GrownSubclass, type("GaussianBlock", (public.GaussianBlock,), {})])
def test_subclasses_are_left_alone(cls):
    model = nn.Sequential(cls([1], [2], [3], 1))
    fuse(model)
    assert fused_in(model) == [] and "subclass" in fusion_report(model).skipped["0"]


class DensityAdaptiveAttention(nn.Module):
    """A stranger of the same name, with the public package's module inside."""

    def __init__(self):
        super().__init__()
        self.inner = heads()

    def forward(self, x):
        return self.inner(x) + 1


def test_a_stranger_of_the_same_name_stays_and_what_is_in_it_is_fused():
    model = nn.Sequential(DensityAdaptiveAttention())
    x = sample()
    expected = model(x)
    fuse(model)
    assert type(model[0]) is DensityAdaptiveAttention and fused_in(model) == ["0.inner"]
    assert "not its base, attributes and parameters" in fusion_report(model).skipped["0"]
    assert close(model(x), expected)


def test_the_public_code_under_the_density_names_is_fused(capsys):
    source = Path(public.GaussianBlock.__init__.__code__.co_filename).read_text(encoding="utf-8")
    source = source.replace("Gaussian", "Density").replace("chunk_size = x", "print('head'); chunk_size = x")
    namespace = {"__name__": "elsewhere"}
    exec(source, namespace)
    model = nn.Sequential(trained(namespace["DensityBlock"]([1], [4], [3], 1)))
    x = sample()
    expected = model(x)
    capsys.readouterr()
    fuse(model)
    assert fusion_report(model).swapped == {"0": "DensityBlock -> FusedDensityBlock"}
    assert close(model(x), expected)
    assert "\nhead" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "old, new",
    [
        ("mixture *= gaussian", "mixture = mixture + gaussian"),
        ("x = layer(x) + x", "x = layer(x)"),
        (".clamp(min=self.eps)", ""),
        ("torch.where(mask, x, torch.zeros_like(x))", "x"),
    ],
)
def test_code_of_another_generation_under_the_same_names_is_left_alone(old, new):
    source = Path(public.GaussianBlock.__init__.__code__.co_filename).read_text(encoding="utf-8")
    assert old in source
    namespace = {"__name__": "elsewhere"}
    exec(source.replace(old, new), namespace)
    model = nn.Sequential(namespace["GaussianBlock"]([1], [4], [2], 1, 7.0))
    fuse(model)
    assert fused_in(model) == []
    assert "computes something else" in fusion_report(model).skipped["0"]


def test_our_own_modules_are_left_alone():
    model = nn.Sequential(
        compat.GaussianBlock([1], [2], [3], 1), compat.DensityAdaptiveAttention(1, 2, 3), FusedMultiHeadDAAM(1, 2, 3)
    )
    before = list(model.modules())
    fuse(model)
    unfuse(model)
    assert list(model.modules()) == before
    report = fusion_report(model)
    assert report.swapped == report.skipped == {}


def test_fuse_does_not_import_the_public_package():
    code = "import sys, torch, daam_kernels; daam_kernels.fuse(torch.nn.Linear(1, 1))\n"
    code += "assert 'gaussian_adaptive_attention' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_wrappers_that_hold_on_to_the_model_are_left_alone():
    class DistributedDataParallel(nn.Module):  # the real one needs a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

    shared = block()
    model = nn.Sequential(torch.compile(block(), backend="eager"), DistributedDataParallel(shared), shared, heads())
    fuse(model)
    assert fused_in(model) == ["3"]
    reasons = fusion_report(model).skipped
    assert "OptimizedModule" in reasons["0._orig_mod"] and "DistributedDataParallel" in reasons["1.module"]
    assert list(reasons) == ["0._orig_mod", "1.module", "2"]


@pytest.mark.parametrize("model", ["GaussianBlock", None])
def test_only_modules_are_taken(model):
    for function in (fuse, unfuse, fusion_report):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
            function(model)


# ---- optimisers


def test_a_given_optimizer_with_dead_parameters_is_an_error_before_anything_changes():
    model = nested()
    before = list(model.modules())
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="replaces 22 of the parameters that Adam optimises"):
        fuse(model, optimizer=optimizer)
    assert list(model.modules()) == before
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got StepLR"):
        fuse(model, optimizer=torch.optim.lr_scheduler.StepLR(optimizer, 1))


def test_a_living_optimizer_with_dead_parameters_is_warned_of():
    model = nested()
    optimizer = torch.optim.SGD(model["head"].parameters(), 0.1)
    with pytest.warns(UserWarning, match="fuse.model. replaces 2 of the parameters that SGD") as record:
        fuse(model)
    assert record[0].filename == __file__
    del optimizer
    optimizer = torch.optim.SGD(model["head"].parameters(), 0.1)
    with pytest.warns(UserWarning, match="unfuse.model. replaces 2 of the parameters that SGD"):
        unfuse(model)
    del optimizer


def test_an_optimizer_of_other_parameters_is_fine():
    model = nested()
    other = torch.optim.SGD(model["encoder"][0].parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(model, optimizer=other)
        unfuse(model, optimizer=other)
        fuse(nn.Linear(1, 1), optimizer=other)


# ---- unfuse and what lies between


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_unfuse_gives_back_the_classes_with_the_values_of_now(copied):
    model = nested()
    reference = copy.deepcopy(model)
    before = reference.state_dict()
    model = copied(fuse(model))
    assert list(model.state_dict()) == list(fuse(copy.deepcopy(reference)).state_dict())
    x = sample()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    expected = run(model, x)
    assert unfuse(model) is model
    assert classes(model) == classes(reference)
    assert close(run(model, x), expected)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key] + 0.25) for key, value in model.state_dict().items())
    for a, b in zip(model.modules(), reference.modules()):
        for name in ("norm_axis", "num_heads", "num_gaussians", "padding_value", "eps", "training"):
            assert getattr(a, name, None) == getattr(b, name, None)


def test_conversion_between_fuse_and_unfuse():
    model = fuse(nested())
    model.float().eval()
    model["encoder"][1].layers[0].eps = 1e-3
    unfuse(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert model["encoder"][1].layers[0].attention_heads[1].eps == 1e-3
    run(model, sample().float())


def test_what_fuse_keeps_is_no_submodule_and_no_state():
    fused, plain = fuse(block()), FusedDensityBlock([1, 1], [4, 2], [3, 5], 2, 0)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    assert len(list(fused.parameters())) == len(list(plain.parameters()))
    assert repr(fused).replace("0.0", "0") == repr(plain).replace("0.0", "0")
    plain.double().load_state_dict(fused.state_dict())
    x = sample()
    assert torch.equal(plain(x), fused(x))


def test_checkpoints_before_and_after():
    model = nested()
    checkpoint = copy.deepcopy(model.state_dict())
    fused = fuse(nested())
    fused.load_state_dict(checkpoint)
    x = sample()
    assert close(run(fused, x), run(model, x))
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(run(loaded, x), run(fused, x))
    assert classes(unfuse(loaded)) == classes(model)


def test_two_models_fused_of_one_original_do_not_share_what_unfuse_restores():
    original = block()
    one, two = fuse(original), fuse(original)
    nn.init.ones_(one.layers[0].c)
    one, two = unfuse(one), unfuse(two)
    assert one.layers[0].attention_heads[0].c.eq(1).all() and not two.layers[0].attention_heads[0].c.eq(1).all()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: setattr(m, "padding_stats", "exclude"), "padding_stats"),
        (lambda m: setattr(m, "normalize", "softmax"), "normalize"),
        (lambda m: m.register_forward_hook(lambda *_: None), "has hooks"),
    ],
)
def test_unfuse_leaves_what_the_original_cannot_express(change, reason, capsys):
    model = fuse(nn.Sequential(heads(), block()))
    change(model[0])
    kept = model[0]
    capsys.readouterr()
    unfuse(model)
    assert model[0] is kept and isinstance(model[1], public.GaussianBlock)
    said = capsys.readouterr().out
    assert "1 module(s) swapped, 1 skipped" in said and reason in said


def test_unfuse_leaves_what_fuse_did_not_make(capsys):
    model = nn.Sequential(FusedDAAM(1, 2, 3), compat.GaussianBlock([1], [2], [3], 1))
    before = list(model.modules())
    unfuse(model)
    assert list(model.modules()) == before
    assert capsys.readouterr().out.count("not made by fuse()") == 2


def test_public_names_are_reachable_from_the_package():
    for name in ("FusedDAAM", "FusedMultiHeadDAAM", "FusedDensityBlock", "fuse", "unfuse", "fusion_report"):
        assert name in daam_kernels.__all__ and hasattr(daam_kernels, name)
