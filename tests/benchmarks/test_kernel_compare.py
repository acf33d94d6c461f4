"""Two runs beside each other: what is beyond the noise is told, and one of ours that got worse ends in status 1."""

import copy

import pytest

from benchmarks.__main__ import main
from benchmarks.kernels.compare import compare, report
from benchmarks.kernels.sweep import INPUTS
from benchmarks.report import write_json


def row(contender, us, iqr=0.0, status="ok", **others):
    case = dict(shape="s", dims="4x8", operator="product", norm_axis=1, num_heads=1, layers=1, num_gaussians=4)
    times = dict(kernel_us=None, kernel_us_iqr=None, wall_us=us, wall_us_iqr=iqr)
    return {**case, "dtype": "float32", "direction": "forward", "contender": contender, "status": status,
            "note": None if status == "ok" else "why", **times, **others}  # fmt: skip


def run(*rows, **environment):
    return {"environment": {"device": "a", "date": "1", **environment}, "rows": list(rows)}


@pytest.mark.parametrize(
    "old, new, copies, verdict",
    [
        ((100, 0), (104, 0), (10, 10), ""),  # 5 % at least
        ((100, 0), (106, 0), (10, 10), "SLOWER"),
        ((100, 10), (119, 11.9), (10, 10), ""),  # 0.1 + 0.1 of ranges
        ((100, 10), (121, 12.1), (10, 10), "SLOWER"),
        ((100, 0), (120, 0), (10, 12.5), ""),  # the machine is slower: so is the copy
        ((100, 0), (130, 0), (10, 12.5), "SLOWER"),
        ((100, 0), (90, 0), (10, 10), "faster"),
    ],
)
def test_what_is_beyond_the_noise(old, new, copies, verdict):
    a, b = [row("fused (native)", *old), row("copy", copies[0])], [row("fused (native)", *new), row("copy", copies[1])]
    ours, limit = compare(a, b)
    assert (ours.verdict, ours.regressed, limit.verdict) == (verdict, verdict == "SLOWER", "")
    assert ours.ratio == pytest.approx(new[0] / old[0])


def test_what_was_right_and_is_not_any_more_is_lost_and_backends_are_named():
    old, new = [row("fused (triton)", 5.0)], [row("fused (cuda)", None, status="wrong")]
    (change,) = compare(old, new)
    assert (change.verdict, change.regressed, change.note) == ("LOST", True, "wrong: why; then fused (triton)")
    (change,) = compare(old, [row("fused (triton)", None, status="skipped")])
    assert (change.verdict, change.regressed) == ("", False)
    (change,) = compare(new, old)
    assert (change.verdict, change.regressed) == ("", False)


def test_what_was_right_is_lost_too_where_the_data_of_its_case_failed(capsys):
    old, new = [row("fused (native)", 5.0), row("copy", 1.0)], [row(INPUTS, None, status="failed")]
    ours, limit = compare(old, new)
    assert (ours.verdict, ours.regressed, ours.note) == ("LOST", True, "failed: why") and not limit.regressed
    assert report(run(*old), run(*new)) == 1 and "LOST: fused, s [4x8]" in capsys.readouterr().out
    (change,) = compare(new, new)
    assert (change.verdict, change.regressed) == ("", False)


def test_device_time_counts_where_both_have_it():
    old, new = (row("fused", 50.0, kernel_us=us, kernel_us_iqr=0.0) for us in (2.0, 3.0))
    assert compare([old], [new])[0].ratio == 1.5 and compare([row("fused", 25.0)], [new])[0].ratio == 2.0


def test_the_command(tmp_path, capsys):
    old = run(row("fused (native)", 10.0), row("upstream eager", 10.0), row("copy", 1.0), row("copy", 1.0, shape="t"))
    new = copy.deepcopy(run(*old["rows"][:3], device="b", date="2"))
    new["rows"][1]["wall_us"] = 99.0
    paths = [str(tmp_path / name) for name in ("old.json", "new.json")]
    for path, content in zip(paths, (old, new)):
        write_json(tmp_path / path, content)
    assert main(["compare", *paths]) == 0  # the public package's time is not ours
    text = capsys.readouterr().out
    assert "device: a then, b now" in text and "date" not in text and "beyond the noise: " in text
    assert "1 cases and directions are in one of the two only" in text and "none of ours regressed" in text
    assert "s [4x8] float32, product, axis 1, 1 heads, K = 4, forward" in text and "9.900" in text
    new["rows"][0]["wall_us"] = 20.0
    write_json(tmp_path / paths[1], new)
    assert main(["compare", *paths]) == 1 and "SLOWER: fused, s [4x8]" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case in common"):
        report(run(row("copy", 1.0, shape="x")), new)
