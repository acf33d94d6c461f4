"""Values that an option does not take are answered with the option, what it got and what it takes."""

import pytest

from benchmarks import arguments
from benchmarks.__main__ import main


def test_what_is_taken():
    assert arguments.count("3") == 3 and arguments.counts("1,8,1") == [1, 8]
    assert (arguments.seconds("0"), arguments.seconds("1e-9")) == (0.0, 1e-9)
    assert (arguments.seed("-1"), arguments.seed(str((1 << 64) - 1))) == (-1, (1 << 64) - 1)


REFUSED = {
    "kernels --threads 0": "'0' is not a whole number from 1",
    "kernels --threads -3": "'-3' is not a whole number from 1",
    "kernels --num-gaussians 1,-2": "'1,-2' is not comma-separated whole numbers from 1",
    "kernels --num-gaussians 0": "'0' is not comma-separated whole numbers from 1",
    "kernels --num-heads x": "'x' is not comma-separated whole numbers from 1",
    "kernels --num-heads ": "'' is not comma-separated whole numbers from 1",
    "kernels --budget nan": "'nan' is not a finite number from 0",
    "kernels --budget -1": "'-1' is not a finite number from 0",
    "kernels --call-limit inf": "'inf' is not a finite number from 0",
    "kernels --seed 99999999999999999999": "'99999999999999999999' is not a whole number of 64 bits",
    "host --threads 0": "'0' is not a whole number from 1",
    "host --budget nan": "'nan' is not a finite number from 0",
    "host --backend nothing": "invalid choice: 'nothing'",
    "tune --rounds 0": "'0' is not a whole number from 1",
    "tune --num-gaussians 0": "'0' is not a whole number from 1",
    "tune --budget nan": "'nan' is not a finite number from 0",
    "verify --limit nan": "'nan' is not a finite number from 0",
    "verify --cores 0": "'0' is not a whole number from 1",
    "additive --limit -1": "'-1' is not a finite number from 0",
    "pool --threads 0": "'0' is not a whole number from 1",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_taken_is_told(words, capsys):
    family, option, value = words.split(" ")
    with pytest.raises(SystemExit) as caught:
        main([family, option, value])
    assert caught.value.code == 2
    assert f"argument {option}: {REFUSED[words]}" in capsys.readouterr().err


@pytest.mark.parametrize("option, what", [("shapes", "shape"), ("dtype", "dtype"), ("contenders", "contender")])
def test_an_empty_word_is_not_the_default(option, what):
    with pytest.raises(SystemExit, match=f"unknown {what} ''"):
        main(["kernels", "--device", "cpu", f"--{option}", ""])
