"""``python -m benchmarks verify``: past failures and hangs, what is read from records and logs, and a dry run."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import _FAMILIES, main
from benchmarks.verify import derivatives, record, sanitizer, schedule, summary, touch
from benchmarks.verify.problems import OPERATORS, problems
from benchmarks.verify.schedule import Outcome, Step
from benchmarks.verify.steps import GROUPS, SANITIZERS, TIMINGS, steps

REPOSITORY = Path(__file__).resolve().parents[2]


def python(code):
    return sys.executable, "-S", "-c", code


def test_steps_end_apart_from_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "_LEAST", 0.0)
    monkeypatch.setattr(schedule, "_GRACE", 0.5)
    hangs = "import subprocess, sys; print('here', flush=True); subprocess.run([sys.executable, '-S', '-c', "
    hangs += "'import os, time; print(os.getpid(), flush=True); time.sleep(60)'])"
    chosen = [
        Step("good", python("print('fine')"), 20),
        Step("bad", python("raise SystemExit(3)"), 20),
        Step("killed", python("import os; os.kill(os.getpid(), 9)"), 20),
        Step("hangs", python(hangs), 4.0),
        Step("later", python("pass"), 20, after=("hangs", "good")),
        Step("absent", ("no such program",), 20, problem="not installed: it"),
        Step("timing", python("pass"), 20, alone=True),
        Step("late", python("pass"), 20, alone=True),
    ]
    heard = []

    def advance(what):
        heard.append(what)
        if what == "timing: started":
            monkeypatch.setattr(schedule, "_LEAST", 1e9)  # from now on there is no time left

    found = schedule.run(chosen, tmp_path, 30, 4, tmp_path, advance)
    assert [(o.step.name, o.status) for o in found] == [
        ("good", "ok"), ("bad", "failed"), ("killed", "failed"), ("hangs", "timed out"), ("later", "ok"),
        ("absent", "not run"), ("timing", "ok"), ("late", "out of time"),
    ]  # fmt: skip
    assert [o.reason for o in found[:3]] == ["", "exit status 3", "ended by SIGKILL"]
    assert found[0].log.read_text().splitlines()[1:] == ["fine"]
    ends = {o.step.name: o.started + o.seconds for o in found if o.started is not None}
    assert found[4].started >= ends["hangs"] - 0.01 and found[6].started >= max(ends["later"], ends["bad"]) - 0.01
    grandchild = int(found[3].log.read_text().splitlines()[2])
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(grandchild, 0)
            time.sleep(0.1)


def test_an_interrupted_run_ends_its_steps_and_keeps_what_was_done(tmp_path):
    lasting = tmp_path / "lasting"
    chosen = [
        Step("done", python("pass"), 20),
        Step("slow", python(f"import time; time.sleep(2); open({str(lasting)!r}, 'w')"), 20, after=("done",)),
        Step("after", python("pass"), 20, after=("slow",)),
    ]
    said = []

    def advance(what):
        said.append(what)
        if what == "slow: started":
            raise KeyboardInterrupt

    done, slow, after = schedule.run(chosen, tmp_path / "logs", 60, 2, tmp_path, advance)
    assert (done.status, slow.status, after.status) == (schedule.OK, schedule.INTERRUPTED, schedule.INTERRUPTED)
    assert said[-2:] == ["slow: interrupted, 0 s after 0 s", "after: interrupted, 0 s before it started"]
    rows = [summary.judge(outcome, tmp_path, "cpu") for outcome in (done, slow, after)]
    expected = ["slow: interrupted, after 0 s", "after: interrupted, before it started"]
    assert summary.failures(rows) == expected
    time.sleep(2.5)
    assert not lasting.exists()


def test_a_broken_context_ends_the_trial(tmp_path, monkeypatch, capsys):
    def fails():
        raise ValueError("\nan error\nand more")

    monkeypatch.setenv(record.PATH, str(tmp_path / "record"))
    assert record.try_all([("one", lambda: None), ("two", fails), ("three", lambda: None)]) == 1
    monkeypatch.setattr(record, "context_is_broken", lambda: True)
    assert record.try_all([("four", fails), ("five", lambda: None)]) == 1
    found = {entry["name"]: (entry["outcome"], entry["message"]) for entry in record.read(tmp_path / "record")}
    assert found == {
        "one": ("passed", ""),
        "two": ("failed", "ValueError: an error"),
        "three": ("passed", ""),
        "four": ("failed", "ValueError: an error"),
        "five": ("failed", "not tried: four broke the CUDA context"),
    }
    assert "two: failed" in capsys.readouterr().out


TESTS = """
import sys, types
import pytest

def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")

broken = []
sys.modules["torch"] = types.SimpleNamespace(
    cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
)

def test_breaks():
    broken.append(1)
    assert not broken, "wrong"

def test_passes():
    assert not broken

def test_is_left_out():
    pytest.skip("no need")
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_the_record_of_tests(tmp_path, workers):
    """A worker whose context is broken is replaced; without workers that is the end, and what is left is not there."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.verify.record", "--rootdir", str(tmp_path)]
    command += [
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        str(tmp_path),
        *(["-p", "xdist", "-n", str(workers)] if workers else []),
    ]
    environment = {**os.environ, record.PATH: str(tmp_path / "record"), "PYTEST_ADDOPTS": ""}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer than the tests
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1, result.stdout
    found = {e["name"].rpartition("::")[2]: e["outcome"] for e in record.read(tmp_path / "record")}
    left = {"test_passes": "passed", "test_is_left_out": "skipped"}
    assert found == {"test_breaks": "failed", **(left if workers else {})}, result.stdout


def test_logs_of_the_sanitizer():
    ours = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at forward_resident+0x1b0 in density_forward.py:97
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f0000000200 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x2] in libcuda.so.1
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<512, 1>(T3)+0x40
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 2 errors
"""
    found = sanitizer.parse(ours)
    assert found.ours == {"Invalid __global__ read of size 4 bytes at forward_resident": 1} and found.finished
    assert list(found.others.values()) == [1] and "reduce_kernel" in next(iter(found.others))
    race = "========= Error: Race reported between Write access at pool_sums+0xc0 in pool.py:3\n"
    race += "=========     and Read access at pool_sums+0x150 in pool.py:4 [8 hazards]\n"
    race += "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert sanitizer.parse(race).ours == {"Error: Race reported between Write access at pool_sums": 1}
    warned = sanitizer.parse(race.replace("Error: Race", "Warning: Race"))
    assert not warned.ours and list(warned.others.values()) == [1]
    assert sanitizer.parse("========= ERROR SUMMARY: 3 errors").ours == {"3 errors, which the log has": 1}
    clean = sanitizer.parse("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors")
    assert clean.finished and not clean.ours and not clean.others
    assert sanitizer.parse("========= Error: Device not supported.").unsupported


def test_the_summary_names_all_that_went_wrong(tmp_path):
    (tmp_path / "logs").mkdir()

    def row(name, status, log="", entries=(), device="cuda", **options):
        path = tmp_path / "logs" / f"{name.replace(' ', '-')}.log"
        path.write_text(log)
        path.with_suffix(".jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries) + '{"cut of')
        outcome = Outcome(Step(name, ("run",), 1, **options), status, "a reason", log=path, started=0.0)
        return summary.judge(outcome, tmp_path, device)

    def entry(name, outcome, message=""):
        return dict(name=name, outcome=outcome, message=message, seconds=1.0)

    rows = [
        row("gpu tests", "failed", entries=[entry("a", "passed"), entry("b", "failed", "wrong"), entry("b", "passed")]),
        row("contract", "ok", entries=[entry("a", "skipped", "needs a GPU")]),
        row("derivatives 1", "timed out", entries=[entry("c", "passed")]),
        row("touch 1", "failed", log="one\n\ntwo\nthree\n"),
        row("touch 2", "failed", log="Traceback\n  at\ntorch.AcceleratorError: illegal\nmore\n"),
        row("memcheck", "failed", log="========= Error: Device not supported"),
        row("racecheck", "failed", log="========= Invalid read\n=====     at at::native::f+0x1\n= ERROR SUMMARY: 1"),
    ]
    results = {
        "rows": [{"shape": "tiny", "direction": "forward", "contender": "fused", "status": "wrong", "note": "!"}]
    }
    (tmp_path / "kernels-cuda.json").write_text(json.dumps(results))
    rows += [row("kernels", "failed", alone=True), row("pool", "ok", alone=True)]
    assert [r["status"] for r in rows] == [
        "failed",
        "failed",
        "timed out",
        "failed",
        "failed",
        "not run",
        "ok",
        "failed",
        "ok",
    ]
    assert summary.failures(rows) == [
        "gpu tests: b: wrong",
        "contract: no test ran",
        "derivatives 1: timed out, a reason",
        "touch 1: one | two | three",
        "touch 2: torch.AcceleratorError: illegal",
        "kernels: tiny forward fused: wrong: !",
    ]
    page = summary.page(rows, {"device": "a GPU"}, 12)
    assert "# Verification: 6 failed" in page and "| memcheck | not run | 0 | compute-sanitizer does not" in page
    assert "- racecheck: 1 x Invalid read at at::native::f" in page


def test_commands_for_a_gpu_are_such_as_the_programs_take(tmp_path, monkeypatch):
    """None of them can run here; that their options exist can be seen."""
    monkeypatch.setattr("benchmarks.verify.steps.find_sanitizer", lambda: "/opt/compute-sanitizer")
    found = {step.name: step for step in steps("cuda", GROUPS, tmp_path, 16, REPOSITORY)}
    for name in TIMINGS:
        parser = argparse.ArgumentParser()
        _FAMILIES[name].add_arguments(parser)
        assert found[name].command[1:4] == ("-m", "benchmarks", name) and found[name].alone
        assert parser.parse_args(found[name].command[4:]).device == "cuda"
    assert found["report"].command[3:] == ("report", str(tmp_path)) and list(found)[-1] == "report"
    for module in (derivatives, touch):
        monkeypatch.setattr(module, "problems", lambda *_, **__: iter(()))
    for name, step in found.items():
        module = {"derivatives": derivatives, "touch": touch}.get(name.partition(" ")[0])
        if name in SANITIZERS:
            assert step.command[:3] == ("/opt/compute-sanitizer", "--tool", name) and len(step.after) == 4
            assert step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            module = touch
        if module is not None:
            start = step.command.index(module.__name__) + 1
            assert module.main(list(step.command[start:])) == 0
    assert found["gpu tests"].slots == 10 and found["gpu tests"].command[-1].startswith("tests/")
    assert "tests/gpu/test_ragged.py" in found["huge tests"].command
    operators = [step.command[-1] for name, step in found.items() if name.startswith("derivatives")]
    assert sorted(",".join(operators).split(",")) == sorted(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_problems_of_both_sizes(operator):
    small = list(problems(operator, "cpu", torch.float64, "reference", small=True))
    assert small and all(t.numel() < 100 and t.requires_grad for p in small for t in p.tensors)
    large = [p.name for p in problems(operator, "cpu", torch.bfloat16, "reference", small=False)]
    assert len(set(large)) == len(large) >= len({p.name for p in small})


def test_a_summary_names_no_environment_of_an_earlier_run(tmp_path, capsys):
    (tmp_path / "environment.json").write_text('{"commit": "an earlier one"}')
    assert main(["verify", "--device", "cpu", "--steps", "sanitizer", "--out", str(tmp_path)]) == 0
    assert "an earlier one" not in capsys.readouterr().out
    assert json.loads((tmp_path / "verify.json").read_text())["environment"] == {}


def test_a_step_that_writes_no_results_is_not_judged_by_those_of_an_earlier_run(tmp_path, monkeypatch):
    """And what was not asked for stays."""
    wrong = json.dumps({"rows": [{"shape": "tiny", "contender": "fused", "status": "wrong"}]})
    (tmp_path / "logs").mkdir()
    for name in ("host-cpu.json", "pool-cpu.json", "logs/host.log"):
        (tmp_path / name).write_text(wrong)
    fails = [Step("host", python("raise SystemExit(3)"), 20, alone=True)]
    monkeypatch.setattr("benchmarks.verify.cli.steps", lambda *_: fails)
    assert main(["verify", "--device", "cpu", "--steps", "host", "--out", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "verify.json").read_text())
    assert content["failures"] == ["host: # at 0 s: " + " ".join(fails[0].command)]
    assert (tmp_path / "pool-cpu.json").exists()


def test_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = ["verify", "--device", "cpu", "--out", str(tmp_path), "--cores", "2"]
    assert main([*chosen, "--steps", "environment,touch,sanitizer", "--limit", "100"]) == 0
    content = json.loads((tmp_path / "verify.json").read_text())
    status = {row["name"]: row["status"] for row in content["steps"]}
    assert status == {"environment": "ok", "touch 1": "ok", **dict.fromkeys(SANITIZERS, "not run")}
    assert content["failures"] == [] and content["environment"]["torch"] == torch.__version__
    assert content["steps"][0]["command"].startswith("python -m benchmarks.verify.machine --device cpu --out OUT")
    assert content["steps"][1]["counts"]["passed"] >= 6
    assert "nothing failed" in (tmp_path / "summary.md").read_text()
    with pytest.raises(SystemExit, match="unknown step 'none'"):
        main([*chosen, "--steps", "none"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch finds no GPU here"):
            main(["verify", "--out", str(tmp_path)])
