"""What is run, in the order of its worth, and with which command."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from . import record
from .problems import OPERATORS
from .schedule import Step

TESTS, HUGE, CONTRACT, DERIVATIVES, TOUCH = "gpu tests", "huge tests", "contract", "derivatives", "touch"
ENVIRONMENT, SANITIZER = "environment", "sanitizer"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
TIMINGS, REPORT = ("kernels", "additive", "pool", "host"), "report"
GROUPS = (ENVIRONMENT, TESTS, HUGE, DERIVATIVES, CONTRACT, TOUCH, SANITIZER, *TIMINGS, REPORT)

# Tests of all operators that hold a backend on the device to the contract; those of tests/gpu are a step of their own.
_CONTRACTS = (
    "tests/test_numeric_contract.py", "tests/ops/test_mixture.py", "tests/ops/test_unnormalised.py",
    "tests/test_pooling.py", "tests/kernels/test_density_block.py", "tests/kernels/test_additive_attention.py",
)  # fmt: skip
# Operators that a process takes on a GPU, where each has kernels to compile.
_TOGETHER = (("product", "ragged"), ("mixture",), ("gaussian", "gate", "pool"), ("block", "additive"))


def steps(device: str, groups: tuple[str, ...], out: Path, cores: int, repository: Path) -> list[Step]:
    """The steps of the ``groups``, on ``cores`` processor cores. The results of timings go to ``out``."""
    made = {
        ENVIRONMENT: lambda: [_environment(device, out)],
        TESTS: lambda: [_tests(TESTS, device, "gpu and not huge", 240, cores * 5 // 8, repository)],
        HUGE: lambda: [_tests(HUGE, device, "huge", 150, 1, repository)],
        DERIVATIVES: lambda: _derivatives(device),
        CONTRACT: lambda: [_contract(device, cores // 5)],
        TOUCH: lambda: _touches(device),
        SANITIZER: lambda: _sanitizers(device, [step.name for step in _touches(device)] if TOUCH in groups else []),
        **{name: lambda name=name: [_timing(name, device, out)] for name in TIMINGS},
        REPORT: lambda: [_report(out)],
    }
    found = [step for group in GROUPS if group in groups for step in made[group]()]
    return [_with_environment(step, device, out, cores) for step in found]


def record_of(step: Step, out: Path) -> Path:
    """Where a step notes what it tried."""
    return out / "logs" / f"{step.name.replace(' ', '-')}.jsonl"


def results_of(name: str, device: str, out: Path) -> Path:
    """What the timing of that name writes."""
    return out / f"{name}-{device}.json"


def find_sanitizer() -> str | None:
    """The program compute-sanitizer, on the path or where CUDA's toolkit has it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def _with_environment(step: Step, device: str, out: Path, cores: int) -> Step:
    """The step with what all have in their environment: where to note what was tried, and of those that run side by
    side, few threads. What a shell has left over of this package's and Triton's variables is none of a GPU's."""
    environment = {record.PATH: str(record_of(step, out))}
    if device == "cuda":
        environment |= {"TRITON_INTERPRET": "0", "DAAM_KERNELS_BACKEND": ""}
    if not step.alone and step.name != ENVIRONMENT:
        environment |= {"OMP_NUM_THREADS": str(max(1, cores // 8)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return replace(step, environment=environment | step.environment)


def _python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", *arguments


def _missing(*modules: str) -> str | None:
    absent = [name for name in modules if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _environment(device: str, out: Path) -> Step:
    command = _python("benchmarks.verify.machine", "--device", device, "--out", str(out / "environment.json"))
    return Step(ENVIRONMENT, command, 60)


def _with_gpu_marks(repository: Path) -> list[str]:
    """The files that have tests marked gpu: to collect all others would only take time."""
    files = sorted((repository / "tests").rglob("test_*.py"))
    return [str(f.relative_to(repository)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


def _tests(name: str, device: str, marks: str, limit: float, workers: int, repository: Path) -> Step:
    return _pytest(name, device, ("-m", marks, *_with_gpu_marks(repository)), limit, workers)


def _pytest(name: str, device: str, selection: tuple[str, ...], limit: float, workers: int) -> Step:
    """Most of what these tests take is the compilation of kernels, hundreds of them: in ``workers`` side by side."""
    options = ["-q", "-rf", "-p", "benchmarks.verify.record", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", "--tb=short"]
    workers = max(1, workers) if find_spec("xdist") is not None else 1
    if workers > 1:
        options += ["-n", str(workers)]
    if find_spec("pytest_timeout") is not None:
        options += ["--timeout=120", "--timeout-method=thread"]  # the other method cannot interrupt a wait for the GPU
    problem = _missing("pytest", "hypothesis", *(["triton"] if device == "cuda" else []))
    return Step(name, _python("pytest", *options, *selection), limit, workers, problem=problem)


def _contract(device: str, workers: int) -> Step:
    if device == "cuda":
        selection = "-k", "contract and not native and not reference", *_CONTRACTS
        return _pytest(CONTRACT, device, selection, 200, workers)
    return _pytest(CONTRACT, device, ("-k", "contract_holds and native", _CONTRACTS[0]), 200, 1)


def _backend(device: str) -> str:
    return "triton" if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "auto"


def _derivatives(device: str) -> list[Step]:
    options = ("--device", device, "--backend", _backend(device))
    return _together(DERIVATIVES, "benchmarks.verify.derivatives", options, device)


def _touches(device: str) -> list[Step]:
    on_gpu = device == "cuda"
    options = ("--device", device, "--backends", "triton,cuda" if on_gpu else _backend(device))
    return _together(TOUCH, "benchmarks.verify.touch", (*options, *(() if on_gpu else ("--small",))), device)


def _together(name: str, module: str, options: tuple[str, ...], device: str) -> list[Step]:
    return [
        Step(f"{name} {number}", _python(module, *options, "--operators", ",".join(operators)), 150)
        for number, operators in enumerate(_TOGETHER if device == "cuda" else (OPERATORS,), 1)
    ]


def _sanitizers(device: str, after: list[str]) -> list[Step]:
    """Each of the tools over what the steps ``after`` which it comes did: the kernels are compiled by then.

    Without torch's cache of memory every tensor is an allocation of its own, so that an access beside it, or of what
    nobody wrote, is seen.
    """
    program = find_sanitizer()
    problem = "needs a GPU" if device != "cuda" else None if program else "compute-sanitizer is not found"
    watched = _python("benchmarks.verify.touch", "--device", device, "--backends", "triton,cuda")
    options = ("--target-processes", "application-only", "--show-backtrace", "no", "--print-limit", "200")
    options += ("--error-exitcode", "86")
    of_tool = {"memcheck": ("--report-api-errors", "no")}  # torch asks for what there may not be, and goes on
    return [
        Step(
            tool, (program or "compute-sanitizer", "--tool", tool, *options, *of_tool.get(tool, ()), *watched), 180,
            after=tuple(after),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, problem=problem,
        )
        for tool in SANITIZERS
    ]  # fmt: skip


def _timing(name: str, device: str, out: Path) -> Step:
    on_gpu = device == "cuda"
    chosen, limit, usual = {
        "kernels": (("--quick",) if on_gpu else ("--quick", "--shapes", "tiny", "--budget", "0.1"), 150, 90),
        "additive": (("--quick", "--shapes", "T256", "--contenders", "eager,daam_kernels"), 90, 30),
        "pool": (("--quick",), 60, 20),
        "host": (() if on_gpu else ("--cases", "tiny", "--budget", "0.1"), 60, 25),
    }[name]
    problem = _missing("tqdm", "matplotlib") if name != "host" else None
    command = _python("benchmarks", name, "--device", device, "--out", str(out), *chosen)
    return Step(name, command, limit, alone=True, usual=usual, problem=problem)


def _report(out: Path) -> Step:
    """The page and the pictures of all that was measured, of a benchmark that was killed too; the last of the steps."""
    command = _python("benchmarks", "report", str(out))
    return Step(REPORT, command, 60, alone=True, usual=10, problem=_missing("matplotlib"))
