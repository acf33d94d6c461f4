"""The search: from the ladder's tile to a neighbour that is right and faster, as long as there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Callable

from daam_kernels.kernels import tiling, tuning
from daam_kernels.kernels.tiling import Choice, Problem

from ..kernels.check import Truth, complaint, errors
from ..kernels.clocks import rotation
from ..kernels.contender import BACKWARD, BOTH, FORWARD, Contender
from ..kernels.shapes import Case
from ..timing import Measurement, interleave, prepared_graph_timer, wall_timer
from .candidates import neighbours

Choices = Mapping[Problem, Choice]
_LEAST_GAIN = 0.01  # of the ladder's time: less is not worth another machine code


@dataclass(frozen=True)
class Limits:
    """``budget``: seconds to time a round of candidates; ``rounds``: steps away from the ladder's tile, at most."""

    budget: float
    rounds: int


@dataclass(frozen=True)
class Found:
    """How a problem was solved: ``tuned`` is None where no tile beats the ladder's beyond the noise."""

    problem: Problem
    ladder: Choice
    tuned: Choice | None
    ladder_us: float
    best_us: float
    tried: int
    rejected: tuple[str, ...]  # why candidates were not timed

    @property
    def choice(self) -> Choice:
        return self.tuned or self.ladder


class _Asked(dict):
    """Knows no choice, and holds what it was asked for."""

    def get(self, problem, default=None):
        self[problem] = default
        return default


def problems(case: Case, contender: Contender, backward: bool) -> list[Problem]:
    """What has to be cut for a call of this direction, in the order in which it is."""
    asked = _Asked()
    with tuning.replaced(asked):
        contender(BOTH, case.x, case.grad)
    return [problem for problem in asked if problem.backward == backward]


def search(
    case: Case, contender: Contender, true: Truth, problem: Problem, others: Choices, processors: int, limits: Limits
) -> Iterator[Found | None]:
    """None after every round, at most ``limits.rounds`` of them, and what was found at the end.

    ``others`` are the choices for the other launches of the call.
    """
    trial = partial(_trial, case, contender, true, problem, others)
    ladder = best = tiling.ladder(problem, processors)
    seen, rejected = {ladder: trial(ladder)}, []
    if isinstance(seen[ladder], str):
        raise RuntimeError(f"the ladder's own tile is wrong: {seen[ladder]}")
    for _ in range(limits.rounds):
        timers = {best: seen[best]}
        for candidate in neighbours(problem, best):
            if candidate not in seen:
                seen[candidate] = timer = trial(candidate)
                if isinstance(timer, str):
                    rejected.append(f"{candidate}: {timer}")
                else:
                    timers[candidate] = timer
        before, best = best, _fastest(interleave(timers, limits.budget))
        seen.update((choice, _discarded) for choice in timers if choice != best)  # and the graph that it holds
        yield None
        if best == before:
            break
    measured = interleave({"ladder": trial(ladder), "best": trial(best)}, limits.budget)
    for failure in measured.values():
        if isinstance(failure, Exception):
            raise failure
    kept = best if best != ladder and _beats(measured["best"], measured["ladder"]) else None
    times = (measured[name].median * 1e6 for name in ("ladder", "best"))
    yield Found(problem, ladder, kept, *times, len(seen), tuple(rejected))


def _trial(
    case: Case, contender: Contender, true: Truth, problem: Problem, others: Choices, choice: Choice
) -> Callable[[], float] | str:
    """A timer of the call with this choice, or why there is none: it does not compile, or is wrong."""
    choices = {**others, problem: choice}
    direction = BACKWARD if problem.backward else FORWARD
    prepared = [partial(contender.prepare, direction, *pair) for pair in rotation(case)]
    try:
        with tuning.replaced(choices):
            wrong = complaint(contender, errors(direction, contender(direction, case.x, case.grad), true))
            if wrong or case.x.is_cuda:
                return wrong or prepared_graph_timer(prepared)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"

    def within() -> float:
        with tuning.replaced(choices):
            return wall_timer([prepare() for prepare in prepared], case.x.device)()

    return within


def _discarded() -> float:
    raise RuntimeError("timed already, and slower")


def _fastest(measured: Mapping[Choice, Measurement | Exception]) -> Choice:
    """The one with the smallest median; the first, which is known to work, where all others failed."""
    times = {choice: m.median for choice, m in measured.items() if isinstance(m, Measurement)}
    return min(times, key=times.__getitem__)


def _beats(best: Measurement, ladder: Measurement) -> bool:
    """Whether it is faster by more than the noise of both and by a share that is worth it."""
    gain = ladder.median - best.median
    return gain > max(best.spread, ladder.spread) / 2 and gain > _LEAST_GAIN * ladder.median
