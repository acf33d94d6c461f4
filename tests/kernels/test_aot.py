"""Every kernel compiles ahead of time: no spills, 16-byte accesses. See aot.py, which CI runs for other tritons too."""

import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import aot  # noqa: E402
import instructions  # noqa: E402

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
        if aot.CASES[name].hidden:
            wide = "wide" in name or name == "pool, odd and gated" and target.startswith("gfx")
            of_layers = ["pool_hidden_dx", "pool_layer_sums"] + ["pool_layer_sums"] * wide
            forward = "pool_wide_sums" if "wide" in name else "pool_hidden_sums"
            backward = "pool_wide_hidden_gradient" if wide else "pool_hidden_gradient"
            assert launched == [forward, "pool_merge", backward, *of_layers]
            return
        forward = "pool_wide_sums" if name in ("pool, hops", "pool, longer rows") else "pool_sums"
        gradient = "pool_wide_gradient" if name == "pool, longer rows" else "pool_gradient"
        assert launched == [forward, "pool_merge", gradient, "pool_query_sums"]
        return
    if isinstance(aot.CASES[name], aot.AdditiveCase):
        assert launched[0] == "additive_output" and "additive_gradients" in launched
        return
    density = aot.CASES[name].density
    mixture = "" if density == "product" else "mixture_"
    normalised = density in ("product", "mixture")
    statistics = ["split_statistics", "split_normaliser"] if normalised else ["split_statistics"]
    sums = mixture + "split_sums" if normalised else "mixture_split_slopes"
    last = ("feature_" if density == "gaussian" else mixture) + "parameter_gradients"
    forward = dict(resident=["forward_resident"], split=[*statistics, "split_output"], looped=["forward_looped"])
    backward = dict(resident=[mixture + "backward_resident"], split=[sums, mixture + "split_gradient"])
    backward["looped"] = [mixture + "backward_looped"]
    ways = {(f, b): forward[f] + backward[b] + [last] for f, b in itertools.product(forward, backward)}
    if name in aot.BLOCKS:
        assert launched == ["block_forward_resident", "block_backward_resident", "block_parameter_gradients"]
    elif aot.CASES[name].inference:
        assert launched == ["forward_looped"]
    elif "split" in name or name == "thin columns":
        assert launched == ways["split", "split"]
    elif "looped mixture" in name:
        assert launched == ways["resident", "looped"]
    elif "looped" in name or name == "ragged columns":
        assert launched == ways["looped", "looped"]
    elif "many rows" in name:
        assert launched == ways["resident", "resident" if dtype == "fp64" else "looped"]
    else:  # some are split or looped over in the backward pass alone
        assert launched in [way for (f, _), way in ways.items() if f == "resident"] + [ways["looped", "looped"]]


def forward_per_element(compiled, name, dtype):
    """What each element takes of a forward pass in one kernel on sm_90, and the size of one in bytes."""
    kernel = compiled[name, dtype, "sm_90"][0]
    elements = math.prod(aot.CASES[name].shape) / kernel["threads"]
    return {kind: number / elements for kind, number in kernel["shortest"].items()}, aot.DTYPES[dtype].itemsize


@pytest.mark.parametrize(
    "gaussians, dtype, exponentials", [(8, "fp32", (7, 7.2)), (4, "bf16", (3.6, 3.7))], ids=["8-fp32", "4-bf16"]
)
def test_a_mixture_computes_no_longer_than_it_reads_and_writes(compiled, gaussians, dtype, exponentials):
    """Of the exponentials, all of which are on the path, some are polynomials."""
    taken, size = forward_per_element(compiled, f"mixture of {gaussians} Gaussians", dtype)
    assert exponentials[0] <= taken["exponentials"] < exponentials[1]
    for kind, most in instructions.affordable(size).items():
        assert taken[kind] <= most, (kind, taken)


def test_instructions_are_counted_on_the_shortest_path():
    listing = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        .L_x_0:
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        .L_x_1:
        /*0040*/                   MUFU.RCP R2, R2 ;
        /*0050*/               @P2 EXIT ;
        /*0060*/                   EXIT ;
    """
    assert instructions.count(listing) == dict(instructions=5, special=1, exponentials=0)
    assert instructions.shortest_path(listing.replace("@!P0 BRA", "     BRA"))[1:3] == ["BRA", "MUFU.RCP"]
    with pytest.raises(ValueError, match="no way"):
        instructions.shortest_path(listing.replace("EXIT ;\n    ", "BRA `(.L_x_1) ;\n    "))


def test_a_fault_is_seen():
    fine = dict(name="forward_resident", spills=0, wide_loads=1, wide_stores=1, registers=40, warpgroup_products=0)
    assert aot.faults("rows", "sm_90", fine) == []
    assert aot.faults("rows", "sm_90", {**fine, "spills": 3}) == ["3 spills"]
    assert aot.faults("pool", "sm_90", {**fine, "warpgroup_products": 2}) == ["2 products by warpgroups"]
    assert aot.faults("rows", "sm_90", {**fine, "wide_loads": 0, "wide_stores": 0}) == [
        "no 16-byte loads", "no 16-byte stores"
    ]  # fmt: skip
    assert aot.faults("odd rows", "sm_90", {**fine, "wide_loads": 0, "wide_stores": 0}) == []
