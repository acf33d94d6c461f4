"""What the tests share: backends, the contract's tolerances, float64 truth, memory layouts, NaN-padded buffers."""

from __future__ import annotations

import math
from importlib.util import find_spec

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
    """Where a backend's tensors live: Triton's on the GPU where there is one, all others on the CPU."""
    return "cuda" if backend == "triton" and HAVE_GPU else "cpu"


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
    """(y, dx, dmean_offsets, dc) by autograd of the reference in float64, of the same rounded inputs, on the CPU.

    A padding value is rounded to x's own type, as torch compares, before x becomes float64.
    """
    if options.get("padding_value") is not None:
        options["padding_value"] = torch.tensor(options["padding_value"], dtype=x.dtype).item()
    if options.get("mask") is not None:
        options["mask"] = options["mask"].cpu()
    x, mean_offsets, c = (t.detach().cpu().double().requires_grad_() for t in (x, mean_offsets, c))
    y = reference.density_attention(x, mean_offsets, c, **options)
    grad = torch.ones_like(y) if grad is None else grad.detach().cpu().double()
    return (y.detach(), *torch.autograd.grad(y, (x, mean_offsets, c), grad))


def assert_contract(got, expected, dtype: torch.dtype, what: str = "") -> None:
    """(y, dx, dmean_offsets, dc) within the numeric contract of ``dtype``."""
    y_tolerance, dx_tolerance, parameters_tolerance = TOLERANCES[dtype]
    tolerances = (y_tolerance, dx_tolerance, parameters_tolerance, parameters_tolerance)
    for name, g, e, tolerance in zip(("y", "dx", "dmean_offsets", "dc"), got, expected, tolerances, strict=True):
        assert torch.isfinite(g).all(), f"{what} {name} is not finite"
        if name == "y" or e.norm() > NEGLIGIBLE:
            assert_close(g, e, tolerance, f"{what} {name}")


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
