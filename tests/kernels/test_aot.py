"""Every kernel compiles ahead of time: no spills, 16-byte accesses. See aot.py, which CI runs for other tritons too."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import aot  # noqa: E402

sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The statistics of every kernel by (case, type, target), from a process without the interpreter."""
    file = tmp_path_factory.mktemp("aot") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parents[1]), environment.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, HERE / "aot.py", "--json", file], capture_output=True, text=True, env=environment
    )
    assert file.exists(), result.stdout + result.stderr
    kernels = {}
    for row in json.loads(file.read_text()):
        kernels.setdefault((row["case"], row["dtype"], row["target"]), []).append(row)
    return kernels


@pytest.mark.parametrize("name, dtype, target", aot.JOBS)
def test_kernels_compile_without_faults(compiled, name, dtype, target):
    kernels = compiled[name, dtype, target]
    launched = [kernel["name"] for kernel in kernels]
    for kernel in kernels:
        assert not aot.faults(name, target, kernel), kernel
    if name in aot.POOLS:
        sums_of_queries = [] if aot.CASES[name].hidden else ["pool_sums"]
        assert launched == ["pool_sums", "pool_merge", "pool_gradient", *sums_of_queries]
        return
    if isinstance(aot.CASES[name], aot.AdditiveCase):
        assert launched[0] == "additive_output" and "additive_gradients" in launched
        return
    density = aot.CASES[name].density
    mixture = "" if density == "product" else "mixture_"
    normalised = density in ("product", "mixture")
    statistics = ["split_statistics", "split_normaliser"] if normalised else ["split_statistics"]
    sums = [*(statistics if mixture else []), mixture + ("split_sums" if normalised else "split_slopes")]
    last = ("feature_" if density == "gaussian" else mixture) + "parameter_gradients"
    forward = ["forward_resident"], [*statistics, "split_output"]
    backward = [mixture + "backward_resident"], [*sums, mixture + "split_gradient"]
    ways = [f + b + [last] for f, b in itertools.product(forward, backward)]
    must_be_split = "split" in name or name == "thin columns"  # others may be split in the backward pass alone
    if name in aot.BLOCKS:
        ways = [["block_forward_resident", "block_backward_resident", "block_parameter_gradients"]] * 2
    assert launched in (ways[-1:] if must_be_split else ways[:2])


def test_a_fault_is_seen():
    fine = dict(name="forward_resident", spills=0, wide_loads=1, wide_stores=1, registers=40)
    assert aot.faults("rows", "sm_90", fine) == []
    assert aot.faults("rows", "sm_90", {**fine, "spills": 3}) == ["3 spills"]
    assert aot.faults("rows", "sm_90", {**fine, "wide_loads": 0, "wide_stores": 0}) == [
        "no 16-byte loads", "no 16-byte stores"
    ]  # fmt: skip
    assert aot.faults("odd rows", "sm_90", {**fine, "wide_loads": 0, "wide_stores": 0}) == []
