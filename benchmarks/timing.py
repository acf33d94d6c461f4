"""Interleaved timing: every contender once a round, so that a drifting clock or a busy neighbour hits all alike."""

from __future__ import annotations

import statistics
import time
from typing import Callable, NamedTuple, Sequence

import torch

Call = Callable[[], object]


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

    The order turns by one every round, and a first round is thrown away unless it alone exceeds the budget. A timer
    that raises is left out from then on, and its exception stands in the place of its measurement.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    failures: dict[str, Exception] = {}
    start = time.perf_counter()
    for done in range(-1, max_rounds):
        names = [name for name in timers if name not in failures]
        turn = (done + 1) % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            try:
                samples[name].append(timers[name]())
            except Exception as error:
                failures[name] = error
        spent = time.perf_counter() - start
        if done == -1 and spent < budget:
            for taken in samples.values():
                taken.clear()
        elif done + 1 >= min_rounds and spent >= budget:
            break
    return {name: failures.get(name) or summarize(samples[name]) for name in timers}


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


def graph_timer(calls: Sequence[Call]) -> Callable[[], float]:
    """Seconds of device time per call, by CUDA events around the replay of one graph that holds all of ``calls``."""
    return prepared_graph_timer([lambda call=call: call for call in calls])


def prepared_graph_timer(prepared: Sequence[Callable[[], Call]]) -> Callable[[], float]:
    """:func:`graph_timer` of the calls that ``prepared`` return, each after it did what is not timed."""
    side = torch.cuda.Stream()
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
