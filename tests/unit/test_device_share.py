"""DeviceShare: time by the share while both wait, everything to one that waits alone, nothing saved up, a bound on waiting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.device_share import MAX_LEAD_S, DeviceShare, Purpose

SERVING, TRAINING = Purpose
BOTH = (SERVING, TRAINING)

shares = st.floats(0.05, 0.95)
seconds = st.floats(0.001, 2.0)


def run(share: DeviceShare, num_jobs: int, waiting: Sequence[Purpose] = BOTH, **job_s: float) -> list[Purpose]:
    """The turns of so many jobs. job_s: how long one takes, by the name of its purpose."""
    turns = []
    for _ in range(num_jobs):
        turns.append(share.choose(waiting))
        share.charge(turns[-1], job_s[turns[-1].name.lower()])
    return turns


def test_jobs_of_one_length_take_turns_by_the_share() -> None:
    assert run(DeviceShare(0.5), 6, serving=1, training=1) == [SERVING, TRAINING] * 3
    assert run(DeviceShare(0.25), 8, serving=1, training=1) == [SERVING, TRAINING, TRAINING, TRAINING] * 2
    assert run(DeviceShare(0.75), 8, serving=1, training=1) == [SERVING, TRAINING, SERVING, SERVING] * 2


def test_seconds_are_shared_and_not_turns() -> None:
    turns = run(DeviceShare(0.5), 14, serving=0.125, training=0.75)
    assert turns == [SERVING, TRAINING, *[SERVING] * 6, TRAINING, *[SERVING] * 5]


def test_who_waits_alone_gets_the_device_at_once() -> None:
    share = DeviceShare(0.1)
    assert run(share, 5, serving=3, training=1)[:2] == [SERVING, TRAINING]
    assert run(share, 100, [SERVING], serving=3) == [SERVING] * 100
    assert run(share, 100, [TRAINING], training=1) == [TRAINING] * 100


@pytest.mark.parametrize("alone", Purpose)
def test_time_that_the_other_did_not_want_is_neither_owed_nor_saved_up(alone: Purpose) -> None:
    share = DeviceShare(0.5)
    run(share, 1000, [alone], serving=1, training=1)
    turns = run(share, 20, serving=1, training=1)
    assert turns[0] is alone.other and abs(turns.count(alone) - 10) <= 1


def test_a_step_that_comes_during_a_microbatch_waits_for_that_one_alone() -> None:
    share = DeviceShare(0.2)
    for _ in range(50):  # a session that answers each token with the next step, during the next microbatch
        assert run(share, 1, [TRAINING], training=0.1) == [TRAINING]
        assert run(share, 1, serving=0.01, training=0.1) == [SERVING]


def test_an_endless_job_is_made_up_for_within_the_bound() -> None:
    share = DeviceShare(0.5)
    run(share, 1, [SERVING], serving=1000)
    turns = run(share, 100, serving=0.5, training=0.5)
    num_before = int(MAX_LEAD_S / 0.5)
    assert turns[: num_before + 1] == [TRAINING] * num_before + [SERVING]
    assert share.used_s == {SERVING: 1000 + turns.count(SERVING) * 0.5, TRAINING: turns.count(TRAINING) * 0.5}


@pytest.mark.parametrize("serving", [-0.5, 0, 1, 1.5, math.nan])
def test_neither_can_be_left_with_nothing(serving: float) -> None:
    with pytest.raises(ValueError, match="need 0 < share < 1"):
        DeviceShare(serving)


@given(shares, st.lists(st.tuples(seconds, seconds).map(lambda pair: (pair[0] / 4, pair[1] / 4)), min_size=1))
def test_while_both_wait_the_time_of_each_is_its_share_within_one_job(
    serving: float, jobs: list[tuple[float, float]]
) -> None:
    share = DeviceShare(serving)
    for job in jobs:
        chosen = share.choose(BOTH)
        share.charge(chosen, job[chosen])
    total_s, longest_s = sum(share.used_s.values()), max(map(max, jobs))
    for purpose in Purpose:
        assert abs(share.used_s[purpose] - share.of[purpose] * total_s) <= longest_s + 1e-6


@given(shares, st.lists(st.tuples(st.sampled_from([(SERVING,), (TRAINING,), BOTH]), seconds), max_size=200))
def test_nobody_waits_longer_than_the_bound(serving: float, moments: list[tuple[tuple[Purpose, ...], float]]) -> None:
    """Whoever waits, waits until it has had a turn."""
    share, waited_s = DeviceShare(serving), dict.fromkeys(Purpose, 0.0)
    backlog: set[Purpose] = set()
    for come, job_s in moments:
        backlog |= {*come}
        chosen = share.choose(sorted(backlog))
        assert chosen in backlog
        share.charge(chosen, job_s)
        backlog.discard(chosen)
        waited_s[chosen] = 0.0
        if chosen.other in backlog:
            waited_s[chosen.other] += job_s
            assert waited_s[chosen.other] <= MAX_LEAD_S + 2 * max(s for _, s in moments) + 1e-6
