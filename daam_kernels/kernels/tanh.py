"""The hyperbolic tangent in plain arithmetic, the same on every GPU and in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def portable_tanh(x):
    """tanh of float32 or float64 to 4 units in the last place, near 0 too.

    1 - 2 / (1 + exp(2 |x|)) loses digits near 0; there it is x + x^3 P(x^2), P the Chebyshev fit of (tanh(x) / x - 1) /
    x^2 that is exact to a tenth of a unit.
    """
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    z = x * x
    if x.dtype == tl.float64:
        p = 6.485163482793113e-06 * z - 3.12011014257974e-05
        p = p * z + 9.257116129556769e-05
        p = p * z - 0.0002375906496055562
        p = p * z + 0.0005896606577757043
        p = p * z - 0.0014557754120478055
        p = p * z + 0.0035921217511549622
        p = p * z - 0.008863235103240878
        p = p * z + 0.021869488519008305
        p = p * z - 0.05396825396789699
        p = p * z + 0.13333333333333042
        p = p * z - 0.3333333333333333
        border: tl.constexpr = 0.625
    else:
        p = 0.00014279318799621565 * z - 0.0009235008463481761
        p = p * z + 0.003206803386846565
        p = p * z - 0.008697847592814879
        p = p * z + 0.02182954884305937
        p = p * z - 0.05396341475443884
        p = p * z + 0.133333106555451
        p = p * z - 0.3333333315672231
        border: tl.constexpr = 1.0
    return tl.where(size < border, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """FAST, of float32 on NVIDIA's GPUs alone: one instruction, relative error up to 2^-11."""
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return portable_tanh(x)
