"""When a run goes back, and where to."""

from __future__ import annotations

import random

import pytest

from swarm.epoch.messages import Place
from swarm.member_record import MemberRecord
from swarm.records import ShardState
from swarm.training.checkpoints import NUM_COMPLETE, is_complete, states_to_keep
from swarm.training.rollback import Watch, complete_places, lost_stages, newest, newest_complete, saved_by_stage
from tests.support.runs import make_member

NUM_STAGES = 3  # two and the ends
PATIENCE_S = 60.0


def at(epoch: int, era: int = 0, history: str = "a") -> Place:
    return Place(epoch, history.encode() * 32, era)


def member(name: str, stage: int, place: Place, *saved: Place, **fields: object) -> MemberRecord:
    return make_member(
        name, stage=stage, epoch=place.epoch, lineage=place.lineage, era=place.era, saved=saved, **fields
    )


def run_at(place: Place, *saved: Place) -> list[MemberRecord]:
    return [member(f"m{stage}", stage, place, *saved) for stage in range(NUM_STAGES)]


def test_a_place_that_was_rolled_back_to_is_ahead_of_all_of_the_old_era_and_proven_by_the_old_commit() -> None:
    back = at(5).rolled_back(1)
    assert (back.epoch, back.era) == (5, 1) and back.lineage != at(5).lineage
    assert at(9).is_behind(back) and not back.is_behind(at(9))
    assert back.is_behind(at(7).rolled_back(1)) and at(7).rolled_back(1).is_behind(at(5).rolled_back(2))
    run_id = b"r" * 32
    start = Place(0, run_id)
    assert start.follows(None, run_id) and start.rolled_back(2).follows(None, run_id)
    assert not Place(0, run_id, 1).rolled_back(2).follows(None, b"x" * 32)
    assert not Place(0, start.rolled_back(2).lineage, 3).follows(None, run_id)


def test_a_run_that_goes_on_or_waits_for_somebody_is_left_alone() -> None:
    watch = Watch(NUM_STAGES, PATIENCE_S)
    for second in range(0, 300, 5):  # it goes on; one record is always older than the others
        place = at(100 + second)
        records = [*run_at(place, at(100)), member("late", 1, at(99 + second), at(100))]
        records[1] = member("m1", 1, at(99 + second), at(100))
        assert watch.look(records, place, second) is None
    watch = Watch(NUM_STAGES, PATIENCE_S)
    for second in range(0, 300, 5):  # a stage has nobody at all: whoever comes may bring its state
        assert watch.look(run_at(at(120), at(100))[1:], at(120), second) is None
    assert lost_stages(run_at(at(120))[1:], NUM_STAGES) == ([0], [])


def test_a_run_that_stands_still_goes_back_to_the_newest_place_that_all_have() -> None:
    watch = Watch(NUM_STAGES, PATIENCE_S)
    records = run_at(at(120), at(80), at(90), at(100))
    records[1] = member("newcomer", 1, Place(0, b"r" * 32), at(90), at(80))
    assert lost_stages(records, NUM_STAGES) == ([], [1])
    assert watch.look(records, at(120), 0) is None and watch.look(records, at(120), PATIENCE_S - 1) is None
    decision = watch.look(records, at(120), PATIENCE_S)
    assert decision is not None and decision.base == at(90) and decision.lost == (1,) and decision.newest == at(120)
    assert decision.goal == at(90).rolled_back(1)
    later = [*records, member("first", 0, decision.goal, at(90))]  # somebody has gone there already
    assert watch.look(later, at(120), PATIENCE_S + 1) is None, "the others follow, and nobody goes further"
    assert newest(record.place for record in later) == decision.goal


def test_one_who_invents_a_far_place_moves_nobody() -> None:
    watch = Watch(NUM_STAGES, PATIENCE_S)
    records = [*run_at(at(120), at(100)), member("liar", 0, at(10**9, history="z"), at(100))]
    assert [watch.look(records, at(120), second) for second in (0, 100, 1000)] == [None] * 3


def test_without_a_place_that_all_have_nobody_goes_anywhere() -> None:
    watch = Watch(NUM_STAGES, PATIENCE_S)
    records = run_at(at(120), at(100))
    records[1] = member("newcomer", 1, Place(0, b"r" * 32))
    assert [watch.look(records, at(120), second) for second in (0, 100, 1000)] == [None] * 3


def test_leaving_members_count_for_nothing_but_their_disks() -> None:
    records = run_at(at(120), at(100))
    records[1] = member("m1", 1, at(120), at(100), state=ShardState.LEAVING)
    assert lost_stages(records, NUM_STAGES) == ([1], [])
    assert newest_complete(saved_by_stage(records), NUM_STAGES) == at(100)


def test_of_complete_checkpoints_that_of_the_newer_era_is_the_newest_however_few_its_epochs() -> None:
    back = Place(90, b"b" * 32, era=1)
    records = run_at(back, back, at(80), at(100))
    assert complete_places(saved_by_stage(records), NUM_STAGES) == {back, at(80), at(100)}
    assert newest_complete(saved_by_stage(records), NUM_STAGES) == back
    records[1] = member("m1", 1, back, at(80), at(100))
    assert newest_complete(saved_by_stage(records), NUM_STAGES) == at(100)


@pytest.mark.parametrize("seed", range(30))
def test_the_two_newest_complete_checkpoints_are_kept_whatever_the_others_save(seed: int) -> None:
    rng = random.Random(seed)
    disks: list[list[Place]] = [[] for _ in range(NUM_STAGES)]  # newest first
    complete: list[Place] = []
    for epoch in range(10, 400, 10):
        for stage in range(NUM_STAGES):
            if rng.random() < 0.7:  # else its disk is full
                disks[stage].insert(0, at(epoch))
        for stage in rng.sample(range(NUM_STAGES), NUM_STAGES):
            seen = {number: set(disk) for number, disk in enumerate(disks)}
            keep = states_to_keep(disks[stage], seen, NUM_STAGES)
            disks[stage] = [place for place in disks[stage] if place in keep]
            assert len(keep) <= 4 and (not seen[stage] or max(seen[stage]) in keep)
        seen = {number: set(disk) for number, disk in enumerate(disks)}
        before = complete
        complete = sorted(place for place in seen[0] if is_complete(place, seen, NUM_STAGES))
        assert set(before[-NUM_COMPLETE:]) <= set(complete) or len(complete) >= NUM_COMPLETE


def test_what_a_run_went_back_to_is_kept_beside_what_comes_after() -> None:
    """Two states of epoch 20, one of them of the history that was left, are not the two newest that anybody goes back to."""
    base, left = Place(10, b"a" * 32), Place(20, b"b" * 32)
    again = Place(20, b"c" * 32, era=1)
    seen = {stage: {base, left, again} for stage in range(2)}
    assert {base, again} <= states_to_keep([again, left, base], seen, 2)
    assert states_to_keep([left, base], {stage: {base, left} for stage in range(2)}, 2) == {left, base}
