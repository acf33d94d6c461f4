"""Which backend serves a call: by name, by the environment variable, by itself."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import daam_kernels
import pytest
import torch
from daam_kernels import backends, density_attention
from daam_kernels.ops import eager
from support import BACKENDS, HAVE_GPU, assert_same_bits, device_of

VARIABLE = "DAAM_KERNELS_BACKEND"
ROOT = Path(__file__).resolve().parent.parent
ON_CPU = "native" if "native" in BACKENDS else "reference"  # what auto takes there


def call(backend="auto", device="cpu"):
    x = torch.linspace(-1, 2, 12, device=device).view(2, 6)
    return density_attention(x, torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device), backend=backend)


@pytest.fixture
def served(monkeypatch):
    """The names of the backends that served, in order; of calls that are not remembered from other tests."""
    names, resolve = [], backends.resolve
    monkeypatch.setattr(eager, "_calls", {})

    def recording(*arguments):
        names.append(resolve(*arguments))
        return names[-1]

    monkeypatch.setattr("daam_kernels.ops.density_attention.resolve", recording)
    return names


def python(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_backend_says_whether_it_works_and_why_not():
    found = daam_kernels.available_backends()
    assert list(found) == list(backends.BACKENDS) == ["triton", "native", "cuda", "reference"]
    assert found["reference"] and found["reference"].available
    for name, status in found.items():
        assert isinstance(status.available, bool) and bool(status) == status.available
        assert status.reason and "\n" not in status.reason, name


def test_without_the_interpreter_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in daam_kernels.available_backends()["triton"].reason
    with pytest.raises(RuntimeError, match=r"backend asks for 'triton', which cannot serve a tensor on cpu: .*CUDA"):
        call("triton")
    assert call("auto").isfinite().all()


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    status = daam_kernels.available_backends()["triton"]
    assert not status and "not installed" in status.reason
    with pytest.raises(RuntimeError, match="backend asks for 'triton', which cannot serve .*: triton is not installed"):
        call("triton")
    assert call("auto").isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_asked_for_by_name_serves(backend, served):
    call(backend, device_of(backend))
    assert served == [backend]


def test_auto_on_the_cpu(served):
    """In Triton's interpreter too: it is there for tests that ask for it."""
    call("auto")
    assert served == [ON_CPU]


def test_auto_on_the_cpu_without_the_library_is_the_reference(served, monkeypatch):
    monkeypatch.setattr(backends.native, "status", lambda: (False, "not built"))
    call("auto")
    assert served == ["reference"]


class OnGPU:
    """What resolve reads of a CUDA tensor, where there is no GPU to have one on."""

    device, dtype, is_cuda, is_cpu = torch.device("cuda", 0), torch.float32, True, False


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("failure", ["", "they do not load"])
def test_auto_on_cuda(triton, compiled, failure, monkeypatch):
    monkeypatch.setattr(backends, "_triton_installed", lambda: triton)
    monkeypatch.setattr(backends.native, "cuda_status", lambda: (compiled, "compiled or not"))
    monkeypatch.setattr(backends.native, "cuda_failure", lambda device: failure)
    without_triton = "cuda" if compiled and not failure else "reference"
    assert backends.resolve("auto", OnGPU()) == ("triton" if triton else without_triton)
    double = OnGPU()
    double.dtype = torch.float64
    assert backends.resolve("auto", double) == ("triton" if triton else "reference")
    if compiled and not failure:
        with pytest.raises(RuntimeError, match="'cuda'.* on cuda:0: it takes float32, bfloat16 and float16, got .*64"):
            backends.resolve("cuda", double)
    elif compiled:
        with pytest.raises(RuntimeError, match="they do not load"):
            backends.resolve("cuda", OnGPU())


def test_a_failure_to_load_on_a_gpu_is_asked_again_and_a_success_is_not(monkeypatch):
    native, codes, device = backends.native, [4, 0], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(native, "_library", lambda: SimpleNamespace(cuda_load=lambda image: codes.pop(0)))
    monkeypatch.setattr(native, "_cuda_image", lambda: None)
    monkeypatch.setattr(native, "_reason", lambda code: f"status {code}")
    monkeypatch.setattr(native, "_loaded_on", set())
    assert [native.cuda_failure(device) for _ in range(3)] == ["status 4", "", ""] and not codes


def test_on_other_devices_auto_is_the_reference():
    other = OnGPU()
    other.device, other.is_cuda = torch.device("mps"), False
    assert backends.resolve("auto", other) == "reference"
    if "native" in BACKENDS:
        with pytest.raises(RuntimeError, match="'native', which cannot serve a tensor on mps: needs a CPU tensor"):
            backends.resolve("native", other)


@pytest.mark.parametrize("name", [name for name, status in daam_kernels.available_backends().items() if not status])
def test_an_unavailable_backend_raises_by_name(name):
    device = torch.empty(0, device=device_of(name)).device
    reason = daam_kernels.available_backends()[name].reason
    with pytest.raises(RuntimeError) as error:
        call(name, device)
    assert str(error.value) == f"backend asks for {name!r}, which cannot serve a tensor on {device}: {reason}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_environment_variable_overrides_auto(backend, served, monkeypatch):
    monkeypatch.setenv(VARIABLE, f" {backend.upper()} ")
    call("auto", device_of(backend))
    assert served == [backend]


def test_the_environment_variable_leaves_a_name_alone(served, monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    call("reference")
    assert served == ["reference"]


@pytest.mark.parametrize("value", ["", "auto", "AUTO"])
def test_the_environment_variable_may_say_auto(value, served, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    call("auto")
    assert served == [ON_CPU]


def test_the_environment_variable_counts_for_remembered_calls_too(served, monkeypatch):
    for value in ("", "reference", "", " Reference"):
        monkeypatch.setenv(VARIABLE, value)
        call("auto")
    again = [] if ON_CPU == "native" else [ON_CPU]  # a remembered call is resolved already
    assert served == [ON_CPU, "reference", *again, "reference"]


def test_a_bad_environment_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cudnn")
    message = f"the environment variable {VARIABLE} must be one of auto, triton, native, cuda, reference, got 'cudnn'"
    with pytest.raises(ValueError) as error:
        call("auto")
    assert str(error.value) == message


def test_an_environment_variable_that_cannot_be_served(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    message = f"the environment variable {VARIABLE} asks for 'cuda', which cannot serve"
    with pytest.raises(RuntimeError, match=message):
        call("auto")


@pytest.mark.skipif(HAVE_GPU, reason="a tensor of a GPU is what Triton takes there")
def test_backends_agree_with_themselves_by_name_and_by_variable(monkeypatch):
    for backend in BACKENDS:
        by_name = call(backend)
        monkeypatch.setenv(VARIABLE, backend)
        assert_same_bits(call("auto"), by_name)


def test_importing_and_running_on_the_cpu_imports_no_triton():
    code = """
import sys, torch, daam_kernels
from daam_kernels import density_attention
assert "triton" not in sys.modules, "import"
assert not torch.cuda.is_initialized()
x = torch.randn(3, 8, requires_grad=True)
c = torch.ones(2, 2, requires_grad=True)
density_attention(x, torch.zeros(2, 2), c).sum().backward()
daam_kernels.available_backends()
assert "triton" not in sys.modules, "call"
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_importing_works_where_triton_cannot_be_imported():
    code = """
import sys
sys.modules["triton"] = None
import torch, daam_kernels
assert not daam_kernels.available_backends()["triton"]
daam_kernels.density_attention(torch.randn(3, 8), torch.zeros(2, 2), torch.ones(2, 2))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_rule_of_plain_pytorch():
    """By the formula up to 2 ** 17 intermediates on a CPU; where nothing has been measured, in blocks."""
    form = backends.reference_form
    assert [form("cpu", 2**power) for power in (0, 12, 17, 18, 30)] == ["formula"] * 3 + ["blocks"] * 2
    assert form("cuda", 1) == form("mps", 1) == "blocks"
    x = torch.empty(1)
    assert backends.takes_formula("auto", x, 1) and not backends.takes_formula("reference", x, 1)


def test_what_asks_for_a_backend_goes_before_the_rule(monkeypatch):
    for value, expected in (("", True), ("auto", True), ("reference", False)):
        monkeypatch.setenv(VARIABLE, value)
        assert backends.takes_formula("auto", torch.empty(1), 1) == expected


@pytest.mark.parametrize("keys, in_blocks", [(4, False), (2**15, True)])
def test_auto_computes_small_attention_by_the_formula_and_large_in_blocks(monkeypatch, keys, in_blocks):
    from daam_kernels.ops import additive_attention, attention_pool

    used = []

    def recorded(original):
        return lambda *arguments: used.append(original) or original(*arguments)

    for module, name in (
        (additive_attention.blocks, "additive_attention_forward"),
        (attention_pool.in_blocks, "forward"),
    ):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    double = dict(dtype=torch.float64)
    x, query = torch.randn(1, 1, keys, 16, **double), torch.randn(1, 1, 1, 16, **double, requires_grad=True)
    weight = torch.randn(1, 16, **double)
    for function in (
        lambda backend: daam_kernels.additive_attention(query, x, x, weight, backend=backend),
        lambda backend: daam_kernels.attention_pool(x[0], query[0, 0], backend=backend),
    ):
        used.clear()
        got, named = function("auto"), function("reference")
        assert len(used) == 1 + in_blocks
        torch.testing.assert_close(got, named)
        for result, other in zip(*(torch.autograd.grad(y.square().sum(), query) for y in (got, named))):
            torch.testing.assert_close(result, other)
