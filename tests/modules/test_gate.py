"""The density gate's module: the public code's formulas and parameters, and what every torch module must survive."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from support import assert_close, assert_same_bits, device_of
from torch import Tensor, nn

from daam_kernels import available_backends
from daam_kernels.modules.gate import FusedDensityGate
from daam_kernels.reference import density_gate


class PublicGaussians(nn.Module):
    """What the public training code calls ``gaa``, with its formulas and parameters."""

    def __init__(self, num_gaussians: int) -> None:
        super().__init__()
        self.mean_offsets = nn.Parameter(torch.zeros(num_gaussians))
        self.log_sigma = nn.Parameter(torch.full((num_gaussians,), math.log(0.5)))
        self.register_buffer("_log_sqrt_2pi", torch.tensor(0.5 * math.log(2 * math.pi)), persistent=False)  # not used

    def forward(self, a: Tensor) -> Tensor:
        mean, std = a.mean(2, keepdim=True), a.var(2, keepdim=True, unbiased=False).clamp_min(1e-6).sqrt()
        sigma = nn.functional.softplus(self.log_sigma) + 1e-3
        logs = []
        for offset, s in zip(self.mean_offsets, sigma):
            z = (a - (mean + offset)) / (std * s + 1e-8)
            logs.append(-0.5 * z * z - torch.log(s) - 0.5 * math.log(2 * math.pi))
        return torch.exp(torch.logsumexp(torch.stack(logs, -1), -1) - math.log(len(logs)))


class Public(nn.Module):
    def __init__(self, channels: int, num_gaussians: int = 4) -> None:
        super().__init__()
        self.to_attn = nn.Conv1d(channels, 1, 1)
        self.gaa = PublicGaussians(num_gaussians)
        self.alpha = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gaa(self.to_attn(x))
        return x * (1 + self.alpha * gate), gate


def make(channels: int = 6, num_gaussians: int = 4, **options) -> FusedDensityGate:
    module = FusedDensityGate(channels, num_gaussians, **options)
    with torch.no_grad():
        module.gaa["mean_offsets"].normal_()
        module.gaa["log_sigma"].normal_()
    return module


def lengths_mask(lengths: list[int], time: int) -> Tensor:
    return torch.arange(time) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("num_gaussians", [1, 4])
def test_equals_the_public_code_with_its_checkpoint(num_gaussians):
    torch.manual_seed(0)
    public, ours = Public(6, num_gaussians).double(), FusedDensityGate(6, num_gaussians).double()
    with torch.no_grad():
        for parameter in public.gaa.parameters():
            parameter.normal_()
    assert str(ours.load_state_dict(public.state_dict())) == "<All keys matched successfully>"
    assert str(public.load_state_dict(ours.upstream_state_dict())) == "<All keys matched successfully>"
    assert not any(value.requires_grad for value in ours.upstream_state_dict().values())
    xs = [torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(1)).double().requires_grad_() for _ in range(2)]
    (y, gate), (y_public, gate_public) = (module(x) for module, x in zip((ours, public), xs))
    assert gate.shape == (3, 1, 40)
    assert_close(y, y_public, 1e-12, "y")
    assert_close(gate, gate_public, 1e-12, "gate")
    (y.square().sum() + gate.sum()).backward()  # the gate is part of the graph there too
    (y_public.square().sum() + gate_public.sum()).backward()
    assert_close(xs[0].grad, xs[1].grad, 1e-12, "dx")
    theirs = dict(public.named_parameters())
    for name, parameter in ours.named_parameters():
        if name != "to_attn.bias":  # 0 but for rounding there
            assert_close(parameter.grad, theirs[name].grad, 1e-12, name)
    assert not ours.to_attn.bias.grad.any()


def test_initialisation_is_the_public_codes():
    torch.manual_seed(0)
    public = Public(5, 3).state_dict()
    module = FusedDensityGate(5, 3)
    assert module.density == "gate"
    assert {key: value.shape for key, value in module.state_dict().items()} == {
        key: value.shape for key, value in public.items()
    }
    assert all(torch.equal(module.state_dict()[key], public[key]) for key in public if "to_attn" not in key)
    assert module.to_attn.weight.abs().max() <= 5**-0.5 and module.to_attn.weight.unique().numel() == 5
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(value, public[key]) for key, value in module.state_dict().items())
    assert FusedDensityGate(5, alpha=0.5).alpha == 0.5


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_forward_passes_mask_and_options(padding_stats):
    module, x = make(padding_stats=padding_stats).double(), torch.randn(3, 6, 20).double()
    mask = lengths_mask([20, 9, 2], 20)
    gaussians = module.gaa["mean_offsets"], module.gaa["log_sigma"]
    expected = density_gate(
        x, module.to_attn.weight, module.to_attn.bias, *gaussians, module.alpha, mask=mask[:, None],
        padding_stats=padding_stats,
    )  # fmt: skip
    for form in (mask, mask[:, None]):
        assert all(torch.equal(*pair) for pair in zip(module(x, mask=form), expected))
    assert torch.equal(module(x, mask=mask[1])[0], module(x, mask=mask[1].expand(3, 20))[0])


def test_a_masked_batch_gives_what_its_sequences_give_alone():
    module, x = make().double(), torch.randn(3, 6, 20).double()
    lengths = [20, 9, 1]
    y, gate = module(x, mask=lengths_mask(lengths, 20))
    for row, length in enumerate(lengths):
        y_alone, gate_alone = module(x[row : row + 1, :, :length])
        assert_close(y[row, :, :length], y_alone[0], 1e-12)
        assert_close(gate[row, :, :length], gate_alone[0], 1e-12)
        assert torch.equal(y[row, :, length:], x[row, :, length:]) and not gate[row, :, length:].any()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(channels=0), ValueError, "channels must be an int of at least 1, got 0"),
        (dict(channels=4, num_gaussians=1.0), ValueError, "num_gaussians must be an int of at least 1, got 1.0"),
        (dict(channels=4, alpha="a"), TypeError, "alpha must be a number, got str"),
        (dict(channels=4, alpha=math.inf), ValueError, "alpha must be finite, got inf"),
        (dict(channels=4, padding_stats="no"), ValueError, "padding_stats must be one of zero, exclude, got 'no'"),
    ],
)
def test_constructor_names_what_does_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        FusedDensityGate(**arguments)


@pytest.mark.parametrize(
    "x, mask, error, words",
    [
        ([1.0], None, TypeError, "x must be a tensor, got list"),
        (
            torch.ones(2, 6, 5).int(),
            None,
            TypeError,
            "x must be float64, float32, bfloat16 or float16, got torch.int32",
        ),
        (torch.ones(6, 5), None, ValueError, r"x must have shape \[batch, channels=6, time\].*got \[6, 5\]"),
        (torch.ones(2, 5, 6), None, ValueError, r"x must have shape .*got \[2, 5, 6\]"),
        (torch.ones(2, 6, 0), None, ValueError, r"time at least 1, got \[2, 6, 0\]"),
        (torch.ones(2, 6, 5, device="meta"), None, ValueError, "x must be on the parameters' device, cpu, got meta"),
        (torch.ones(2, 6, 5), [True], TypeError, "mask must be a boolean tensor, got list"),
        (torch.ones(2, 6, 5), torch.ones(2, 5), TypeError, "mask must be a boolean tensor, True where x is valid, got"),
        (torch.ones(2, 6, 5), torch.ones(3, 5).bool(), ValueError, r"\[batch=2, time=5\] or broadcast.*got \[3, 5\]"),
        (torch.ones(2, 6, 5), torch.ones(2, 6, 5).bool(), ValueError, r"to \[2, 1, 5\], got \[2, 6, 5\]"),
        (torch.ones(2, 6, 5), torch.ones(1, 2, 1, 5).bool(), ValueError, r"to \[2, 1, 5\], got \[1, 2, 1, 5\]"),
    ],
)
def test_forward_names_what_does_not_fit(x, mask, error, words):
    with pytest.raises(error, match=words):
        make()(x, mask=mask)


def test_repr_shows_arguments_and_options_that_are_not_the_default():
    assert repr(FusedDensityGate(6)).startswith("FusedDensityGate(\n  channels=6, num_gaussians=4, alpha=0.05\n")
    assert "alpha=0.1, padding_stats='zero'\n" in repr(FusedDensityGate(6, 2, 0.1, padding_stats="zero"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied):
    module, x = make(), torch.randn(3, 6, 9)
    other = copied(module)
    assert torch.equal(other(x)[0], module(x)[0]) and repr(other) == repr(module)


def test_state_dict_round_trip_through_a_file_of_weights_only():
    module, other, x = make(), make(), torch.randn(3, 6, 9)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert str(other.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
    assert torch.equal(other(x)[0], module(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_parameters_and_input(dtype):
    module, x = make(), torch.randn(3, 6, 9)
    y, gate = module(x)
    converted = copy.deepcopy(module).to(dtype)
    assert {t.dtype for m in (converted, module) for t in m(x.to(dtype))} == {dtype}
    assert torch.allclose(converted(x.to(dtype))[1].float(), gate, rtol=0.2, atol=0.05)
    assert torch.allclose(module(x.to(dtype))[0].float(), y, rtol=0.02, atol=0.02)
    assert {p.dtype for p in make(dtype=dtype).parameters()} == {dtype}


def test_autocast_leaves_the_arithmetic_alone():
    module, x = make(), torch.randn(3, 6, 30)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    for a, b in zip(got, module(x), strict=True):
        assert_same_bits(a, b)


def test_meta_device_then_materialised():
    module = FusedDensityGate(6, device="meta")
    assert all(p.is_meta for p in module.parameters())
    y, gate = module(torch.empty(3, 6, 9, device="meta"))
    assert y.shape == (3, 6, 9) and gate.shape == (3, 1, 9)
    module.to_empty(device="cpu").reset_parameters()
    assert module(torch.randn(3, 6, 9))[0].isfinite().all()


def test_training_changes_every_parameter_but_the_bias():
    module = make()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module(torch.randn(4, 6, 9))[0].square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    unchanged = [name for name, p in module.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == ["to_attn.bias"]


def test_an_empty_batch():
    module, x = make(), torch.zeros(0, 6, 9, requires_grad=True)
    y, gate = module(x, mask=torch.ones(0, 9, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 6, 9) and gate.shape == (0, 1, 9)
    assert not any(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("padding_stats", [None, "zero", "exclude"])
def test_compiles_without_graph_breaks(padding_stats):
    module = make() if padding_stats is None else make(padding_stats=padding_stats)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    xs = [torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    mask = None if padding_stats is None else lengths_mask([9, 5, 1], 9)
    ys = [m(x, mask=mask) for m, x in zip((compiled, module), xs)]
    assert all(torch.equal(*pair) for pair in zip(*ys))
    grads = [torch.autograd.grad(y.square().sum(), (x, *module.parameters())) for (y, _), x in zip(ys, xs)]
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*grads))


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_in_tritons_kernels(padding_stats):
    if not available_backends()["triton"]:
        pytest.skip("triton is not installed")
    device = device_of("triton")
    module, x = make(padding_stats=padding_stats).to(device), torch.randn(3, 6, 20, device=device)
    mask = lengths_mask([20, 9, 2], 20).to(device)
    fused = FusedDensityGate(6, padding_stats=padding_stats, backend="triton", device=device)
    fused.load_state_dict(module.state_dict())
    assert fused.backend == "triton" and "backend='triton'" in repr(fused)
    expected, got = (m(x, mask=mask) for m in (module, fused))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 2e-6)
    grads = [torch.autograd.grad(y.square().sum() + gate.sum(), m.parameters()) for m, (y, gate) in
             ((module, expected), (fused, got))]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
