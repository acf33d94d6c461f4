"""The page stands by itself and says what failed and why; goals are judged where the rows say something about them."""

import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.environment import describe
from benchmarks.kernels.bare import BARE
from benchmarks.kernels.cell import new_cell
from benchmarks.kernels.contender import BACKWARD, BOTH, FORWARD
from benchmarks.kernels.contenders import CLOSED_FORM_COMPILED, COPY, FUSED, LAYER_NORM, UPSTREAM, UPSTREAM_COMPILED
from benchmarks.kernels.goals import judge
from benchmarks.kernels.page import write_page
from benchmarks.kernels.scaling import GROUPS
from benchmarks.kernels.shapes import SHAPES
from benchmarks.report import write_json

GPU, CPU = {"cuda": "13.0", "l2_mb": 50.0}, {"cuda": None}
BY_NAME = {**SHAPES, **{shape.name: shape for shape in GROUPS["scaling"](True)}}


def row(shape, contender, direction=FORWARD, us=1.0, num_gaussians=4, **columns):
    cell = new_cell(replace(BY_NAME[shape], num_gaussians=num_gaussians), torch.float32, direction, contender)
    return {**asdict(cell), "kernel_us": us, "wall_us": us, **columns}


def ours(shape, direction=FORWARD, contender=f"{FUSED} (triton)", **columns):
    return row(shape, contender, direction, **columns)


def pair(shape, other, us, of_ours=FUSED):
    """``other`` takes so many times longer."""
    return [row(shape, other, us=us), row(shape, of_ours)]


def many(shape, us):
    return [ours(f"{shape}_k1", num_gaussians=1), ours(f"{shape}_k64", num_gaussians=64, us=us)]


@pytest.mark.parametrize(
    "environment, word, good, bad",
    [
        (GPU, "forward, slices that fit", [ours("frames", of_copy=0.93)], [ours("frames", of_copy=0.91)]),
        (GPU, "backward, the same", [ours("frames", BACKWARD, of_copy=0.89)], [ours("slice_8", BACKWARD, of_copy=0.8)]),
        (GPU, "slices of 2¹⁷", [ours("slice_8388608", of_copy=0.61)], [ours("slice_8388608", of_copy=0.5)]),
        (GPU, "slices of 2¹⁷", [ours("slice_16777216", BACKWARD, of_copy=0.46)], [ours("long_middle", of_copy=0.44)]),
        (GPU, "launches", [ours("tiny", BACKWARD, launches=2)], [ours("tiny", launches=2)]),
        (GPU, "launches", [ours("long", launches=3)], [ours("mixture", BACKWARD, launches=3)]),
        (GPU, "launches", [ours("block6", BACKWARD, launches=2)], [ours("block3_features", launches=3)]),
        (GPU, "launches", [ours("ragged", launches=1)], [ours("ragged", BACKWARD, launches=3)]),
        (GPU, "a call", pair("wavlm", LAYER_NORM, 1), pair("wavlm", LAYER_NORM, 0.6)),
        (CPU, "never slower", pair("tiny", CLOSED_FORM_COMPILED, 1), pair("tiny", CLOSED_FORM_COMPILED, 0.9)),
        (GPU, "typically", pair("tiny", CLOSED_FORM_COMPILED, 1.6), pair("tiny", CLOSED_FORM_COMPILED, 1)),
        (GPU, "the public", pair("frames", UPSTREAM, 21), pair("llama", UPSTREAM, 49)),
        (CPU, "memory, forward", [ours("wavlm", peak_mb=0.8)], [ours("wavlm", peak_mb=1.6)]),
        (CPU, "saved", [ours("frames", BOTH, saved_mb=3.2)], [ours("wavlm", BOTH, saved_mb=0.8)]),
        (CPU, "native kernels, rows", [row("features", BARE, of_copy=0.9)], [row("features", BARE, BOTH, of_copy=0.7)]),
        (CPU, "native kernels, a middle", [row("frames", BARE, BOTH, of_copy=0.5)], [row("llama", BARE, of_copy=0.6)]),
        (CPU, "native kernels, in cache", [row("beit", BARE, of_copy=0.5)], [row("wavlm", BARE, BOTH, of_copy=0.2)]),
        (CPU, "native kernels, K", pair("tiny", UPSTREAM_COMPILED, 4, BARE), pair("tiny", UPSTREAM_COMPILED, 3, BARE)),
        (CPU, "native kernels, wavlm", pair("wavlm", UPSTREAM, 61, BARE), pair("llama", UPSTREAM, 59, BARE)),
        (GPU, "K = 64", many("frames", 1.04), many("frames", 1.06)),
    ],
)
def test_a_goal_is_met_missed_or_not_judged(environment, word, good, bad):
    def of(rows):
        (goal,) = [goal for goal in judge(rows, environment) if goal.text.startswith(word)]
        return goal.verdict, goal.judged, len(goal.missed)

    assert of(good) == ("met", 1, 0)
    assert of(bad) == ("missed", 1, 1)
    assert of([{**r, "status": "failed"} for r in bad]) == of([row("tiny", COPY)]) == ("not judged", 0, 0)


@pytest.mark.parametrize(
    "left_out",
    [
        ours("jepa", launches=9),  # with its projection
        ours("block6", BACKWARD, dtype="float64", launches=12),  # of which no sweep takes six layers
        ours("block3_features", BACKWARD, dims="64x65536", norm_axis=-1, num_heads=1, launches=6),  # too long for one
        ours("block3", BOTH, launches=9),
    ],
)
def test_launches_that_nobody_promised_are_not_judged(left_out):
    (goal,) = [goal for goal in judge([left_out], GPU) if goal.text.startswith("launches")]
    assert goal.verdict == "not judged"


def test_goals_of_a_gpu_are_not_judged_on_a_cpu():
    rows = [ours("frames", of_copy=0.1), row("features", BARE, of_copy=0.1)]
    missed = {environment["cuda"]: [g.text for g in judge(rows, environment) if g.missed] for environment in (GPU, CPU)}
    assert [text.split(",")[0] for text in missed["13.0"] + missed[None]] == ["forward", "native kernels"]


class Balanced(HTMLParser):
    """Collects the text, and asserts that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_by_itself(tmp_path):
    failed = dict(status="failed", note="OutOfMemoryError: <2 GB> & less", kernel_us=None, wall_us=None)
    rows = [ours("wavlm", of_copy=0.1, peak_mb=9.0, gb_per_s=12.345), ours("llama", BACKWARD, **failed)]
    environment = describe(torch.device("cpu"))
    write_json(tmp_path / "kernels-cpu.json", {"environment": environment, "options": {"seed": 7}, "rows": rows})
    host = {"device": "cpu", "case": "tiny", "direction": "forward", "layer": "module", "us": 12.5, "new": "column"}
    write_json(tmp_path / "host-cpu.json", {"environment": environment, "rows": [host]})
    picture = '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg viewBox="0 0 1 1"><text>drawn</text></svg>\n'
    (tmp_path / "kernels-cpu-float32-of-copy.svg").write_text(picture)
    html = write_page(tmp_path).read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(html)
    text = " ".join(parser.text)
    assert not parser.open and 'name="viewport"' in html
    assert not re.search(r"<script|<link|<img|src=|url\(|@import|<\?xml|href=.http", html)
    for words in ("OutOfMemoryError: <2 GB> & less", "llama float32 backward: fused (triton)", "12.3", "drawn", "12.5"):
        assert words in text
    assert environment["torch"] in text and "missed" in text and "Calls on the host" in text
    assert "wavlm [8x24x1024] float32, H = 8, K = 4, forward: 9, goal 0.856" in text  # y is 0.786 MB


def test_a_folder_without_results_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="has no results: python -m benchmarks kernels --out"):
        main(["report", str(tmp_path)])


def test_a_broken_file_is_told_and_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.kernels.plots.plot", lambda *_: [])
    rows = [ours("wavlm", of_copy=0.1)]
    content = {"environment": describe(torch.device("cpu")), "rows": rows}
    write_json(tmp_path / "kernels-cpu.json", content)
    (tmp_path / "kernels-cuda.json").write_text((tmp_path / "kernels-cpu.json").read_text()[:300])
    (tmp_path / "host-cpu.json").write_text('{"rows": [')
    assert main(["report", str(tmp_path)]) == 1
    html, told = (tmp_path / "report.html").read_text(encoding="utf-8"), capsys.readouterr().err
    assert "wavlm [8x24x1024]" in html
    for name, kind in (("kernels-cuda.json", "kernel"), ("host-cpu.json", "host")):
        assert all(f"{name} has no results of the {kind} benchmark" in text for text in (html, told))


def test_a_section_shows_its_own_pictures_alone(tmp_path):
    for stem, dtype in (("kernels-cpu", "float32"), ("kernels-cpu-old", "bfloat16")):
        content = {"environment": describe(torch.device("cpu")), "rows": [ours("wavlm", dtype=dtype)]}
        write_json(tmp_path / f"{stem}.json", content)
        for drawn in ("float32", "bfloat16"):  # one of them of an earlier run
            (tmp_path / f"{stem}-{drawn}-of-copy.svg").write_text(f"<svg><text>{stem}-{drawn}</text></svg>")
    html = write_page(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<svg><text>(.*?)</text>", html) == ["kernels-cpu-old-bfloat16", "kernels-cpu-float32"]


def test_results_of_the_host_alone_have_a_page_too(tmp_path):
    pytest.importorskip("matplotlib")
    host = {"device": "cpu", "case": "tiny", "direction": "forward", "layer": "module", "us": 12.5}
    write_json(tmp_path / "host-cpu.json", {"environment": describe(torch.device("cpu")), "rows": [host]})
    assert main(["report", str(tmp_path)]) == 0
    assert "Calls on the host" in (tmp_path / "report.html").read_text(encoding="utf-8")
