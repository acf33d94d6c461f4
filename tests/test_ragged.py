"""density_attention of packed sequences and of nested tensors: equal to a loop over them, and what it refuses."""

import itertools

import daam_kernels
import pytest
import torch
from daam_kernels import density_attention, sequences
from mixture import MIXTURE_BACKENDS
from ragged import LENGTHS, check, inputs, packed, rows, truth
from support import (
    BACKENDS,
    DTYPES,
    assert_same_bits,
    device_of,
    every_second,
    generator,
    interpreted,
    nan_padded,
    sized,
    transposed,
)

CASES = [(b, "product") for b in BACKENDS] + [(b, "mixture") for b in MIXTURE_BACKENDS]
OPTIONS = {
    "plain": {},
    "zero": dict(masked=True, padding_value=1.5),
    "exclude": dict(masked=True, padding_value=1.5, padding_stats="exclude"),
    "softmax and residual": dict(normalize="softmax", residual=True),
    "clamped": dict(eps=3.0, masked=True),
}


def some_mask(x):
    mask = (torch.rand(x.shape, generator=generator(3)) < 0.7).to(x.device)
    mask[-3:] = False  # the last head of the last sequence is padding alone
    return mask


# Equal to a loop


FEW_OPTIONS = {"product": ("exclude", "softmax and residual"), "mixture": ("zero", "clamped")}


@pytest.mark.parametrize(
    "backend, density, name",
    [(*case, name) for case in CASES for name in sized(case[0], OPTIONS, FEW_OPTIONS[case[1]])],
)
def test_every_sequence_is_as_if_it_came_alone(backend, density, name):
    options = dict(OPTIONS[name])
    for dtype in sized(backend, (torch.float64, torch.float32), (torch.float32,)):
        x, grad, cu_seqlens, parameters = inputs((3,), dtype=dtype, device=device_of(backend), density=density)
        x[::7] = 1.5
        mask = some_mask(x) if options.pop("masked", False) else None
        check(backend, x, grad, cu_seqlens, parameters, mask=mask, **options)


@pytest.mark.parametrize("backend, density", CASES)
def test_types(backend, density):
    for dtype in sized(backend, DTYPES, (torch.bfloat16,)):
        x, grad, cu_seqlens, parameters = inputs((36,), dtype=dtype, device=device_of(backend), density=density)
        check(backend, x, grad, cu_seqlens.long(), parameters, max_seqlen=max(LENGTHS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_on_an_offset_with_a_constant_gradient(backend):
    x, grad, cu_seqlens, parameters = inputs((2,), dtype=torch.float32, device=device_of(backend), mean=1e4)
    check(backend, x, torch.ones_like(grad), cu_seqlens, parameters)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_the_same_bits_as_a_sequence_alone(backend):
    """Where a sequence is a call of its own. Triton's tile is that of the longest one, and sums in another order."""
    x, _, cu_seqlens, parameters = inputs((5,), dtype=torch.float32, device=device_of(backend))
    y = density_attention(x, *parameters, norm_axis=0, cu_seqlens=cu_seqlens, backend=backend)
    for part in rows(cu_seqlens):
        assert_same_bits(y[part], density_attention(x[part], *parameters, norm_axis=0, backend=backend))


LAYOUTS = {"contiguous": lambda t: t, "transposed": transposed, "every second": every_second}


FEATURES = list(itertools.product([(), (1,), (33,), (2, 3)], LAYOUTS))
FEW_FEATURES = [((), "every second"), ((33,), "contiguous"), ((33,), "transposed"), ((2, 3), "transposed")]


@pytest.mark.parametrize(
    "backend, features, layout", [(b, *case) for b in BACKENDS for case in sized(b, FEATURES, FEW_FEATURES)], ids=str
)
def test_features_and_layouts(backend, features, layout):
    x, grad, cu_seqlens, parameters = inputs(features, dtype=torch.float64, device=device_of(backend))
    grad = LAYOUTS[layout](grad) if layout != "every second" else grad[:1].expand(grad.shape)
    y, dx, *_ = check(backend, LAYOUTS[layout](x), grad, cu_seqlens, parameters)
    assert y.shape == dx.shape == x.shape
    if len(features) < 2:
        assert y.stride() == torch.empty_like(LAYOUTS[layout](x)).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_broadcasts(backend):
    x, grad, cu_seqlens, parameters = inputs((2, 3), dtype=torch.float64, device=device_of(backend))
    mask = some_mask(x[:, :1, :1])
    check(backend, x, grad, cu_seqlens, parameters, mask=mask, padding_stats="exclude")


@pytest.mark.parametrize("backend, density", CASES)
def test_weights(backend, density):
    x, _, cu_seqlens, (mean_offsets, c, *weights) = inputs((4,), device=device_of(backend), density=density)
    options = dict(norm_axis=0, return_weights=True, density=density, weights=weights[0] if weights else None)
    y, got = density_attention(x, mean_offsets, c, cu_seqlens=cu_seqlens, backend=backend, **options)
    parts = [density_attention(x[part], mean_offsets, c, backend="reference", **options) for part in rows(cu_seqlens)]
    torch.testing.assert_close(y, torch.cat([part[0] for part in parts]), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got, torch.cat([part[1] for part in parts]), rtol=1e-12, atol=1e-13)
    assert not got.requires_grad


@pytest.mark.parametrize("density", ["gate", "gaussian"])
def test_densities_that_are_not_normalised_take_one_element_for_a_head(density):
    x, grad, cu_seqlens, parameters = inputs((3,), (2, 5, 9))
    options = dict(density=density, norm_axis=0, backend="reference")
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    got = density_attention(*leaves, cu_seqlens=cu_seqlens, **options)
    expected = torch.cat([density_attention(leaves[0][part], *leaves[1:], **options) for part in rows(cu_seqlens)])
    torch.testing.assert_close(got, expected)
    for a, e in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, e)
    with pytest.raises(ValueError, match="sequence 0 has length 1, and 2 head"):
        density_attention(*leaves, cu_seqlens=packed((1, 15)), **options)


@pytest.mark.parametrize("density", ["product", "mixture"])
def test_the_reference_backward_is_the_gradient_of_the_forward(density):
    x, grad, cu_seqlens, parameters = inputs(density=density)
    y, *got = truth(x, cu_seqlens, parameters, grad)  # extended precision
    named = dict(norm_axis=0, density=density)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    if density == "mixture":
        named["log_shares"] = leaves[3].log_softmax(1)
    out = daam_kernels.reference.ragged_density_attention(*leaves[:3], cu_seqlens, **named)
    for a, e in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), got, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    closed = daam_kernels.reference.ragged_density_attention_backward(grad, *leaves[:3], cu_seqlens, **named)
    for a, e in zip(closed[:3], got[:3]):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend, density", CASES)
def test_no_sequences(backend, density):
    device = device_of(backend)
    x, _, cu_seqlens, parameters = inputs((3,), (), torch.float32, device, density)
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    c = leaves[2]
    options = dict(density=density, weights=leaves[3] if density == "mixture" else None, return_weights=True)
    y, weights = density_attention(*leaves[:3], cu_seqlens=cu_seqlens, norm_axis=0, backend=backend, **options)
    assert y.shape == weights.shape == (0, 3)
    dx, *gradients = torch.autograd.grad(y.sum(), leaves)
    assert dx.shape == (0, 3) and all(not g.any() and g.shape == c.shape for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_own_sequence(backend):
    x, grad, cu_seqlens, parameters = inputs((3,), dtype=torch.float32, device=device_of(backend))
    ill = rows(cu_seqlens)[2]
    options = dict(cu_seqlens=cu_seqlens, norm_axis=0, backend=backend)
    expected, got = [], []
    for results in (expected, got):
        leaf = x.clone().requires_grad_()
        y = density_attention(leaf, *parameters, **options)
        results += [y.detach(), *torch.autograd.grad(y, leaf, grad)]
        x[ill] = torch.nan
    for a, e in zip(got, expected, strict=True):
        assert a[ill].isnan().all()
        a[ill] = e[ill] = 0
        assert_same_bits(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_is_written_and_bits_do_not_depend_on_the_run(backend, poisoned_memory):
    x, grad, cu_seqlens, parameters = inputs((3,), dtype=torch.float32, device=device_of(backend))
    x, grad = (nan_padded(t)[0] for t in (x, grad))
    first, second = (check(backend, x, grad, cu_seqlens, parameters, max_seqlen=100) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)


# Nested tensors


def nested(values, cu_seqlens):
    return torch.nested.nested_tensor_from_jagged(values, cu_seqlens)


@pytest.mark.parametrize("norm_axis", [1, -2])
@pytest.mark.parametrize("backend, density", [case for case in CASES if not interpreted(case[0])])
def test_nested_tensors_are_taken_as_they_are(backend, density, norm_axis):
    x, grad, cu_seqlens, parameters = inputs((4,), device=device_of(backend), density=density)
    mask = some_mask(x)
    options = dict(padding_stats="exclude", density=density, backend=backend, return_weights=True)
    results = []
    for is_nested in (True, False):
        values, *gaussians = (t.clone().requires_grad_() for t in (x, *parameters))
        given = nested(values, cu_seqlens) if is_nested else values
        if is_nested:
            packing = dict(norm_axis=norm_axis, mask=nested(mask, given.offsets()))
        else:
            packing = dict(norm_axis=0, mask=mask, cu_seqlens=cu_seqlens)
        weights = gaussians[2] if density == "mixture" else None
        y, shares = density_attention(given, *gaussians[:2], weights=weights, **packing, **options)
        if is_nested:
            assert y.is_nested and y.shape == given.shape and (y + given).shape == given.shape
            assert y.offsets() is given.offsets() and shares.shape == given.shape
            y, shares = y.values(), shares.values()
        results.append((y.detach(), shares, *torch.autograd.grad(y, (values, *gaussians), grad)))
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_nested_tensors_with_several_axes_of_features_or_none():
    for features in ((), (2, 3)):
        x, _, cu_seqlens, parameters = inputs(features)
        y = density_attention(nested(x, cu_seqlens), *parameters, norm_axis=1, mask=some_mask(x))
        expected = density_attention(x, *parameters, norm_axis=0, mask=some_mask(x), cu_seqlens=cu_seqlens)
        assert_same_bits(y.values(), expected)


def test_a_nested_tensor_is_not_a_leaf_of_its_values():
    """The gradient of a nested parameter is nested too."""
    x, _, cu_seqlens, parameters = inputs((3,))
    leaf = nested(x, cu_seqlens).detach().requires_grad_()
    density_attention(leaf, *parameters, norm_axis=1).values().square().sum().backward()
    assert leaf.grad.is_nested and leaf.grad.shape == leaf.shape and leaf.grad.values().abs().sum() > 0


def test_nested_tensors_with_gaps_are_refused_until_they_are_contiguous():
    x = torch.randn(3, 6, 4, generator=generator())
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([2, 3, 4])
    gaps = torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged)
    parameters = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match="lengths"):
        density_attention(gaps, *parameters, norm_axis=1)
    y = density_attention(gaps.contiguous(), *parameters, norm_axis=1)
    for i, part in enumerate(y.unbind()):
        alone = density_attention(x[i, starts[i] : starts[i] + lengths[i]], *parameters, norm_axis=0)
        torch.testing.assert_close(part, alone)


# Modules


def modules(eps=1e-8):
    torch.manual_seed(0)
    kinds = daam_kernels.FusedMultiHeadDAAM, daam_kernels.FusedMultiHeadGAAM, daam_kernels.FusedDAAM
    for kind in kinds:
        yield lambda axis, kind=kind: kind(axis, 2, 3, eps=eps, padding_value=1.5)
    yield lambda axis: daam_kernels.FusedDensityBlock([axis, axis], [2, 1], [3, 2], 2, padding_value=1.5, eps=eps)


def test_modules_take_packed_and_nested_sequences():
    x, _, cu_seqlens, _ = inputs((3,), dtype=torch.float32)
    mask = some_mask(x)
    for make in modules():
        module, on_nested = make(0), make(1)
        on_nested.load_state_dict(module.state_dict())
        y, details = module(x, True, mask=mask, cu_seqlens=cu_seqlens, max_seqlen=max(LENGTHS))
        alone = torch.cat([module(x[part], mask=mask[part]) for part in rows(cu_seqlens)])
        torch.testing.assert_close(y, alone)
        given = nested(x, cu_seqlens)
        of_nested, of_nested_details = on_nested(given, True, mask=nested(mask, given.offsets()))
        assert_same_bits(of_nested.values(), y)
        if isinstance(details, dict):
            details, of_nested_details = details["layer_1"], of_nested_details["layer_1"]
        assert_same_bits(of_nested_details.values(), details)


def test_modules_with_an_eps_for_every_head_refuse_packed_sequences():
    x, _, cu_seqlens, _ = inputs((3,))
    for axis, given, packing in ((0, x, dict(cu_seqlens=cu_seqlens)), (1, nested(x, cu_seqlens), {})):
        module = daam_kernels.FusedMultiHeadDAAM(axis, 2, 3, eps=[1e-8, 1e-6])
        with pytest.raises(ValueError, match="eps must be one number for all heads"):
            module(given, **packing)


# What is refused


def refusals():
    x = torch.randn(33, 3)
    good = packed()
    yield "norm_axis=-1", dict(norm_axis=-1), ValueError, "norm_axis must be 0.*got axis 1 .*pass norm_axis=0"
    yield "no tensor", dict(cu_seqlens=[0, 33]), TypeError, "cu_seqlens must be a tensor, got list"
    yield "type", dict(cu_seqlens=good.float()), TypeError, "cu_seqlens must be int32 or int64, got torch.float32"
    yield "shape", dict(cu_seqlens=good[None]), ValueError, r"cu_seqlens must have shape \[num_sequences \+ 1\]"
    yield "nothing", dict(cu_seqlens=good[:0]), ValueError, r"cu_seqlens must have shape .* got \[0\]"
    yield "device", dict(cu_seqlens=good.to("meta")), ValueError, "cu_seqlens must be on x's device, cpu, got meta"
    yield "start", dict(cu_seqlens=good[1:]), ValueError, "cu_seqlens must start with 0, got 9"
    yield "end", dict(cu_seqlens=good[:-1]), ValueError, "cu_seqlens must end with .* 33, got 28"
    yield "order", dict(cu_seqlens=torch.tensor([0, 20, 10, 33])), ValueError, "must ascend, got 20 .* 10 .*sequence 1"
    short = torch.tensor([0, 20, 23, 33])
    yield "short", dict(cu_seqlens=short), ValueError, r"sequence 1 has length 3, and 2 head\(s\) take at least 4"
    yield "empty sequence", dict(cu_seqlens=torch.tensor([0, 0, 33])), ValueError, "sequence 0 has length 0"
    yield "max_seqlen", dict(max_seqlen=14), ValueError, r"max_seqlen must be at least .* 15 \(sequence 2\), got 14"
    yield "max_seqlen's type", dict(max_seqlen=15.0), TypeError, "max_seqlen must be an int or None, got float"
    yield "negative max_seqlen", dict(max_seqlen=-1), ValueError, "max_seqlen must not be negative, got -1"
    yield "alone", dict(cu_seqlens=None, max_seqlen=15), ValueError, "max_seqlen must be None without cu_seqlens"
    yield "x twice", dict(x=nested(x, good), norm_axis=1), ValueError, "cu_seqlens must be None for a nested x"
    yield "features", dict(x=nested(x, good), cu_seqlens=None, norm_axis=-1), ValueError, "pass norm_axis=1"
    strided = torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(5, 3)])
    yield (
        "strided",
        dict(x=strided, cu_seqlens=None, norm_axis=1),
        ValueError,
        "nested tensor of the layout torch.jagged",
    )
    across = nested(x, good).transpose(1, 2)
    yield (
        "across",
        dict(x=across, cu_seqlens=None, norm_axis=2),
        ValueError,
        "must have its ragged axis at 1, got it at 2",
    )
    other = nested(torch.ones(33, 3, dtype=torch.bool), good.clone())
    yield (
        "mask",
        dict(x=nested(x, good), cu_seqlens=None, norm_axis=1, mask=other),
        ValueError,
        "mask.* x's own offsets",
    )


@pytest.mark.parametrize("arguments, kind, message", [pytest.param(*r[1:], id=r[0]) for r in refusals()])
def test_what_is_refused(arguments, kind, message):
    arguments = dict(x=torch.randn(33, 3), cu_seqlens=packed(), norm_axis=0) | arguments
    with pytest.raises(kind, match=message):
        density_attention(arguments.pop("x"), torch.zeros(2, 3), torch.ones(2, 3), **arguments)


# What is read from another device, and when


class Elsewhere(torch.Tensor):
    """A tensor that says that it is not on the CPU."""

    is_cpu = False


def test_cu_seqlens_is_read_once_for_each_version(monkeypatch):
    read = []
    original = sequences._packing
    monkeypatch.setattr(sequences, "_packing", lambda t: read.append(t) or original(t))
    cu_seqlens = packed().as_subclass(Elsewhere)
    for _ in range(3):
        sequences.check_packing(cu_seqlens, sum(LENGTHS), 2, None, 2)
    assert len(read) == 1 and sequences.packing(cu_seqlens).lengths == LENGTHS
    cu_seqlens[1] = 1
    with pytest.raises(ValueError, match="sequence 0 has length 1"):
        sequences.check_packing(cu_seqlens, sum(LENGTHS), 2, None, 2)
    assert len(read) == 2


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(sequences, "_is_captured", lambda cu_seqlens: True)
    monkeypatch.setattr(sequences, "_packing", None)
    cu_seqlens = packed().as_subclass(Elsewhere)
    sequences.check_packing(cu_seqlens, 3, 2, None, 2)
    with pytest.raises(RuntimeError, match="give max_seqlen"):
        sequences.packing(cu_seqlens)
