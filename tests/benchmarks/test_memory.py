"""Peak memory is what a call held at a time beyond what was there before, to the byte."""

import pytest
import torch

from benchmarks.kernels.memory import peak_bytes
from daam_kernels import density_attention, native

CPU = torch.device("cpu")


def kept(start: torch.Tensor):
    return torch.empty(1000, dtype=torch.float32)


def one_after_the_other(start: torch.Tensor):
    for _ in range(3):
        torch.empty(1000, dtype=torch.float64)


def both_at_a_time(start: torch.Tensor):
    first = torch.empty(500, dtype=torch.float64)
    second = torch.empty(250, dtype=torch.float32)
    del first
    return second, torch.empty(100, dtype=torch.uint8)


def in_place(start: torch.Tensor):
    start.add_(start)  # a Python number would be a tensor of a few bytes for a moment


def a_temporary(start: torch.Tensor):
    return (start + start) * start  # of 4000 bytes each


@pytest.mark.parametrize(
    "call, expected",
    [(kept, 4000), (one_after_the_other, 8000), (both_at_a_time, 5000), (in_place, 0), (a_temporary, 8000)],
)
def test_a_known_amount(call, expected):
    start = torch.zeros(1000)
    assert [peak_bytes(lambda: call(start), CPU) for _ in range(2)] == [expected, expected]


def test_memory_from_before_the_call_makes_no_room_when_it_is_given_back():
    held = [torch.empty(10000)]

    def call():
        held.clear()
        return torch.empty(1000)

    assert peak_bytes(call, CPU) == 4000


def test_an_address_that_a_call_before_had_counts_for_nothing():
    """The profiler remembers what it saw allocated, and not that it was given back when it did not look."""
    seen = []
    peak_bytes(lambda: seen.extend(torch.empty(10000) for _ in range(100)), CPU)
    addresses = {t.data_ptr() for t in seen}
    seen.clear()
    held = [torch.empty(10000) for _ in range(100)]
    if addresses.isdisjoint(t.data_ptr() for t in held):
        pytest.skip("the allocator took other addresses")

    def call():
        held.clear()
        return torch.empty(1000)

    assert peak_bytes(call, CPU) == 4000


@pytest.mark.skipif(not native.status()[0], reason="the native library is not there")
def test_the_fused_operator_holds_its_results_and_nothing_of_that_size_beside_them():
    x, grad = (torch.randn(8, 24, 512) for _ in range(2))
    parameters = [torch.zeros(4, 3), torch.ones(4, 3)]
    assert peak_bytes(lambda: density_attention(x, *parameters, norm_axis=1, backend="native"), CPU) == x.nbytes
    for t in (x, *parameters):
        t.requires_grad_()

    def both():
        y = density_attention(x, *parameters, norm_axis=1, backend="native")
        return y, torch.autograd.grad(y, (x, *parameters), grad)

    assert 2 * x.nbytes <= peak_bytes(both, CPU) <= 2 * x.nbytes + 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_known_amount_on_a_gpu():
    device = torch.device("cuda")
    assert peak_bytes(lambda: torch.empty(1 << 20, dtype=torch.uint8, device=device), device) == 1 << 20
