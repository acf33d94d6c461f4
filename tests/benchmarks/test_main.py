"""The command line as a whole: what is missing or interrupts it is told in a line, and nothing measured is lost."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import _FAMILIES, main

REPOSITORY = Path(__file__).resolve().parents[2]


def kernels(folder):
    return ["kernels", "--device", "cpu", "--contenders", "copy", "--direction", "fwd", "--out", str(folder)]


@pytest.mark.parametrize("missing", ["matplotlib", "tqdm"])
def test_a_missing_extra_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys, missing):
    for name in [name for name in sys.modules if name.startswith("benchmarks.kernels.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main([*kernels(tmp_path), "--shapes", "tiny", "--budget", "0"]) == 1
    assert f"{missing} is not installed; in the repository root: pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_whatever_is_interrupted_ends_with_a_word(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_FAMILIES["host"], "run", interrupted)
    assert main(["host"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_is_told_in_a_line_and_other_errors_as_ever(monkeypatch, capsys):
    def full(options):
        raise OSError(errno.ENOSPC, "No space left on device", *named)

    monkeypatch.setattr(_FAMILIES["host"], "run", full)
    named = ["out/host-cpu.json"]
    assert main(["host"]) == 1 and capsys.readouterr().err == "out/host-cpu.json: No space left on device\n"
    named = []
    with pytest.raises(OSError, match="No space"):
        main(["host"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_sweep_on_a_full_disk_ends_with_a_line(tmp_path, monkeypatch, capsys):
    def part_on_a_full_disk(path, text, **options):
        with open("/dev/full", "w") as file:
            file.write(text)

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Path, "write_text", part_on_a_full_disk)
    assert main([*kernels(tmp_path), "--shapes", "tiny", "--budget", "0"]) == 1
    assert f"{tmp_path / 'kernels-cpu.json'}: No space left on device\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_a_sweep_that_is_terminated_says_how_to_go_on(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    command = [sys.executable, "-m", "benchmarks", *kernels(tmp_path), "--shapes", "tiny,wavlm", "--budget", "2"]
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sweep:
        deadline = time.monotonic() + 60
        while not (tmp_path / "kernels-cpu.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        sweep.send_signal(signal.SIGTERM)
        printed, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130 and "interrupted; with --resume the same command goes on" in printed
    assert {row["shape"] for row in json.loads((tmp_path / "kernels-cpu.json").read_text())["rows"]} == {"tiny"}
