"""Training with additive attention holds no tensor [batch, heads, Tq, Tk, hidden]: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import functools, re, sys
import torch
import daam_kernels

torch.set_num_threads(1)
length, hidden = 1024, 64
query, key, value, grad = (torch.randn(1, 1, length, hidden) for _ in range(4))
weight = torch.randn(1, hidden)
tensors = [t.requires_grad_() for t in (query, key, value, weight)]
function = daam_kernels.reference.additive_attention
if sys.argv[1] != "formula":
    function = functools.partial(daam_kernels.additive_attention, backend=sys.argv[1])

def peak():  # KiB; getrusage begins with what the parent process had
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

function(*(t.detach()[..., :2, :] for t in tensors[:3]), weight.detach())
assert "sympy" not in sys.modules  # which some of torch's functions take a second to import

def train(*tensors, grad):
    torch.autograd.grad(function(*tensors), tensors, grad)

train(*(t[..., :2, :] for t in tensors[:3]), weight, grad=grad[..., :2, :])
before = peak()
train(*tensors, grad=grad)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_training_at_a_length_of_1024_takes_little_more_than_its_results():
    """One activation tensor would be 256 MiB, of which the formula holds several."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    peak = {}
    for form in ("auto", "reference", "formula"):
        result = subprocess.run(
            [sys.executable, "-c", CODE, form], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        peak[form] = int(result.stdout) / 1024
    assert peak["auto"] < 32 and peak["reference"] < 32 and peak["formula"] > 512, peak
