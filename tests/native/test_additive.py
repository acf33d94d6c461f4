"""Additive attention on the native library: against float64 over anything that fits, its tanh, threads, memory."""

import ctypes
import math

import hypothesis.strategies as st
import pytest
import torch
from additive import assert_contract, exact, masks, problem, public, results, seeded
from children import python
from daam_kernels import additive_attention, native, native_additive
from daam_kernels.native_additive import NativeActivations
from daam_kernels.options import AdditiveProblem
from hypothesis import given, settings
from support import HALF_TYPES, assert_close, assert_margins_intact, assert_same_bits, generator, nan_padded, transposed

AVAILABLE, REASON = native.status()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)
run = public("native")
of_backend = torch.ops.daam_kernels.additive_attention.default


def activations(*shape):
    """The library's sums for a problem of shape [batch, Tq, Tk, hidden] and its tensors, poisoned around."""
    batch, queries, keys, hidden = shape
    rng = generator(3)
    sizes = (batch, queries, hidden), (batch, keys, hidden), (hidden,), (batch, queries, keys)
    tensors = [nan_padded(torch.randn(size, generator=rng))[0] for size in sizes]
    query, key, weight, d_scores = tensors
    arguments = query[:, None], key[:, None], key[:, None], weight[None]
    return NativeActivations(AdditiveProblem(*arguments, *(None,) * 3, False, 0.0, 1.0, False, False, False)), *tensors


@given(st.data())
@settings(max_examples=60)
def test_any_problem(data):
    # Where one of a handful of weights is nearly 1, the gradient cancels, and its truth is ill-conditioned in float32.
    shape = tuple(data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 3), (5, 40), (8, 90)))
    hidden, value_dim = data.draw(st.integers(1, 70)), data.draw(st.integers(4, 9))
    dtype = data.draw(st.sampled_from((torch.float32, *HALF_TYPES)))
    kind = data.draw(st.sampled_from([None, "causal", "boolean", "added", "padding", "all"]))
    tensors = problem(shape, hidden, value_dim, dtype, seed=data.draw(st.integers(0, 2**16)))
    tensors[3].div_(hidden**0.5)
    options = masks(kind, shape)
    moved = [exact(*(rounded(t, seed) for t in tensors), **options) for seed in range(3)]
    assert_contract(results(run, *tensors, **options), exact(*tensors, **options), dtype, moved)


def rounded(t, seed):
    """t in float64, as if its numbers had been rounded to float32, at random."""
    return t.double() * (1 + 2**-24 * (2 * torch.rand(t.shape, generator=generator(seed), dtype=torch.float64) - 1))


def test_dropout_drops_what_other_backends_drop():
    tensors, seed = problem((2, 2, 9, 33), dtype=torch.float32), torch.tensor([7])
    got, expected = results(seeded("native", seed, 0.3), *tensors), exact(*tensors, dropout_p=0.3, seed=seed)
    assert torch.equal(got[1] == 0, expected[1] == 0) and (expected[1] == 0).any()
    assert_contract(got, expected, torch.float32)


def test_tanh_is_within_four_units_in_the_last_place():
    x = torch.cat([torch.linspace(-12, 12, 200001), torch.logspace(-38, 2, 100001), torch.tensor([0.0, math.inf])])
    x = torch.cat([x, -x])
    sums = activations(1, 1, 1, 1)[0]
    got = sums.scores(x.view(1, -1, 1), torch.zeros(1, 1, 1), torch.ones(1), 1.0).view(-1).double()
    expected = x.double().tanh()
    unit = torch.ldexp(torch.ones_like(expected), expected.frexp().exponent - 24).clamp_min(2.0**-149)
    assert ((got - expected).abs() <= 4 * unit).all()
    assert sums.scores(torch.full((1, 1, 1), math.nan), torch.zeros(1, 1, 1), torch.ones(1), 1.0).isnan().all()


@pytest.mark.parametrize("name", native.instruction_sets() if AVAILABLE else [])
def test_every_instruction_set_keeps_the_contract(name):
    code = """
    import torch
    from additive import assert_contract, exact, problem, public, results
    from daam_kernels import native

    for shape, hidden in (((2, 1, 7, 9), 3), ((1, 2, 33, 70), 64), ((1, 1, 1, 5), 37), ((9, 1, 3, 6), 16)):
        tensors = problem(shape, hidden, dtype=torch.float32)
        assert_contract(results(public("native"), *tensors), exact(*tensors), torch.float32)
    print(native.instruction_set())
    """
    assert python(code, DAAM_KERNELS_INSTRUCTION_SET=name) == name


@pytest.mark.parametrize("shape", [(1, 1, 200, 130), (20, 1, 3, 150)], ids=str)  # parts of a batch; batches of a task
def test_any_number_of_threads_gives_the_same_bits(shape):
    tensors, before = problem(shape, hidden=33, dtype=torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(run, *tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for got, expected in zip(other, found[0]):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("shape", [(1, 5, 3, 1), (2, 9, 14, 21), (3, 1, 2, 40), (1, 300, 40, 70)], ids=str)
def test_no_access_out_of_bounds(shape):
    """What lies around the tensors is NaN: it must neither be written nor find its way into a result."""
    sums, query, key, weight, d_scores = activations(*shape)
    scores, buffer = nan_padded(torch.empty(d_scores.shape))
    block = native_additive._block(query, key, scale=0.5)
    native.additive_scores(ctypes.addressof(block), *(t.data_ptr() for t in (query, key, weight, scores)))
    assert_margins_intact(buffer)
    y = torch.tanh(query[:, :, None].double() + key[:, None].double())
    assert_close(scores, y @ (0.5 * weight.double()), 2e-6)
    gradients, buffers = zip(*(nan_padded(torch.ones_like(t)) for t in (query, key, weight)))
    sums.add_gradients(d_scores, query, key, weight, *gradients)
    slopes = d_scores.double()[..., None] * (1 - y * y) * weight.double()
    expected = 1 + slopes.sum(2), 1 + slopes.sum(1), 1 + torch.einsum("bqk,bqkc->c", d_scores.double(), y)
    for got, truth, buffer in zip(gradients, expected, buffers):
        assert_close(got, truth, 5e-6)
        assert_margins_intact(buffer)


def test_layouts_give_the_same_bits():
    *tensors, grad, _ = problem((2, 2, 5, 9), hidden=12, dtype=torch.float32)
    expected = additive_attention(*tensors, backend="native")
    hidden_first = [t.transpose(-2, -1).contiguous().transpose(-2, -1) for t in tensors]
    for layout in (map(transposed, tensors), hidden_first):
        assert_same_bits(additive_attention(*layout, backend="native"), expected)


def test_nan_stays_in_its_batch():
    tensors = problem((3, 2, 4, 6), dtype=torch.float32)
    expected = results(run, *tensors)
    tensors[1][1, 0, 2, 1] = math.nan
    got = results(run, *tensors)
    for number in range(5):
        assert_same_bits(got[number][::2], expected[number][::2])
    assert got[0][1, 0].isnan().all() and got[0][1, 1].isfinite().all()


def test_opcheck():
    tensors = [t.requires_grad_() for t in problem((2, 1, 3, 4), dtype=torch.float32)[:4]]
    arguments = (*tensors, None, None, None, False, 0.0, 1.0, False, True, False, "native")
    torch.library.opcheck(of_backend, arguments)


def test_what_is_not_served_says_so():
    tensors = problem()
    with pytest.raises(RuntimeError, match="serves float32, bfloat16 and float16, got torch.float64"):
        additive_attention(*tensors[:4], backend="native")
    assert_close(additive_attention(*tensors[:4]), exact(*tensors)[0], 1e-12)
    with pytest.raises(RuntimeError, match="does not serve these arguments"):
        native.additive_scores(0, 0, 0, 0, 0)
