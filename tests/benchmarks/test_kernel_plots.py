"""Pictures are made from the CSV, each where the data for it are there, and the same from the same data."""

from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.environment import describe  # noqa: E402  (after what it may be skipped for)
from benchmarks.kernels.bare import BARE  # noqa: E402
from benchmarks.kernels.cell import new_cell  # noqa: E402
from benchmarks.kernels.contender import BOTH, FORWARD  # noqa: E402
from benchmarks.kernels.contenders import COPY, FUSED, UPSTREAM, all_names  # noqa: E402
from benchmarks.kernels.plots import dots, growth, plot, style  # noqa: E402
from benchmarks.kernels.scaling import GROUPS  # noqa: E402
from benchmarks.kernels.shapes import SHAPES  # noqa: E402
from benchmarks.report import read_csv, write_csv  # noqa: E402

TINY = replace(SHAPES["tiny"], num_gaussians=4)


def csv_of(folder, shapes, dtypes=(torch.float32,), failing=()):
    rows = []
    for dtype in dtypes:
        for shape in shapes:
            for name, time in ((UPSTREAM, 20.0), (f"{FUSED} (native)", 5.0), (COPY, 2.0)):
                for direction in (FORWARD, BOTH):
                    cell = new_cell(shape, dtype, direction, name)
                    cell.wall_us, cell.of_copy, cell.peak_mb = time, 2 / time, 3 * shape.numel * dtype.itemsize / 1e6
                    if name in failing:
                        cell.status, cell.wall_us, cell.of_copy = "failed", None, None
                    rows.append({**asdict(cell), **describe(torch.device("cpu"))})
    write_csv(folder / "kernels-cpu.csv", rows)
    return folder / "kernels-cpu.csv"


def test_one_set_of_pictures_a_type_and_the_same_ones_again(tmp_path):
    shapes = [TINY, replace(GROUPS["size"](False)[0], num_gaussians=4)]  # of which the second is not shown here
    path = csv_of(tmp_path, shapes, (torch.float32, torch.bfloat16), failing=(UPSTREAM,))
    paths = plot(path, tmp_path)
    expected = [f"kernels-cpu-{t}-{p}" for t in ("float32", "bfloat16") for p in ("of-copy", "memory")]
    assert [p.name for p in paths] == [f"{stem}.{form}" for stem in expected for form in ("png", "svg")]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths[::2])
    svg = paths[1].read_text()
    assert (
        svg.startswith("<?xml") and ">upstream eager<" in svg and ">0.40<" in svg and "4×1024" not in svg
    )  # text is text
    dots.fraction_of_copy([row for row in read_csv(path)[:6] if row["shape"] == "tiny"], tmp_path / "again")
    assert (tmp_path / "again-of-copy.svg").read_text() == svg


def test_pictures_of_an_earlier_run_do_not_stay(tmp_path):
    earlier, others = tmp_path / "kernels-cpu-bfloat16-of-copy.png", tmp_path / "kernels-cpu-old-float32-of-copy.png"
    for path in (earlier, others):
        path.touch()
    plot(csv_of(tmp_path, [TINY]), tmp_path)
    assert not earlier.exists() and others.exists()


def test_what_grows_is_drawn_where_it_grows(tmp_path):
    chosen = [*GROUPS["slice"](False)[:2], *GROUPS["inner"](False)[:3:2], GROUPS["size"](False)[0]]
    shapes = [replace(shape, num_gaussians=4) for shape in chosen] + [replace(TINY, num_gaussians=k) for k in (1, 64)]
    rows = read_csv(csv_of(tmp_path, shapes))
    names = [g.name for g, draw in zip(growth._GROWTHS, growth.PICTURES) if draw(rows, tmp_path / "x")]
    assert names == ["slice", "inner", "gaussians"]
    sizes = {g.name: [g.size(row) for row in rows[:: len(rows) // len(shapes)]] for g in growth._GROWTHS}
    assert sizes["slice"][:2] == [8, 32] and sizes["inner"][2:4] == [1, 8] and sizes["gaussians"][-2:] == [1, 64]
    assert sizes["size"][4] == 4 * 4096


def test_a_direction_that_failed_in_all_cases_of_a_set_leaves_its_panel_empty(tmp_path):
    shapes = [replace(TINY, dims=dims, num_gaussians=k) for dims in ((10, 128), (20, 128)) for k in (1, 64)]
    rows = read_csv(csv_of(tmp_path, shapes))
    left = [row for row in rows if row["direction"] == FORWARD or row["dims"] == "10x128"]
    ((png, svg),) = filter(None, (draw(left, tmp_path / "x") for draw in growth.PICTURES))
    assert png.name == "x-gaussians.png" and svg.read_text().count("no times") == 1


def test_a_small_fraction_is_not_called_zero(tmp_path):
    rows = read_csv(csv_of(tmp_path, [TINY]))
    for row in rows:
        row["of_copy"] = "0.0036"
    _, svg = dots.fraction_of_copy(rows, tmp_path / "x")
    assert ">0.004<" in svg.read_text() and ">0.00<" not in svg.read_text()


def test_memory_is_in_sizes_of_x(tmp_path):
    (row, *_) = read_csv(csv_of(tmp_path, [TINY]))
    assert dots._of_x(row, "peak_mb") == pytest.approx(3) and dots._of_x(row, "saved_mb") is None
    row["status"] = "wrong"
    assert dots._of_x(row, "peak_mb") is None and style.time_us(row) is None


def test_contenders_are_told_apart_without_colours_too():
    shown = [
        name for name in all_names() if name in style.LOOKS and "layer by layer" not in name and "cuda" not in name
    ]
    assert len(shown) == 9 and BARE in shown
    assert len({style.LOOKS[name].color for name in shown}) == len({style.LOOKS[name].marker for name in shown}) == 9
