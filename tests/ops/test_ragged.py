"""The operator on packed sequences: schema, fakes, autograd, torch.compile, derivatives, transforms."""

import daam_kernels
import pytest
import torch
from daam_kernels import density_attention
from mixture import MIXTURE_BACKENDS
from ragged import inputs, packed
from support import BACKENDS, assert_same_bits, device_of, generator, interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

forward = torch.ops.daam_kernels.density_attention.default
backward = torch.ops.daam_kernels.density_attention_backward.default

CASES = [(b, "product") for b in BACKENDS] + [(b, "mixture") for b in MIXTURE_BACKENDS]


def scalars(density):
    """norm_axis, padding_value, padding_stats, normalize, eps, residual, density, multiply."""
    return 0, None, "zero", "clamp", 1e-8, False, density, True


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def arguments(backend, density, **options):
    """(x, mean_offsets, c, log_shares or weights or None), grad, cu_seqlens."""
    x, grad, cu_seqlens, parameters = inputs(device=device_of(backend), density=density, **options)
    return (x, *parameters, *(() if density == "mixture" else (None,))), grad, cu_seqlens


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend, density", CASES)
def test_opcheck(backend, density):
    (x, mean_offsets, c, log_shares), grad, cu_seqlens = arguments(backend, density, dtype=torch.float32)
    tensors = leaves((x, mean_offsets, c)) + [None if log_shares is None else log_shares.log_softmax(1)]
    ours = scalars(density)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # torch.compile is below
    torch.library.opcheck(forward, (*tensors, None, *ours, True, True, backend, cu_seqlens, 15), test_utils=checks)
    stats = forward(*tensors, None, *ours, False, True, backend, cu_seqlens, None)[2].detach()
    assert (stats.numel() > 0) == (backend == "triton")
    detached = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(backward, (grad, *detached, None, stats, *ours, backend, cu_seqlens), test_utils=checks)


@pytest.mark.parametrize("is_nested, compiler", [(False, "inductor"), (True, "aot_eager"), (True, "inductor")])
@pytest.mark.parametrize("backend, density", [case for case in CASES if case != ("triton", "mixture")])
def test_compiled_gives_the_same_bits_forward_and_backward(backend, density, compiler, is_nested):
    (x, mean_offsets, c, weights), grad, cu_seqlens = arguments(backend, density, dtype=torch.float32)

    def run(x, mean_offsets, c, weights, cu_seqlens):
        given, options = x, dict(norm_axis=0, cu_seqlens=cu_seqlens)
        if is_nested:
            given, options = torch.nested.nested_tensor_from_jagged(x, cu_seqlens), dict(norm_axis=1)
        y = density_attention(given, mean_offsets, c, density=density, weights=weights, backend=backend, **options)
        return y.values() if is_nested else y

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    results = []
    for function in (run, compiled):
        tensors = [None if t is None else t.clone().requires_grad_() for t in (x, mean_offsets, c, weights)]
        y = function(*tensors, cu_seqlens)
        results.append((y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], grad)))
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_nested_arguments_of_a_compiled_function():
    x, _, cu_seqlens, parameters = inputs(dtype=torch.float32)

    def run(nested):
        return density_attention(nested, *parameters, norm_axis=1, residual=True)

    given = torch.nested.nested_tensor_from_jagged(x, cu_seqlens)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(given)
    assert got.is_nested and got.shape == given.shape
    assert_same_bits(got.values(), run(given).values())


def test_one_graph_for_every_number_of_sequences():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def run(x, cu_seqlens, max_seqlen, *parameters):
        return density_attention(x, *parameters, norm_axis=0, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)

    for lengths in ((9, 4, 6), (5, 7, 8, 20), (4, 31)):
        x, _, cu_seqlens, parameters = inputs(lengths=lengths, dtype=torch.float32)
        expected = density_attention(x, *parameters, norm_axis=0, cu_seqlens=cu_seqlens)
        assert_same_bits(run(x, cu_seqlens, max(lengths), *parameters), expected)
    assert len(graphs) == 1


def test_a_compiled_graph_still_refuses_a_short_sequence():
    x, _, _, parameters = inputs(lengths=(9, 3, 5))
    run = torch.compile(density_attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="sequence 1 has length 3"):
        run(x, *parameters, norm_axis=0, cu_seqlens=packed((9, 3, 5)))
    with pytest.raises(ValueError, match="pass norm_axis=0"):
        torch.compile(density_attention, backend="eager")(x, *parameters, cu_seqlens=packed((9, 3, 5)))


def test_fake_tensors_with_cuda_metadata():
    """Nothing is read, and Triton's statistics do not depend on lengths that only the GPU knows."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(100, 6, device="cuda", dtype=torch.bfloat16)
        cu_seqlens = torch.empty(5, device="cuda", dtype=torch.int32)
        parameters = torch.empty(2, 3, device="cuda"), torch.empty(2, 3, device="cuda")
        y = density_attention(x, *parameters, norm_axis=0, cu_seqlens=cu_seqlens)
        stats = forward(x, *parameters, None, None, *scalars("product"), False, True, "auto", cu_seqlens)[2]
        dx, *_ = backward(y, x, *parameters, None, None, stats, *scalars("product"), "auto", cu_seqlens)
        assert y.shape == dx.shape == x.shape and y.dtype == x.dtype and y.device.type == "cuda"
        assert tuple(stats.shape) == (3, 4 * 2 * 6) and stats.dtype == torch.float32


@pytest.mark.parametrize("backend, density", CASES)
def test_derivatives(backend, density):
    x, _, cu_seqlens, parameters = inputs((2,), (6, 5), device=device_of(backend), density=density)
    tensors = leaves((x, *parameters))
    tensors[2].data.clamp_(1, 2)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[2, 0] = mask[8] = False
    fast = interpreted(backend)

    def run(x, mean_offsets, c, weights=None):
        return density_attention(
            x, mean_offsets, c, density=density, weights=weights, norm_axis=0, cu_seqlens=cu_seqlens, mask=mask,
            padding_stats="exclude", residual=True, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    """torch.func and forward mode get the reference's operations, one sequence after another, checked too."""
    x, _, cu_seqlens, parameters = inputs(device=device_of(backend))

    def loss(x, *parameters):
        return density_attention(x, *parameters, norm_axis=0, cu_seqlens=cu_seqlens, backend=backend).square().sum()

    tensors = leaves((x, *parameters))
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for got, exact in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, *parameters), expected, strict=True):
        torch.testing.assert_close(got, exact)
    direction = torch.randn(x.shape, generator=generator(4), dtype=x.dtype).to(x.device)
    tangent = torch.func.jvp(lambda t: loss(t, *parameters), (x,), (direction,))[1]
    torch.testing.assert_close(tangent, (expected[0] * direction).sum())
    with pytest.raises(ValueError, match="sequence 0 has length 3"):
        cu_seqlens[1] = 3
        torch.func.grad(loss)(x, *parameters)


def test_the_operator_without_sequences_is_called_as_before():
    x, _, _, parameters = inputs(dtype=torch.float32)
    y = forward(x, *parameters, None, None, *scalars("product"), False, False, "reference")[0]
    assert_same_bits(y, daam_kernels.reference.density_attention(x, *parameters, norm_axis=0))
