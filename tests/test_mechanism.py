"""AttentionMechanism: arrays and tensors in every form, training, files, the picture, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from support import assert_close, generator

from daam_kernels import AttentionMechanism

EXAMPLE = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def bags_of(count, seed=0):
    """(bags, labels, numbers): bags of 2 to 6 rows; the row with the largest first column says what the bag is."""
    rng = np.random.default_rng(seed)
    bags = [rng.normal(size=(rng.integers(2, 7), 3)) for _ in range(count)]
    telling = np.array([bag[bag[:, 0].argmax()] for bag in bags])
    for bag in bags:
        bag[bag[:, 0].argmax(), 0] += 3
    return bags, np.where(telling[:, 1] > 0, "high", "low"), telling[:, 1:] * 100


def test_the_example():
    mechanism = AttentionMechanism(input_dim=3, attention_units=2)
    for inputs in (EXAMPLE, np.array(EXAMPLE)):
        context_vector, attention_weights = mechanism.calculate_attention(inputs)
        assert context_vector.shape == (2, 3) and attention_weights.shape == (2, 3)
        assert isinstance(context_vector, np.ndarray) and context_vector.dtype == np.float64
        np.testing.assert_allclose(attention_weights.sum(1), 1, rtol=1e-12)
        np.testing.assert_allclose(attention_weights @ np.array(EXAMPLE), context_vector, rtol=1e-12)


def test_the_formula():
    mechanism, x = AttentionMechanism(3, 2), np.array(EXAMPLE) / 10
    query, weight, bias = (p.detach().double().numpy() for p in mechanism.pool.parameters())
    scores = np.exp(query @ np.tanh(x @ weight.T + bias).T)
    np.testing.assert_allclose(mechanism.calculate_attention(x)[1], scores / scores.sum(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("units", [1, 2])
def test_forms_of_input_agree(units):
    mechanism = AttentionMechanism(3, units, score="gated")
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    single = [mechanism.calculate_attention(bag) for bag in x]
    context, weights = mechanism.calculate_attention(x)
    listed = mechanism.calculate_attention([x[0], x[1, :2]])
    nested = mechanism.calculate_attention([x[0].tolist(), x[1, :2].tolist()])
    assert context.shape == ((2, 3) if units == 1 else (2, 2, 3)) and weights.shape == (2, units, 4)
    assert context.dtype == weights.dtype == np.float32 and isinstance(listed[1], list)
    for bag in range(2):
        np.testing.assert_allclose(single[bag][0], context[bag], rtol=1e-5)
        np.testing.assert_allclose(single[bag][1], weights[bag], rtol=1e-5)
    np.testing.assert_allclose(listed[0][0], context[0], rtol=1e-5)
    np.testing.assert_allclose(nested[0], listed[0], rtol=1e-5)
    assert listed[1][1].shape == nested[1][1].shape == (units, 2)


def test_tensors_stay_tensors_and_gradients_go_through():
    mechanism, x = AttentionMechanism(3, 2), torch.randn(4, 3, generator=generator(), requires_grad=True)
    context, weights = mechanism.calculate_attention(x)
    gradients = torch.autograd.grad(context.square().sum() + weights[0, 0], (x, *mechanism.pool.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    other = mechanism.calculate_attention([x, x[:2].double()])
    assert_close(other[0][0], context, 1e-6)
    assert mechanism.calculate_attention(torch.tensor(EXAMPLE))[0].dtype == torch.float32


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_fit_learns_which_row_tells(task, tmp_path, capsys):
    bags, labels, numbers = bags_of(150)
    targets = labels if task == "classification" else numbers
    options = dict(task=task, epochs=40, learning_rate=0.03, penalty=0.01)
    mechanism = AttentionMechanism(3, 1).fit(bags[:100], targets[:100], **options)
    assert "epoch" in capsys.readouterr().err and mechanism.losses[-1] < 0.5 * mechanism.losses[0]
    predicted = mechanism.predict(bags[100:])
    if task == "classification":
        assert (predicted == labels[100:]).mean() > 0.85 and mechanism.predict(bags[100]) in ("high", "low")
    else:
        assert np.square(predicted - numbers[100:]).mean() < 0.3 * numbers.var()
    found = [mechanism.calculate_attention(bag)[1].mean(0).argmax() for bag in bags[100:]]
    assert np.mean([i == bag[:, 0].argmax() for i, bag in zip(found, bags[100:])]) > 0.85
    context, weights = mechanism.calculate_attention(bags[0])
    np.testing.assert_allclose(weights[0] @ bags[0], context, rtol=1e-6)

    again = AttentionMechanism(3, 1).fit(bags[:100], targets[:100], progress=False, **options)
    assert again.losses == mechanism.losses
    path = mechanism.save(tmp_path / "mechanism.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["mechanism.npz"]
    with np.load(path) as arrays:
        assert arrays["pool.query"].shape == (1, 16)
    loaded = AttentionMechanism.load(path)
    np.testing.assert_array_equal(loaded.predict(bags[100:]), predicted)
    np.testing.assert_array_equal(loaded.calculate_attention(bags[0])[1], weights)
    assert loaded.losses == mechanism.losses and loaded.task == task


def test_a_file_before_any_fit(tmp_path):
    mechanism = AttentionMechanism(3, 2, score="dot", seed=5)
    loaded = AttentionMechanism.load(mechanism.save(tmp_path / "m.npz"))
    np.testing.assert_array_equal(*(m.calculate_attention(EXAMPLE)[0] for m in (mechanism, loaded)))
    with pytest.raises(RuntimeError, match="predict needs a fit"):
        loaded.predict([EXAMPLE])
    np.savez(tmp_path / "other.npz", a=1)
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "nothing.npz", description="{}")
    np.savez(tmp_path / "list.npz", description="[1]")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.ones(3))
    for name in ("other.npz", "text.npz", "nothing.npz", "list.npz", "array.npz"):
        with pytest.raises(ValueError, match="a file that AttentionMechanism.save wrote"):
            AttentionMechanism.load(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_file_keeps_the_type(tmp_path, dtype):
    bags, classes, _ = bags_of(20)
    mechanism = AttentionMechanism(3, 2).fit(bags, classes, epochs=1, progress=False).to(dtype)
    loaded = AttentionMechanism.load(mechanism.save(tmp_path / "m.npz"))
    for name, t in mechanism.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype and torch.equal(loaded.state_dict()[name], t)
    np.testing.assert_array_equal(loaded.predict(bags), mechanism.predict(bags))


def test_the_picture(tmp_path):
    mechanism = AttentionMechanism(3, 2)
    figure = mechanism.plot(EXAMPLE, tmp_path / "weights.png", row_names=["one", "two", "three"])
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), mechanism.calculate_attention(EXAMPLE)[1])
    assert (tmp_path / "weights.png").stat().st_size > 1000
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["one", "two", "three"]
    with pytest.raises(ValueError, match="inputs must be one input"):
        mechanism.plot([EXAMPLE, EXAMPLE])


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ([[1, 2]], ValueError, r"inputs must have at least one row, of input_dim=3 numbers each, got shape \[1, 2\]"),
        (np.zeros((0, 3)), ValueError, "inputs must have at least one row"),
        (np.zeros((2, 0, 3)), ValueError, r"inputs must have at least one row, .* got shape \[2, 0, 3\]"),
        (np.zeros((0, 2, 3)), ValueError, "inputs must hold at least one input, got none"),
        ([1, 2, 3], ValueError, r"inputs must be \[rows, input_dim=3\], .* got shape \[3\]"),
        (torch.ones(2, 3).to_sparse(), TypeError, "inputs must be one dense tensor"),
        ([torch.ones(2, 3).to_sparse()], TypeError, r"inputs\[0\] must be one dense tensor"),
        (torch.nested.nested_tensor([torch.ones(2, 3)]), TypeError, "inputs must be one dense tensor, got a nested"),
        ([[1, 2, 3], [4, 5]], ValueError, "inputs must be a rectangle of numbers, got rows of different lengths"),
        ([EXAMPLE, [[1, 2]]], ValueError, r"inputs\[1\] must have at least one row, .* got shape \[1, 2\]"),
        ([["a", "b", "c"]], TypeError, "inputs must hold real numbers, got <U1"),
        (np.ones((2, 3), complex), TypeError, "inputs must hold real numbers, got complex128"),
        ([torch.ones(2, 3), EXAMPLE], TypeError, r"inputs\[1\] must be a tensor like the others, got list"),
    ],
)
def test_bad_inputs_are_named(inputs, error, message):
    with pytest.raises(error, match=message):
        AttentionMechanism(3, 2).calculate_attention(inputs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(targets=[1]), r"targets must have shape \[inputs\] for 2 inputs, got \[1\]"),
        (dict(targets=[[1], [1, 2]]), "targets must be a rectangle of numbers, got rows of different lengths"),
        (dict(inputs=EXAMPLE), "inputs must be a batch or a list of inputs, got one of shape"),
        (dict(task="ranking"), "task must be one of classification, regression, got 'ranking'"),
        (dict(epochs=0), "epochs must be an int of at least 1, got 0"),
        (dict(learning_rate=-1), "learning_rate must not be negative, got -1"),
        (dict(seed=-1), "seed must be an int of at least 0, got -1"),
    ],
)
def test_bad_arguments_of_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionMechanism(3, 2).fit(**{"inputs": [EXAMPLE, EXAMPLE], "targets": [0, 1], **arguments})


def test_targets_of_bfloat16_are_numbers_like_others():
    targets = torch.tensor([1, 2], dtype=torch.bfloat16)
    fitted = [AttentionMechanism(3, 2).fit([EXAMPLE, EXAMPLE[:2]], t, task="regression", epochs=2, progress=False)
              for t in (targets, targets.float())]  # fmt: skip
    assert fitted[0].losses == fitted[1].losses


def test_without_numpy_tensors_work_and_arrays_say_what_is_missing():
    code = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")
import torch
from daam_kernels import AttentionMechanism
mechanism = AttentionMechanism(3, 2)
assert mechanism.calculate_attention(torch.ones(4, 3))[1].shape == (2, 4)
try:
    mechanism.calculate_attention([[1, 2, 3]])
except ImportError as error:
    assert "calculate_attention needs NumPy" in str(error) and "pip install numpy" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
