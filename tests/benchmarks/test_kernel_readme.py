"""README.md says what the committed results say, and nothing by hand."""

import json

import pytest

from benchmarks.kernels import readme
from benchmarks.kernels.contenders import COPY, FUSED, UPSTREAM
from benchmarks.report import read_csv, write_json

HERE = pytest.mark.skipif(not readme.RESULTS.exists(), reason="a source distribution has no results")


@HERE
def test_readme_has_what_the_committed_results_give():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.replaced(text, readme.section(readme.RESULTS)) == text, "run: python -m benchmarks readme"


@HERE
def test_csv_and_pictures_are_of_the_same_run_as_the_json():
    for path in readme.RESULTS.glob("kernels-*.json"):
        results = json.loads(path.read_text())
        commit = results["environment"]["commit"]
        rows = read_csv(path.with_suffix(".csv"))
        assert {row["commit"] for row in rows} == {commit}
        for a, b in zip(rows, results["rows"], strict=True):
            assert {name: a[name] for name in b} == {n: "" if v is None else str(v) for n, v in b.items()}
        for dtype in {row["dtype"] for row in rows}:
            stem = path.with_name(f"{path.stem}-{dtype}-of-copy")
            assert stem.with_suffix(".png").exists() and f"commit {commit}" in stem.with_suffix(".svg").read_text()


def results(folder, name, rows, **environment):
    told = {"device": "D", "threads": 2, "instruction_set": "avx2", "torch": "2.11", "commit": "c0ffee", "cuda": None}
    case = dict(dims="8x24x1024", operator="product", norm_axis=1, num_heads=8, layers=1, num_gaussians=4, note=None)
    rows = [{**case, "dtype": "float32", "status": "ok", "kernel_us": None, **row} for row in rows]
    write_json(folder / name, {"environment": {**told, "date": "2026-01-02T03", **environment}, "rows": rows})


def row(contender, direction, us, **others):
    return {"shape": "wavlm", "contender": contender, "direction": direction, "wall_us": us, **others}


def test_the_table_has_measured_cells_alone(tmp_path):
    rows = [row(UPSTREAM, "forward", 20400.0), row(f"{FUSED} (native)", "forward", 994.0), row(COPY, "forward", 61.0)]
    rows += [row(f"{FUSED} (native)", "forward+backward", 9949.0), row(COPY, "forward+backward", 5.0, status="wrong")]
    rows += [row(COPY, "forward", 1.0, num_gaussians=64), row(COPY, "forward", 1.0, shape="tiny")]  # are not shown
    results(tmp_path, "kernels-cpu.json", rows)
    text = readme.section(tmp_path)
    assert "On D with 2 threads (AVX2), float32, K = 4, milliseconds" in text and "commit c0ffee, 2026-01-02" in text
    assert "\n| shape, heads | public package | `density_attention` | a copy |\n|---|---|---|---|\n" in text
    assert "\n| WavLM [8, 24, 1024], axis 1, 8 | 20 / – | 0.99 / 9.9 | 0.06 / – |\n\n" in text
    assert "results/kernels-cpu-float32-of-copy.png" in text and text.endswith("device cuda` makes them.\n\n")


def test_a_gpu_comes_first_with_its_device_time(tmp_path):
    results(tmp_path, "kernels-cpu.json", [row(COPY, "forward", 61.0)])
    results(tmp_path, "kernels-cuda.json", [row(COPY, "forward", 61.0, kernel_us=3.21)], cuda="13.0", device="G")
    text = readme.section(tmp_path)
    assert text.index("On G, float32, K = 4, microseconds on the device") < text.index("On D with 2 threads")
    assert "| 3.2 / – |" in text and "No number from a GPU" not in text


@pytest.mark.parametrize("text", ["", readme.BEGIN, f"{readme.END}\n{readme.BEGIN}", readme.BEGIN * 2 + readme.END])
def test_marks_are_needed(text):
    with pytest.raises(ValueError, match="README.md needs the lines <!-- made by"):
        readme.replaced(text, "")
