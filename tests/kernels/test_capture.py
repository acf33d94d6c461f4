"""What the host does around Triton's kernels while a CUDA graph is captured: it may not read a tensor, nor send one.

Either waits for the GPU, which ends the capture. On CPU tensors nothing waits, so whoever asks is caught by name.
"""

import sys
from pathlib import Path

import daam_kernels
import pytest
import torch
from daam_kernels import attention_pool, density_attention, sequences
from pooling import problem
from ragged import inputs
from support import device_of

from benchmarks.verify.problems import problems

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = device_of("triton")
PACKAGE = str(Path(daam_kernels.__file__).parent)


@pytest.fixture
def captured(monkeypatch):
    """Whatever the package reads on the host or makes of the host's numbers raises, as it does under a capture."""

    def refuse(owner, name):
        original = getattr(owner, name)

        def asked(*args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            assert not caller.startswith(PACKAGE), f"{name} in {caller}"
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, asked)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__iter__"):
        refuse(torch.Tensor, name)
    for name in ("tensor", "as_tensor"):
        refuse(torch, name)
    monkeypatch.setattr(sequences, "_is_captured", lambda _: True)


def run(function, *tensors, **options):
    results = function(*tensors, backend="triton", **options)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.grad(results, tensors, [torch.ones_like(result) for result in results])


@pytest.mark.parametrize("operator", ["product", "ragged", "additive", "pool"])
def test_nothing_is_read_on_the_host(captured, operator):
    for number, (_, function, tensors) in enumerate(problems(operator, DEVICE, torch.float32, "triton", small=True)):
        run(lambda *t, backend: function(*t), *tensors)
        assert number < 10


def test_nor_for_packed_bags_with_padding(captured):
    p = problem("gated", "packed", torch.float32, DEVICE)
    tensors = [t.requires_grad_() for t in (p.x, *p.tensors)]
    run(attention_pool, *tensors, **p.bags, max_seqlen=14, need_weights=True)


def test_what_has_to_be_read_says_so(captured, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    x, _, cu_seqlens, parameters = inputs((3,), dtype=torch.float32, device=DEVICE)
    with pytest.raises(RuntimeError, match="give max_seqlen"):
        density_attention(x, *parameters, norm_axis=0, cu_seqlens=cu_seqlens, backend="triton")
