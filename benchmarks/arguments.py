"""Values of command-line options: argparse names the option and says what it got, these say what it takes."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

_SEEDS = range(-(1 << 63), 1 << 64)  # that torch's generators take


def count(text: str) -> int:
    """A whole number from 1."""
    return _checked(text, int, lambda value: value >= 1, "a whole number from 1")


def counts(text: str) -> list[int]:
    """Comma-separated whole numbers from 1, each once."""

    def read(words: str) -> list[int]:
        return list(dict.fromkeys(map(int, words.split(","))))

    return _checked(text, read, lambda values: min(values) >= 1, "comma-separated whole numbers from 1")


def seconds(text: str) -> float:
    """A time from 0, finite."""
    return _checked(text, float, lambda value: value >= 0 and math.isfinite(value), "a finite number from 0")


def seed(text: str) -> int:
    """A whole number that a generator of torch takes."""
    return _checked(text, int, lambda value: value in _SEEDS, "a whole number of 64 bits")


def _checked(text: str, read, fits, takes: str):
    try:
        value = read(text)
        if fits(value):
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not {takes}")
