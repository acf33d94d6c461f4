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
def launches():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parents[1]), environment.get("PYTHONPATH"))))
    result = subprocess.run([sys.executable, HERE / "held.py"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_nothing_is_held_in_the_interpreter(monkeypatch):
    from daam_kernels import density_attention
    from daam_kernels.kernels import direct

    plans = []
    original = direct.Plan.__call__
    monkeypatch.setattr(direct.Plan, "__call__", lambda self, *rest: plans.append(self) or original(self, *rest))
    for seed in (0, 1):
        x = torch.randn(3, 20, generator=generator(seed), dtype=torch.float64)
        y = density_attention(x, torch.zeros(1, 2), torch.ones(1, 2), backend="triton")
        torch.testing.assert_close(y, density_attention(x, torch.zeros(1, 2), torch.ones(1, 2), backend="reference"))
    assert plans[0] is plans[1] and not plans[0].held
