"""Lets the native library write one number past the end of its output: a sanitized build has to stop that.

Usage: python .ci/overrun.py MISSING, the bytes that the output lacks; 0 for a call that is right.
"""

import sys

import torch

from daam_kernels import native
from daam_kernels.options import DensityOptions

missing = int(sys.argv[1])
x, mean_offsets, c = torch.randn(4, 64), torch.zeros(2, 3), torch.ones(2, 3)
options = DensityOptions(
    norm_axis=1, padding_value=None, padding_stats="zero", normalize="clamp", eps=1e-8, residual=False
)
y = torch.empty_like(x)
y.untyped_storage().resize_(y.nbytes - missing)  # y keeps its shape: it is the library that must not be told lies
native.density_forward(x, mean_offsets, c, None, options, y, None)
print(f"density_forward returned, {missing} bytes short")
