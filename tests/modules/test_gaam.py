"""FusedMultiHeadGAAM against the first generation's formulas, its arguments, and its checkpoints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from daam_kernels import FusedMultiHeadGAAM, density_attention

SHARES = torch.tensor([0.5, 0.3, 0.4])


class Head(nn.Module):
    """One head of the first generation, its formulas written out; its parameters under the names of its checkpoints."""

    def __init__(self, num_gaussians, shares=None):
        super().__init__()
        self.mean_offsets = nn.Parameter(torch.randn(num_gaussians, dtype=torch.float64))
        self.c = nn.Parameter(torch.randn(num_gaussians, dtype=torch.float64).exp())
        self.given = shares
        if shares is None:
            self.weights = nn.Parameter(torch.randn(num_gaussians, dtype=torch.float64))

    def forward(self, x, axis, padding_value, eps):
        shares = self.weights.softmax(0) if self.given is None else self.given
        valid = torch.ones_like(x, dtype=torch.bool) if padding_value is None else x != padding_value
        kept = x * valid
        deviation = (kept.var(axis, keepdim=True) + eps) ** 0.5
        density = 0
        for share, offset, c in zip(shares, self.mean_offsets, self.c):
            z = (x - kept.mean(axis, keepdim=True) - offset) / deviation
            density = density + share * torch.exp(-(z**2) / (2 * c**2))
        return torch.where(valid, x * density / density.sum(axis, keepdim=True).clamp(min=eps), x)


class Public(nn.Module):
    def __init__(self, axis, num_heads, num_gaussians, shares=None, padding_value=None, eps=1e-8):
        super().__init__()
        self.options = axis, padding_value, eps
        self.attention_heads = nn.ModuleList(Head(num_gaussians, shares) for _ in range(num_heads))

    def forward(self, x):
        parts = x.split(x.shape[self.options[0]] // len(self.attention_heads), self.options[0])
        return torch.cat(
            [head(part, *self.options) for head, part in zip(self.attention_heads, parts)], self.options[0]
        )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shares", [None, SHARES.double()], ids=["learned", "given"])
@pytest.mark.parametrize("padding_value, eps", [(None, 1e-8), (7.0, 1e-8), (0, 3.0)])
@pytest.mark.parametrize("shape, axis", [((4, 12), -1), ((2, 12, 3), 1)])
def test_equals_the_first_generation_with_its_checkpoint(shape, axis, padding_value, eps, shares):
    public = Public(axis, 3, 3, shares, padding_value, eps)
    learnable = True if shares is None else shares
    ours = FusedMultiHeadGAAM(axis, 3, 3, 2, learnable, padding_value, eps, dtype=torch.float64)
    assert str(ours.load_state_dict(public.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(shape, dtype=torch.float64)
    if padding_value is not None:
        x[torch.rand(shape) < 0.2] = padding_value
    grad = torch.randn(shape, dtype=torch.float64)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    expected, y = public(xs[0]), ours(xs[1])
    expected.backward(grad)
    y.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-11, atol=1e-12)
    for name, parameter in ours.named_parameters():
        heads = torch.stack([getattr(head, name).grad for head in public.attention_heads])
        torch.testing.assert_close(parameter.grad, heads, rtol=1e-11, atol=1e-12)
    details = ours(x, True)[1]
    assert details.shape == x.shape and not details.requires_grad


@pytest.mark.parametrize("shares", [None, SHARES], ids=["learned", "given"])
def test_checkpoints_travel_both_ways_bit_for_bit(shares):
    public = Public(1, 12, 3, shares).float()
    checkpoint = public.state_dict()
    ours = FusedMultiHeadGAAM(1, 12, 3, learnable_weights=True if shares is None else shares)
    ours.load_state_dict(checkpoint)
    back = ours.upstream_state_dict()
    assert list(back) == list(checkpoint)
    assert all(torch.equal(back[key], checkpoint[key]) and not back[key].requires_grad for key in back)
    other = FusedMultiHeadGAAM(1, 12, 3, learnable_weights=True if shares is None else torch.ones(3))
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 30)
    assert torch.equal(other(x), ours(x))
    assembled = FusedMultiHeadGAAM(1, 12, 3, learnable_weights=True if shares is None else shares, device="meta")
    assembled.load_state_dict(checkpoint, assign=True)
    assert torch.equal(assembled(x), ours(x))


def test_shares_in_the_checkpoints_of_the_first_days_are_taken():
    checkpoint = Public(1, 2, 3, SHARES).float().state_dict()
    shares = torch.rand(2, 3)
    checkpoint |= {f"attention_heads.{head}.fixed_weights": shares[head] for head in range(2)}
    ours = FusedMultiHeadGAAM(1, 2, 3, learnable_weights=SHARES)
    ours.load_state_dict(checkpoint)
    assert torch.equal(ours.shares, shares)


def test_checkpoints_of_the_other_kind_of_weights_are_refused():
    learned, given = FusedMultiHeadGAAM(1, 2, 3), FusedMultiHeadGAAM(1, 2, 3, learnable_weights=SHARES)
    for module, other, missing, unexpected in (
        (learned, given, "weights", "shares"),
        (given, learned, "shares", "wei"),
    ):
        with pytest.raises(RuntimeError, match=rf'(?s)Missing.*"{missing}".*Unexpected.*"{unexpected}'):
            module.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"attention_heads.0.weights"'):
        given.load_state_dict(Public(1, 2, 3).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"attention_heads.0.weights"'):
        learned.load_state_dict(Public(1, 2, 3, SHARES).state_dict())
    with pytest.raises(RuntimeError, match="the checkpoint has 4 attention heads .* this module has num_heads=2"):
        learned.load_state_dict(Public(1, 4, 3).state_dict())


def test_order_of_the_arguments():
    module = FusedMultiHeadGAAM(-1, 2, 3, 1.5, SHARES, 7.0, 1e-3)
    got = [getattr(module, name) for name in ("norm_axis", "num_heads", "num_gaussians", "initial_c")]
    assert got == [-1, 2, 3, 1.5] and (module.padding_value, module.eps) == (7.0, 1e-3)
    assert torch.equal(module.shares, SHARES.expand(2, 3))


def test_initialisation():
    module = FusedMultiHeadGAAM(1, 2, 3)
    assert not module.mean_offsets.any() and (module.c == 2).all() and (module.weights == 1).all()
    widths = torch.tensor([0.1, -1, 3], dtype=torch.float64)
    module = FusedMultiHeadGAAM(1, 2, 3, widths, SHARES.double(), dtype=torch.float64)
    for _ in range(2):
        assert not module.mean_offsets.any() and torch.equal(module.c, widths.expand(2, 3))
        assert torch.equal(module.shares, SHARES.double().expand(2, 3))
        assert dict(module.named_parameters()).keys() == {"mean_offsets", "c"}
        for t in (*module.parameters(), module.shares):
            nn.init.constant_(t, 5)
        module.reset_parameters()
    meta = FusedMultiHeadGAAM(1, 2, 3, widths, SHARES, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(meta.c, widths.float().expand(2, 3)) and torch.equal(meta.shares, SHARES.expand(2, 3))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("1", 2, 3), ValueError, "norm_axis must be an int, got '1'"),
        ((1, 0, 3), ValueError, "num_heads must be an int of at least 1, got 0"),
        ((1, 2, 3, "2"), TypeError, "initial_c must be a number, got str"),
        ((1, 2, 3, 0), ValueError, "initial_c must not be 0, got 0"),
        ((1, 2, 3, float("inf")), ValueError, "initial_c must be finite, got inf"),
        ((1, 2, 3, torch.ones(2)), ValueError, r"initial_c must have shape \[num_gaussians\] = \[3\], got \[2\]"),
        ((1, 2, 3, torch.tensor([1, 0, 2.0])), ValueError, r"initial_c must not be 0, got \(1.0, 0.0, 2.0\)"),
        ((1, 2, 3, torch.ones(3) * 1j), TypeError, "initial_c must be a tensor of real numbers, got torch.complex64"),
        ((1, 2, 3, 2, False), ValueError, r"learnable_weights must be True, or a tensor \[3\] .*False alone"),
        ((1, 2, 3, 2, 1), TypeError, r"learnable_weights must be True or a tensor \[3\], got 1"),
        ((1, 2, 3, 2, torch.ones(1, 3)), ValueError, r"learnable_weights must have shape .* = \[3\], got \[1, 3\]"),
        (
            (1, 2, 3, 2, torch.tensor([1, -1, 1.0])),
            ValueError,
            r"learnable_weights must not be negative, got \(1.0, -1",
        ),
        ((1, 2, 3, 2, torch.ones(3) / 0), ValueError, "learnable_weights must be finite"),
        ((1, 2, 3, 2, True, "0"), TypeError, "padding_value must be a number or None, got str"),
        ((1, 2, 3, 2, True, None, 0), ValueError, "eps must be positive, got 0"),
    ],
)
def test_constructor_names_what_does_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        FusedMultiHeadGAAM(*arguments)


def test_repr_shows_its_arguments():
    assert repr(FusedMultiHeadGAAM(1, 4, 2, 2, torch.tensor([0.25, 0.75]), normalize="softmax")) == (
        "FusedMultiHeadGAAM(norm_axis=1, num_heads=4, num_gaussians=2, initial_c=2, learnable_weights=(0.25, 0.75), "
        "padding_value=None, eps=1e-08, normalize='softmax')"
    )


@pytest.mark.parametrize("shares", [True, SHARES], ids=["learned", "given"])
def test_forward_passes_mask_residual_and_options(shares):
    module = FusedMultiHeadGAAM(1, 2, 3, 1.5, shares, 7.0, 1e-3, padding_stats="exclude", normalize="softmax").double()
    x = torch.randn(4, 11, dtype=torch.float64)
    x[:, 3] = 7.0
    mask = torch.rand(4, 11) < 0.8
    learned = shares is True
    expected = density_attention(
        x, module.mean_offsets, module.c, density="mixture", weights=module.weights if learned else module.shares,
        weights_softmax=learned, norm_axis=1, padding_value=7.0, mask=mask, padding_stats="exclude",
        normalize="softmax", eps=1e-3, residual=True,
    )  # fmt: skip
    assert torch.equal(module(x, mask=mask, residual=True), expected)


def test_eps_of_each_head():
    module = FusedMultiHeadGAAM(1, 2, 3, eps=[1e-8, 3.0]).double()
    nn.init.normal_(module.weights)
    x, parts = torch.randn(4, 11, dtype=torch.float64), []
    for head, (part, eps) in enumerate(zip(x.split([5, 6], 1), module.eps)):
        row = slice(head, head + 1)
        gaussians = dict(mean_offsets=module.mean_offsets[row], c=module.c[row], weights=module.weights[row])
        parts.append(density_attention(part, **gaussians, density="mixture", eps=eps))
    torch.testing.assert_close(module(x), torch.cat(parts, 1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shares", [True, SHARES], ids=["learned", "given"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied, shares):
    module = FusedMultiHeadGAAM(1, 2, 3, learnable_weights=shares)
    x = torch.randn(3, 9)
    assert torch.equal(copied(module)(x), module(x))


def test_conversion_takes_the_shares_along():
    module = FusedMultiHeadGAAM(1, 2, 3, learnable_weights=SHARES)
    x = torch.randn(3, 9)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        converted = copy.deepcopy(module).to(dtype)
        assert converted.shares.dtype == dtype
        assert converted(x.to(dtype)).dtype == dtype
        torch.testing.assert_close(converted(x.to(dtype)).float(), module(x), rtol=0.1, atol=0.05)


def test_training_changes_every_parameter():
    module = FusedMultiHeadGAAM(1, 2, 3, torch.tensor([1, 2, 3.0]))
    before = [p.detach().clone() for p in module.parameters()]
    module(torch.randn(4, 9)).square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert len(before) == 3 and all(not torch.equal(p, b) for p, b in zip(module.parameters(), before))


@pytest.mark.parametrize("shares", [True, SHARES], ids=["learned", "given"])
def test_compiles_without_graph_breaks(shares):
    module, x = FusedMultiHeadGAAM(1, 2, 3, learnable_weights=shares), torch.randn(3, 9)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-6, atol=1e-7)
    compiled(x).sum().backward()
    torch._dynamo.reset()
