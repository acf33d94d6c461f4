"""The kernels on packed sequences, in Triton's interpreter or on a GPU: splits, launches, bounds, allocations."""

import daam_kernels
import pytest
import torch
from ragged import check, inputs, truth
from support import TOLERANCES, assert_close, assert_margins_intact, device_of, generator, nan_padded, transposed
from torch.utils._python_dispatch import TorchDispatchMode

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

from daam_kernels.kernels import density_backward, density_forward

DEVICE = device_of("triton")
FORWARD = ["split_statistics", "split_normaliser", "split_output"]
BACKWARD = {
    "product": ["split_sums", "split_gradient", "parameter_gradients"],
    "mixture": ["mixture_split_sums", "mixture_split_gradient", "mixture_parameter_gradients"],
}
LENGTHS = {"rows": (12, 150, 5), "columns": (70, 5)}  # short ones have runs without an element


@pytest.mark.parametrize(
    "density, features, layout, dtype",
    [
        ("product", 32, "columns", torch.bfloat16),
        ("product", 2, "rows", torch.float64),
        ("mixture", 2, "rows", torch.float32),
    ],
    ids=str,
)
def test_split_slices(small_tiles, launched, density, features, layout, dtype):
    x, grad, cu_seqlens, parameters = inputs((features,), LENGTHS[layout], dtype, DEVICE, density, mean=3.0)
    x = transposed(x) if layout == "rows" else x
    check("triton", x, grad, cu_seqlens, parameters)
    assert launched == FORWARD + BACKWARD[density]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("density", ["product", "mixture"])
@pytest.mark.parametrize("features, layout", [(32, "columns"), (2, "rows")])
def test_slices_that_are_looped_over(looped_tiles, launched, features, layout, density, dtype):
    """The mixture's sums are those of programs in float32 and of tiles in float64, which shorter sequences have fewer
    of."""
    x, grad, cu_seqlens, parameters = inputs((features,), LENGTHS[layout], dtype, DEVICE, density, mean=3.0)
    x = transposed(x) if layout == "rows" else x
    check("triton", x, grad, cu_seqlens, parameters)
    forward, mixture = (FORWARD, "mixture_") if density == "mixture" else (["forward_looped"], "")
    assert launched == [*forward, mixture + "backward_looped", mixture + "parameter_gradients"]


@pytest.mark.parametrize("padding_stats, eps", [("zero", 50.0), ("exclude", 1e-8)])
@pytest.mark.parametrize("density, tiles", [
    ("product", "small_tiles"), ("product", "looped_tiles"), ("mixture", "small_tiles"), ("mixture", "looped_tiles")
])  # fmt: skip
def test_long_slices_with_padding(request, density, tiles, padding_stats, eps):
    request.getfixturevalue(tiles)
    x, grad, cu_seqlens, parameters = inputs((3,), (12, 150, 4), torch.float32, DEVICE, density)
    mask = torch.rand(x.shape, generator=generator(5)).to(DEVICE) < 0.7
    mask[12:87, 0] = False  # a slice of padding alone
    check("triton", x, grad, cu_seqlens, parameters, mask=mask, padding_stats=padding_stats, eps=eps, residual=True)


@pytest.mark.parametrize("density", ["product", "mixture"])
def test_resident_slices_take_one_launch_forward_and_two_backward(launched, density):
    x, grad, cu_seqlens, parameters = inputs((40,), (20, 4), torch.float32, DEVICE, density)
    check("triton", x, grad, cu_seqlens, parameters, max_seqlen=1 << 40)  # no more than all rows
    mixture = "mixture_" if density == "mixture" else ""
    assert launched == ["forward_resident", mixture + "backward_resident", mixture + "parameter_gradients"]


def options_of(density, max_seqlen=None):
    return daam_kernels.options.DensityOptions(0, None, "zero", "clamp", 1e-8, False, density, max_seqlen=max_seqlen)


@pytest.mark.parametrize("density, tiles", [
    ("product", None), ("product", "small_tiles"), ("product", "looped_tiles"), ("mixture", None),
    ("mixture", "small_tiles"), ("mixture", "looped_tiles"),
])  # fmt: skip
def test_no_access_out_of_bounds(monkeypatch, request, density, tiles):
    """Every tensor lies in the middle of NaN: what is read of them shows in the results, what is written in them."""
    if tiles is not None:
        request.getfixturevalue(tiles)
    x, grad, cu_seqlens, parameters = inputs((3,), (4, 31, 5), torch.float32, DEVICE, density)
    mean_offsets, c, *weights = parameters
    last = weights[0].log_softmax(1) if weights else None, cu_seqlens
    expected = truth(x, cu_seqlens, parameters, grad)
    x, grad = (nan_padded(t)[0] for t in (x, grad))
    buffers, new_empty = [], torch.Tensor.new_empty

    def padded(t, shape=None, dtype=None, **keywords):
        shape, dtype = t.shape if shape is None else shape, dtype or t.dtype
        if not dtype.is_floating_point or shape == 0:  # the interpreter's own
            return new_empty(t, shape, dtype=dtype, **keywords)
        view, buffer = nan_padded(torch.full(shape, torch.nan, dtype=dtype, device=t.device))
        buffers.append(buffer)
        return view

    monkeypatch.setattr(torch, "empty_like", padded)
    monkeypatch.setattr(torch.Tensor, "new_empty", padded)
    y, stats = padded(x), padded(x, (3, 3 * 2 * 3))
    density_forward.density_forward(x, mean_offsets, c, None, options_of(density), y, None, stats, *last)
    got = density_backward.density_backward(grad, x, mean_offsets, c, None, stats, options_of(density, 36), *last)
    monkeypatch.undo()
    assert len(buffers) >= 5 + (tiles == "small_tiles")
    for buffer in buffers:
        assert_margins_intact(buffer)
    got = (y, *got[: len(parameters)])
    for result, exact, tolerance in zip(got, expected, TOLERANCES[torch.float32] + (1e-4,)):
        assert_close(result, exact, tolerance)


class SizesOfAllocations(TorchDispatchMode):
    """The elements of every tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.sizes += [result.numel()] if "empty" in function.overloadpacket.__name__ else []
        return result


@pytest.mark.parametrize("density", ["product", "mixture"])
def test_no_padding_is_made(monkeypatch, density):
    """One sequence of 20000 beside 30 of 64: padded, that would be 28 times x."""
    x, grad, cu_seqlens, (mean_offsets, c, *weights) = inputs(
        (16,), (20000, *[64] * 30), torch.float32, DEVICE, density
    )
    for module in (density_forward, density_backward, daam_kernels.kernels.mixture_backward):
        monkeypatch.setattr(module, "run", lambda *args, **kwargs: None)
    last = weights[0] if weights else None, cu_seqlens
    y = torch.empty_like(x)
    with SizesOfAllocations() as made:
        density_forward.density_forward(x, mean_offsets, c, None, options_of(density), y, None, None, *last)
        density_backward.density_backward(grad, x, mean_offsets, c, None, None, options_of(density), *last)
    assert made.sizes and max(made.sizes) <= x.numel()
