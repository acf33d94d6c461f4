"""What stands beside every number: the processor, threads, versions; nothing that names the machine."""

import platform
from pathlib import Path

import pytest
import torch

from benchmarks import environment
from benchmarks.__main__ import main
from daam_kernels import native

CPU = torch.device("cpu")


def test_processor_threads_versions_and_instruction_set_are_named():
    found = environment.describe(CPU)
    assert found["device"] and found["device"] != platform.node()
    assert (found["threads"], found["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert {"commit", "triton", "upstream", "date"} <= set(found)
    assert found["instruction_set"] == (native.instruction_set() if native.status()[0] else None)


def test_the_processor_is_the_first_that_linux_names(monkeypatch):
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2.0 GHz\n\nprocessor\t: 1\nmodel name\t: Another\n"
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: text)
    assert environment._processor() == "Some CPU @ 2.0 GHz"


def test_the_processor_elsewhere(monkeypatch):
    def missing(self, *_, **__):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert environment._processor() == "arm"
    assert environment._huge_pages() is None and environment.available_memory() is None


@pytest.mark.parametrize("text, expected", [("always [madvise] never\n", "madvise"), ("nothing\n", None)])
def test_huge_pages(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: text)
    assert environment._huge_pages() == expected


def test_settings_that_change_the_numbers_are_named_and_paths_are_not(monkeypatch):
    monkeypatch.setenv("DAAM_KERNELS_HUGE_PAGES", "1")
    assert "DAAM_KERNELS_HUGE_PAGES=1" in environment.describe(CPU)["settings"]
    assert not any("LIBRARY" in name for name in environment._SETTINGS)


def test_nothing_names_the_machine_or_its_folders(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "6.1.2-on-somebodys-machine")
    found = environment.describe(CPU)
    text = " ".join(str(value) for value in found.values())
    assert str(Path.cwd()) not in text and str(Path.home()) not in text
    assert "somebodys" not in text and "6.1.2" in found["platform"]
    assert not platform.node() or platform.node() not in (found["device"], found["platform"])


@pytest.mark.parametrize("family", ["kernels", "host", "verify"])
def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_measured(tmp_path, family):
    (tmp_path / "file").touch()
    options = {"kernels": ["--shapes", "tiny"], "host": ["--cases", "tiny"], "verify": []}[family]
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match=f"--out {folder}: it takes a folder to write to, "):
            main([family, "--device", "cpu", *options, "--out", str(folder)])


def test_a_folder_is_made_whatever_it_is_called(tmp_path):
    folder = tmp_path / "größe 文" / "below"
    assert environment.usable_folder(folder) == folder and folder.is_dir() and not list(folder.iterdir())
