"""Tuned tiles: kept whole, used where they fit, ignored where not, and as right as the ladder's."""

import json
import logging
import threading
from dataclasses import replace
from types import SimpleNamespace

import daam_kernels
import pytest
import torch
from daam_kernels import env
from daam_kernels.kernels import tuning
from daam_kernels.kernels.tiling import Choice, cut, density_problem, fault, ladder
from daam_kernels.slices import SliceView
from support import assert_contract, evaluate, gaussians, generator, truth

DEVICE = tuning.Device("Some GPU", "9.0")
VIEW = SliceView(8, 256, 64, ((256 * 64, 64, 1),) * 2)
PROBLEM = density_problem(VIEW, 4, 4, False)
CHOICE = Choice(32, 32, 4, 128)


@pytest.fixture(autouse=True)
def kept_here(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    tuning._read_once.cache_clear()
    yield tmp_path
    tuning._read_once.cache_clear()


def test_what_is_stored_is_read_and_can_be_taken_away():
    other = replace(PROBLEM, outer=9)
    path = tuning.store(DEVICE, {PROBLEM: CHOICE})
    assert path == tuning.path_of(DEVICE) and tuning.read(path, DEVICE) == ({PROBLEM: CHOICE}, "")
    tuning.store(DEVICE, {other: CHOICE})
    assert tuning.read(path, DEVICE).choices == {PROBLEM: CHOICE, other: CHOICE}
    tuning.store(DEVICE, {PROBLEM: None})
    assert tuning.read(path, DEVICE).choices == {other: CHOICE}


def test_the_folder(monkeypatch, tmp_path):
    assert tuning.folder() == tmp_path
    monkeypatch.delenv(tuning.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert tuning.folder() == tmp_path / "caches" / "daam_kernels"
    assert tuning.path_of(DEVICE).name == "tuned-some-gpu-9-0.json"


@pytest.mark.parametrize("field", ["format", "kernels", "triton", "name", "capability"])
def test_what_was_measured_with_something_else_is_ignored(field):
    path = tuning.store(DEVICE, {PROBLEM: CHOICE})
    content = json.loads(path.read_text())
    content["version"][field] = "another"
    path.write_text(json.dumps(content))
    assert tuning.read(path, DEVICE) == ({}, f"it was measured with another {field}")


BROKEN = ["", "{", "[]", "null", '{"version": {}}', '{"version": 1, "tiles": 2}', "\0" * 9, "[" * 200_000]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:9])
def test_a_broken_file_is_ignored_with_one_line_and_replaced(text, caplog, monkeypatch):
    path = tuning.path_of(DEVICE)
    path.write_text(text)
    monkeypatch.setattr(tuning, "model_of", lambda device: DEVICE)
    with caplog.at_level(logging.DEBUG, "daam_kernels"):
        assert [dict(tuning.tuned_choices(torch.device("cpu"))) for _ in range(3)] == [{}] * 3
    assert len(caplog.records) == 1 and str(path) in caplog.text
    tuning.store(DEVICE, {PROBLEM: CHOICE})
    assert tuning.read(path, DEVICE).choices == {PROBLEM: CHOICE}


@pytest.mark.parametrize("entry", [{}, {"problem": {}, "choice": {}}, 3, None, {"problem": 1, "choice": 2}])
def test_an_entry_of_another_form_is_a_broken_file(entry):
    path = tuning.store(DEVICE, {PROBLEM: CHOICE})
    content = json.loads(path.read_text())
    content["tiles"].append(entry)
    path.write_text(json.dumps(content))
    choices, reason = tuning.read(path, DEVICE)
    assert not choices and "cannot be read" in reason


INVALID = {
    "block_r must be a power of two, got 48": dict(block_r=48),
    "block_r must be a power of two, got '32'": dict(block_r="32"),
    "block_s must be a power of two, got 0": dict(block_s=0),
    "block_s must be a power of two, got 32.0": dict(block_s=32.0),
    "num_warps must be a power of two, got True": dict(num_warps=True),
    "num_warps must be at most 16, got 32": dict(num_warps=32),
    "registers of 4 warps must be 32 to 255, got 256": dict(registers=256),
    "registers of 16 warps must be 32 to 128, got 255": dict(num_warps=16, registers=255),
    "registers of 4 warps must be 32 to 255, got None": dict(registers=None),
    "a tile of 128 by 32 is larger than 64 by 64, which hold all": dict(block_r=128),
    "block_s must be at least 16, got 8": dict(block_s=8),
    "8 warps are more threads than 8 by 16 elements": dict(block_r=8, block_s=16, num_warps=8),
}


@pytest.mark.parametrize("reason", INVALID)
def test_a_tile_that_must_not_be_launched_is_left_out(reason):
    invalid = replace(CHOICE, **INVALID[reason])
    assert fault(PROBLEM, invalid) == reason and not fault(PROBLEM, CHOICE)
    path = tuning.store(DEVICE, {replace(PROBLEM, outer=9): CHOICE, PROBLEM: invalid})
    choices, why = tuning.read(path, DEVICE)
    assert list(choices) == [replace(PROBLEM, outer=9)]
    assert why == f"1 of 2 tiles do not fit, such as: {reason}"


def test_tiles_of_long_slices_and_of_blocks_have_limits_of_their_own():
    long = density_problem(SliceView(1, 1 << 20, 1 << 12, ((1 << 32, 1 << 12, 1),) * 2), 1, 4, False)
    assert "block_s of split slices must be at most 2048, got 4096" == fault(long, Choice(1, 4096, 8, 255))
    assert "at most 16384 elements" in fault(long, Choice(32, 1024, 8, 255))
    block = density_problem(VIEW, 4, 4, False, num_layers=3)
    assert "a block must not be split: block_r must be 64, got 32" == fault(block, CHOICE)


def test_two_who_write_at_once_lose_nothing_and_readers_see_whole_files():
    problems = [replace(PROBLEM, outer=n) for n in range(16)]

    def write(mine):
        for problem in mine:
            tuning.store(DEVICE, {problem: CHOICE})

    writers = [threading.Thread(target=write, args=(problems[i::2],)) for i in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        _, reason = tuning.read(tuning.path_of(DEVICE), DEVICE)
        assert reason in ("", "there is no such file")
    assert set(tuning.read(tuning.path_of(DEVICE), DEVICE).choices) == set(problems)
    assert not list(tuning.folder().glob("*.part"))


def test_a_failed_write_leaves_the_file_as_it_was(monkeypatch):
    path = tuning.store(DEVICE, {PROBLEM: CHOICE})
    before = path.read_text()

    def full(*arguments):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        tuning.store(DEVICE, {PROBLEM: None})
    assert path.read_text() == before and not list(tuning.folder().glob("*.part"))


def inputs(dtype):
    rng = generator(3)
    x, grad = (torch.randn((1, 128, 64), generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, grad, gaussians(2, 3, rng, offsets=0.05)


class Asked(dict):
    """Tiles with another number of rows, slices and warps than the ladder's for whoever asks, and who asked."""

    def get(self, problem, default=None):
        self[problem] = Choice(32 if problem.backward else 64, 32, 1, 255)  # split, resident
        assert not fault(problem, self[problem]) and self[problem] != ladder(problem)
        return self[problem]


interpreted = pytest.mark.skipif(
    not daam_kernels.available_backends()["triton"] or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


@pytest.mark.skipif(torch.version.hip is not None, reason="of AMD's it is the name")
def test_a_gpu_is_known_by_its_name_and_capability(monkeypatch):
    """Whose property for the name of an architecture is the device's name once more."""
    found = SimpleNamespace(name="Some GPU", major=9, minor=0, gcnArchName="Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    assert tuning._gpu_model.__wrapped__(0) == DEVICE


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_tiles_keep_the_contract(dtype, launched):
    x, grad, parameters = inputs(dtype)
    with tuning.replaced(Asked()):
        got = evaluate("triton", x, *parameters, grad, norm_axis=1)
    assert_contract(got, truth(x, *parameters, grad, norm_axis=1), dtype)
    assert launched == ["forward_resident", "split_sums", "split_gradient", "parameter_gradients"]


@interpreted
def test_a_stored_tile_is_launched_unless_it_is_switched_off(monkeypatch):
    from daam_kernels.kernels import density_forward
    from daam_kernels.kernels.remembered import forget_launches

    x, _, parameters = inputs(torch.float32)
    device, asked, tiles, reads = tuning.model_of(x.device), Asked(), [], []
    with tuning.replaced(asked):
        daam_kernels.density_attention(x, *parameters, norm_axis=1, backend="triton")
    tuning.store(device, asked)

    def recorded(kernel, launch, *arguments):
        tiles.append(launch.tile)

    read = tuning.read
    monkeypatch.setattr(density_forward, "run", recorded)
    monkeypatch.setattr(tuning, "read", lambda *arguments: reads.append(arguments) or read(*arguments))
    for setting in ("", "0"):
        monkeypatch.setenv(tuning.SWITCH, setting)
        forget_launches()
        for _ in range(2):
            daam_kernels.density_attention(x, *parameters, norm_axis=1, backend="triton")
    forget_launches()
    ((problem, choice),) = asked.items()
    assert tiles[:2] == [cut(problem, choice)] * 2 and tiles[2:] == [cut(problem, ladder(problem))] * 2
    assert len(reads) == 1


def test_the_page_of_the_environment_names_the_file_and_whether_it_is_used(monkeypatch):
    monkeypatch.setattr(tuning, "model_of", lambda device: DEVICE)
    path = tuning.store(DEVICE, {PROBLEM: CHOICE})
    assert f"{path}, 1 used" in env.report()
    monkeypatch.setenv(tuning.SWITCH, "0")
    assert f"{path}, not used: DAAM_KERNELS_TUNED is 0" in env.report()
    path.unlink()
    monkeypatch.delenv(tuning.SWITCH)
    assert f"{path}, 0 used (there is no such file)" in env.report()
