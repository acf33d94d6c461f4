"""The pytest-benchmark form, for a few small cases: ``pytest benchmarks``. Asserts the results, then times them."""

from __future__ import annotations

import functools

import pytest
import torch

from ..timing import wall_timer
from .check import complaint, errors, truth
from .bare import BARE
from .contender import DIRECTIONS
from .contenders import CLOSED_FORM, CLOSED_FORM_COMPILED, COPY, FUSED, UPSTREAM, contenders
from .data import make_case
from .shapes import SHAPES

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_NUM_GAUSSIANS = 4
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 3, 50, 0.3  # so that a busy machine takes fewer rounds, not minutes


@functools.lru_cache(maxsize=1)
def _case(name: str):
    case = make_case(SHAPES[name], torch.float32, _DEVICE, _NUM_GAUSSIANS)
    return case, truth(case), {}


@pytest.mark.parametrize("contender", [UPSTREAM, CLOSED_FORM, CLOSED_FORM_COMPILED, FUSED, BARE, COPY])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", ["tiny", "wavlm"])
def test_density_attention(benchmark, shape: str, direction: str, contender: str) -> None:
    case, true, made = _case(shape)
    if contender == UPSTREAM:
        pytest.importorskip("gaussian_adaptive_attention")
    if contender not in made:
        makers = contenders(case)
        if contender not in makers:
            pytest.skip("the native library is not there")
        made[contender] = makers[contender]()
    called = made[contender].prepare(direction, case.x, case.grad)
    if made[contender].tolerance is not None:
        found = errors(direction, called(), true)
        assert complaint(made[contender], found) is None
    benchmark.group = f"{shape} {direction}"
    timer = wall_timer([called], _DEVICE)
    rounds = min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(_SECONDS / timer())))
    benchmark.pedantic(timer, rounds=rounds, warmup_rounds=1)
