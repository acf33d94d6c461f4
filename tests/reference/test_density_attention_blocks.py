"""The reference a block of slices at a time, against all of them at once."""

import pytest
import torch
from daam_kernels.reference import density_attention, density_attention_backward
from daam_kernels.reference import density_attention_blocks as in_blocks
from support import assert_close, generator, narrowed, transposed

LAYOUTS = {"contiguous": lambda t: t, "transposed": transposed, "narrowed": narrowed}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(in_blocks, "_BLOCK", 100)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", ["product", "mixture", "gate", "gaussian"])
@pytest.mark.parametrize("shape, norm_axis", [((9, 12, 10), 1), ((2, 90, 12), 2), ((12, 50), 0), ((1, 7, 6, 30), 2)])
def test_blocks_are_the_whole(shape, norm_axis, density, layout):
    rng = generator()
    x, grad = (LAYOUTS[layout](torch.randn(shape, generator=rng)) for _ in range(2))
    columns = torch.Size(shape[norm_axis + 1 :]).numel() if density == "gaussian" else 3
    mean_offsets, c = 0.1 * torch.randn(2, columns, generator=rng), torch.rand(2, columns, generator=rng) + 0.5
    log_shares = torch.randn(2, 3, generator=rng) if density in ("mixture", "gate") else None
    mask = torch.rand(shape[norm_axis:], generator=rng) < 0.8
    options = dict(norm_axis=norm_axis, density=density, log_shares=log_shares, mask=mask, eps=1e-6)
    y, weights = in_blocks.forward(x, mean_offsets, c, return_weights=True, **options)
    expected = density_attention(x, mean_offsets, c, return_weights=True, **options)
    for got, whole in zip((y, weights), expected):
        assert got.stride() == torch.empty_like(x).stride()
        assert_close(got, whole, 1e-6)
    gradients = in_blocks.backward(grad, x, mean_offsets, c, **options)
    assert gradients[0].stride() == torch.empty_like(x).stride()
    for got, whole in zip(gradients, density_attention_backward(grad, x, mean_offsets, c, **options), strict=True):
        assert got.dtype == whole.dtype
        assert_close(got, whole, 1e-5)


@pytest.mark.parametrize("density, shape, norm_axis, blocks", [
    ("product", (9, 12, 10), 1, 10),  # 11 wanted: more than any axis has
    ("product", (40, 12, 10), 1, 40),
    ("product", (2, 10, 90), 1, 18),
    ("gaussian", (2, 10, 90), 1, 2),  # its parameters lie along the last axis
    ("gaussian", (10, 900), 0, 1),
    ("product", (900,), 0, 1),
    ("product", (0, 12), 1, 1),
])  # fmt: skip
def test_blocks_cover_x_once(density, shape, norm_axis, blocks):
    cuts = in_blocks._cuts(torch.empty(shape), norm_axis, density)
    seen = torch.zeros(shape)
    for cut in cuts:
        cut(seen).add_(1)
    assert len(cuts) == blocks and (seen == 1).all()
