"""Interleaved timing: every contender once a round, so that a drifting clock or a busy neighbour hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from functools import lru_cache
from typing import Callable, NamedTuple, Sequence

import torch

Call = Callable[[], object]

_ENOUGH = 20  # samples for a median that one disturbance does not move


class Measurement(NamedTuple):
    """Seconds per call: median, interquartile range and best over so many repetitions."""

    median: float
    spread: float
    best: float
    repetitions: int


def summarize(seconds: Sequence[float]) -> Measurement:
    """The measurement that at least one sample gives."""
    if len(seconds) == 1:
        return Measurement(seconds[0], 0.0, seconds[0], 1)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Measurement(statistics.median(seconds), high - low, min(seconds), len(seconds))


def interleave(
    timers: dict[str, Callable[[], float]], budget: float, min_rounds: int = 2, max_rounds: int = 200
) -> dict[str, Measurement | Exception]:
    """Run rounds of all timers, each of which returns its own seconds, until ``budget`` seconds are spent.

    The order turns by one every round, and a first round is thrown away unless it alone exceeds the budget. Where slow
    timers leave time for few rounds, fast ones run several times when it is their turn. A timer that raises is left out
    from then on, and its exception stands in the place of its measurement.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    failures: dict[str, Exception] = {}
    taken: dict[str, float] = {}  # in the first round
    in_a_turn = dict.fromkeys(timers, 1)
    start = time.perf_counter()
    for done in range(-1, max_rounds):
        names = [name for name in timers if name not in failures]
        turn = (done + 1) % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            try:
                for _ in range(in_a_turn[name]):
                    samples[name].append(timers[name]())
            except Exception as error:
                failures[name] = error
            taken.setdefault(name, time.perf_counter() - began)
        spent = time.perf_counter() - start
        if done == -1:
            in_a_turn = {name: _times_in_a_turn(seconds, spent, budget, len(timers)) for name, seconds in taken.items()}
        if done == -1 and spent < budget:
            for thrown_away in samples.values():
                thrown_away.clear()
        elif done + 1 >= min_rounds and spent >= budget:
            break
    return {name: failures.get(name) or summarize(samples[name]) for name in timers}


def _times_in_a_turn(seconds: float, round_seconds: float, budget: float, timers: int) -> int:
    """As often as makes enough samples of the rounds that there will be, if all turns together add at most half a round
    to each."""
    rounds = max(1.0, budget / max(round_seconds, 1e-9))
    fitting = round_seconds / 2 / timers / max(seconds, 1e-9)
    return max(1, min(math.ceil(_ENOUGH / rounds), int(fitting)))


def wall_timer(calls: Sequence[Call], device: torch.device) -> Callable[[], float]:
    """Seconds of wall clock per call, over all of ``calls`` in a row; on a GPU until the device is idle again."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def timer() -> float:
        synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize()
        return (time.perf_counter() - start) / len(calls)

    return timer


@lru_cache(maxsize=None)
def _side_stream(device: int) -> torch.cuda.Stream:
    """The one that everything is captured on. What autograd adds up a leaf's gradient with belongs to the stream of the
    leaf's first use, and to all graphs of the leaf that are alive: a backward captured on another stream would branch
    off to it, and not come back before the capture ends."""
    return torch.cuda.Stream(device)


def graph_timer(calls: Sequence[Call]) -> Callable[[], float]:
    """Seconds of device time per call, by CUDA events around the replay of one graph that holds all of ``calls``."""
    return prepared_graph_timer([lambda call=call: call for call in calls])


def prepared_graph_timer(prepared: Sequence[Callable[[], Call]]) -> Callable[[], float]:
    """:func:`graph_timer` of the calls that ``prepared`` return, each after it did what is not timed."""
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls = [prepare() for prepare in prepared]  # here, because a backward runs on the stream of its forward
        for _ in range(3):  # what compiles or allocates at its first call must have done so before the capture
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:  # holds on to the calls, whose memory the graph reads
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return timer
