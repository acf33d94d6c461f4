"""explain.plot_alignment: the picture of which source token each target token was made from."""

import numpy as np
import pytest
import torch
from daam_kernels import AttentionMechanism, explain
from daam_kernels.explain import alignment

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


def test_names_are_shown_as_they_are(tmp_path):
    names = ["$5-$6", r"$\notacommand$", "a_b^c"]
    weights, path = torch.rand(3, 3), tmp_path / "picture.svg"
    figures = [
        explain.plot_alignment(weights, names, names, path),
        explain.plot_importance(weights, path, layer_names=names),
        explain.plot_layer_contribution(weights, path, layer_names=names),
        AttentionMechanism(3, 1).plot(weights, path, row_names=names),
    ]
    for figure in figures:
        axes = figure.axes[0]
        found = [[label for label in labels if label.get_text() in names]
                 for labels in (axes.get_xticklabels(), axes.get_yticklabels())]  # fmt: skip
        assert any([label.get_text() for label in labels] == names for labels in found)
        assert not any(label.get_parse_math() for labels in found for label in labels)


def test_long_sequences_have_fewer_labels():
    figure = explain.plot_alignment(np.ones((400, 90)), ["word"] * 90, ["word"] * 400)
    axes = figure.axes[0]
    assert len(axes.get_xticks()) <= 60 and len(axes.get_yticks()) <= 60


def test_rows_as_they_come_and_many_tokens_in_a_cell(monkeypatch):
    monkeypatch.setattr(alignment, "_MOST_CELLS", 3)
    weights = torch.arange(35.0).view(5, 7)
    figures = [explain.plot_alignment(given, "a" * 7, "b" * 5) for given in (weights, iter(weights.split(2)))]
    for figure in figures:
        (image,) = figure.axes[0].get_images()
        assert image.get_array().tolist() == [[9, 12, 13], [23, 26, 27], [30, 33, 34]]  # three columns, two rows each
        assert image.get_extent() == [-0.5, 8.5, 5.5, -0.5]
        assert figure.axes[0].get_xlim() == (-0.5, 6.5) and figure.axes[0].get_ylim() == (4.5, -0.5)
    with pytest.raises(ValueError, match=r"weights must have len\(target\)=5 rows, got 4 in all"):
        explain.plot_alignment(iter(weights[:4].split(2)), "a" * 7, "b" * 5)
    with pytest.raises(ValueError, match=r"got \[3, 7\] after 3 rows"):
        explain.plot_alignment(iter((weights[:3], weights[:3])), "a" * 7, "b" * 5)


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
