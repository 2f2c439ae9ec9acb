"""JobQueue: urgent first, fair within a kind, and a bound on waiting for every kind."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.job_queue import MAX_PASSED_OVER, JobKind, JobQueue

STEP, FORWARD, BACKWARD = JobKind


def drain(queue):
    return [queue.pop() for _ in range(len(queue))]


def test_urgent_kinds_go_first_and_first_come_first_served_within_a_kind():
    queue = JobQueue()
    for number, kind in enumerate([BACKWARD, FORWARD, STEP, BACKWARD, FORWARD, STEP]):
        queue.push(kind, (kind, number))
    assert drain(queue) == [(STEP, 2), (STEP, 5), (FORWARD, 1), (FORWARD, 4), (BACKWARD, 0), (BACKWARD, 3)]


def test_an_empty_queue_has_nothing_to_pop():
    queue = JobQueue()
    with pytest.raises(IndexError):
        queue.pop()
    queue.push(STEP, "job")
    assert queue.pop() == "job" and len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_a_kind_that_was_passed_over_often_enough_gets_one_turn(kind):
    queue = JobQueue()
    for _ in range(2):
        queue.push(kind, kind)
    for _ in range(30):
        queue.push(STEP, STEP)
    turn = [STEP] * MAX_PASSED_OVER + [kind]
    assert drain(queue)[: 2 * len(turn)] == turn * 2


def test_steps_and_forwards_together_do_not_starve_a_backward():
    queue = JobQueue()
    for _ in range(30):
        queue.push(STEP, STEP)
        queue.push(FORWARD, FORWARD)
    queue.push(BACKWARD, BACKWARD)
    order = drain(queue)
    assert order[: MAX_PASSED_OVER + 3] == [STEP] * MAX_PASSED_OVER + [FORWARD, BACKWARD, STEP]


def test_a_kind_that_had_nothing_to_do_was_not_passed_over():
    queue = JobQueue()
    for _ in range(3 * MAX_PASSED_OVER):
        queue.push(STEP, STEP)
    for _ in range(2 * MAX_PASSED_OVER):
        queue.pop()
    queue.push(BACKWARD, BACKWARD)
    assert drain(queue) == [STEP] * MAX_PASSED_OVER + [BACKWARD]


def test_under_full_load_every_kind_gets_its_share():
    queue = JobQueue()
    for kind in JobKind:
        for _ in range(1000):
            queue.push(kind, kind)
    assert queue.pop() == STEP
    shares = Counter(queue.pop() for _ in range(900))
    assert shares[STEP] == 700 and shares[FORWARD] == shares[BACKWARD] == 100


@given(st.lists(st.one_of(st.sampled_from(JobKind), st.integers(1, 12)), max_size=300))
def test_no_job_waits_longer_than_the_bound(schedule):
    """A kind pushes a job, a number pops as many."""
    queue, waiting, num_popped, num_pushed = JobQueue(), {kind: [] for kind in JobKind}, 0, 0

    def pop():
        nonlocal num_popped
        most_urgent = next(kind for kind in JobKind if waiting[kind])
        kind, number = queue.pop()
        num_popped += 1
        first, due = waiting[kind].pop(0)
        assert number == first, "first come first served"
        assert num_popped <= due, "the bound that JobQueue promises"
        passed_over[kind] = 0
        if kind != most_urgent:
            assert overdue[kind], "out of turn only after MAX_PASSED_OVER"
        for other in JobKind:
            if waiting[other] and other != kind:
                passed_over[other] += 1
                overdue[other] = passed_over[other] >= MAX_PASSED_OVER
                assert passed_over[other] <= (len(JobKind) - 1 if other == STEP else MAX_PASSED_OVER + len(JobKind) - 2)
        overdue[kind] = False

    passed_over, overdue = Counter(), Counter()
    for action in schedule:
        if isinstance(action, JobKind):
            due = num_popped + (len(waiting[action]) + 1) * JobQueue.MOST_POPS_PER_TURN
            waiting[action].append((num_pushed, due))
            queue.push(action, (action, num_pushed))
            num_pushed += 1
        else:
            for _ in range(min(action, len(queue))):
                pop()
        assert len(queue) == num_pushed - num_popped
    while len(queue):
        pop()
    assert not any(waiting.values())
