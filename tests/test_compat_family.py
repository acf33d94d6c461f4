"""fuse and unfuse of the first generation, the paper's per-feature attention and the gate, recognised by attributes.

The stand-ins below have the public code's names, attributes and parameters; their formulas are written out here.
"""

from __future__ import annotations

import copy
import math
import pickle
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from daam_kernels import (
    FusedDensityGate,
    FusedMultiHeadFeatureDAAM,
    FusedMultiHeadGAAM,
    compat,
    explain,
    fuse,
    fusion_report,
    unfuse,
)

# ---- the first generation


class GaussianAdaptiveAttention(nn.Module):
    def __init__(self, norm_axis, num_gaussians, learnable_weights=True, padding_value=None, eps=1e-8):
        super().__init__()
        self.norm_axis, self.num_gaussians = norm_axis, num_gaussians
        self.padding_value, self.eps = padding_value, eps
        self.device = torch.device("cpu")
        self.mean_offsets = nn.Parameter(torch.zeros(num_gaussians))
        self.c = nn.Parameter(torch.full((num_gaussians,), 2.0))
        self.weights = nn.Parameter(torch.ones(num_gaussians)) if learnable_weights is True else learnable_weights

    def density(self, x, mean, var):
        learned = isinstance(self.weights, nn.Parameter)
        shares = self.weights.softmax(0) if learned else self.weights
        d = x - mean
        total = 0
        for share, offset, c in zip(shares, self.mean_offsets, self.c):
            total = total + share * torch.exp(-((d - offset) ** 2) / (2 * var * c**2))
        return total

    def forward(self, x):
        x = x.to(self.device)
        valid = torch.ones_like(x, dtype=torch.bool) if self.padding_value is None else x != self.padding_value
        kept = torch.where(valid, x, 0)
        mean = kept.mean(self.norm_axis, keepdim=True)
        var = kept.var(self.norm_axis, keepdim=True) + self.eps
        density = self.density(x, mean, var)
        weights = density / density.sum(self.norm_axis, keepdim=True).clamp(min=self.eps)
        return torch.where(valid, x * weights, x)


class MultiHeadGaussianAdaptiveAttention(nn.Module):
    def __init__(self, norm_axis, num_heads, num_gaussians, initial_variance=2, learnable_weights=True,
                 padding_value=None, eps=1e-8):  # fmt: skip
        super().__init__()
        self.norm_axis, self.num_heads, self.num_gaussians = norm_axis, num_heads, num_gaussians
        self.padding_value, self.eps = padding_value, eps
        self.learnable_weights, self.initial_variance = learnable_weights, initial_variance
        self.attention_heads = nn.ModuleList(
            GaussianAdaptiveAttention(norm_axis, num_gaussians, learnable_weights, padding_value, eps)
            for _ in range(num_heads)
        )

    def forward(self, x):
        size = x.shape[self.norm_axis] // self.num_heads
        parts = [head(x.narrow(self.norm_axis, i * size, size)) for i, head in enumerate(self.attention_heads)]
        return torch.cat(parts, self.norm_axis)


# ---- the paper


class DAAM(nn.Module):
    def __init__(self, feature_size, eps=1e-5):
        super().__init__()
        self.downsample = nn.AdaptiveAvgPool1d(1)
        self.eps = eps
        self.c = nn.Parameter(torch.full((1, feature_size), 2.0))
        self.mean_offset = nn.Parameter(torch.zeros(1, feature_size))
        self.attention_weights = {"var": [], "mean": [], "c": [], "attention_maps": []}

    def spread(self, a):
        return ((a**2).mean(1, keepdim=True) - a.mean(1, keepdim=True) ** 2).abs()

    def forward(self, x, save_attention_weights=False):
        batch, layers, steps, features = x.shape
        a = self.downsample(x.reshape(batch, layers * features, steps)).view(batch, layers, features)
        d = a - a.mean(1, keepdim=True)
        weights = torch.exp(-((d - self.mean_offset) ** 2) / (2 * self.c * (self.spread(a) + 1e-8 + self.eps)))
        self.y_transform = weights.unsqueeze(2).expand_as(x)
        if save_attention_weights:
            self.attention_weights["attention_maps"].append(self.y_transform.mean((0, 2)).detach())
        return x * self.y_transform


class MultiHeadDAAM(nn.Module):
    """The details of some of the public code fail: they look for the heads under the name of the other code."""

    def __init__(self, layers, features, num_heads, heads="daams", details="daams", eps=1e-5):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, layers // num_heads
        self.details, self.takes_time = details, False
        setattr(self, heads, nn.ModuleList(DAAM(features, eps) for _ in range(num_heads)))

    def heads(self):
        return next(iter(self._modules.values()))

    def forward(self, x, save_attention_weights=False):
        x = x.squeeze().unsqueeze(0) if len(x) == 1 else x.squeeze()
        if not self.takes_time:
            batch, layers, features = x.shape
            x = x.unsqueeze(2)
        parts = x.unflatten(1, (self.num_heads, self.head_dim)).unbind(1)
        y = torch.cat([head(part, save_attention_weights).mean(2) for head, part in zip(self.heads(), parts)], 1)
        if save_attention_weights:
            return y, [head.attention_weights for head in getattr(self, self.details)]
        return y


# ---- the gate


class GateGaussians(nn.Module):
    def __init__(self, num_gaussians):
        super().__init__()
        self.norm_axis, self.num_heads, self.num_gaussians, self.padding_value, self.eps = 2, 1, num_gaussians, None, 0
        self.mean_offsets = nn.Parameter(torch.zeros(num_gaussians))
        self.log_sigma = nn.Parameter(torch.full((num_gaussians,), math.log(0.5)))
        self.register_buffer("_log_sqrt_2pi", torch.tensor(0.5 * math.log(2 * math.pi)), persistent=False)

    def spread(self, a):
        return a.var(2, keepdim=True, unbiased=False).clamp_min(1e-6).sqrt()

    def forward(self, a, return_attention_details=False):
        a32 = a.float()
        d, std = a32 - a32.mean(2, keepdim=True), self.spread(a32)
        s = nn.functional.softplus(self.log_sigma) + 1e-3
        z = [(d - offset) / (std * width + 1e-8) for offset, width in zip(self.mean_offsets, s)]
        logs = [-each.square() / 2 - width.log() - self._log_sqrt_2pi for each, width in zip(z, s)]
        gate = torch.stack(logs).exp().mean(0)
        y = (a32 * gate).to(a.dtype)
        return (y, gate.to(a.dtype)) if return_attention_details else y


GateGaussians.__name__ = "GaussianAdaptiveAttention"


class GAttnGateG(nn.Module):
    def __init__(self, channels, num_gaussians=4, cap=0.2):
        super().__init__()
        self.to_attn = nn.Conv1d(channels, 1, 1)
        self.gaa = GateGaussians(num_gaussians)
        self.alpha = nn.Parameter(torch.tensor(0.05))
        self.cap = cap

    def forward(self, x):
        _, gate = self.gaa(self.to_attn(x), return_attention_details=True)
        return x * (1 + self.alpha * gate), gate


# ---- what all must do


def trained(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_()
            if name.endswith("c"):
                parameter.exp_()
    return module.double()


def shares(*values):
    return torch.tensor(values or (0.5, 0.3, 0.4))


def first(learnable_weights=True, heads=2, **options):
    return trained(MultiHeadGaussianAdaptiveAttention(1, heads, 3, 2, learnable_weights, **options))


def alone(learnable_weights=True):
    return trained(GaussianAdaptiveAttention(-2, 3, learnable_weights))


def paper(heads="daams", **options):
    return trained(MultiHeadDAAM(8, 6, 2, heads, **options))


def gate():
    return trained(GAttnGateG(8, 3)).float()


CASES = {
    "first": (first, FusedMultiHeadGAAM),
    "first, given shares, padding": (lambda: first(shares(), padding_value=0.5), FusedMultiHeadGAAM),
    "a head of the first": (alone, FusedMultiHeadGAAM),
    "a head of the first, given shares": (lambda: alone(shares()), FusedMultiHeadGAAM),
    "paper": (paper, compat.MultiHeadDAAM),
    "paper, other name": (lambda: paper("gcts"), compat.MultiHeadDAAM),
    "gate": (gate, FusedDensityGate),
}


def sample(module: nn.Module) -> Tensor:
    x = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1), dtype=next(module.parameters()).dtype)
    x[0, 1:3] = 0.5
    return x


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    y = module(x)
    return list(y) if isinstance(y, tuple) else [y]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= (1e-11 if a.dtype == torch.float64 else 1e-5) * b.norm()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("make, cls", CASES.values(), ids=CASES)
def test_fused_and_back_with_the_same_outputs_gradients_and_checkpoints(make, cls, capsys):
    model = nn.ModuleDict({"inner": make(), "other": nn.Linear(2, 2)})
    reference, x = copy.deepcopy(model["inner"]), sample(model["inner"])
    before = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    training = [part.training for part in model["inner"].eval().modules()]
    assert fuse(model) is model
    fused = model["inner"]
    assert type(fused) is cls and not fused.training
    assert "inner: " in capsys.readouterr().out and list(fusion_report(model).swapped) == ["inner"]
    assert fusion_report(model).skipped == {}

    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [outputs(module, each) for module, each in zip((fused, reference), xs)]
    assert_all_close(*ys)
    for y in ys:
        sum(t.square().sum() for t in y).backward()
    assert_all_close([xs[0].grad], [xs[1].grad])

    checkpoint = make().state_dict()
    assert str(fused.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    reference.load_state_dict(checkpoint)
    with torch.no_grad():
        for parameter in (*fused.parameters(), *reference.parameters()):
            parameter.add_(0.25)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each in (model, copied):
        assert unfuse(each, verbose=False) is each
        restored = each["inner"]
        assert type(restored) is type(reference)
        assert list(restored.state_dict()) == list(reference.state_dict())
        assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in each.named_parameters()} == before
        assert [part.training for part in restored.modules()] == training
        assert all(torch.equal(p, q) for p, q in zip(restored.parameters(), reference.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(outputs(restored, x), outputs(reference, x)))


@pytest.mark.parametrize("make, cls", CASES.values(), ids=CASES)
def test_the_module_itself_a_shared_one_and_one_on_meta(make, cls):
    module = make()
    x = sample(module)
    expected = outputs(module, x)
    fused = fuse(module, verbose=False)
    assert type(fused) is cls and list(fusion_report(fused).swapped) == [""]
    assert_all_close(outputs(fused, x), expected)
    assert all(torch.equal(*pair) for pair in zip(outputs(module, x), expected))

    model = fuse(nn.ModuleList([module, module]), verbose=False)
    assert model[0] is model[1] and type(model[0]) is cls
    unfuse(model, verbose=False)
    assert model[0] is model[1] and type(model[0]) is type(module)

    fused = fuse(make().to("meta"), verbose=False)
    assert type(fused) is cls and all(parameter.is_meta for parameter in fused.parameters())
    fused.to_empty(device="cpu")
    assert not any(t.is_meta for t in unfuse(fused, verbose=False).state_dict().values())
    fused = fuse(make().requires_grad_(False), verbose=False)
    assert not any(parameter.requires_grad for parameter in fused.parameters())


@pytest.mark.parametrize("make", [make for make, _ in list(CASES.values())[::2]], ids=list(CASES)[::2])
def test_hooks_subclasses_and_wrappers_are_left_alone(make):
    hooked, subclass, own = make(), make(), make()
    hooked.register_forward_hook(lambda *_: None)
    subclass.__class__ = type("Own", (type(subclass),), {})
    own.forward = lambda x: x
    model = nn.ModuleList([hooked, subclass, own, torch.compile(make(), backend="eager")])
    before = list(model.modules())
    fuse(model, verbose=False)
    assert list(model.modules()) == before
    reasons = list(fusion_report(model).skipped.values())
    for words, reason in zip(("has hooks", "is a subclass", "a forward of its own", "OptimizedModule"), reasons):
        assert words in reason


# ---- the first generation


def test_the_remainder_that_the_original_drops_is_noted():
    module = first()
    fused = fuse(nn.Sequential(module), verbose=False)
    assert "the last one takes the remainder" in fusion_report(fused).notes["0"]
    assert "the last one takes the remainder" in str(fusion_report(fused))
    assert fusion_report(fuse(first(heads=1), verbose=False)).notes == {}
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    assert module(x).shape[1] == 8 and fused(x).shape == x.shape
    assert_all_close([fused(x)[:, :4]], [module(x)[:, :4]])


def test_eps_and_starting_widths_of_the_first_generation_are_kept():
    module = first()
    module.initial_variance = 1.5
    module.attention_heads[1].eps = 0.5
    fused = fuse(module, verbose=False)
    assert fused.initial_c == 1.5 and fused.eps == (1e-8, 0.5)
    assert [head.eps for head in unfuse(fused, verbose=False).attention_heads] == [1e-8, 0.5]


def unlike_shares(module):
    module.attention_heads[1].weights = shares(1.0, 1.0, 1.0)


def negative_shares(module):
    for head in module.attention_heads:
        head.weights = shares(1.0, -1.0, 1.0)


def shares_that_learn(module):
    for head in module.attention_heads:
        head.weights = shares().requires_grad_()


def one_learned_head(module):
    module.attention_heads[1] = alone()


def one_strange_head(module):
    module.attention_heads[1].bias = nn.Parameter(shares())


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (unlike_shares, "different shares"),
        (negative_shares, "must not be negative"),
        (shares_that_learn, "require a gradient"),
        (one_learned_head, "different generations"),
        (one_strange_head, "not its base, attributes and parameters"),
    ],
)
def test_first_generations_that_are_not_sure_are_left_alone(spoil, reason):
    model = nn.Sequential(first(shares()))
    spoil(model[0])
    before = list(model.modules())
    fuse(model, verbose=False)
    assert list(model.modules()) == before and reason in fusion_report(model).skipped["0"]


def unsquared(self, x, mean, var):
    pairs = zip(self.weights.softmax(0), self.mean_offsets, self.c)
    return sum(share * torch.exp(-((x - mean - offset) ** 2) / (2 * var * c)) for share, offset, c in pairs)


def test_look_alikes_that_compute_something_else_are_left_alone():
    one, two, three = first(), gate(), paper()
    for head in one.attention_heads:
        head.density = MethodType(unsquared, head)
    two.gaa.spread = lambda a: a.std(2, keepdim=True)
    for head in three.daams:
        head.spread = lambda a: a.var(1, keepdim=True)
    model = nn.ModuleList([one, two, three])
    before = list(model.modules())
    fuse(model, verbose=False)
    assert list(model.modules()) == before
    assert all("computes something else" in reason for reason in fusion_report(model).skipped.values())


@pytest.mark.parametrize("channels, num_gaussians", [(1, 1), (512, 4), (1024, 16)])
def test_gates_of_all_sizes_are_recognised(channels, num_gaussians):
    for dtype in (torch.float32, torch.bfloat16):
        module = GAttnGateG(channels, num_gaussians).to(dtype)
        assert type(fuse(module, verbose=False)) is FusedDensityGate


def test_the_floor_of_the_gates_deviation_is_looked_at():
    model = nn.Sequential(gate())
    model[0].gaa.spread = lambda a: a.std(2, keepdim=True, unbiased=False)
    assert "computes something else" in fusion_report(model).skipped["0"]


# ---- the paper


def test_one_time_step_in_all_forms_the_original_takes():
    module = paper()
    fused = fuse(module, verbose=False)
    x = sample(module)
    for each in (x, x[:1], x.unsqueeze(2), x.unsqueeze(1)):
        assert_all_close([fused(each)], [module(each)])
        assert_all_close([fused(each, save_attention_weights=False)], [module(each, False)])
    for module_ in (module, fused):
        with pytest.raises(ValueError):
            module_(x.unsqueeze(2).expand(3, 8, 2, 6))
    with pytest.raises(ValueError, match=r"one time step, got \[3, 8, 2, 6\]: FusedMultiHeadFeatureDAAM takes several"):
        fused(x.unsqueeze(2).expand(3, 8, 2, 6))


def test_saved_attention_weights_go_on_after_fuse_and_after_unfuse():
    module, x = paper(), sample(paper())
    module(x, True)
    reference = copy.deepcopy(trained(paper()))
    model = fuse(nn.Sequential(module), verbose=False)
    reference.load_state_dict(model[0].upstream_state_dict())
    y, saved = model[0](x, True)
    expected, theirs = reference(x, True)
    assert_all_close([y], [expected])
    assert [len(head["attention_maps"]) for head in saved] == [2, 2]
    assert_all_close([head["attention_maps"][1] for head in saved], [head["attention_maps"][0] for head in theirs])
    _, weights = model[0](x, return_attention_details=True)
    assert_all_close([weights.mean(0)[4:]], [theirs[1]["attention_maps"][0]])
    assert_all_close([*explain.collect(model, [x], progress=False).values()], [weights.mean(0)])
    restored = unfuse(model, verbose=False)[0]
    assert [len(head.attention_weights["attention_maps"]) for head in restored.daams] == [2, 2]


def test_what_the_last_call_left_does_not_stop_fuse():
    module = paper()
    module(sample(module)).sum().backward()
    assert module.daams[0].y_transform.requires_grad
    fused = fuse(module, verbose=False)
    assert type(fused) is compat.MultiHeadDAAM
    assert not hasattr(unfuse(fused, verbose=False).daams[0], "y_transform")


def test_details_that_fail_in_the_original_do_not_stop_fuse():
    module = paper(details="gcts")
    with pytest.raises(AttributeError):
        module(sample(module), True)
    assert type(fuse(module, verbose=False)) is compat.MultiHeadDAAM


def test_several_time_steps_are_skipped_with_the_reason():
    several = paper()
    several.takes_time = True
    model = nn.ModuleDict({"head alone": trained(DAAM(6)), "several": several})
    x = torch.randn(2, 8, 3, 6, dtype=torch.float64)
    expected = several(x)
    fuse(model, verbose=False)
    assert type(model["head alone"]) is DAAM and torch.equal(model["several"](x), expected)
    reasons = fusion_report(model).skipped
    assert "several time steps, which it mixes with the features" in reasons["head alone"]
    assert "several time steps, which the paper's class mixes with the features" in reasons["several"]


def unlike_eps(module):
    module.daams[1].eps = 1e-3


def a_head_too_few(module):
    del module.daams[1]


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (unlike_eps, "different values of eps"),
        (a_head_too_few, "num_heads is 2, and there are 1 heads"),
    ],
)
def test_paper_modules_that_are_not_sure_are_left_alone(spoil, reason):
    model = nn.Sequential(paper())
    spoil(model[0])
    before = list(model.modules())
    fuse(model, verbose=False)
    assert list(model.modules()) == before and reason in fusion_report(model).skipped["0"]


def test_the_papers_name_takes_its_arguments():
    module = compat.MultiHeadDAAM(8, 99, 6, 2, 3, 1e-3)
    assert (module.num_layers, module.feature_size, module.num_heads, module.eps) == (8, 6, 2, 1e-3)
    assert (module.c == 3).all() and isinstance(module, FusedMultiHeadFeatureDAAM)
    with pytest.raises(ValueError, match="num_layers must be a multiple of num_heads=3, got 8"):
        compat.MultiHeadDAAM(8, 1, 6, 3)


# ---- the gate


def test_the_gate_keeps_its_parameters_so_that_optimizers_and_ties_go_on():
    model = nn.ModuleDict({"gate": gate(), "tied": nn.Linear(3, 1, bias=False), "other": gate()})
    model["tied"].bias = model["gate"].gaa.mean_offsets
    model["other"].to_attn.weight = model["gate"].to_attn.weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = set(model.parameters())
    fuse(model, optimizer=optimizer, verbose=False)
    assert list(fusion_report(model).swapped) == ["gate", "other"]
    assert set(model.parameters()) == parameters
    assert model["tied"].bias is model["gate"].gaa["mean_offsets"]
    unfuse(model, optimizer=optimizer, verbose=False)
    assert set(model.parameters()) == parameters and type(model["gate"]) is GAttnGateG
    assert model["other"].to_attn.weight is model["gate"].to_attn.weight


def test_a_parameter_of_a_gate_that_a_head_has_too_stays_tied():
    model = nn.ModuleList([gate(), trained(GaussianAdaptiveAttention(1, 3)).float()])
    model[1].mean_offsets = model[0].gaa.mean_offsets
    fuse(model, verbose=False)
    assert type(model[0]) is FusedDensityGate and "used elsewhere" in fusion_report(model).skipped["1"]
    assert model[1].mean_offsets is model[0].gaa["mean_offsets"]


def a_wider_convolution(module):
    module.to_attn = nn.Conv1d(8, 1, 3, padding=1)


def no_bias(module):
    module.to_attn = nn.Conv1d(8, 1, 1, bias=False)


def another_axis(module):
    module.gaa.norm_axis = 1


def another_alpha(module):
    module.alpha = nn.Parameter(torch.zeros(8, 1))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (a_wider_convolution, "to_attn must be Conv1d"),
        (no_bias, "to_attn must be Conv1d"),
        (another_axis, "norm_axis=1"),
        (another_alpha, r"alpha must have shape [], got [8, 1]"),
    ],
)
def test_gates_that_are_not_sure_are_left_alone(spoil, reason):
    model = nn.Sequential(gate())
    spoil(model[0])
    before = list(model.modules())
    fuse(model, verbose=False)
    assert list(model.modules()) == before and reason in fusion_report(model).skipped["0"]


def test_strangers_of_the_gates_and_the_papers_names_stay_and_say_so():
    strangers = [type(name, (nn.Linear,), {})(2, 2) for name in ("GAttnGateG", "MultiHeadDAAM", "DAAM")]
    model = nn.ModuleList([*strangers, GateGaussians(2)])
    before = list(model.modules())
    fuse(model, verbose=False)
    assert list(model.modules()) == before
    reasons = fusion_report(model).skipped
    assert all("has a public class's name" in reasons[path] for path in "012")
    assert "only as a part of one" in reasons["3"]
