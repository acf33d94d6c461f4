"""Explanations: averages and importance factors against their formulas, pictures by what is drawn in them."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from gaussian_adaptive_attention import GaussianBlock, MultiHeadGaussianAdaptiveAttention
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from daam_kernels import FusedDensityBlock, FusedDensityGate, FusedMultiHeadDAAM, explain
from daam_kernels.modules.gaam import FusedMultiHeadGAAM

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-15, equal_nan=True)


def min_max(t: torch.Tensor) -> torch.Tensor:
    return (t - t.min()) / (t.max() - t.min())


class Classifier(nn.Module):
    """Attention within a model that also has what evaluation mode changes."""

    def __init__(self, attention: nn.Module, features: int = 6) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm1d(features, affine=False), nn.Dropout(0.5))
        self.attention = attention
        self.after = nn.Linear(features, 2)

    def forward(self, x, mask=None):
        x = self.before(x.transpose(1, 2)).transpose(1, 2)
        return self.after(self.attention(x, mask=mask) if mask is not None else self.attention(x))


def classifier(**keywords) -> Classifier:
    return Classifier(FusedMultiHeadDAAM(1, 2, 3, **keywords)).double()


def normalised(model: Classifier, x: torch.Tensor) -> torch.Tensor:
    """What arrives at the attention in evaluation mode, batch normalisation being new."""
    return x / math.sqrt(1 + model.before[0].eps)


def batches(*sizes: int, length: int = 9, features: int = 6) -> list[torch.Tensor]:
    return [torch.randn(size, length, features, dtype=torch.float64) for size in sizes]


# importance_factor, layer_contribution


def test_importance_factor_is_min_max_over_all_layers_and_features():
    weights = torch.rand(5, 7, dtype=torch.float64)
    importance = explain.importance_factor(weights)
    assert close(importance, min_max(weights))
    assert importance.min() == 0 and importance.max() == 1
    assert close(explain.importance_factor(importance), importance)


def test_other_axes_are_averaged_and_axes_may_come_in_any_order():
    weights = torch.rand(3, 7, 4, 5, dtype=torch.float64)
    expected = min_max(weights.mean((0, 2)).T)
    assert close(explain.importance_factor(weights, layer_axis=-1, feature_axis=1), expected)
    assert close(explain.importance_factor(weights), min_max(weights.mean((0, 1))))
    contribution = explain.layer_contribution(weights, layer_axis=3, feature_axis=1)
    assert close(contribution, 100 * weights.sum((0, 1, 2)) / weights.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float64_whatever_the_weights_are(dtype):
    weights = torch.rand(4, 64, 8).to(dtype).requires_grad_()
    expected = min_max(weights.detach().double().mean(1))
    importance = explain.importance_factor(weights, layer_axis=0)
    assert importance.dtype == torch.float64 and not importance.requires_grad
    assert close(importance, expected)


def test_entries_of_a_mapping_are_the_layers():
    weights = {"a": torch.rand(3, 4, 6), "b": torch.rand(6), "c": torch.rand(2, 6)}
    expected = min_max(torch.stack([t.double().reshape(-1, 6).mean(0) for t in weights.values()]))
    assert close(explain.importance_factor(weights), expected)
    turned = {name: t.movedim(-1, 0) for name, t in weights.items()}
    assert close(explain.importance_factor(turned, feature_axis=0), expected)


def test_constant_weights_have_no_importance():
    for value in (0.0, 0.25):
        importance = explain.importance_factor(torch.full((3, 4), value))
        assert torch.equal(importance, torch.zeros(3, 4, dtype=torch.float64))
    assert torch.equal(explain.layer_contribution(torch.zeros(3, 4)), torch.zeros(3, dtype=torch.float64))


def test_nan_is_where_there_are_no_data():
    weights = torch.tensor([[1.0, 2.0, math.nan], [3.0, 5.0, math.nan]])
    expected = torch.tensor([[0, 0.25, math.nan], [0.5, 1, math.nan]], dtype=torch.float64)
    assert close(explain.importance_factor(weights), expected)
    assert close(explain.layer_contribution(weights), torch.tensor([150.0, 400.0]).double() / 5.5)
    assert explain.importance_factor(torch.full((2, 3), math.nan)).isnan().all()
    without_layer = torch.tensor([[1.0, 2.0], [math.nan, math.nan], [3.0, 0.0]])
    assert close(explain.layer_contribution(without_layer), torch.tensor([50, math.nan, 50]).double())
    several = torch.stack([weights, torch.full((2, 3), math.nan)])
    assert close(explain.importance_factor(several), expected)


def test_layer_contribution_is_the_share_of_the_weights_in_percent():
    weights = torch.rand(6, 9, dtype=torch.float64)
    contribution = explain.layer_contribution(weights)
    assert close(contribution, 100 * weights.sum(1) / weights.sum())
    assert close(contribution.sum(), torch.tensor(100.0).double())


def test_layers_with_normalised_weights_contribute_the_same():
    _, weights = FusedMultiHeadDAAM(-1, 2, 3, normalize="softmax")(torch.randn(4, 5, 12).double(), True)
    assert torch.allclose(explain.layer_contribution(weights), torch.full((5,), 20.0).double(), rtol=1e-6)


@pytest.mark.parametrize(
    "weights, keywords, error, words",
    [
        ([1.0], {}, TypeError, "weights must be a tensor, got list"),
        (
            torch.ones(2, 2, dtype=torch.int64),
            {},
            TypeError,
            "weights must be of a floating-point type, got torch.int64",
        ),
        (torch.ones(3), {}, ValueError, r"weights must have at least 2 dimension\(s\), got shape \[3\]"),
        (torch.ones(0, 3), {}, ValueError, r"weights must not be empty, got shape \[0, 3\]"),
        (torch.tensor([[1.0, math.inf]]), {}, ValueError, "weights must be finite, or NaN.*got Inf"),
        (torch.ones(2, 3), {"layer_axis": 2}, ValueError, r"layer_axis must be in \[-2, 1\].*got 2"),
        (torch.ones(2, 3), {"feature_axis": "x"}, TypeError, "feature_axis must be an int, got 'x'"),
        (torch.ones(2, 3), {"layer_axis": 1}, ValueError, "must be two axes, got 1 for both"),
        (torch.ones(2, 3).to_sparse(), {}, TypeError, "weights must be one dense tensor, got one of layout"),
        ({"a": torch.ones(3, device="meta")}, {}, ValueError, r"weights\['a'\] must hold numbers, got .* meta"),
        ({}, {}, ValueError, "weights must have at least one entry"),
        ({"a": torch.ones(2, 3)}, {"layer_axis": 0}, ValueError, "layer_axis must be None for several weights.*got 0"),
        ({"a": torch.ones(3), "b": torch.ones(4)}, {}, ValueError, "same number of features.*3 at 'a', 4 at 'b'"),
        ({"a": torch.ones(())}, {}, ValueError, r"weights\['a'\] must have at least 1 dimension"),
        ({"a": torch.ones(3)}, {"feature_axis": 1}, ValueError, r"feature_axis must be in \[-1, 0\].*weights\['a'\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, keywords, error, words):
    for function in (explain.importance_factor, explain.layer_contribution):
        with pytest.raises(error, match=words):
            function(weights, **keywords)


def test_negative_weights_contribute_nothing_sensible():
    with pytest.raises(ValueError, match="weights must not be negative, got -0.5"):
        explain.layer_contribution(torch.tensor([[1.0, -0.5], [math.nan, 1.0]]))


# collect


def test_collect_averages_samples_not_batches():
    model, data = classifier(), batches(5, 1, 2)
    collected = explain.collect(model, data, progress=False)
    _, weights = model.attention(normalised(model, torch.cat(data)), True)
    assert list(collected) == ["attention"]
    assert collected["attention"].shape == (9, 6) and collected["attention"].dtype == torch.float64
    assert close(collected["attention"], weights.mean(0))
    of_batches = torch.stack([part.mean(0) for part in weights.split([5, 1, 2])]).mean(0)
    assert not torch.allclose(collected["attention"], of_batches, rtol=1e-3)


def test_collect_adds_half_types_in_float64():
    module, x = FusedMultiHeadDAAM(1, 2, 3).half(), torch.randn(4096, 8, 2).half()
    collected = explain.collect(module, x.split(64), progress=False)
    _, weights = module(x, True)
    assert torch.equal(collected["FusedMultiHeadDAAM"], weights.double().mean(0))


@pytest.mark.parametrize("form", ["tensors", "tuples", "lists", "dicts", "generator", "DataLoader", "forward"])
def test_collect_takes_every_usual_loader(form):
    model, data = classifier(), batches(3, 2)
    expected = explain.collect(model, data, progress=False)["attention"]
    forward, targets = None, [torch.zeros(3), torch.zeros(2)]
    if form == "tuples":
        data = list(zip(data, targets))
    elif form == "lists":
        data = [list(pair) for pair in zip(data, targets)]
    elif form == "dicts":
        data = [{"x": x, "mask": None} for x in data]
    elif form == "generator":
        data = iter(data)
    elif form == "DataLoader":
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(data), torch.cat(targets)), 2)
    elif form == "forward":
        data = [(target, x) for x, target in zip(data, targets)]

        def forward(model, batch):
            model(batch[1])

    collected = explain.collect(model, data, forward=forward, progress=False)["attention"]
    assert close(collected, expected)


def test_collect_asks_a_block_for_every_layer():
    block = FusedDensityBlock([1, 2], [2, 3], [3, 2], 2).double()
    model, data = nn.Sequential(nn.Identity(), block), batches(4, 3)
    collected = explain.collect(model, data, progress=False)
    _, details = block(torch.cat(data), True)
    assert list(collected) == ["1.layer_0", "1.layer_1"]
    for name, weights in details.items():
        assert close(collected[f"1.{name}"], weights.mean(0))
    assert list(explain.collect(block, data, progress=False)) == ["layer_0", "layer_1"]


def test_collect_asks_the_public_package_as_well():
    public = GaussianBlock([1, 1], [2, 2], [3, 3], 2, 0.0).double()
    ours = FusedDensityBlock([1, 1], [2, 2], [3, 3], 2, 0.0).double()
    with torch.no_grad():
        for parameter in public.parameters():
            parameter.normal_().abs_().add_(0.1)
    ours.load_state_dict(public.state_dict())
    data = batches(4, 3)
    data[0][1, 6:] = 0
    expected = explain.collect(ours, data, progress=False)
    collected = explain.collect(public, data, progress=False)
    assert list(collected) == list(expected) == ["layer_0", "layer_1"]
    for name in expected:
        assert torch.allclose(collected[name], expected[name], rtol=1e-10)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_padding_does_not_count(padding_stats):
    module = FusedMultiHeadDAAM(1, 2, 3, padding_value=0.0, padding_stats=padding_stats).double()
    x = torch.randn(5, 12, 4, dtype=torch.float64)
    x[0, 9:], x[1, 4:], x[:, 11] = 0, 0, 0
    mask = torch.rand(5, 12, 1) < 0.8
    mask[4] = True
    data = [{"x": x[:3], "mask": mask[:3]}, {"x": x[3:], "mask": mask[3:]}]
    collected = explain.collect(module, data, progress=False)["FusedMultiHeadDAAM"]
    _, weights = module(x, True, mask=mask)
    valid = mask & (x != 0)
    assert close(collected, torch.where(valid, weights, 0).sum(0) / valid.sum(0))
    assert collected[11].isnan().all() and not collected[:11].isnan().all(1).any()
    only_mask = FusedMultiHeadDAAM(1, 2, 3).double()
    collected = explain.collect(only_mask, data, progress=False, average_over=(0, 1))["FusedMultiHeadDAAM"]
    _, weights = only_mask(x, True, mask=mask)
    assert close(collected, (weights * mask).sum((0, 1)) / mask.sum((0, 1)))


def test_lengths_may_change_where_time_is_averaged():
    block = FusedDensityBlock([1, 1], [2, 2], [3, 3], 2, 0.0).double()
    data = batches(3, length=9) + batches(2, length=14)
    data[0][0, 5:] = 0
    collected = explain.collect(block, data, average_over=(0, -2), progress=False)
    for name in ("layer_0", "layer_1"):
        parts = [block(x, True)[1][name][(x != 0).all(-1)] for x in data]
        assert close(collected[name], torch.cat(parts).mean(0))
    with pytest.raises(ValueError, match=r"'layer_0', averaged over \(0,\), .*\[14, 6\] after \[9, 6\].*average_over"):
        explain.collect(block, data, progress=False)


def state_of(model: nn.Module) -> list:
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [(m.training, *(dict(getattr(m, name)) for name in hooks)) for m in model.modules()]


def test_collect_leaves_the_model_as_it_was():
    model = classifier().train()
    model.after.eval()
    model.attention.register_forward_hook(lambda module, inputs, output: None)
    before, checkpoint = state_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    data = batches(3)
    random_state = torch.random.get_rng_state()
    explain.collect(model, data, progress=False)
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), random_state)  # no dropout
    assert all(torch.equal(value, checkpoint[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def failing():
        yield batches(3)[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        explain.collect(model, failing(), progress=False)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="at least 2 elements per head"):
        explain.collect(model, batches(3, length=3), progress=False)
    assert state_of(model) == before and torch.is_grad_enabled()


def test_other_hooks_and_callers_see_what_they_always_saw():
    model, seen = classifier().eval(), []
    model.attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(args), dict(kwargs))), with_kwargs=True
    )
    model.attention.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    x = batches(3)[0]
    outputs = []
    explain.collect(model, [x], forward=lambda model, batch: outputs.append(model(batch)), progress=False)
    assert seen == [(1, {}), torch.Tensor]
    assert torch.equal(outputs[0], model(x))


def test_who_asks_for_details_still_gets_them():
    module, x, outputs = FusedMultiHeadDAAM(1, 2, 3), torch.randn(3, 8, 2), []

    def forward(model, batch):
        outputs.extend([model(batch, True), model(batch, return_attention_details=True), model(batch)])

    collected = explain.collect(module, [x], forward=forward, progress=False)
    y, weights = module(x, True)
    for output in outputs[:2]:
        assert torch.equal(output[0], y) and torch.equal(output[1], weights)
    assert torch.equal(outputs[2], y)
    assert close(collected["FusedMultiHeadDAAM"], weights.double().mean(0))


class Explained(nn.Module):
    """A model of a user's that hands the attention out itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FusedMultiHeadDAAM(1, 2, 3), FusedMultiHeadDAAM(1, 2, 3)

    def forward(self, x, return_attention_details=False):
        y, first = self.first(x, True)
        y, second = self.second(y, True)
        return (y, {"sum": first + second}) if return_attention_details else y


def test_of_nested_modules_the_outermost_is_asked_unless_others_are_named():
    model, x = Explained(), torch.randn(3, 8, 2)
    assert list(explain.collect(model, [x], progress=False)) == ["sum"]
    collected = explain.collect(model, [x], modules=["second", "first"], progress=False)
    assert list(collected) == ["second", "first"]
    assert close(collected["first"], model.first(x, True)[1].double().mean(0))


def test_memory_is_bounded():
    model, alive = classifier(), []

    def loader():
        for _ in range(6):
            (x,) = batches(4)
            alive.append(weakref.ref(x))
            yield x
            del x
            assert sum(reference() is not None for reference in alive) <= 1

    kept = []
    model.attention.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(args[0])))
    explain.collect(model, loader(), progress=False)
    assert len(kept) == 6 and not any(reference() is not None for reference in kept + alive)


def test_limit_takes_no_batch_more():
    model, data = classifier(), batches(2, 3, 4)
    loader = iter(data)
    collected = explain.collect(model, loader, limit=2, progress=False)
    assert next(loader) is data[2]
    assert close(collected["attention"], explain.collect(model, data[:2], progress=False)["attention"])


def test_batches_go_to_the_device():
    class Batch:
        def to(self, device):
            moved.append(torch.device(device))
            return x

    model, (x,), moved = classifier(), batches(2), []
    explain.collect(model, [Batch()], progress=False)
    explain.collect(model, [(Batch(), Batch())], device="cpu", progress=False)
    explain.collect(model, [{"x": Batch()}], progress=False)
    assert moved == [torch.device("cpu")] * 4
    explain.collect(nn.Sequential(nn.Flatten(2), model), [[[x]]], progress=False)


def test_a_module_called_twice_counts_twice():
    module, x = FusedMultiHeadDAAM(1, 2, 3).double(), batches(3)[0]
    collected = explain.collect(nn.Sequential(module, module), [x], progress=False)["0"]
    y, first = module(x, True)
    assert close(collected, (first.mean(0) + module(y, True)[1].mean(0)) / 2)


@pytest.mark.parametrize("compiled", ["model", "model in place", "attention", "attention in place", "part"])
def test_collect_works_where_something_is_compiled(compiled):
    model, data = Classifier(nn.Sequential(FusedMultiHeadDAAM(1, 2, 3))).double(), batches(3, 3)
    expected = explain.collect(model, data, progress=False)["attention.0"]
    torch._dynamo.reset()
    if compiled == "model":
        model = torch.compile(model, backend="eager")
    elif compiled == "attention":
        model.attention[0] = torch.compile(model.attention[0], backend="eager")
    elif compiled == "part":
        model.attention = torch.compile(model.attention, backend="eager")
    elif compiled == "model in place":
        model.compile(backend="eager")
    else:
        model.attention[0].compile(backend="eager")
    model.eval()
    with torch.no_grad():
        model(data[0])  # from here on it does not look at every hook that is new
    collected = explain.collect(model, data, progress=False)
    assert list(collected) == ["attention.0"] and close(collected["attention.0"], expected)


def test_progress_is_a_bar_or_a_count_or_nothing(capsys, monkeypatch):
    module, data = FusedMultiHeadDAAM(1, 2, 3), [torch.randn(2, 8, 2)] * 3
    explain.collect(module, data, limit=2)
    bar = capsys.readouterr().err
    assert "attention: 100%" in bar and "2/2" in bar
    explain.collect(module, data, progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    explain.collect(module, data, limit=5)
    assert capsys.readouterr().err == "\rattention: batch 1 of 3\rattention: batch 2 of 3\rattention: batch 3 of 3\n"
    explain.collect(module, iter(data))
    assert "batch 3\n" in capsys.readouterr().err


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = FusedMultiHeadDAAM(1, 2, 3), FusedMultiHeadDAAM(1, 2, 3)

    def forward(self, x):
        return self.used(x)


class WithoutDetails(nn.Module):
    def forward(self, x, return_attention_details=False):
        return x


@pytest.mark.parametrize(
    "model, keywords, error, words",
    [
        (lambda x: x, {}, TypeError, "model must be a torch.nn.Module, got function"),
        (nn.Linear(2, 2), {}, ValueError, "model must contain a module whose forward takes return_att.*got Linear"),
        (Unused(), {}, ValueError, r"modules must name.*never called \['unused'\]"),
        (Unused(), {"modules": ["use"]}, ValueError, r"modules must be.*\['used', 'unused'\], got \['use'\]"),
        (Unused(), {"modules": "used"}, ValueError, "modules must be a list of names of modules, got 'used'"),
        (Unused(), {"modules": []}, ValueError, r"modules must be a list of names of modules, got \[\]"),
        (WithoutDetails(), {}, TypeError, "'WithoutDetails' must return .y, weights..*got Tensor"),
        (FusedMultiHeadDAAM(1, 2, 3), {"average_over": 3}, ValueError, r"average_over must name.*have 3, got \(3,\)"),
        (FusedMultiHeadDAAM(1, 2, 3), {"average_over": "0"}, TypeError, "average_over must be an axis or several"),
        (FusedMultiHeadDAAM(1, 2, 3), {"average_over": ()}, TypeError, "average_over must be an axis or several"),
        (FusedMultiHeadDAAM(1, 2, 3), {"average_over": True}, TypeError, "average_over must be an axis or several"),
        (FusedMultiHeadDAAM(1, 2, 3), {"limit": 0}, ValueError, "limit must be an int of at least 1, got 0"),
    ],
)
def test_collect_names_what_does_not_fit(model, keywords, error, words):
    with pytest.raises(error, match=words):
        explain.collect(model, [torch.randn(2, 8, 2)], progress=False, **keywords)


def test_collect_needs_batches_and_finite_weights():
    module = FusedMultiHeadDAAM(1, 2, 3)
    with pytest.raises(ValueError, match="loader must give at least one batch, got none"):
        explain.collect(module, [], progress=False)
    with pytest.raises(ValueError, match="weights of 'FusedMultiHeadDAAM' must be finite"):
        explain.collect(module, [torch.full((2, 8, 2), math.nan)], progress=False)
    ragged = torch.nested.nested_tensor([torch.randn(8, 2), torch.randn(9, 2)], layout=torch.jagged)
    with pytest.raises(TypeError, match="weights of 'FusedMultiHeadDAAM' must be one dense tensor, got a nested one"):
        explain.collect(module, [ragged], progress=False)


# Pictures


def saved(path: Path) -> bytes:
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


PLOTS = {
    "importance": lambda path=None, **keywords: explain.plot_importance(torch.rand(3, 5), path, **keywords),
    "contribution": lambda path=None, **keywords: explain.plot_layer_contribution(torch.rand(3, 5), path, **keywords),
    "density": lambda path=None, **keywords: explain.plot_density(FusedMultiHeadDAAM(1, 2, 3), path, **keywords),
}


@pytest.fixture(params=PLOTS)
def plot(request):
    return PLOTS[request.param]


def test_pictures_are_png_or_svg_by_suffix(plot, tmp_path):
    figure = plot(tmp_path / "a.PNG", title="Speakers")
    assert isinstance(figure, Figure)
    assert saved(tmp_path / "a.PNG").startswith(b"\x89PNG\r\n")
    (tmp_path / "a.PNG").unlink()
    plot(str(tmp_path / "b.svg"))
    assert ElementTree.fromstring(saved(tmp_path / "b.svg")).tag.endswith("svg")
    shown = figure.get_suptitle() or figure.axes[0].get_title()
    assert shown == "Speakers"


@pytest.mark.parametrize("name", ["a.pdf", "a", "png"])
def test_other_suffixes_are_refused_before_anything_is_written(plot, name, tmp_path):
    with pytest.raises(ValueError, match=f"path must end in .png or .svg, got .*{name}"):
        plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_what_was_there(plot, tmp_path, monkeypatch):
    def write_half(self, path, **keywords):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(OSError, match="disk full"):
        plot(tmp_path / "a.png")
    assert saved(tmp_path / "a.png") == b"old"


def test_pictures_without_matplotlib_say_what_to_install(plot, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'daam_kernels\[explain\]'"):
        plot()


def test_importing_and_numbers_need_neither_matplotlib_nor_tqdm_and_pictures_no_pyplot():
    code = """
        import sys
        hidden = ("matplotlib", "tqdm")

        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in hidden:
                    raise ModuleNotFoundError(f"No module named {name!r}")

        sys.meta_path.insert(0, Hide())
        import torch
        from daam_kernels import FusedMultiHeadDAAM, explain
        assert not {"matplotlib", "tqdm", "torch._dynamo"} & set(sys.modules)
        module = FusedMultiHeadDAAM(1, 2, 3)
        weights = explain.collect(module, [torch.randn(2, 8, 4)])["FusedMultiHeadDAAM"]
        assert explain.importance_factor(weights).shape == (8, 4)
        assert "torch._dynamo" not in sys.modules
        hidden = ()
        explain.plot_importance(weights), explain.plot_layer_contribution(weights), explain.plot_density(module)
        assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "attention: batch 1 of 1" in result.stderr


def test_heat_map_shows_features_by_layers():
    weights = torch.rand(3, 5, dtype=torch.float64)
    axes, bar = explain.plot_importance(weights).axes
    (image,) = axes.images
    assert close(torch.tensor(image.get_array().data), min_max(weights))
    assert image.get_extent() == [0.5, 5.5, 0.5, 3.5] and image.origin == "lower" and image.get_clim() == (0, 1)
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("feature", "layer", "importance factor")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    assert list(axes.get_xticks()) == [1, 2, 3, 4, 5]


def rendered(figure: Figure) -> torch.Tensor:
    """RGBA [height, width, 4], 0 to 255, the upper row first."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.tensor(np.asarray(canvas.buffer_rgba()))


def test_layers_stay_apart_where_features_are_finer_than_pixels():
    weights = torch.zeros(2, 1000)
    weights[1] = 1
    figure = explain.plot_importance(weights)
    axes, pixels = figure.axes[0], rendered(figure).float() / 255
    box = axes.get_window_extent()
    column = pixels[:, int((box.x0 + box.x1) / 2)].flip(0)[int(box.y0) + 2 : int(box.y1) - 2]
    low, high = (torch.tensor(axes.images[0].cmap(value)) for value in (0.0, 1.0))
    blended = ((column - low).abs().amax(1) > 0.02) & ((column - high).abs().amax(1) > 0.02)
    assert len(column) > 100 and blended.sum() <= 0.05 * len(column)


def test_no_feature_is_lost_between_pixels():
    weights = torch.zeros(2, 5000)
    weights[:, ::2] = 1
    figure = explain.plot_importance(weights)
    pixels, axes = rendered(figure).float() / 255, figure.axes[0]
    x, y = axes.transData.transform((2500, 1))
    low, middle, high = (torch.tensor(axes.images[0].cmap(value)) for value in (0.0, 0.5, 1.0))
    row = pixels[-int(y), int(x) - 50 : int(x) + 50]
    assert (row - middle).abs().amax() < 0.5 * min((low - middle).abs().amax(), (high - middle).abs().amax())


def test_no_data_is_grey():
    weights = torch.rand(2, 5)
    weights[:, 4] = math.nan
    figure = explain.plot_importance(weights)
    pixels = rendered(figure)
    x, y = figure.axes[0].transData.transform((5, 1))
    assert pixels[-int(y), int(x), :3].tolist() == [0xE3] * 3


def test_layers_are_called_by_the_names_of_the_entries():
    weights = {"encoder.block.layer_0": torch.rand(4), "encoder.block.layer_1": torch.rand(4)}
    axes = explain.plot_importance(weights).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer_0", "layer_1"]
    axes = explain.plot_layer_contribution(weights, layer_names=["low", "high"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["low", "high"]
    axes = explain.plot_importance(torch.rand(100, 4)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["1", "5", "9"]
    for names in (["low"], "ab", 2):
        with pytest.raises(ValueError, match="layer_names must be one name for each of 2 layers, got"):
            explain.plot_importance(weights, layer_names=names)


def test_bars_are_the_contributions():
    weights = torch.rand(4, 5, dtype=torch.float64)
    axes = explain.plot_layer_contribution(weights).axes[0]
    heights = torch.tensor([bar.get_height() for bar in axes.patches], dtype=torch.float64)
    assert close(heights, 100 * weights.sum(1) / weights.sum())
    assert list(axes.lines[0].get_ydata()) == [25, 25]
    assert axes.get_ylim()[1] > heights.max()


def drawn(panel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, the density, and the single Gaussians of one head, as drawn."""
    *single, density = [torch.tensor(line.get_ydata()) for line in panel.lines]
    return torch.tensor(panel.lines[0].get_xdata()), density, torch.stack(single)


def module_with(offsets, c, **attributes) -> nn.Module:
    module = nn.Module()
    module.mean_offsets, module.c = nn.Parameter(torch.tensor(offsets)), nn.Parameter(torch.tensor(c))
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("rstd", [1, 0.25])
def test_curves_of_a_product(rstd):
    module = FusedMultiHeadDAAM(1, 2, 3)
    nn.init.normal_(module.mean_offsets)
    with torch.no_grad():
        module.c[0] *= -1  # only squares count
    panels = explain.plot_density(module, rstd=rstd).axes
    assert len(panels) == 2
    for panel, offsets, c in zip(panels, module.mean_offsets.detach().double(), module.c.detach().double()):
        t, density, single = drawn(panel)
        assert t.min() <= -4 and t.max() >= 4
        assert close(density.max(), torch.tensor(1.0).double())
        # d = t / rstd in units of x, variance 1 / rstd^2
        gaussians = [(-((t / rstd - o) ** 2) * rstd**2 / (2 * s**2)).exp() for o, s in zip(offsets, c)]
        assert torch.allclose(single, torch.stack(gaussians), rtol=1e-9, atol=1e-12)
        product = math.prod(gaussians)
        assert torch.allclose(density, product / product.max(), rtol=1e-9, atol=1e-12)
        inverse = c**-2
        center, width = (offsets * rstd * inverse).sum() / inverse.sum(), inverse.sum() ** -0.5
        words = panel.get_title().replace("−", "-").split()
        assert float(words[3].rstrip(",")) == pytest.approx(center.item(), abs=0.0051)
        assert float(words[5]) == pytest.approx(width.item(), rel=0.051)
    assert panels[0].get_xlabel() == "(x − mean) / deviation"


@pytest.mark.parametrize("softmax", [True, False])
def test_curves_of_a_mixture(softmax):
    offsets, c = [[-1.5, 0.0], [0.0, 9.0]], [[0.5, 1.0], [-2.0, 1.0]]
    weights = torch.tensor([[0.0, 1.0], [0.25, 0.75]])
    keywords = {} if softmax else {"weights_softmax": False}
    module = module_with(offsets, c, density="mixture", weights=weights, **keywords)
    shares = weights.double().softmax(1) if softmax else weights.double()
    figure = explain.plot_density(module)
    for panel, mu, sigma, share in zip(figure.axes, offsets, c, shares):
        t, density, single = drawn(panel)
        parts = torch.stack([p * (-((t - m) ** 2) / (2 * s**2)).exp() for p, m, s in zip(share, mu, sigma)])
        peak = parts.sum(0).max()
        assert torch.allclose(single, parts / peak, rtol=1e-9, atol=1e-12)
        assert torch.allclose(density, parts.sum(0) / peak, rtol=1e-9, atol=1e-12)
        assert t.max() >= 12  # the second head's Gaussian at 9 is in the picture, of both heads alike
    assert [text.get_text() for text in figure.legends[0].get_texts()][0] == "mixture"


@pytest.mark.parametrize("learnable_weights", [True, torch.tensor([0.5, 0.2, 0.3])])
def test_the_mixture_module_is_drawn_as_one(learnable_weights):
    module = FusedMultiHeadGAAM(1, 2, 3, torch.tensor([0.5, 1.0, 2.0]), learnable_weights)
    nn.init.normal_(module.mean_offsets)
    shares = torch.ones(3) / 3 if learnable_weights is True else learnable_weights
    for panel, mu in zip(explain.plot_density(module).axes, module.mean_offsets.detach().double()):
        t, density, _ = drawn(panel)
        mixture = sum(p * (-((t - m) ** 2) / (2 * s**2)).exp() for p, m, s in zip(shares, mu, (0.5, 1.0, 2.0)))
        assert torch.allclose(density, mixture / mixture.max(), rtol=1e-6, atol=1e-9)
    x = batches(3)[0]
    collected = explain.collect(module, [x], progress=False)["FusedMultiHeadGAAM"]
    assert close(collected, module(x, True)[1].mean(0))


def test_first_generation_modules_are_known_by_their_weights():
    stated = module_with([[-1.0, 0.5]], [[0.5, 1.0]], density="mixture", weights=torch.tensor([0.0, 1.0]))
    public = module_with([-1.0, 0.5], [0.5, 1.0], weights=torch.tensor([0.0, 1.0]))
    curves = [drawn(explain.plot_density(module).axes[0])[1] for module in (stated, public)]
    assert torch.equal(*curves)


def test_the_gate_is_drawn_as_the_mean_of_normal_densities():
    gate = FusedDensityGate(5, 3)
    offsets, log_sigma = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([-2.0, 0.5, 1.0])
    gate.gaa["mean_offsets"].data, gate.gaa["log_sigma"].data = offsets, log_sigma
    figure = explain.plot_density(nn.Sequential(gate), rstd=0.5)
    (panel,) = figure.axes
    t, density, single = drawn(panel)
    assert panel.get_title() == "head 1" and t.max() >= 4
    widths = nn.functional.softplus(log_sigma.double()) + 1e-3
    parts = [(-((t - 0.5 * mu) ** 2) / (2 * s**2)).exp() / (3 * s) for mu, s in zip(offsets.tolist(), widths)]
    peak = sum(parts).max()
    assert torch.allclose(single, torch.stack(parts) / peak, rtol=1e-9, atol=1e-12)
    assert torch.allclose(density, sum(parts) / peak, rtol=1e-9, atol=1e-12)


def test_shares_of_a_mixture_may_be_one_for_all_heads():
    offsets, c, weights = [[-1.5, 0.0], [0.0, 2.0]], [[0.5, 1.0], [2.0, 1.0]], torch.tensor([0.25, 0.75])
    one, each = (module_with(offsets, c, density="mixture", weights=w) for w in (weights, weights.expand(2, 2)))
    for panel, other in zip(explain.plot_density(one).axes, explain.plot_density(each).axes):
        assert torch.equal(drawn(panel)[1], drawn(other)[1])


def test_narrow_and_many_gaussians_are_drawn_to_their_peak():
    far_apart = [[float(k) for k in range(-40, 40, 2)]]
    for module in (module_with([[0.1234]], [[1e-6]]), module_with(far_apart, [[0.5] * 40])):
        _, density, single = drawn(explain.plot_density(module).axes[0])
        assert density.max() == 1 and density.isfinite().all() and single.amax(1).min() > 0.999


def test_every_head_of_every_layer_is_drawn():
    figure = explain.plot_density(FusedDensityBlock([1, 1], [3, 2], [4, 1], 2))
    titles = [panel.get_title().splitlines()[0] for panel in figure.axes]
    assert titles == [f"layers.0, head {h}" for h in (1, 2, 3)] + [f"layers.1, head {h}" for h in (1, 2)]
    public, ours = MultiHeadGaussianAdaptiveAttention(1, 3, 4), FusedMultiHeadDAAM(1, 3, 4)
    ours.load_state_dict(public.state_dict())
    for theirs, panel in zip(explain.plot_density(public).axes, explain.plot_density(ours).axes):
        assert torch.equal(drawn(theirs)[1], drawn(panel)[1])


@pytest.mark.parametrize(
    "module, keywords, error, words",
    [
        (torch.ones(2), {}, TypeError, "module must be a torch.nn.Module, got Tensor"),
        (nn.Linear(2, 2), {}, ValueError, "module must have mean_offsets and c.*got Linear"),
        (FusedMultiHeadDAAM(1, 2, 3), {"rstd": 0}, ValueError, "rstd must be positive, got 0"),
        (FusedMultiHeadDAAM(1, 2, 3), {"rstd": "1"}, TypeError, "rstd must be a number, got str"),
        (
            module_with([[0.0]], [[1.0]], density="gaussian"),
            {},
            ValueError,
            "must be 'product' or 'mixture'.*'gaussian'",
        ),
        (module_with([[0.0]], [[1.0]], density="mixture"), {}, ValueError, "weights of 'module'.*tensor, got None"),
        (module_with([[0.0]], [[1.0, 1.0]]), {}, ValueError, r"must have shape.*got \[1, 1\] and \[1, 2\]"),
        (module_with([[0.0, 0.0]], [[1.0, 1.0]], num_gaussians=1), {}, ValueError, r"must have shape.*got \[1, 2\]"),
    ],
)
def test_modules_without_curves_are_refused(module, keywords, error, words):
    with pytest.raises(error, match=words):
        explain.plot_density(module, **keywords)


# CSV


def test_csv_holds_every_importance_factor(tmp_path):
    weights = torch.rand(2, 3, dtype=torch.float64)
    weights[1, 2] = math.nan
    explain.write_importance(weights, tmp_path / "a.csv", layer_names=["low", "high, last"])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["feature"]) for row in rows] == [
        (layer, feature) for layer in ("low", "high, last") for feature in "123"
    ]
    values = torch.tensor([float(row["importance"]) for row in rows], dtype=torch.float64).view(2, 3)
    assert values.equal(explain.importance_factor(weights)) or close(values, explain.importance_factor(weights))
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]
    explain.write_importance(weights, tmp_path / "a.csv", layer_axis=1, feature_axis=0)
    assert (tmp_path / "a.csv").read_text().splitlines()[1].startswith("1,1,")
