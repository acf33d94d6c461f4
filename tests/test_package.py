"""What a user meets first: importing the package, doing without triton, the README's code, the pinned versions."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
import torch

import daam_kernels

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
README_PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run_python(code: str) -> None:
    """Runs code in a new interpreter that knows nothing of this one's settings but its path; it has to succeed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DAAM_KERNELS_BACKEND")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_import_queries_no_device_and_loads_neither_triton_nor_matplotlib():
    run_python(
        """
        import sys
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError("importing daam_kernels asked for a device")

        for name in ("is_available", "device_count", "current_device", "get_device_capability", "init", "_lazy_init"):
            setattr(torch.cuda, name, refuse)
        before = set(sys.modules)
        import daam_kernels

        assert not torch.cuda.is_initialized()
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
        unwanted = {"triton", "matplotlib", "numpy", "tqdm", "pytest", "gaussian_adaptive_attention", "benchmarks"}
        assert not loaded & unwanted, loaded & unwanted
        assert "triton" not in sys.modules
        """
    )


def test_everything_works_on_the_cpu_where_triton_is_not_installed():
    run_python(
        """
        import sys

        class WithoutTriton:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, *args):
                return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, *args)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
        try:
            import triton
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("triton is not hidden")

        import torch
        import daam_kernels

        status = daam_kernels.available_backends()["triton"]
        assert not status and "not installed" in status.reason, status

        x = torch.randn(2, 6, 8, requires_grad=True)
        layer = daam_kernels.FusedMultiHeadDAAM(norm_axis=1, num_heads=2, num_gaussians=3)
        y = layer(x)
        y.square().sum().backward()
        for tensor in (y, x.grad, *(p.grad for p in layer.parameters())):
            assert tensor.isfinite().all()

        try:
            daam_kernels.density_attention(x, torch.zeros(1, 1), torch.ones(1, 1), backend="triton")
        except RuntimeError as error:
            assert "not installed" in str(error), error
        else:
            raise AssertionError("a backend asked for by name has to raise where it cannot serve")
        """
    )


# Who may know whom: each the rooms before it, and those beside it. The reference needs nobody.
LAYERS = (
    ("reference",),
    ("options", "sequences", "slices", "cache", "checks"),
    ("kernels", "native", "native_additive", "backends"),
    ("ops",),
    ("functional", "additive", "pooling"),
    ("modules",),
    ("compat", "mechanism", "explain"),
    ("env", "__init__"),
)


def rooms_known_to(file: Path) -> set[str]:
    """The package's modules that the file imports, not for types alone, by the first part of their names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    left_out = {line for node in for_types for line in ast.walk(node)}
    depth = len(file.relative_to(ROOT / "daam_kernels").parts)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth and node not in left_out:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_an_arrow_never_runs_back_up():
    rank = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    for file in sorted((ROOT / "daam_kernels").rglob("*.py")):
        room = file.relative_to(ROOT / "daam_kernels").parts[0].removesuffix(".py")
        for known in rooms_known_to(file) - {room, "__version__", "available_backends"}:
            assert rank[known] <= rank[room], f"{file.relative_to(ROOT)} knows {known}"
            assert room != "reference", f"{file.relative_to(ROOT)} knows {known}"


def test_private_names_stay_in_their_module():
    for file in {*(ROOT / "daam_kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")}:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert private in ([], ["__version__"]), f"{file.relative_to(ROOT)} takes {private} of {node.module}"


def test_public_names_exist():
    for name in daam_kernels.__all__:
        assert hasattr(daam_kernels, name)


def test_installed_version_is_the_source_version():
    try:
        installed = metadata.version("daam_kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("daam_kernels is not installed, only on the path")
    assert installed == daam_kernels.__version__


@pytest.mark.parametrize("block", README_PYTHON, ids=range(1, len(README_PYTHON) + 1))
def test_readme_python_runs(block):
    with torch.random.fork_rng():
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_has_python():
    assert len(README_PYTHON) >= 3


@pytest.mark.parametrize("command", ["pytest", "python -m benchmarks quickstart"])
def test_readme_has_one_line_that_installs_and_runs(command):
    # .ci/run finds its commands in the README by this pattern.
    assert len(re.findall(rf"^pip install .* && {re.escape(command)}$", README, re.MULTILINE)) == 1


def test_constraints_pin_every_dependency_and_agree_with_the_metadata():
    tomllib = pytest.importorskip("tomllib")
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "+" not in specifier.version, pin
        versions[canonicalize_name(pin.name)] = specifier.version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == ["torch>=2.11"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(r) for group in groups for r in group):
        if canonicalize_name(requirement.name) != canonicalize_name(project["name"]):
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement
