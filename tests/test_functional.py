"""density_attention: every row of the operator page's table of edges, error texts included; what comes back."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from daam_kernels import density_attention, reference
from hypothesis import given, settings
from support import (
    BACKENDS,
    DTYPES,
    HALF_TYPES,
    TOLERANCES,
    assert_close,
    assert_contract,
    assert_contract_of_any,
    assert_same_bits,
    channels_last,
    device_of,
    evaluate,
    gaussians,
    generator,
    interpreted,
    sized,
    truth,
)

# Arguments that do not fit

X = torch.randn(2, 8, generator=generator())
OFFSETS, C = torch.zeros(2, 3), torch.ones(2, 3)


def shaped(*shape):
    return torch.zeros(shape), torch.ones(shape)


WRONG = {
    # x
    "x is no tensor": (([1.0, 2.0], OFFSETS, C), {}, TypeError, r"x must be a tensor, got list"),
    "x is integer": (
        (torch.ones(2, 8, dtype=torch.int64), OFFSETS, C),
        {},
        TypeError,
        r"x must be float64, float32, bfloat16 or float16, got torch.int64",
    ),
    "x is complex": (
        (torch.ones(2, 8, dtype=torch.complex64), OFFSETS, C),
        {},
        TypeError,
        r"x must be float64, float32, bfloat16 or float16, got torch.complex64",
    ),
    "x is boolean": ((torch.ones(2, 8) > 0, OFFSETS, C), {}, TypeError, r"x must be float64.*, got torch.bool"),
    "x is sparse": ((X.to_sparse(), OFFSETS, C), {}, TypeError, r"x must be one dense .* layout torch.sparse_coo"),
    "x has no strides": ((X.to_sparse_csr(), OFFSETS, C), {}, TypeError, r"x must be one .* layout torch.sparse_csr"),
    "x is a scalar": (
        (torch.tensor(1.0), OFFSETS, C),
        {},
        ValueError,
        r"x must have at least 1 dimension, got a scalar tensor",
    ),
    "a chunk of one element": (
        (torch.ones(2, 3), OFFSETS, C),
        {},
        ValueError,
        r"x must have at least 2 elements per head along norm_axis: its size along axis 1 is 3, "
        r"and 2 head\(s\) take at least 4",
    ),
    "fewer elements than heads": (
        (torch.ones(2, 8), *shaped(9, 1)),
        {},
        ValueError,
        r"size along axis 1 is 8, and 9 head\(s\) take at least 18",
    ),
    "a chunk of one element on another axis": (
        (torch.ones(1, 8), *shaped(1, 1)),
        dict(norm_axis=0),
        ValueError,
        r"size along axis 0 is 1, and 1 head\(s\) take at least 2",
    ),
    "an empty norm_axis": ((torch.ones(2, 0), *shaped(1, 1)), {}, ValueError, r"size along axis 1 is 0"),
    # norm_axis
    "norm_axis too large": (
        (X, OFFSETS, C),
        dict(norm_axis=2),
        ValueError,
        r"norm_axis must be in \[-2, 1\] for x of shape \[2, 8\], got 2",
    ),
    "norm_axis too small": ((X, OFFSETS, C), dict(norm_axis=-3), ValueError, r"norm_axis must be in .*, got -3"),
    "norm_axis is a float": ((X, OFFSETS, C), dict(norm_axis=1.0), TypeError, r"norm_axis must be an int, got float"),
    "norm_axis is a bool": ((X, OFFSETS, C), dict(norm_axis=True), TypeError, r"norm_axis must be an int, got bool"),
    # mean_offsets and c
    "no Gaussians": (
        (X, *shaped(2, 0)),
        {},
        ValueError,
        r"mean_offsets must have shape \[num_heads, num_gaussians\], both at least 1, got \[2, 0\]",
    ),
    "no heads": ((X, *shaped(0, 3)), {}, ValueError, r"mean_offsets must have shape .*, got \[0, 3\]"),
    "parameters of one dimension": ((X, *shaped(3)), {}, ValueError, r"mean_offsets must have shape .*, got \[3\]"),
    "c of one dimension": ((X, OFFSETS, torch.ones(3)), {}, ValueError, r"c must have shape .*, got \[3\]"),
    "parameters of different shapes": (
        (X, OFFSETS, torch.ones(2, 4)),
        {},
        ValueError,
        r"mean_offsets and c must have the same shape \[num_heads, num_gaussians\], got \[2, 3\] and \[2, 4\]",
    ),
    "mean_offsets is integer": (
        (X, OFFSETS.int(), C),
        {},
        TypeError,
        r"mean_offsets must be of a floating-point type, got torch.int32",
    ),
    "c is complex": ((X, OFFSETS, C + 0j), {}, TypeError, r"c must be of a floating-point type, got torch.complex64"),
    "c is sparse": ((X, OFFSETS, C.to_sparse()), {}, TypeError, r"c must be one dense .* layout torch.sparse_coo"),
    "c is a number": ((X, OFFSETS, 1.0), {}, TypeError, r"c must be a tensor, got float"),
    "mean_offsets elsewhere": (
        (X, OFFSETS.to("meta"), C),
        {},
        ValueError,
        r"mean_offsets must be on x's device, cpu, got meta",
    ),
    "c elsewhere": ((X, OFFSETS, C.to("meta")), {}, ValueError, r"c must be on x's device, cpu, got meta"),
    "x elsewhere": ((X.to("meta"), OFFSETS, C), {}, ValueError, r"mean_offsets must be on x's device, meta, got cpu"),
    # density and weights
    "an unknown density": (
        (X, OFFSETS, C),
        dict(density="sum"),
        ValueError,
        r"density must be one of product, mixture, gate, gaussian, got 'sum'",
    ),
    "weights for the product": (
        (X, OFFSETS, C),
        dict(weights=C),
        ValueError,
        r"weights must be given for density='mixture', and for it alone, got them for 'product'",
    ),
    "no weights for the mixture": (
        (X, OFFSETS, C),
        dict(density="mixture"),
        ValueError,
        r"weights must be given for density='mixture', and for it alone, got None for 'mixture'",
    ),
    "weights are a list": (
        (X, OFFSETS, C),
        dict(density="mixture", weights=[1.0]),
        TypeError,
        r"weights must be a tensor, got list",
    ),
    "weights are integer": (
        (X, OFFSETS, C),
        dict(density="mixture", weights=C.int()),
        TypeError,
        r"weights must be of a floating-point type, got torch.int32",
    ),
    "weights of one dimension": (
        (X, OFFSETS, C),
        dict(density="mixture", weights=C[0]),
        ValueError,
        r"weights must have shape \[num_heads, num_gaussians\], both at least 1, got \[3\]",
    ),
    "weights of another shape": (
        (X, OFFSETS, C),
        dict(density="mixture", weights=C[:, :2]),
        ValueError,
        r"mean_offsets and weights must have the same shape \[num_heads, num_gaussians\], got \[2, 3\] and \[2, 2\]",
    ),
    "weights elsewhere": (
        (X, OFFSETS, C),
        dict(density="mixture", weights=C.to("meta")),
        ValueError,
        r"weights must be on x's device, cpu, got meta",
    ),
    # mask
    "mask is no tensor": ((X, OFFSETS, C), dict(mask=[True]), TypeError, r"mask must be a boolean tensor, .* got list"),
    "mask is sparse": (
        (X, OFFSETS, C),
        dict(mask=(X > 0).to_sparse()),
        TypeError,
        r"mask must be one dense tensor, got one of layout torch.sparse_coo",
    ),
    "mask is float": (
        (X, OFFSETS, C),
        dict(mask=torch.ones(2, 8)),
        TypeError,
        r"mask must be a boolean tensor, True where x is valid, got torch.float32",
    ),
    "mask is integer": (
        (X, OFFSETS, C),
        dict(mask=torch.ones(2, 8, dtype=torch.uint8)),
        TypeError,
        r"mask must be a boolean tensor, True where x is valid, got torch.uint8",
    ),
    "mask of another shape": (
        (X, OFFSETS, C),
        dict(mask=torch.ones(2, 7, dtype=torch.bool)),
        ValueError,
        r"mask must broadcast to x's shape \[2, 8\], got \[2, 7\]",
    ),
    "mask of more dimensions": (
        (X, OFFSETS, C),
        dict(mask=torch.ones(1, 2, 8, dtype=torch.bool)),
        ValueError,
        r"mask must broadcast to x's shape \[2, 8\], got \[1, 2, 8\]",
    ),
    "mask that x would have to broadcast to": (
        (X[:1], OFFSETS, C),
        dict(mask=torch.ones(2, 8, dtype=torch.bool)),
        ValueError,
        r"mask must broadcast to x's shape \[1, 8\], got \[2, 8\]",
    ),
    "mask elsewhere": (
        (X, OFFSETS, C),
        dict(mask=torch.ones(2, 8, dtype=torch.bool, device="meta")),
        ValueError,
        r"mask must be on x's device, cpu, got meta",
    ),
    # numbers and words
    "eps is zero": ((X, OFFSETS, C), dict(eps=0.0), ValueError, r"eps must be positive and finite, got 0.0"),
    "eps is negative": ((X, OFFSETS, C), dict(eps=-1e-8), ValueError, r"eps must be positive and finite, got -1e-08"),
    "eps is NaN": ((X, OFFSETS, C), dict(eps=float("nan")), ValueError, r"eps must be positive and finite, got nan"),
    "eps is infinite": ((X, OFFSETS, C), dict(eps=float("inf")), ValueError, r"eps must be positive and .*, got inf"),
    "eps is a word": ((X, OFFSETS, C), dict(eps="small"), TypeError, r"eps must be a number, got str"),
    "eps rounds to 0": (
        (X, OFFSETS, C),
        dict(eps=1e-46),
        ValueError,
        r"eps must not round to 0 in the arithmetic of x's type, torch.float32, got 1e-46",
    ),
    "eps rounds to 0 for half types": (
        (X.half(), OFFSETS, C),
        dict(eps=2.0**-150),
        ValueError,
        r"eps must not round to 0 in the arithmetic of x's type, torch.float16",
    ),
    "density is a list": (
        (X, OFFSETS, C),
        dict(density=[]),
        ValueError,
        r"density must be one of product, .*, got \[\]",
    ),
    "padding_value is a word": (
        (X, OFFSETS, C),
        dict(padding_value="0"),
        TypeError,
        r"padding_value must be a number or None, got str",
    ),
    "padding_value is a bool": (
        (X, OFFSETS, C),
        dict(padding_value=False),
        TypeError,
        r"padding_value must be a number or None, got bool",
    ),
    "padding_value is a tensor": (
        (X, OFFSETS, C),
        dict(padding_value=torch.zeros(1)),
        TypeError,
        r"padding_value must be a number or None, got Tensor",
    ),
    "padding_stats": (
        (X, OFFSETS, C),
        dict(padding_stats="ignore"),
        ValueError,
        r"padding_stats must be one of zero, exclude, got 'ignore'",
    ),
    "normalize": (
        (X, OFFSETS, C),
        dict(normalize="sum"),
        ValueError,
        r"normalize must be one of clamp, softmax, got 'sum'",
    ),
    "backend": (
        (X, OFFSETS, C),
        dict(backend="cudnn"),
        ValueError,
        r"backend must be one of auto, triton, native, cuda, reference, got 'cudnn'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_do_not_fit(case):
    tensors, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        density_attention(*tensors, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_of_everything(backend):
    device = device_of(backend)
    for dtype, eps in ((torch.float32, 2.0**-149), (torch.float64, 1e-300), (torch.float32, 1)):
        x = torch.tensor([[1.0, 2.0]], dtype=dtype, device=device)
        y = density_attention(x, *(t.to(device) for t in shaped(1, 1)), eps=eps, backend=backend)
        assert y.shape == (1, 2) and y.isfinite().all()


# Empty batches


@pytest.mark.parametrize("shape, norm_axis", [((0, 8), 1), ((8, 0), 0), ((0, 8, 3), 1), ((3, 8, 0), 1), ((0, 8, 0), 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend, dtype, shape, norm_axis):
    device = device_of(backend)
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    parameters = [t.to(device).requires_grad_() for t in shaped(2, 3)]
    for padding_stats in ("zero", "exclude"):
        y, weights = density_attention(
            x,
            *parameters,
            norm_axis=norm_axis,
            padding_value=0,
            padding_stats=padding_stats,
            return_weights=True,
            backend=backend,
        )
        assert y.shape == weights.shape == x.shape and y.dtype == weights.dtype == dtype
        dx, *rest = torch.autograd.grad(y.sum(), (x, *parameters))
        assert dx.shape == x.shape
        for gradient in rest:
            assert gradient.shape == (2, 3) and not gradient.any()


# Constant slices, and slices with nothing to weigh


@pytest.mark.parametrize("padding", [1e10, 1e18, -1e18])
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_padding_alone_far_from_their_mean_give_no_nan(backend, padding):
    """Their mean is 0 and their deviation 1e-4: the square of the distance in deviations is past float32's range."""
    rng, device = generator(), device_of(backend)
    x = torch.randn(3, 20, generator=rng).to(device)
    x[1] = padding
    mask = torch.tensor([[True], [False], [True]], device=device)
    parameters, grad = gaussians(2, 3, rng, device=device), torch.randn(3, 20, generator=rng).to(device)
    got = evaluate(backend, x, *parameters, grad, mask=mask)
    assert_contract(got, truth(x, *parameters, grad, mask=mask), torch.float32)


@pytest.mark.parametrize("value", [0.0, 1.0, -1234.5, 1e18])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_slice(backend, value):
    device = device_of(backend)
    x = torch.full((2, 16), value, device=device)
    parameters = gaussians(2, 3, generator(), width=1.5, device=device)
    got = evaluate(backend, x, *parameters, torch.ones_like(x))
    assert_contract(got, truth(x, *parameters), torch.float32)
    # Clamp not active, all weights equal: 8 elements to a slice.
    assert_close(got[0], x.cpu().double() / 8, 2e-6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
@pytest.mark.parametrize("norm_axis", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_with_less_than_two_valid_elements(backend, dtype, norm_axis, normalize, residual):
    rng, device = generator(), device_of(backend)
    x = torch.randn(2, 9, 9, generator=rng).to(device, dtype)
    grad = torch.randn(x.shape, generator=rng).to(device, dtype)
    mask = torch.zeros(9, dtype=torch.bool, device=device)
    mask[[2, 7]] = True  # in each of the two heads one valid element
    mask = mask.view(1, -1, 1) if norm_axis == 1 else mask
    parameters = gaussians(2, 3, rng, offsets=1.0, device=device)
    options = dict(norm_axis=norm_axis, padding_stats="exclude", normalize=normalize, residual=residual)
    for nothing_valid in (mask, mask & False):
        y, dx, *rest = evaluate(backend, x, *parameters, grad, mask=nothing_valid, **options)
        assert_same_bits(y, x * (1 + residual), "y")
        assert_same_bits(dx, grad * (1 + residual), "dx")
        for gradient in rest:
            assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_skipped_slice_leaves_the_others_alone(backend):
    rng, device = generator(), device_of(backend)
    x = torch.randn(4, 12, generator=rng).to(device)
    grad = torch.randn(x.shape, generator=rng).to(device)
    parameters = gaussians(1, 3, rng, offsets=1.0, device=device)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1] = mask[3, 1:] = False
    options = dict(padding_stats="exclude")
    y, dx, *rest = evaluate(backend, x, *parameters, grad, mask=mask, **options)
    kept = [0, 2]
    expected = truth(x[kept], *parameters, grad[kept])
    assert_contract((y[kept], dx[kept], *rest), expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_of_padding_alone_under_zero_statistics(backend):
    """As upstream: y = x, and the weights are what the formula gives."""
    rng, device = generator(), device_of(backend)
    x = torch.randn(3, 8, generator=rng).to(device)
    x[1] = 7.0
    parameters = gaussians(1, 3, rng, offsets=0.1, device=device)
    y, dx, *rest = evaluate(backend, x, *parameters, torch.ones_like(x), padding_value=7)
    assert_same_bits(y[1], x[1])
    assert_contract((y, dx, *rest), truth(x, *parameters, padding_value=7), torch.float32)


# What is not finite stays where it is; what is finite stays finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("padding", [None, "zero", "exclude"])
@pytest.mark.parametrize("shape, norm_axis", [((3, 12, 2), 1), ((6, 12), -1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_or_inf_stays_in_its_slice(backend, shape, norm_axis, padding, bad):
    rng, device = generator(), device_of(backend)
    x = torch.randn(shape, generator=rng).to(device)
    grad = torch.randn(shape, generator=rng).to(device)
    parameters = gaussians(2, 3, rng, offsets=0.1, device=device)
    options = dict(norm_axis=norm_axis)
    if padding:
        options.update(mask=torch.rand(shape, generator=rng).to(device) < 0.8, padding_stats=padding)
        options["mask"].select(norm_axis, 8).fill_(True)
    clean = evaluate(backend, x, *parameters, grad, **options)
    spoilt = x.clone()
    position = (1, 8, 1) if len(shape) == 3 else (1, 8)  # the second head of one batch row
    spoilt[position] = bad
    got = evaluate(backend, spoilt, *parameters, grad, **options)

    own = torch.zeros(shape, dtype=torch.bool, device=device)
    own[(1, slice(6, None), 1) if len(shape) == 3 else (1, slice(6, None))] = True
    for name, g, expected in zip(("y", "dx"), got, clean):
        assert_same_bits(g[~own], expected[~own], name)
    assert not got[0][position].isfinite()
    for name, g, expected in zip(("dmean_offsets", "dc"), got[2:], clean[2:]):
        assert_same_bits(g[0], expected[0], name)
        assert not g[1].isfinite().any(), name


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_that_is_not_finite_harms_nobody_under_exclude(backend, padding_stats):
    """Masked NaN: under "exclude" it is never looked at. Under "zero" its density counts, and its slice is lost."""
    rng, device = generator(), device_of(backend)
    x = torch.randn(4, 12, generator=rng).to(device)
    grad = torch.randn(x.shape, generator=rng).to(device)
    parameters = gaussians(1, 3, rng, offsets=0.1, device=device)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, :3] = False
    expected = truth(x, *parameters, grad, mask=mask, padding_stats=padding_stats)
    x[1, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    y, dx, *rest = evaluate(backend, x, *parameters, grad, mask=mask, padding_stats=padding_stats)
    assert_same_bits(y[1, :3], x[1, :3])
    others = [0, 2, 3]
    assert_close(y[others], expected[0][others], 2e-6)
    if padding_stats == "exclude":
        expected[0][1, :3] = y[1, :3] = 0
        assert_contract((y, dx, *rest), expected, torch.float32)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize("width", [1e-6, 1e-3, 1.0, 1e3, 1e6, "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_input_gives_no_nan(backend, width, magnitude):
    rng, device = generator(), device_of(backend)
    length = 200  # the squares of 200 numbers of 1e18 add up to more than float32 holds
    c = torch.tensor([[1e-6, 1.0, 1e6], [1e6, -1e-6, -1.0]]) if width == "mixed" else torch.full((2, 3), width)
    c = c.to(device)
    rows = torch.randn(6, length, generator=rng).sign() * magnitude
    rows[0] = magnitude
    rows[1] = torch.randn(length, generator=rng).clamp(-1, 1) * magnitude
    rows[2] = torch.linspace(-1, 1, length) * magnitude
    rows[3] = 0
    rows[3, 5] = magnitude
    rows[4] = torch.randn(length, generator=rng).clamp(-1, 1)
    rows[4, 7] = -magnitude
    x = rows.to(device)
    for offsets in (torch.zeros(2, 3), torch.tensor([[0.0, 1e-3, 1.0], [-1.0, 1e3, 1e6]])):
        for normalize, padding in itertools.product(("clamp", "softmax"), (None, "zero", "exclude")):
            options = dict(normalize=normalize)
            if padding:
                options.update(padding_value=0, padding_stats=padding)
            if interpreted(backend) and padding == "zero":
                continue  # the two others take both ways through the kernel
            for grad in (torch.ones_like(x), torch.randn(x.shape, generator=generator(1)).to(device)):
                got = evaluate(backend, x, offsets.to(device), c, grad, **options)
                for name, g in zip(("y", "dx", "dmean_offsets", "dc"), got):
                    assert not g.isnan().any(), f"{name} with {options}, offsets {offsets.tolist()}"
                assert got[0].isfinite().all()


@pytest.mark.parametrize("magnitude, width", [(1e15, 1.0), (1e3, 1e3), (1e-3, 1.0), (1e-9, 1.0), (1.0, 1e6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_very_large_and_small_data_is_right_not_only_finite(backend, magnitude, width):
    rng, device = generator(), device_of(backend)
    x = (magnitude * torch.randn(sized(backend, 64, 8), 48, generator=rng)).to(device)
    grad = torch.randn(x.shape, generator=rng).to(device)
    parameters = gaussians(2, 3, rng, width=width, device=device)
    for normalize in ("clamp", "softmax"):
        expected = truth(x, *parameters, grad, normalize=normalize)
        got = evaluate(backend, x, *parameters, grad, normalize=normalize)
        assert_contract(got, expected, torch.float32, normalize)


# Layouts and types of what comes back


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_is_that_of_empty_like(backend, needs_grad, return_weights):
    device = device_of(backend)
    base = torch.randn(2, 6, 4, 4, generator=generator()).to(device)
    parameters = [t.to(device) for t in shaped(2, 2)]
    views = {
        "contiguous": base,
        "channels_last": channels_last(base),
        "transposed": base.transpose(1, 3),
        "expanded": base[:, :, :1].expand(2, 6, 4, 4),
        "sliced": base[:, :, ::2, 1:],
        "permuted": base.permute(3, 2, 0, 1),
    }
    for name, view in views.items():
        x = view.detach().requires_grad_(needs_grad)
        axis = max(range(4), key=lambda d: view.shape[d])
        y = density_attention(x, *parameters, norm_axis=axis, return_weights=return_weights, backend=backend)
        tensors = list(y) if return_weights else [y]
        if needs_grad:
            tensors += torch.autograd.grad(tensors[0], x, torch.ones_like(tensors[0]))
        for t in tensors:
            assert t.stride() == torch.empty_like(view).stride(), name
            assert t.dtype == view.dtype and t.device == view.device


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimension(backend):
    rng, device = generator(), device_of(backend)
    x = torch.randn(41, generator=rng).to(device)
    parameters = gaussians(3, 2, rng, offsets=0.1, device=device)
    for axis in (0, -1):
        got = evaluate(backend, x, *parameters, norm_axis=axis)
        assert_contract(got, truth(x, *parameters, norm_axis=axis), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_batch_axes(backend):
    rng, device = generator(), device_of(backend)
    x = torch.randn(2, 1, 2, 9, 1, 2, 2, generator=rng).to(device)
    parameters = gaussians(2, 2, rng, offsets=0.1, device=device)
    expected = truth(x, *parameters, norm_axis=3)
    assert_contract(evaluate(backend, x, *parameters, norm_axis=3), expected, torch.float32)
    assert_contract(evaluate(backend, x, *parameters, norm_axis=-4), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_value_is_rounded_to_the_type_of_x(backend, padding_stats, dtype):
    rng, device = generator(), device_of(backend)
    x = torch.randn(4, 16, generator=rng)
    padded = torch.rand(x.shape, generator=rng) < 0.3
    x[padded] = 0.1
    x, padded = x.to(device, dtype), padded.to(device)
    parameters = gaussians(1, 3, rng, offsets=0.1, device=device)
    got = evaluate(backend, x, *parameters, padding_value=0.1, padding_stats=padding_stats)
    by_mask = evaluate(backend, x, *parameters, mask=~padded, padding_stats=padding_stats)
    for g, expected in zip(got, by_mask):
        assert_same_bits(g, expected)
    assert_same_bits(got[0][padded], x[padded])
    if padding_stats == "exclude":
        assert_same_bits(got[1][padded], torch.ones_like(x[padded]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_and_not_finite_padding_values(backend):
    device = device_of(backend)
    x = torch.randn(3, 12, generator=generator()).to(device)
    x[:, 2] = 7.0
    x[:, 4] = -float("inf")
    parameters = [t.to(device) for t in shaped(1, 2)]
    y = density_attention(x, *parameters, padding_value=7, padding_stats="exclude", backend=backend)
    assert not y[:, 0].isfinite().any()  # -inf is data here
    y = density_attention(x, *parameters, padding_value=-float("inf"), padding_stats="exclude", backend=backend)
    assert y[:, [0, 1, 2, 3]].isfinite().all() and (y[:, 4] == -float("inf")).all()
    y = density_attention(x, *parameters, padding_value=float("nan"), backend=backend)
    assert not y[:, 0].isfinite().any()  # NaN equals nothing: no padding at all


@pytest.mark.parametrize("density", ["product", "mixture", "gate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows_in_all_of_its_slice_and_nowhere_else(backend, density):
    if density != "product" and backend in ("native", "cuda"):
        pytest.skip("serves the product alone")
    device = device_of(backend)
    parameters = [t.to(device) for t in shaped(1, 2)]
    for (shape, axis), value in itertools.product([((3, 12), 1), ((200, 4), 0)], map(float, ("nan", "inf", "-inf"))):
        x, finite = torch.randn(shape, generator=generator()).to(device), torch.ones(shape, dtype=torch.bool)
        x[1, 2] = value
        finite.select(1 - axis, 2 if axis == 0 else 1).fill_(False)
        weights = torch.full((1, 2), 0.5, device=device) if density == "mixture" else None
        y = density_attention(x, *parameters, weights=weights, norm_axis=axis, density=density, backend=backend)
        assert torch.equal(y.isfinite().cpu(), finite), (shape, value)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_valid_means_both_with_a_mask_and_a_padding_value(backend, padding_stats):
    rng, device = generator(), device_of(backend)
    x = torch.randn(3, 14, 2, generator=rng).to(device)
    mask = (torch.rand(3, 14, 1, generator=rng) < 0.7).to(device)
    x[:, ::5] = 7.0
    grad = torch.randn(x.shape, generator=rng).to(device)
    parameters = gaussians(2, 3, rng, offsets=0.1, device=device)
    options = dict(norm_axis=1, padding_stats=padding_stats)
    got = evaluate(backend, x, *parameters, grad, mask=mask, padding_value=7, **options)
    expected = evaluate(backend, x, *parameters, grad, mask=mask & (x != 7), **options)
    for g, e in zip(got, expected):
        assert_same_bits(g, e)
    assert_contract(got, truth(x, *parameters, grad, mask=mask, padding_value=7, **options), torch.float32)


@pytest.mark.parametrize("mask_shape", [(1,), (5,), (12, 1), (12, 5), (1, 1, 5), (3, 1, 1), (3, 12, 5), ()])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_any_shape_that_broadcasts(backend, mask_shape):
    rng, device = generator(), device_of(backend)
    x = torch.randn(3, 12, 5, generator=rng).to(device)
    mask = (torch.rand(mask_shape, generator=rng) < 0.7).to(device)
    grad = torch.randn(x.shape, generator=rng).to(device)
    parameters = gaussians(2, 3, rng, offsets=0.1, device=device)
    for padding_stats in ("zero", "exclude"):
        options = dict(norm_axis=1, mask=mask, padding_stats=padding_stats)
        expected = truth(x, *parameters, grad, **options)
        assert_contract(evaluate(backend, x, *parameters, grad, **options), expected, torch.float32)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights(backend, padding_stats, needs_grad):
    rng, device = generator(), device_of(backend)
    x = torch.randn(3, 14, generator=rng)
    x[:, ::4] = 0.0
    x[2, :7] = 0.0  # a slice of padding alone, skipped under "exclude"
    x = x.to(device).requires_grad_(needs_grad)
    parameters = gaussians(2, 3, rng, offsets=0.1, device=device)
    options = dict(padding_value=0, padding_stats=padding_stats)
    y, weights = density_attention(x, *parameters, return_weights=True, backend=backend, **options)
    assert y.requires_grad == needs_grad and not weights.requires_grad
    _, expected = reference.density_attention(
        x.detach().cpu().double(), *(t.cpu().double() for t in parameters), return_weights=True, **options
    )
    assert_close(weights, expected, 2e-6)
    padded = x == 0
    if padding_stats == "exclude":
        assert (weights[padded] == 0).all()
    else:
        assert (weights[:2][padded[:2]] > 0).all()
    assert_same_bits(y, density_attention(x, *parameters, backend=backend, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_other_types_than_x(backend, dtype):
    rng, device = generator(), device_of(backend)
    x = torch.randn(4, 20, generator=rng).to(device, dtype)
    grad = torch.randn(x.shape, generator=rng).to(device, dtype)
    mean_offsets, c = gaussians(2, 3, rng, offsets=0.1, dtype=torch.float64, device=device)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for offsets_type, c_type in zip(DTYPES, (*DTYPES[1:], DTYPES[0])):
        parameters = mean_offsets.to(offsets_type), c.to(c_type)
        got = evaluate(backend, x, *parameters, grad)
        assert [t.dtype for t in got] == [dtype, dtype, offsets_type, c_type]
        expected = truth(x, *parameters, grad)
        y_tolerance, dx_tolerance, tolerance = TOLERANCES[dtype]
        assert_close(got[0], expected[0], y_tolerance, "y")
        assert_close(got[1], expected[1], dx_tolerance, "dx")
        assert_close(got[2], expected[2], max(tolerance, rounding[offsets_type]), "dmean_offsets")
        assert_close(got[3], expected[3], max(tolerance, rounding[c_type]), "dc")


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_square_of_c_counts(backend):
    rng, device = generator(), device_of(backend)
    x = torch.randn(4, 20, generator=rng).to(device)
    mean_offsets, c = gaussians(2, 4, rng, offsets=0.1, device=device)
    signs = torch.tensor([[1.0, -1, 1, -1]], device=device)
    y, dx, d_offsets, dc = evaluate(backend, x, mean_offsets, c)
    flipped = evaluate(backend, x, mean_offsets, c * signs)
    for g, expected in zip(flipped, (y, dx, d_offsets, dc * signs)):
        assert_same_bits(g, expected)


@pytest.mark.parametrize("which", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_where_only_some_are_needed(backend, which):
    rng, device = generator(), device_of(backend)
    x = torch.randn(4, 20, generator=rng).to(device)
    inputs = [x, *gaussians(2, 3, rng, offsets=0.1, device=device)]
    expected = evaluate(backend, *inputs)[1:]
    leaves = [t.detach().requires_grad_(needed) for t, needed in zip(inputs, which)]
    density_attention(*leaves, backend=backend).sum().backward()
    for leaf, needed, e in zip(leaves, which, expected):
        assert (leaf.grad is not None) == needed
        if needed:
            assert_same_bits(leaf.grad, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graph_where_none_is_needed(backend):
    device = device_of(backend)
    x, parameters = X.to(device), [OFFSETS.to(device), C.to(device).requires_grad_()]
    with torch.no_grad():
        assert not density_attention(x, *parameters, backend=backend).requires_grad
    assert density_attention(x, *parameters, backend=backend).requires_grad
    with torch.inference_mode():
        y = density_attention(x, *parameters, backend=backend)
    assert_same_bits(y.clone(), density_attention(x, *parameters, backend=backend).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_adds_x(backend):
    rng, device = generator(), device_of(backend)
    x = torch.randn(4, 20, generator=rng).to(device)
    x[:, 3] = 0.0
    parameters = gaussians(2, 3, rng, offsets=0.1, device=device)
    options = dict(padding_value=0.0)
    y, dx, *_ = evaluate(backend, x, *parameters, **options)
    expected = truth(x, *parameters, **options)
    got = evaluate(backend, x, *parameters, residual=True, **options)
    residual = (expected[0] + x.cpu().double(), expected[1] + 1, *expected[2:])
    assert_contract(got, residual, torch.float32)


# Anything that fits


@st.composite
def problems(draw, max_numel):
    dims = draw(st.integers(1, 4))
    axis = draw(st.integers(0, dims - 1))
    num_heads = draw(st.integers(1, 5))
    length = draw(st.integers(2 * num_heads, 2 * num_heads + draw(st.sampled_from([1, 7, 70]))))
    shape, numel = [], length
    for d in range(dims):
        size = length if d == axis else draw(st.integers(1, max(1, min(9, max_numel // numel))))
        numel *= 1 if d == axis else size
        shape.append(size)
    mask_shape = None
    if draw(st.booleans()):
        mask_shape = [size if draw(st.booleans()) else 1 for size in shape][draw(st.integers(0, dims - 1)) :]
    return dict(
        shape=shape,
        norm_axis=axis - dims * draw(st.integers(0, 1)),
        num_heads=num_heads,
        num_gaussians=draw(st.integers(1, 40)),
        mask_shape=mask_shape,
        padding_value=draw(st.sampled_from([None, 0, 7.0])),
        padding_stats=draw(st.sampled_from(["zero", "exclude"])),
        normalize=draw(st.sampled_from(["clamp", "softmax"])),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        order=draw(st.permutations(range(dims))),
        seed=draw(st.integers(0, 2**16)),
    )


def check(backend, problem):
    rng, device, dtype = generator(problem["seed"]), device_of(backend), problem["dtype"]
    order = problem["order"]
    x = (1 + torch.randn(problem["shape"], generator=rng, dtype=torch.float64)).to(dtype)
    if problem["padding_value"] is not None:
        x[torch.rand(x.shape, generator=rng) < 0.3] = problem["padding_value"]
    grad = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(dtype)
    inverse = [order.index(d) for d in range(len(order))]
    x = x.permute(order).contiguous().permute(inverse).to(device)
    options = {name: problem[name] for name in ("norm_axis", "padding_value", "padding_stats", "normalize", "residual")}
    if problem["mask_shape"] is not None:
        options["mask"] = (torch.rand(problem["mask_shape"], generator=rng) < 0.7).to(device)
    parameters = gaussians(
        problem["num_heads"],
        problem["num_gaussians"],
        rng,
        offsets=0.05,
        width=2.0,  # for narrow ones the float32 truth of a handful of slices is ill-conditioned
        dtype=torch.float64,
        device=device,
    )
    got = evaluate(backend, x, *parameters, grad.to(device), **options)
    assert_contract_of_any(got, x, *parameters, grad, **options)
    assert got[0].stride() == torch.empty_like(x).stride()


@given(problems(2000))
@settings(max_examples=150)
def test_any_problem_with_the_reference(problem):
    check("reference", problem)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@given(problem=problems(400))
@settings(max_examples=25)
def test_any_problem(backend, problem):
    check(backend, problem)
