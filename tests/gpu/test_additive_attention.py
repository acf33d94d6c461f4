"""Additive attention on real hardware, at sizes that the interpreter has no time for."""

import pytest
import torch
from additive import assert_contract, exact, masks, problem, public, results, seeded
from daam_kernels import additive_attention
from support import assert_close, assert_same_bits

pytestmark = pytest.mark.gpu

CUDA = "cuda"
triton = public("triton")


@pytest.mark.parametrize(
    "shape, hidden, value_dim",
    [
        *(((2, 3, 130, 257), *sizes) for sizes in ((16, 64), (64, 64), (37, 41), (200, 300), (64, 1024))),
        ((4, 2, 1, 5000), 64, 64), ((16, 1, 1, 66), 1024, 1024), ((3, 1, 10, 128), 1024, 700), ((1, 1, 2000, 1), 8, 8),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_contract(shape, hidden, value_dim, dtype):
    tensors = problem(shape, hidden, value_dim, dtype, CUDA)
    assert_contract(results(triton, *tensors), exact(*tensors), dtype)


@pytest.mark.parametrize("kind", ["causal", "boolean", "added", "padding", "all"])
def test_masks_and_dropout(kind):
    shape = (2, 2, 150, 270)
    tensors, options = problem(shape, 32, 48, torch.float32, CUDA), masks(kind, shape, CUDA)
    assert_contract(results(triton, *tensors, **options), exact(*tensors, **options), torch.float32)
    seed = torch.tensor([77])
    got = results(seeded("triton", seed, 0.2), *tensors, **options)
    assert_contract(got, exact(*tensors, dropout_p=0.2, seed=seed, **options), torch.float32)


def test_every_run_gives_the_same_bits():
    tensors = problem((2, 4, 300, 500), 64, 64, torch.bfloat16, CUDA)
    expected = results(triton, *tensors)
    for _ in range(5):
        for got, first in zip(results(triton, *tensors), expected):
            assert_same_bits(got, first)


def test_fast_tanh():
    tensors = [t.to(torch.float32) for t in problem((2, 4, 300, 500), 64, 64, torch.float32, CUDA)[:4]]
    assert_close(additive_attention(*tensors, fast_tanh=True), additive_attention(*tensors), 2**-8)


def test_memory_does_not_grow_with_the_product_of_lengths():
    torch.cuda.empty_cache()
    query, key, value, weight, grad, _ = problem((1, 2, 8192, 8192), 64, 64, torch.float32, CUDA)
    tensors = [t.requires_grad_() for t in (query, key, value, weight)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(triton(*tensors), tensors, grad)
    assert torch.cuda.max_memory_allocated() - before < 16 * query.nbytes


def test_runs_in_a_cuda_graph():
    tensors = problem((2, 2, 1, 700), 64, 64, torch.bfloat16, CUDA)[:4]
    expected = additive_attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = additive_attention(*tensors)
    graph.replay()
    assert_same_bits(output, expected)
