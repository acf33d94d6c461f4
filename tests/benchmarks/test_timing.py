"""The interleaving of timers; most timers here return numbers of their own and measure nothing."""

import warnings
from functools import partial

import pytest
import torch

from benchmarks.timing import Measurement, interleave, prepared_graph_timer, summarize


def test_summary_is_median_spread_and_best():
    assert summarize([3.0]) == Measurement(3.0, 0.0, 3.0, 1)
    assert summarize([1.0, 2.0, 3.0, 4.0, 100.0]) == Measurement(3.0, 2.0, 1.0, 5)


def test_every_round_runs_all_timers_and_starts_with_another():
    called = []

    def timer(name):
        return lambda: called.append(name) or 1.0

    measured = interleave({name: timer(name) for name in "abc"}, budget=1e9, max_rounds=3)
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert all(m == Measurement(1.0, 0.0, 1.0, 3) for m in measured.values())  # the first round does not count


def test_fast_timers_run_several_times_in_a_turn_where_slow_ones_leave_few_rounds(monkeypatch):
    clock, called = [0.0], []
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])

    def timer(name, seconds):
        def run():
            clock[0] += seconds
            called.append(name)
            return seconds

        return run

    measured = interleave({"slow": timer("slow", 0.99), "fast": timer("fast", 0.01)}, budget=4.0)
    assert measured["slow"].repetitions == 3  # of four seconds, after one for the round that does not count
    assert measured["fast"].repetitions == 15  # 20 / 4 a turn
    assert "".join(name[0] for name in called) == "sffffffssffffffffffs"


def test_a_spent_budget_still_gives_the_fewest_rounds():
    assert interleave({"a": lambda: 2.0}, budget=0.0, min_rounds=2)["a"].repetitions >= 2


@pytest.mark.parametrize("good_calls", [0, 2])
def test_a_timer_that_raises_is_left_out_and_the_others_go_on(good_calls):
    values = iter([1.0] * good_calls)

    def failing():
        for value in values:
            return value
        raise RuntimeError("out of order")

    measured = interleave({"bad": failing, "good": lambda: 1.0}, budget=1e9, max_rounds=5)
    assert str(measured["bad"]) == "out of order"
    assert measured["good"].repetitions == 5


def test_nothing_to_time():
    assert interleave({}, budget=0.0) == {}


@pytest.mark.gpu
def test_backward_passes_over_one_leaf_are_captured_side_by_side():
    leaf = torch.randn(64, device="cuda", requires_grad=True)
    grad = torch.ones_like(leaf)

    def prepare(function):
        return partial(torch.autograd.grad, function(leaf), leaf, grad, retain_graph=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # autograd warns of the stream that a capture would have to wait for
        timers = [prepared_graph_timer([partial(prepare, function)]) for function in (torch.exp, torch.sin)]
    assert all(timer() > 0 for timer in timers)
