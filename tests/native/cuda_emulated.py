"""A pytest plugin: the native backend of this run is csrc/cuda, emulated on the CPU.

    pytest -p native.cuda_emulated ...

Every test of that backend then goes through the CUDA launches and kernels. float64, which they do not serve, is left to
the reference. Problems are as small as for Triton's interpreter. DAAM_TEST_EMULATION: the folder of an emulation that
is compiled already.
"""

import os
import tempfile
from pathlib import Path

import torch
from daam_kernels import backends, native, reference

from .cuda_library import Library, compile_emulation, emulation_in

_folder = tempfile.TemporaryDirectory()
_compiled = os.environ.get("DAAM_TEST_EMULATION")
_library = Library(
    *(emulation_in(Path(_compiled)) if _compiled else compile_emulation(Path(_folder.name), flags=("-O2",)))
)


def _forward(*arguments):
    *arguments, _parallel_for = arguments
    return _library.host.daam_cuda_density_forward(*arguments, _library.image, None)


def _backward(*arguments):
    *arguments, _parallel_for = arguments
    size = _library.host.daam_cuda_workspace(arguments[0])
    workspace = torch.empty(size, dtype=torch.uint8)
    return _library.host.daam_cuda_density_backward(*arguments, workspace.data_ptr(), _library.image, None)


def _serve_float64(original, reference_function):
    def call(*arguments):
        x = next(t for t in arguments if isinstance(t, torch.Tensor))
        return (reference_function if x.dtype == torch.float64 else original)(*arguments)

    return call


def _reference_forward(x, mean_offsets, c, mask, options, y, weights, _log_shares=None):
    named = options.of_reference() | {"mask": mask, "return_weights": True}
    with torch.no_grad():
        found = reference.density_attention(x, mean_offsets, c, **named)
    y.copy_(found[0])
    if weights is not None:
        weights.copy_(found[1])


def _reference_backward(grad, x, mean_offsets, c, mask, options, _dx=None, _log_shares=None):
    named = options.of_reference() | {"mask": mask}
    with torch.no_grad():
        dx, *gradients = reference.density_attention_backward(grad, x, mean_offsets, c, **named)
    return torch.empty_like(x).copy_(dx), *gradients


_found = native._Library(**dict.fromkeys(native._Library._fields))._replace(
    forward=_forward,
    backward=_backward,
    instruction_set=lambda: b"emulated CUDA",
    instruction_sets=lambda: b"emulated",
    flags=0,
)
native._load = lambda: _found
backends.DENSITIES["native"] = backends.DENSITIES["cuda"]
native.density_forward = _serve_float64(native.density_forward, _reference_forward)
native.density_backward = _serve_float64(native.density_backward, _reference_backward)
_problem = native.problem
native.problem = lambda *arguments: None if arguments[4].dtype == torch.float64 else _problem(*arguments)


def pytest_configure():
    import support  # asks which backends there are

    support.interpreted = lambda backend: backend != "reference"


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"emulated CUDA kernels: {_library.launches} launches")
