"""Problems for the native library: shapes, layouts and padding that nobody chose, and those cut in every way."""

import hypothesis.strategies as st
import pytest
import torch
from daam_kernels import native
from support import DTYPES, generator

AVAILABLE, REASON = native.status()
needs_library = pytest.mark.skipif(not AVAILABLE, reason=REASON)
INSTRUCTION_SETS = native.instruction_sets() if AVAILABLE else ()

# name: (shape, axis, heads)
SPLITS = {
    "rows": ((37, 301), -1, 3),
    "short rows": ((3000, 8), -1, 2),
    "columns": ((3, 70, 133), 1, 2),
    "short columns": ((30, 11, 133), 1, 2),
    "long columns": ((2, 700, 65), 1, 1),
    "a long row": ((1, 250_001), -1, 1),
    "long rows": ((2, 210_007), -1, 2),
    "long rows in batches": ((29, 150_001), -1, 1),
    "many long rows": ((33, 20_003), -1, 1),
    "a long column": ((210_003, 1, 1), 0, 1),
    "few long columns": ((210_003, 3), 0, 1),
    "long columns in batches": ((5003, 1000), 0, 1),
    "long columns in two heads": ((410_003, 2), 0, 2),
}


def strided(t, order, step, expanded):
    """The values of t with its axes ordered so in memory, ``step`` apart; axes in ``expanded`` from their first."""
    for d in expanded:
        t = t.narrow(d, 0, 1).expand(t.shape)
    sources = [0 if d in expanded else slice(None) for d in range(t.dim())]
    inverse = [order.index(d) for d in range(len(order))]
    memory = t.new_empty([1 if d in expanded else t.shape[d] for d in order] + [step])
    view = memory.select(-1, step - 1).permute(inverse)
    view.copy_(t[tuple(slice(0, 1) if s == 0 else s for s in sources)])
    return view.expand(t.shape)


@st.composite
def layouts(draw, dims):
    return (
        draw(st.permutations(range(dims))),
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.sets(st.integers(0, dims - 1), max_size=1)),
    )


@st.composite
def problems(draw):
    dims = draw(st.integers(1, 4))
    axis = draw(st.integers(0, dims - 1))
    num_heads = draw(st.integers(1, 5))
    length = 2 * num_heads + draw(st.integers(0, draw(st.sampled_from([3, 40, 600]))))
    sizes = st.integers(1, draw(st.sampled_from([3, 9, 40])))
    shape = [length if d == axis else draw(sizes) for d in range(dims)]
    while (numel := torch.Size(shape).numel()) > 20000:
        widest = max((d for d in range(dims) if d != axis), key=lambda d: shape[d])
        shape[widest] = max(1, shape[widest] * 20000 // numel)
    x_order, x_step, _ = draw(layouts(dims))
    expanded = draw(st.sets(st.sampled_from([d for d in range(dims) if d != axis] or [axis]), max_size=1)) - {axis}
    return dict(
        shape=shape,
        norm_axis=axis,
        num_heads=num_heads,
        num_gaussians=draw(st.integers(1, 40)),
        x_layout=(x_order, x_step, expanded),
        grad_layout=draw(layouts(dims)),
        mask_layout=draw(st.none() | layouts(dims)),
        padding_value=draw(st.sampled_from([None, 0, 7.0])),
        padding_stats=draw(st.sampled_from(["zero", "exclude"])),
        normalize=draw(st.sampled_from(["clamp", "softmax"])),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )


def draw_tensors(problem):
    """(x, grad, options, generator) of one of these; x is near 1."""
    rng, dtype, shape = generator(problem["seed"]), problem["dtype"], problem["shape"]
    x = (1 + torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
    if problem["padding_value"] is not None:
        x[torch.rand(shape, generator=rng) < 0.3] = problem["padding_value"]
    x = strided(x, *problem["x_layout"])
    grad = strided(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype), *problem["grad_layout"])
    options = {name: problem[name] for name in ("norm_axis", "padding_value", "padding_stats", "normalize", "residual")}
    if problem["mask_layout"] is not None:
        options["mask"] = strided(torch.rand(shape, generator=rng) < 0.7, *problem["mask_layout"])
    return x, grad, options, rng


def odd_shapes(axis):
    """(shape, margin) of tensors that are to lie ``margin`` numbers into their memory, with heads along the axis."""
    for shape, margin in zip([(3, 13, 7), (2, 5, 67), (7, 41, 3), (4, 259, 1)], (1, 3, 5, 7)):
        if shape[axis] >= 4:
            yield shape, margin
