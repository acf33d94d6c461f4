"""``python -m benchmarks alignment``: the words, the score, and a short run of all of it."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.alignment.cli import score
from benchmarks.alignment.data import LETTERS, load
from benchmarks.alignment.model import Reverser


def test_the_words_are_real_different_and_reversed():
    train, test = load(seed=0)
    assert len(train.texts) > 1000 and not set(train.texts) & set(test.texts)
    assert "module" in train.texts + test.texts and "function" in train.texts + test.texts
    for words in (train, test):
        for index in (0, 5, 9):
            text, size = words.texts[index], words.lengths[index]
            for numbers, expected in ((words.letters, text), (words.reversed, text[::-1])):
                assert "".join(LETTERS[number - 2] for number in numbers[index, :size]) == expected
                assert not numbers[index, size:].any()


def test_the_score_of_a_perfect_and_of_a_known_answer():
    wanted, lengths = torch.tensor([[4, 3, 2], [6, 5, 0]]), torch.tensor([3, 2])
    weights = torch.zeros(2, 3, 3)
    for word, sources in enumerate(([2, 1, 0], [1, 0])):
        for step, source in enumerate(sources):
            weights[word, step, source] = 1
    assert score(wanted, weights, wanted, lengths) == (1.0, 1.0, 1.0)
    written = wanted.clone()
    written[0, 1] = 9
    written[1, 2] = 7  # behind the end
    weights[1, 0] = torch.tensor([1.0, 0, 0])
    assert score(written, weights, wanted, lengths) == pytest.approx((0.5, 0.8, 0.8))


def test_writing_step_by_step_attends_as_training_does():
    torch.manual_seed(0)
    model = Reverser()
    words, _ = load(seed=0)
    letters, lengths = words.letters[:4], words.lengths[:4]
    written, weights = model.write(letters, lengths)
    scores, at_once = model(letters, lengths, written)
    assert torch.equal(scores.argmax(-1), written)
    torch.testing.assert_close(weights, at_once.detach(), rtol=1e-4, atol=1e-6)


def test_a_short_run(tmp_path, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    assert main(["alignment", "--steps", "3", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"alignment.json", "alignment-loss.csv", "alignment.png"}
    found = json.loads((tmp_path / "alignment.json").read_text())
    assert found["steps"] == 3 and 0 <= found["alignments"] <= 1 and "alignments" in capsys.readouterr().out
