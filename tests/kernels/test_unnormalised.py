"""The kernels of the gate and the per-feature Gaussian: long slices, launches, determinism, columns of parameters."""

import dataclasses

import daam_kernels
import pytest
import torch
from support import assert_contract, device_of, generator
from unnormalised import DENSITIES, columns, evaluate, gaussians, truth

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

from daam_kernels.kernels import tiling  # noqa: E402

DEVICE = device_of("triton")
FORWARD = ["split_statistics", "split_output"]
BACKWARD = ["mixture_split_slopes", "mixture_split_gradient"]
LAST = {"gate": ["mixture_parameter_gradients"], "gaussian": ["feature_parameter_gradients"]}
LONG = {"rows": ((1, 150), 1), "columns": ((130, 8), 0), "thin columns": ((2, 140, 3), 1)}
pytestmark = pytest.mark.parametrize("density", DENSITIES)


def inputs(density, shape, axis, heads, dtype, *, mean=0.0, deviation=1.0):
    rng = generator()
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(DEVICE, dtype)
    grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)
    count = columns(density, shape, axis)
    parameters = gaussians(density, heads, count, rng, offsets=0.05 * deviation, dtype=torch.float64, device=DEVICE)
    return x, grad, parameters


def check(x, grad, parameters, **options):
    got = evaluate("triton", x, *parameters, grad, **options)
    assert_contract(got, truth(x, *parameters, grad, **options), x.dtype, str(options))


@pytest.mark.parametrize(
    "layout, dtype",
    [("rows", torch.float64), ("rows", torch.float16), ("columns", torch.bfloat16), ("thin columns", torch.float32)],
    ids=str,
)
def test_split_slices(small_tiles, launched, layout, dtype, density):
    shape, axis = LONG[layout]
    x, grad, parameters = inputs(density, shape, axis, 1, dtype, mean=3.0)
    check(x, grad, parameters, norm_axis=axis, density=density)
    assert launched == FORWARD + BACKWARD + LAST[density]


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_split_slices_with_padding(small_tiles, padding_stats, multiply, density):
    x, grad, parameters = inputs(density, (130, 3), 0, 1, torch.float32, mean=0.5)
    mask = torch.rand(130, 3, generator=generator(7)).to(DEVICE) < 0.7
    mask[:, 0] = False  # a slice of padding alone
    mask[:, 1] = torch.arange(130, device=DEVICE) == 40  # and one with a single valid element
    options = dict(norm_axis=0, mask=mask, padding_stats=padding_stats, density=density, multiply=multiply)
    check(x, grad, parameters, **options)


def test_the_backward_finds_what_no_forward_pass_saved(small_tiles, launched, density):
    """Nothing is saved of slices so short that no tile but these would split them."""
    x, grad, parameters = inputs(density, (1, 120), 1, 1, torch.float64)
    check(x, grad, parameters, norm_axis=1, density=density)
    assert launched == FORWARD + FORWARD + BACKWARD + LAST[density]


def test_slices_that_one_block_holds_in_the_forward_pass_alone(small_tiles, monkeypatch, launched, density):
    monkeypatch.setattr(tiling, "BUDGET", dataclasses.replace(tiling.BUDGET, forward_columns=4096))
    x, grad, parameters = inputs(density, (130, 8), 0, 1, torch.float32, mean=3.0)
    check(x, grad, parameters, norm_axis=0, residual=True, density=density)
    assert launched == ["forward_resident", *BACKWARD, *LAST[density]]


@pytest.mark.parametrize("mean, deviation", [(1e4, 0.1), (1.0, 1e-4)], ids=["offset", "at the floor"])
def test_split_slices_on_an_offset_with_a_constant_gradient(small_tiles, mean, deviation, density):
    x, _, parameters = inputs(density, (1, 170), 1, 1, torch.float32, mean=mean, deviation=deviation)
    check(x, torch.ones_like(x), parameters, norm_axis=1, density=density)


@pytest.mark.parametrize("shape, axis", [((3, 64), 1), ((2, 24, 33), 1)], ids=str)
def test_resident_slices_take_one_launch_forward_and_two_backward(launched, shape, axis, density):
    x, grad, parameters = inputs(density, shape, axis, 2, torch.float32)
    check(x, grad, parameters, norm_axis=axis, residual=True, density=density)
    assert launched == ["forward_resident", "mixture_backward_resident", *LAST[density]]


def test_many_rows_and_features(density):
    """More partial sums, and more features, than one program of the last launch takes at a time; few elements."""
    shape = (20, 2, 70)
    x, grad, parameters = inputs(density, shape, 1, 1, torch.float64)
    check(x, grad, parameters, norm_axis=1, density=density)


def test_packed_sequences_are_those_alone(density):
    x, grad, parameters = inputs(density, (23, 3), 0, 2, torch.float64)
    ends = [0, 2, 9, 23]
    options = dict(norm_axis=0, density=density)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    got = evaluate("triton", x, *parameters, grad, cu_seqlens=cu_seqlens, **options)
    alone = [truth(x[i:j], *parameters, grad[i:j], **options) for i, j in zip(ends, ends[1:])]
    y, dx, *gradients = zip(*alone)
    assert_contract(got, (torch.cat(y), torch.cat(dx), *map(sum, gradients)), x.dtype)
