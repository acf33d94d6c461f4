"""What the tests share: backends, the contract's tolerances, float64 truth, memory layouts, NaN-padded buffers."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import daam_kernels
from daam_kernels import reference

HAVE_GPU = torch.cuda.is_available()
HALF_TYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF_TYPES)

# The numeric contract of the operator page: relative 2-norms of y, dx, and the gradient of each parameter.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12, 1e-12),
    torch.float32: (2e-6, 5e-6, 1e-4),
    torch.bfloat16: (2.0**-8, 2.0**-8, 1e-3),
    torch.float16: (2.0**-11, 2.0**-11, 1e-3),
}

# Where the true gradient is smaller than this, a backend only has to be finite.
NEGLIGIBLE = 1e-30
OVERFLOWS = {torch.float16: 65520.0}  # what rounds to infinity


def _backends() -> tuple[str, ...]:
    """The backends that work here, the reference first."""
    found = [name for name, status in daam_kernels.available_backends().items() if status]
    if "triton" in found and (
        find_spec("daam_kernels.kernels") is None or find_spec("daam_kernels.kernels.density_forward") is None
    ):
        found.remove("triton")
    return tuple(sorted(found, key=lambda name: name != "reference"))


BACKENDS = _backends()
FUSED_BACKENDS = tuple(name for name in BACKENDS if name != "reference")


def device_of(backend: str) -> str:
    """Where a backend's tensors live: Triton's and CUDA's on the GPU where there is one, all others on the CPU."""
    return "cuda" if backend in ("triton", "cuda") and HAVE_GPU else "cpu"


def interpreted(backend: str) -> bool:
    """Whether the backend runs in Triton's interpreter, where every program costs milliseconds: keep them few."""
    return backend == "triton" and not HAVE_GPU


def sized(backend: str, full, few):
    """``full`` for a backend that runs at speed, ``few`` for one that is interpreted."""
    return few if interpreted(backend) else full


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussians(
    num_heads: int,
    num_gaussians: int,
    rng: torch.Generator,
    *,
    offsets: float = 0.0,
    width: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(mean_offsets, c): offsets ~ ``offsets`` N(0, 1), c ~ exp(N(0, 1)), or all ``width``."""
    shape = (num_heads, num_gaussians)
    mean_offsets = offsets * torch.randn(shape, generator=rng, dtype=torch.float64)
    c = torch.randn(shape, generator=rng, dtype=torch.float64).exp()
    if width is not None:
        c = torch.full_like(c, width)
    return mean_offsets.to(device, dtype), c.to(device, dtype)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """2-norm of got - truth over the 2-norm of the truth, in float64, safe for huge and tiny numbers."""
    got, truth = got.detach().cpu().double(), truth.detach().cpu().double()
    assert got.shape == truth.shape, f"shapes differ: {list(got.shape)} and {list(truth.shape)}"
    scale = truth.abs().max().item() if truth.numel() else 0.0
    if scale == 0:
        return 0.0 if not got.any() else math.inf
    error = ((got - truth) / scale).norm() / (truth / scale).norm()
    return error.item()


def assert_close(got: Tensor, truth: Tensor, tolerance: float, what: str = "result") -> None:
    error = relative_error(got, truth)
    assert error <= tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "result") -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    assert torch.equal(got.contiguous().view(integers), expected.contiguous().view(integers)), f"{what}: bits differ"


def evaluate(backend: str, x: Tensor, mean_offsets: Tensor, c: Tensor, grad: Tensor | None = None, **options):
    """(y, dx, dmean_offsets, dc) of a backend through the public function; dx keeps its own memory layout.

    ``grad`` is y's incoming gradient as it is, strides included; None for ``y.sum()``.
    """
    x, mean_offsets, c = (t.detach().requires_grad_() for t in (x, mean_offsets, c))
    y = daam_kernels.density_attention(x, mean_offsets, c, backend=backend, **options)
    if grad is None:
        gradients = torch.autograd.grad(y.sum(), (x, mean_offsets, c))
    else:
        gradients = torch.autograd.grad(y, (x, mean_offsets, c), grad)
    return (y.detach(), *gradients)


def truth(x: Tensor, mean_offsets: Tensor, c: Tensor, grad: Tensor | None = None, **options):
    """(y, dx, dmean_offsets, dc) of the same rounded inputs, on the CPU; ``grad`` None for ones.

    For float64 it is the operator page in extended precision, else autograd of the reference in float64. A padding
    value is rounded to x's own type, as torch compares, before x becomes float64.
    """
    if options.get("padding_value") is not None:
        options["padding_value"] = torch.tensor(options["padding_value"], dtype=x.dtype).item()
    if options.get("mask") is not None:
        options["mask"] = options["mask"].cpu()
    grad = torch.ones_like(x) if grad is None else grad
    is_double = x.dtype == torch.float64
    x, mean_offsets, c, grad = (t.detach().cpu().double() for t in (x, mean_offsets, c, grad))
    if is_double:
        return extended_truth(x, mean_offsets, c, grad, **options)[:4]
    inputs = [t.requires_grad_() for t in (x, mean_offsets, c)]
    y = reference.density_attention(*inputs, **options)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


def extended(t: Tensor) -> np.ndarray:
    """t in numpy's long double."""
    assert np.finfo(np.longdouble).eps < 2e-19, "this machine has no extended precision to hold float64 against"
    return t.detach().cpu().double().numpy().astype(np.longdouble)


class ExtendedSlices(NamedTuple):
    """One head's slices [..., n], in long double, and their means."""

    cut: tuple  # where they are in all heads' [..., R]
    x: np.ndarray
    g: np.ndarray
    valid: np.ndarray
    counted: np.ndarray  # elements that the statistics count
    n: np.ndarray  # how many, at least 1
    mean: np.ndarray
    deviation: np.ndarray  # of what is counted, 0 elsewhere


def extended_slices(
    x: Tensor,
    grad: Tensor,
    num_heads: int,
    norm_axis: int,
    padding_value: float | None,
    mask: Tensor | None,
    padding_stats: str,
) -> tuple[np.ndarray, np.ndarray, list[ExtendedSlices]]:
    """x and grad in long double with ``norm_axis`` last, and the slices of each head."""
    values, g = (np.moveaxis(extended(t), norm_axis, -1) for t in (x, grad))
    valid = torch.ones_like(x, dtype=torch.bool) if padding_value is None else x != padding_value
    valid = valid if mask is None else valid & mask
    valid = valid.cpu().movedim(norm_axis, -1).numpy()
    chunk, found = values.shape[-1] // num_heads, []
    for head in range(num_heads):
        cut = np.s_[..., head * chunk : (head + 1) * chunk if head < num_heads - 1 else None]
        counted = valid[cut] if padding_stats == "exclude" else np.ones_like(valid[cut])
        n = np.maximum(counted.sum(-1, keepdims=True), 1).astype(np.longdouble)
        kept = np.where(valid[cut], values[cut], 0)
        mean = kept.sum(-1, keepdims=True) / n
        deviation = np.where(counted, kept - mean, 0)
        found.append(ExtendedSlices(cut, values[cut], g[cut], valid[cut], counted, n, mean, deviation))
    return values, g, found


def extended_truth(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    grad: Tensor,
    *,
    norm_axis: int = -1,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    normalize: str = "clamp",
    eps: float = 1e-8,
    residual: bool = False,
) -> tuple[Tensor, ...]:
    """(y, dx, dmean_offsets, dc): the operator page in numpy's long double, Gaussian by Gaussian, no quadratic; and of
    the last two the sizes of all that is added up for them, together.

    Autograd in float64 is no truth for float64: for a constant gradient on N(1e4, 0.1) it loses five digits. Long
    doubles divide slowly: what is the same all over a slice is divided by once for the slice.
    """
    values, g, groups = extended_slices(x, grad, len(c), norm_axis, padding_value, mask, padding_stats)
    offsets, widths = extended(mean_offsets), extended(c)
    y, dx = values.copy(), g.copy()
    gradients = tuple(np.zeros_like(offsets) for _ in range(4))
    for head, s in enumerate(groups):
        v_x, v_g, counts, counted, n, mean, deviation = s.x, s.g, s.valid, s.counted, s.n, s.mean, s.deviation
        skipped = n < 2
        n = np.maximum(n, 2)
        var = (deviation**2).sum(-1, keepdims=True) / (n - 1) + np.longdouble(eps)
        from_mean = v_x - mean
        squares, slope_d = np.zeros_like(v_x), np.zeros_like(v_x)  # slopes: of log_density
        for offset, width in zip(offsets[head], widths[head]):
            d = from_mean - offset
            slope = d * (1 / (var * width**2))
            slope_d -= slope
            squares += slope * d
        slope_var = squares * (1 / (2 * var))
        log_norm = np.log(2 * np.longdouble(np.pi) * widths[head] ** 2).sum() / 2
        log_density = np.where(counted, -squares / 2 - log_norm, -np.inf)
        top = np.where(skipped, 0, log_density.max(-1, keepdims=True))
        total = np.exp(log_density - top).sum(-1, keepdims=True)
        log_total = top + np.log(np.where(skipped, 1, total))
        floor = np.log(np.longdouble(eps)) if normalize == "clamp" else -np.inf
        weights = np.exp(log_density - np.maximum(log_total, floor))
        q = np.where(counts, v_g * v_x, 0)
        clamped = log_total < floor
        p = weights * q
        size = weights * (abs(q) + np.where(clamped, 0, weights * abs(q)).sum(-1, keepdims=True))
        for _ in range(2):  # once more: the weights' sum is 1 but for rounding, which q's offset would enlarge
            p = p - np.where(clamped, 0, weights * p.sum(-1, keepdims=True))
        p, size = np.where(skipped, 0, p), np.where(skipped, 0, size)
        d_mean = -(p * slope_d).sum(-1, keepdims=True)
        d_var = (p * slope_var).sum(-1, keepdims=True)
        y[s.cut] = np.where(counts & ~skipped, v_x * weights, v_x) + residual * v_x
        through = d_mean / n + 2 * d_var * deviation / (n - 1)
        d_x = np.where(counts & ~skipped, v_g * weights + through, v_g) + p * slope_d
        dx[s.cut] = d_x + residual * v_g
        for k, (offset, width) in enumerate(zip(offsets[head], widths[head])):
            d = from_mean - offset
            slope = d * (1 / (var * width**2))
            square = slope * d
            gradients[0][head, k] = (p * slope).sum()
            gradients[1][head, k] = (p * (square - 1)).sum() / width
            gradients[2][head, k] = (size * abs(slope)).sum()
            gradients[3][head, k] = (size * (square + 1)).sum() / abs(width)
    y, dx = (torch.from_numpy(t.astype(np.float64)).movedim(-1, norm_axis) for t in (y, dx))
    return (y, dx, *(torch.from_numpy(t.astype(np.float64)) for t in gradients))


def assert_contract(got, expected, dtype: torch.dtype, what: str = "") -> None:
    """(y, dx, dmean_offsets, dc) within the numeric contract of ``dtype``."""
    y_tolerance, dx_tolerance, parameters_tolerance = TOLERANCES[dtype]
    tolerances = (y_tolerance, dx_tolerance, parameters_tolerance, parameters_tolerance)
    for name, g, e, tolerance in zip(("y", "dx", "dmean_offsets", "dc"), got, expected, tolerances, strict=True):
        assert torch.isfinite(g).all(), f"{what} {name} is not finite"
        if name == "y" or e.norm() > NEGLIGIBLE:
            assert_close(g, e, tolerance, f"{what} {name}")


def assert_contract_of_any(got, x: Tensor, mean_offsets: Tensor, c: Tensor, grad: Tensor, **options) -> None:
    """The contract for a problem that nobody chose.

    y and dx may be past the largest number of their type, and are infinite there, or near its smallest one. The sums of
    the parameters' gradients over a handful of slices may cancel: then they are as exact as what is added up.
    """
    expected = truth(x, mean_offsets, c, grad, **options)
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    near = []
    for g, e, finest in zip(
        (t.detach().cpu().double() for t in got[:2]), expected, (smallest, max(smallest, NEGLIGIBLE))
    ):
        past = e.abs() >= OVERFLOWS.get(x.dtype, math.inf)
        assert torch.equal(g[past], e[past].sign() * math.inf)
        near.append(torch.where(past | ((g - e).abs() <= finest), e, g))
    near += (t.detach().cpu().double() for t in got[2:])
    if not all(relative_error(g, e) <= TOLERANCES[x.dtype][2] for g, e in zip(near[2:], expected[2:], strict=True)):
        sizes = extended_truth(x, mean_offsets, c, grad, **options)[4:]  # takes longer than all else here
        rounding = 1e-15 if x.dtype == torch.float64 else 2e-7
        near[2:] = (
            e if (g - e).norm() <= rounding * size.norm() else g for g, e, size in zip(near[2:], expected[2:], sizes)
        )
    assert_contract(near, expected, x.dtype)


def assert_finite_but_for_overflow(got, expected, what: str = "") -> None:
    """No NaN, and an Inf only where the truth is past the largest number of the storage type."""
    for name, g, e in zip(("y", "dx", "dmean_offsets", "dc"), got, expected, strict=True):
        assert not g.isnan().any(), f"{what} {name} has NaN"
        overflows = e.abs() > 0.99 * torch.finfo(g.dtype).max
        assert (g.cpu().isfinite() | overflows).all(), f"{what} {name} has Inf where {g.dtype} does not overflow"


def narrowed(t: Tensor) -> Tensor:
    """The values of t as the middle of a longer last axis."""
    side = t.new_full((*t.shape[:-1], 3), math.nan)
    return torch.cat([side, t, side], -1).narrow(-1, 3, t.shape[-1])


def every_second(t: Tensor) -> Tensor:
    """The values of t as every second element of a NaN-filled tensor, along the last axis."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
    wide[..., ::2] = t
    return wide[..., ::2]


def transposed(t: Tensor) -> Tensor:
    """The values of t with the first and the last axis exchanged in memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(t: Tensor) -> Tensor:
    """The values of t, of 4 dimensions, with axis 1 innermost in memory."""
    return t.contiguous(memory_format=torch.channels_last)


def nan_padded(t: Tensor, margin: int = 64) -> tuple[Tensor, Tensor]:
    """(view, buffer): the values of t, contiguous, in the middle of a buffer whose margins are NaN."""
    buffer = t.new_full((t.numel() + 2 * margin,), math.nan)
    view = buffer[margin : margin + t.numel()].view(t.shape)
    view.copy_(t)
    return view, buffer


def assert_margins_intact(buffer: Tensor, margin: int = 64) -> None:
    assert buffer[:margin].isnan().all() and buffer[buffer.numel() - margin :].isnan().all(), "written out of bounds"
