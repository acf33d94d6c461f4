"""Attention pooling on real hardware: the contract, ragged bags, determinism, graphs."""

import pytest
import torch
from pooling import SCORES, check, evaluate, problem
from support import DTYPES, assert_close, assert_same_bits

from daam_kernels import AttentionPool, attention_pool

pytestmark = pytest.mark.gpu

LENGTHS = (20_000, 16, 0, 1999, 333, 64)


@pytest.mark.parametrize("hops, embed_dim", [(1, 512), (8, 384), (11, 1000)])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_contract(dtype, score, hops, embed_dim):
    check(problem(score, "packed", dtype, "cuda", LENGTHS, embed_dim, hops, hidden=128), "triton")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_too_long_for_a_program(dtype, score):
    check(problem(score, "packed", dtype, "cuda", (400, 0, 33), 10_000, 3, hidden=64), "triton")


def test_dense_bags_with_masks_and_lengths():
    check(problem("gated", "dense", torch.float32, "cuda", (700, 16, 0, 333), 256, 4, 64), "triton")


def test_results_are_bitwise_the_same_from_run_to_run():
    p = problem("dot", "packed", torch.bfloat16, "cuda", LENGTHS, 512, 4)
    for one, other in zip(evaluate(p, "triton"), evaluate(p, "triton"), strict=True):
        assert_same_bits(one.detach().cpu(), other.detach().cpu())


@pytest.mark.huge
def test_more_rows_than_an_int32_has_elements():
    x = torch.zeros(1, 2**23 + 5, 512, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = 1
    context = attention_pool(x, torch.ones(512, device="cuda"), scale=1.0)
    assert_close(context, torch.ones(1, 512), 1e-2)


def test_graph_capture_of_packed_bags():
    p = problem("dot", "packed", torch.float32, "cuda", LENGTHS, 64)
    options = dict(cu_seqlens=p.bags["cu_seqlens"], max_seqlen=20_000)
    x, query = p.x.nan_to_num(), p.tensors[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = attention_pool(x, query, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention_pool(x, query, **options)
    graph.replay()
    assert_same_bits(got.cpu(), expected.cpu())


def test_a_compiled_module():
    module, x = AttentionPool(64, 2, score="multihead", device="cuda"), torch.randn(3, 500, 64, device="cuda")
    compiled = torch.compile(module, fullgraph=True)
    assert_close(compiled(x)[0], module(x)[0], 1e-5)
