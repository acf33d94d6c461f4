"""``python -m benchmarks bags`` on made-up images in the place of scikit-learn's, which need not be installed."""

import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from support import assert_close, generator

from benchmarks.__main__ import main
from benchmarks.bags.cli import score
from benchmarks.bags.data import Bags, load
from benchmarks.bags.model import POOLINGS, BagClassifier


@pytest.fixture
def digits(monkeypatch):
    """A bright row of pixels for each digit, and noise."""
    numbers = torch.arange(200) % 10
    images = 4 * torch.rand(200, 64, generator=generator()).double()
    for image, number in zip(images, numbers.tolist()):
        image[6 * number : 6 * number + 6] += 10
    found = types.SimpleNamespace(data=images.numpy(), target=numbers.numpy())
    for name in ("sklearn", "sklearn.datasets"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.load_digits = lambda: found
        monkeypatch.setitem(sys.modules, name, module)


def test_bags_are_what_they_say_and_training_has_no_image_of_the_test(digits):
    train, test = load(20, seed=0)
    for bags in (train, test):
        bounds = bags.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(bags.digits) == len(bags.images)
        for bag, (begin, end) in enumerate(zip(bounds, bounds[1:])):
            assert 5 <= end - begin <= 40 and bags.positive[bag] == (9 in bags.digits[begin:end].tolist())
    seen = {tuple(image.tolist()) for image in train.images}
    assert not any(tuple(image.tolist()) in seen for image in test.images)
    some = train.some(torch.tensor([3, 0]))
    bounds = train.cu_seqlens.tolist()
    assert_close(some.images, torch.cat([train.images[bounds[3] : bounds[4]], train.images[: bounds[1]]]), 0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_of_packed_bags_is_that_of_each(pooling):
    torch.manual_seed(0)
    model, images = BagClassifier(pooling), torch.rand(7, 64)
    logits, weights = model(images, torch.tensor([0, 3, 7]))
    alone = [model(part, torch.tensor([0, len(part)]))[0] for part in images.split([3, 4])]
    assert_close(logits, torch.cat(alone), 1e-5)
    assert (weights is not None) == (pooling == "attention") and (weights is None or weights.shape == (7,))


def test_the_score_of_a_known_answer():
    bags = Bags(torch.zeros(5, 64), torch.tensor([9, 1, 2, 9, 3]), torch.tensor([0, 2, 5]), torch.ones(2))
    answer = torch.tensor([1.0, -1.0]), torch.tensor([0.9, 0.1, 0.5, 0.3, 0.2])
    assert score(lambda images, cu_seqlens: answer, bags) == (0.5, 0.5)


def test_a_short_run(digits, tmp_path, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    assert main(["bags", "--bags", "60", "--epochs", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bags.json", "bags-losses.csv", "bags.png"}
    rows = json.loads((tmp_path / "bags.json").read_text())["rows"]
    assert [row["pooling"] for row in rows] == list(POOLINGS) and "nines found" in capsys.readouterr().out
