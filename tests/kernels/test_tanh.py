"""tanh in Triton's arithmetic, in the interpreter or on a GPU: units in the last place, near 0 too."""

import daam_kernels
import mpmath
import numpy as np
import pytest
import torch
from support import device_of

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from daam_kernels.kernels.tanh import portable_tanh  # noqa: E402


@triton.jit
def apply(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, portable_tanh(tl.load(x_ptr + at)))


def units_off(x):
    """The largest error in units in the last place of the truth."""
    x = torch.from_numpy(x).to(device_of("triton"))
    y = torch.empty_like(x)
    apply[(1,)](x, y, BLOCK=x.numel())
    x, y = x.cpu().numpy(), y.cpu().numpy()
    truth = np.tanh(x.astype(np.longdouble))
    return float((np.abs(y - truth) / np.spacing(np.abs(truth).astype(x.dtype)).astype(np.longdouble)).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_four_units_in_the_last_place(dtype):
    tiny = np.finfo(dtype).tiny * 4
    dense = np.concatenate([
        np.linspace(-12, 12, (1 << 18) - 1), np.linspace(0.5, 1.1, 1 << 17), np.geomspace(tiny, 20, 1 << 17), [0.0],
    ]).astype(dtype)  # fmt: skip
    assert dense.size & (dense.size - 1) == 0 and units_off(dense) <= 4
    assert units_off(-dense) <= 4


def test_long_double_is_a_truth_for_it():
    """numpy's long double tanh against mpmath, where the two branches meet and near 0."""
    for x in (1e-30, 1e-5, 0.1, 0.624, 0.626, 0.999, 1.001, 3.0, 19.0):
        exact = mpmath.tanh(mpmath.mpf(x))
        assert abs(mpmath.mpf(np.format_float_positional(np.tanh(np.longdouble(x)), 30)) / exact - 1) < 1e-18


def test_infinity_and_nan():
    values = np.array([np.inf, -np.inf, np.nan, -0.0], np.float32)
    x = torch.from_numpy(values).to(device_of("triton"))
    y = torch.empty_like(x)
    apply[(1,)](x, y, BLOCK=4)
    assert y[:2].tolist() == [1.0, -1.0] and y[2].isnan() and y[3] == 0
