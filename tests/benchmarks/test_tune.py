"""``python -m benchmarks tune``: what is wrong or fails is not timed, only what beats the noise is kept."""

import re

import pytest
import torch

import daam_kernels
from benchmarks.__main__ import main
from benchmarks.kernels.check import truth
from benchmarks.kernels.contenders import FUSED, contenders
from benchmarks.kernels.data import make_case
from benchmarks.kernels.shapes import Shape
from benchmarks.timing import Measurement
from benchmarks.tune import search
from benchmarks.tune.candidates import neighbours
from daam_kernels.kernels import tiling, tuning

interpreted = pytest.mark.skipif(
    not daam_kernels.available_backends()["triton"] or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
LIMITS = search.Limits(budget=0.0, rounds=2)


@pytest.fixture(autouse=True)
def kept_here(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.setenv("DAAM_KERNELS_BACKEND", "triton")


def case():
    return make_case(Shape("small", (1, 12, 64), 1, 2), torch.float32, torch.device("cpu"), 3)


def test_candidates_are_one_step_away():
    problem = tiling.Problem("product", 8, 2048, 512, False, True, 4, 8, 4, True, False, 1, 0)
    ladder = tiling.ladder(problem)
    found = neighbours(problem, ladder)
    assert len(found) == len(set(found)) >= 5 and ladder not in found
    for c in found:
        assert not tiling.fault(problem, c)
        for name in ("block_r", "block_s", "num_warps"):
            assert getattr(c, name) / getattr(ladder, name) in (0.5, 1, 2)
        most = tiling.most_registers(c.num_warps)
        assert c.registers in (most, min(ladder.registers, most), ladder.registers // 2)


@interpreted
@pytest.mark.parametrize("backward", [False, True])
def test_the_fastest_is_found_and_faulty_ones_are_not_timed(monkeypatch, backward):
    """Times are made up: the fewer warps the faster, and one step further is wrong."""
    this = case()
    contender, true = contenders(this)[FUSED](), truth(this)
    (problem,) = search.problems(this, contender, backward)
    assert problem.backward == backward and problem.length == 12
    ladder = tiling.ladder(problem)
    monkeypatch.setattr(
        search, "neighbours", lambda problem, c: [tiling.Choice(c.block_r, c.block_s, n, 64) for n in (1, 16)]
    )
    complaint = search.complaint

    def sixteen_are_wrong(contender, found):
        warps = tuning.tuned_choices(this.x.device)[problem].num_warps
        assert complaint(contender, found) is None
        return "error of y is 1" if warps == 16 else None

    monkeypatch.setattr(search, "complaint", sixteen_are_wrong)
    monkeypatch.setattr(search, "interleave", lambda timers, budget: {
        name: Measurement(1.0 + index if name == "ladder" else 1.0 / (1 + index), 0.1, 0.1, 9)
        for index, name in enumerate(timers)
    })  # fmt: skip
    *rounds, found = search.search(this, contender, true, problem, {}, 132, LIMITS)
    assert rounds == [None, None] and found.problem == problem and found.ladder == ladder
    assert found.tuned == found.choice == tiling.Choice(ladder.block_r, ladder.block_s, 1, 64)
    assert found.tried == 3 and [re.sub(r"^.*: ", "", why) for why in found.rejected] == ["error of y is 1"]


@pytest.mark.parametrize("best, ladder, expected", [
    (Measurement(0.9, 0.1, 0, 9), Measurement(1.0, 0.1, 0, 9), True),
    (Measurement(0.9, 0.3, 0, 9), Measurement(1.0, 0.1, 0, 9), False),
    (Measurement(0.9, 0.1, 0, 9), Measurement(1.0, 0.3, 0, 9), False),
    (Measurement(0.995, 0.0, 0, 9), Measurement(1.0, 0.0, 0, 9), False),
])  # fmt: skip
def test_only_what_is_faster_beyond_the_noise_is_kept(best, ladder, expected):
    assert search._beats(best, ladder) == expected


@interpreted
def test_a_dry_run_stores_what_it_found(monkeypatch, capsys):
    monkeypatch.setattr(search, "_beats", lambda best, ladder: True)
    monkeypatch.setattr(search, "_fastest", lambda measured: list(measured)[-1])
    arguments = [
        "--device",
        "cpu",
        "--shapes",
        "1x8x32:1:2",
        "--direction",
        "fwd",
        "--rounds",
        "1",
        "--budget",
        "0",
    ]
    assert main(["tune", *arguments]) == 0
    model = tuning.model_of(torch.device("cpu"))
    path = tuning.path_of(model)
    ((problem, choice),) = tuning.read(path, model).choices.items()
    assert (problem.length, problem.inner, problem.backward) == (8, 32, False) and choice != tiling.ladder(problem)
    printed = capsys.readouterr().out
    assert f"kept in {path}" in printed and re.search(r"1x8x32:1:2 +float32 +forward .*block_r=", printed)


UNKNOWN = {
    "unknown shape '1x8'": ("--shapes", "1x8"),
    "unknown shape '1x8:a:1'": ("--shapes", "1x8:a:1"),
    "unknown shape '8x8:5:1': AXIS is that of a size": ("--shapes", "8x8:5:1"),
    "unknown shape '8x8:1:9': AXIS": ("--shapes", "8x8:1:9"),
    "unknown shape '0x8:1:1': AXIS": ("--shapes", "0x8:1:1"),
    "unknown operator 'block'": ("--shapes", "8x8:1:2:block"),
    "unknown type 'int8'": ("--dtype", "int8"),
    "unknown direction 'up'": ("--direction", "fwd,up"),
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_what_it_does_not_know_is_told(monkeypatch, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match=message):
        main(["tune", "--device", "cpu", *UNKNOWN[message]])


def test_a_folder_that_nothing_can_be_kept_in_is_told_before_the_search(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "file").touch()
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "file"))
    with pytest.raises(SystemExit, match=f"DAAM_KERNELS_CACHE {tmp_path / 'file'}: it takes a folder to write to"):
        main(["tune", "--device", "cpu", "--shapes", "tiny"])


def test_nothing_is_said_to_be_kept_where_the_search_failed(monkeypatch, capsys):
    def failing(*arguments):
        raise MemoryError("none left")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("benchmarks.tune.cli.make_case", failing)
    assert main(["tune", "--device", "cpu", "--shapes", "tiny"]) == 1
    assert "kept in" not in capsys.readouterr().out
