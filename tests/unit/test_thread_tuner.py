"""ThreadTuner: it follows the machine, and costs little where there is nothing to gain."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from node.thread_tuner import ThreadTuner

FREE = {1: 10.0, 2: 6.0}
BUSY = {1: 12.0, 2: 90.0}


def run(tuner: ThreadTuner, num_steps: int, seconds: Callable[[int], float], size: int = 1) -> float:
    """Seconds that so many steps took."""
    total = 0.0
    for _ in range(num_steps):
        threads = tuner.threads_for(size)
        total += seconds(threads)
        tuner.note(size, threads, seconds(threads))
    return total


def test_on_a_machine_that_gets_busy_it_takes_fewer_threads_soon() -> None:
    tuner = ThreadTuner([1, 2], chosen=2)
    run(tuner, 1000, FREE.__getitem__)
    assert tuner.threads == 2
    run(tuner, 30, BUSY.__getitem__)
    assert tuner.threads == 1


def test_on_a_machine_that_gets_free_it_takes_more_again() -> None:
    tuner = ThreadTuner([1, 2], chosen=2)
    run(tuner, 1000, FREE.__getitem__)
    run(tuner, 1000, BUSY.__getitem__)
    assert tuner.threads == 1
    run(tuner, 2100, FREE.__getitem__)
    assert tuner.threads == 2


@pytest.mark.parametrize("seconds", [FREE, BUSY, {1: 1.0, 2: 10.0}, {1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.99}])
def test_it_costs_a_few_percent_at_most(seconds: dict[int, float]) -> None:
    best = min(seconds, key=seconds.__getitem__)
    tuner = ThreadTuner([1, 2], chosen=best)
    assert run(tuner, 10_000, seconds.__getitem__) < 1.03 * 10_000 * seconds[best]


def test_with_one_candidate_nothing_is_tried() -> None:
    tuner = ThreadTuner([3], chosen=3)
    assert {tuner.threads_for(1) for _ in range(500) if tuner.note(1, 3, 1.0) is None} == {3}


def test_steps_of_another_size_are_not_compared() -> None:
    """A batch of sixteen takes longer than one of one, with any number of threads."""
    tuner = ThreadTuner([1, 2], chosen=2)
    for number in range(4000):
        size = 16 if number % 2 else 1
        threads = tuner.threads_for(size)
        tuner.note(size, threads, FREE[threads] * size)
    assert tuner.threads == 2


def test_three_candidates_are_all_tried() -> None:
    tuner = ThreadTuner([1, 2, 4], chosen=1)
    run(tuner, 2000, {1: 9.0, 2: 8.9, 4: 3.0}.__getitem__)
    assert tuner.threads == 4


def test_a_single_slow_step_changes_nothing() -> None:
    tuner = ThreadTuner([1, 2], chosen=2)
    run(tuner, 500, FREE.__getitem__)
    tuner.note(1, 2, 1000.0)
    run(tuner, 500, FREE.__getitem__)
    assert tuner.threads == 2
