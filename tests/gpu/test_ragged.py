"""Packed sequences on real hardware: the contract, graphs, and one reading of cu_seqlens."""

import pytest
import torch
from ragged import check, inputs, packed
from support import DTYPES, assert_same_bits, evaluate

pytestmark = pytest.mark.gpu

LENGTHS = (700, 16, 1999, 333, 64)


@pytest.mark.parametrize("density", ["product", "mixture"])
@pytest.mark.parametrize("features", [(), (5,), (256,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_contract(dtype, features, density):
    x, grad, cu_seqlens, parameters = inputs(features, LENGTHS, dtype, "cuda", density, heads=4)
    check("triton", x, grad, cu_seqlens, parameters, max_seqlen=2048)


def test_one_long_sequence_is_split():
    x, grad, cu_seqlens, parameters = inputs((2,), (200_000, 50), torch.float32, "cuda", mean=10.0)
    check("triton", x, grad, cu_seqlens, parameters)


def test_graph_capture():
    """A graph is replayed for other sequences, as many and no longer than max_seqlen."""
    x, grad, cu_seqlens, parameters = inputs((32,), LENGTHS, torch.float32, "cuda")
    options = dict(norm_axis=0, cu_seqlens=cu_seqlens, max_seqlen=2048)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels compile outside of the capture
        for _ in range(3):
            evaluate("triton", x, *parameters, grad, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate("triton", x, *parameters, grad, **options)
    cu_seqlens.copy_(packed(LENGTHS[::-1], device="cuda"))
    graph.replay()
    for got, expected in zip(captured, evaluate("triton", x, *parameters, grad, **options), strict=True):
        assert_same_bits(got.cpu(), expected.cpu())


def test_a_capture_needs_max_seqlen():
    x, grad, cu_seqlens, parameters = inputs((32,), LENGTHS, torch.float32, "cuda")
    with pytest.raises(RuntimeError, match="give max_seqlen"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        evaluate("triton", x, *parameters, grad, norm_axis=0, cu_seqlens=cu_seqlens)


def test_only_the_first_call_waits_for_the_gpu():
    x, grad, cu_seqlens, parameters = inputs((32,), LENGTHS, torch.float32, "cuda")
    evaluate("triton", x, *parameters, grad, norm_axis=0, cu_seqlens=cu_seqlens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate("triton", x, *parameters, grad, norm_axis=0, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
