"""A kernel that is launched past Triton's dispatch gets what Triton gives it, and the machine code made for that."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from support import generator

pytest.importorskip("triton")
HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def recorded():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parents[1]), environment.get("PYTHONPATH"))))
    result = subprocess.run([sys.executable, HERE / "held.py"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def launches(recorded):
    return recorded["density"]


def without(launch, *names):
    return {name: value for name, value in launch.items() if name not in ("dispatched", *names)}


@pytest.mark.parametrize("name", ["first", "shifted", "double parameters"])
def test_what_was_launched_before_is_launched_alike_and_not_dispatched(launches, name):
    again = launches["again" if name == "first" else f"{name} again"]
    assert without(again) == without(launches[name])
    assert again["dispatched"] == launches[name]["dispatched"]
    assert without(launches["back"]) == without(launches["first"])


def test_other_machine_code_is_not_launched(launches):
    """Of pointers that 16 does not divide, of another type, or where there was none."""
    named = "first", "shifted", "double parameters", "weights"
    assert len({launches[name]["hash"] for name in named}) == len(named)
    assert [launches[name]["dispatched"] for name in named] == [1, 2, 3, 4]
    assert launches["weights again"]["hash"] == launches["weights"]["hash"]


def test_stream_and_hooks_are_those_of_the_call(launches):
    assert launches["another stream"]["stream"] == 7 and launches["first"]["stream"] == 0
    assert without(launches["another stream"], "stream") == without(launches["first"], "stream")
    assert launches["with a hook"]["hook"] == "watch" != launches["first"]["hook"]
    assert launches["with a hook"]["metadata"]
    assert launches["another stream"]["dispatched"] == launches["with a hook"]["dispatched"] == 4
    assert launches["with a hook before"]["dispatched"] == 5 and launches["forgotten"]["dispatched"] == 6
    assert without(launches["forgotten"]) == without(launches["with a hook before"])


def test_another_number_of_slices_is_not_dispatched(launches):
    many, more = launches["many"], launches["more"]
    assert (many["hash"], many["dispatched"]) == (more["hash"], more["dispatched"])
    assert many["grid"] != more["grid"] and many["arguments"] != more["arguments"]


SHARED = {
    "additive": {"other lengths": "usual", "one query, another step": "one query"},
    "pool": {
        "other lengths": "usual", "packed, other lengths": "packed", "packed, other bags": "packed",
        "gated, other lengths": "gated", "wide, other lengths": "wide",
    },
}  # fmt: skip


@pytest.mark.parametrize("operator", SHARED)
def test_every_launch_is_as_triton_would_have_made_it(recorded, operator):
    """The first time, again, and after launches of other sizes: its machine code, arguments and grid."""
    for name, case in recorded[operator].items():
        assert case["first"]["launches"] == case["again"]["launches"] == case["alone"]["launches"], name
        assert case["again"]["dispatched"] == 0 < case["alone"]["dispatched"], name


@pytest.mark.parametrize("operator", SHARED)
def test_other_sizes_are_not_dispatched_and_other_machine_code_is(recorded, operator):
    """Other lengths get what is held for the first ones, but numbers, addresses and grids of their own."""
    cases = recorded[operator]
    for name, case in cases.items():
        usual = cases[SHARED[operator].get(name, "usual")]
        assert (case["first"]["dispatched"] == 0) == (name in SHARED[operator])
        if name in SHARED[operator]:
            assert {launch["hash"] for launch in case["first"]["launches"]} == {
                launch["hash"] for launch in usual["first"]["launches"]
            }
            assert case["first"]["launches"] != usual["first"]["launches"]
        elif name != "usual":
            assert case["first"]["launches"][0]["hash"] != usual["first"]["launches"][0]["hash"]


def test_what_is_dispatched(recorded):
    """Numbers that a kernel is not specialised for count by their bits; constants and devices by themselves."""
    rules = recorded["rules"]
    assert rules["AMD"] == [1, 1] and len(rules) == 14
    not_dispatched = {"again", "not specialised", "64 bits again", "neither", "another launch"}
    assert {name for name, dispatched in rules.items() if dispatched == 0} == not_dispatched
    assert all(rules[name] == 1 for name in rules.keys() - not_dispatched - {"AMD"})


def test_launches_belong_to_one_device(monkeypatch):
    """Machine code is loaded on one device, so that what is held must not be another's."""
    from daam_kernels.kernels import host
    from daam_kernels.options import DensityOptions

    monkeypatch.setattr(host, "processors", lambda device: 132)
    monkeypatch.setattr(host, "tuned_choices", lambda device: {})
    others = ((torch.Size((4, 64)), None, torch.float32), (((64, 1), (64, 1)), ("y", "x"), False, 1, 2))
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False)
    first, same, second = (host._launch(*others[0], torch.device("cuda", i), *others[1], options) for i in (0, 0, 1))
    assert first is same and first is not second and first.plans is not second.plans


def test_launches_of_other_operators_belong_to_one_device_too():
    from daam_kernels.kernels import additive_backward, additive_forward, additive_weights, attention_pool_host
    from daam_kernels.kernels.additive_host import prepare
    from daam_kernels.options import AdditiveProblem

    query = torch.empty(1, 2, 3, 8)
    problem = AdditiveProblem(query, query, query, query[0, :, 0], *[None] * 3, False, 0.0, 1.0, False, True, False)
    sizes, _ = prepare(problem, grad=query, grad_weights=torch.empty(1, 2, 3, 3))
    held = [additive_forward._launches, additive_backward._launches]
    held += [additive_weights._weights_launch, additive_weights._delta_launch]
    kind = attention_pool_host.PoolKind(None, torch.float32, torch.float32, 1, 8, 0, 8, 0.0, 8, 8)
    launch = [
        lambda kind: attention_pool_host._launch(kind, 4, 4, ()),
        lambda k: attention_pool_host._merge_launch(k, 1, 8),
    ]
    for functions, known in ((held, sizes), (launch, kind)):
        first, same, second = (known._replace(device=torch.device("cuda", index)) for index in (0, 0, 1))
        for function in functions:
            assert function(first) is function(same) is not function(second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
@pytest.mark.parametrize("operator", ["density", "additive", "pool"])
def test_nothing_is_held_in_the_interpreter(monkeypatch, operator):
    from daam_kernels import additive_attention, attention_pool, density_attention
    from daam_kernels.kernels import direct

    def call(x, backend):
        if operator == "density":
            return density_attention(x, torch.zeros(1, 2), torch.ones(1, 2), backend=backend)
        if operator == "pool":
            return attention_pool(x[None], torch.ones(1, 20, dtype=x.dtype), backend=backend)
        return additive_attention(x[None, None], x[None, None], x[None, None], torch.ones(1, 20), backend=backend)

    plans = []
    original = direct.Plan.__call__
    monkeypatch.setattr(direct.Plan, "__call__", lambda self, *rest: plans.append(self) or original(self, *rest))
    for seed in (0, 1):
        x = torch.randn(3, 20, generator=generator(seed), dtype=torch.float64)
        torch.testing.assert_close(call(x, "triton"), call(x, "reference"))
    first, second = plans[: len(plans) // 2], plans[len(plans) // 2 :]
    assert first == second and first and not any(plan.held for plan in plans)
