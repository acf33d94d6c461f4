"""explain.plot_alignment: the picture of which source token each target token was made from."""

import numpy as np
import pytest
import torch
from daam_kernels import explain

pytest.importorskip("matplotlib")


def test_rows_are_targets_and_columns_are_sources(tmp_path):
    weights = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]], requires_grad=True)
    path = tmp_path / "alignment.png"
    figure = explain.plot_alignment(weights, ["the", "black", "cat"], "ab", path, title="A title")
    axes = figure.axes[0]
    (image,) = axes.get_images()
    assert np.array_equal(image.get_array(), weights.detach().numpy())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["the", "black", "cat"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.yaxis_inverted() and axes.get_xlabel() == "source" and axes.get_ylabel() == "target"
    assert figure.get_suptitle() == "A title"
    assert path.read_bytes().startswith(b"\x89PNG") and [*tmp_path.iterdir()] == [path]


def test_long_sequences_have_fewer_labels():
    figure = explain.plot_alignment(np.ones((400, 90)), ["word"] * 90, ["word"] * 400)
    axes = figure.axes[0]
    assert len(axes.get_xticks()) <= 60 and len(axes.get_yticks()) <= 60


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(2, 3), "ab", "xyz"), ValueError, r"weights must have shape .*=3, .*=2\], got \[2, 3\]"),
        ((torch.ones(1, 2, 3), "abc", "xy"), ValueError, r"weights must have shape .* got \[1, 2, 3\]"),
        (("no", "abc", "xy"), TypeError, "weights must be a tensor .* got str"),
        ((torch.ones(2, 0), "", "xy"), ValueError, "source must have at least 1 token"),
        ((torch.ones(2, 3), 3, "xy"), TypeError, "source must be a sequence of tokens, got int"),
        ((torch.ones(2, 3), "abc", "xy", "picture.pdf"), ValueError, "path must end in .png or .svg"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        explain.plot_alignment(*arguments)
