"""The kernels of additive attention, in Triton's interpreter or on a GPU: the contract, masks, dropout, splits."""

import daam_kernels
import pytest
import torch
from additive import assert_contract, check_average, exact, masks, problem, public, results, seeded
from daam_kernels import reference
from support import DTYPES, assert_close, assert_same_bits, device_of, every_second, interpreted, transposed

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = device_of("triton")
SHAPE = (1, 2, 18, 35)  # more than a block of each
triton = public("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_contract(dtype, poisoned_memory):
    tensors = problem(SHAPE, hidden=11, value_dim=18, dtype=dtype, device=DEVICE)
    assert_contract(results(triton, *tensors), exact(*tensors), dtype)


@pytest.mark.parametrize("kind", ["causal", "boolean", "added", "padding", "all"])
def test_masks(kind):
    tensors, options = problem(SHAPE, device=DEVICE, dtype=torch.float32), masks(kind, SHAPE, DEVICE)
    assert_contract(results(triton, *tensors, **options), exact(*tensors, **options), torch.float32)


@pytest.mark.parametrize("kind", [None, "all"])
@pytest.mark.parametrize("shape, value_dim", [((2, 2, 1, 150), 5), ((1, 1, 3, 70), 300), ((1, 1, 1, 1), 1)], ids=str)
def test_few_queries_split_the_keys(shape, value_dim, kind):
    tensors = problem(shape, hidden=5, value_dim=value_dim, device=DEVICE, dtype=torch.float32)
    options = masks(kind, shape, DEVICE)
    options.pop("is_causal", None)  # it would leave the one query one key
    if kind == "all":
        options["key_padding_mask"][-1, :] = False
    assert_contract(results(triton, *tensors, **options), exact(*tensors, **options), torch.float32)


def test_a_float64_query_splits_the_keys():
    tensors = problem((1, 1, 1, 80), device=DEVICE)
    assert_contract(results(triton, *tensors), exact(*tensors), torch.float64)


@pytest.mark.parametrize("shape", [(2, 1, 17, 33), (1, 2, 1, 70)], ids=str)
def test_dropout_drops_what_other_backends_drop(shape):
    tensors = problem(shape, device=DEVICE, dtype=torch.float32)
    seed = torch.tensor([0x1234_5678_9ABC])
    got = results(seeded("triton", seed, 0.3), *tensors)
    options = dict(dropout_p=0.3, seed=seed)
    expected = exact(*tensors, **options)
    assert torch.equal(got[1].cpu() == 0, expected[1] == 0) and (expected[1] == 0).any()
    assert_contract(got, expected, torch.float32)


def test_the_mean_of_the_heads_weights():
    check_average("triton", torch.float16, DEVICE)


def test_layouts_and_repetitions_give_the_same_bits():
    *tensors, grad, grad_weights = problem((1, 1, 5, 20), device=DEVICE, dtype=torch.float32)
    expected = results(triton, *tensors, grad, grad_weights)
    for layout in (lambda t: t, transposed, every_second):
        got = results(triton, *map(layout, tensors), grad, grad_weights)
        for g, e in zip(got, expected):
            assert_same_bits(g, e)


def test_gradcheck():
    *tensors, _, _ = problem((1, 1, 2, 3), hidden=2, value_dim=1, device=DEVICE)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: triton(*t, need_weights=True), tensors)


def test_nothing_is_written_out_of_bounds_and_no_queries_are_fine():
    for shape in ((1, 1, 0, 3), (0, 1, 2, 3)):
        output, weights, *gradients = results(triton, *problem(shape, device=DEVICE))
        assert output.shape == (*shape[:3], 4) and weights.shape == shape and all(not g.any() for g in gradients)


@pytest.mark.skipif(not interpreted("triton"), reason="on a GPU it makes a difference")
def test_fast_tanh_is_the_exact_one_without_a_gpu():
    *tensors, _, _ = problem((1, 1, 3, 4), dtype=torch.float32)
    assert_same_bits(triton(*tensors, fast_tanh=True), triton(*tensors))


def test_the_scale():
    *tensors, _, _ = problem((1, 1, 3, 4), device=DEVICE)
    expected = reference.additive_attention(*tensors, scale=0.37)
    assert_close(triton(*tensors, scale=0.37), expected, 1e-12)
