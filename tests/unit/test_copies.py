"""Which states are copied to other nodes' disks, and by whom."""

from __future__ import annotations

from swarm.epoch.messages import Place
from swarm.identity import Identity
from swarm.member_record import MemberRecord, open_member, sign_member
from swarm.training.checkpoints import states_to_keep
from swarm.training.copies import TURN_S, Copy, CopyWatch, missing_copies, safe_place, turn_of
from swarm.training.rollback import newest_complete, saved_by_stage
from tests.support.runs import make_member

NUM_STAGES = 3  # two and the ends
OLD, NEW = Place(10, b"o" * 32), Place(20, b"n" * 32)


def member(name: str, stage: int, *saved: Place, copies: tuple[tuple[int, Place], ...] = ()) -> MemberRecord:
    return make_member(name, stage=stage, saved=saved, copies=copies)


def run(*copies: MemberRecord) -> list[MemberRecord]:
    """Stage 0 on one disk, stage 1 and the ends on two."""
    nodes = [member("a", 0, NEW, OLD), member("b", 1, NEW, OLD), member("c", 1, NEW, OLD)]
    return [*nodes, member("t", 2, NEW, OLD), member("u", 2, NEW), *copies]


def test_what_one_peer_alone_has_of_the_newest_complete_checkpoint_is_missing_a_copy() -> None:
    assert missing_copies(run(), NUM_STAGES) == [Copy(0, NEW)]
    assert missing_copies([*run()[:-1], member("d", 0, NEW)], NUM_STAGES) == [Copy(2, NEW)]
    assert missing_copies(run()[1:], NUM_STAGES) == [], "of what nobody has no copy can be made"
    made = [one if one.peer_id != "b" else member("b", 1, NEW, OLD, copies=((0, NEW),)) for one in run()]
    assert missing_copies(made, NUM_STAGES) == []


def test_nodes_of_other_stages_take_turns_and_trainers_make_none() -> None:
    turns = {name: turn_of(name, run(), Copy(0, NEW), b"r" * 32) for name in "abctu"}
    assert turns["a"] is turns["t"] is turns["u"] is None
    assert sorted(turn for turn in turns.values() if turn is not None) == [0, 1]
    first, second = sorted("bc", key=lambda name: turns[name] or 0)
    watches = {name: CopyWatch(name, b"r" * 32, NUM_STAGES) for name in "abctu"}
    assert [name for name, watch in watches.items() if watch.look(run(), 5.0)] == [first]
    later = {name: watch.look(run(), 5.0 + TURN_S) for name, watch in watches.items()}
    assert {name for name, copy in later.items() if copy} == {first, second} and later[second] == Copy(0, NEW)


def test_a_copy_makes_a_checkpoint_complete_when_the_stages_own_disk_is_gone() -> None:
    left = [one for one in run(member("d", 1, copies=((0, OLD),))) if one.peer_id != "a"]
    assert newest_complete(saved_by_stage(left), NUM_STAGES) == OLD
    assert newest_complete(saved_by_stage(run()[1:]), NUM_STAGES) is None


def test_the_newest_place_that_hangs_on_no_disk_is_kept_beside_the_newest_complete_ones() -> None:
    places = [Place(epoch, bytes([epoch]) * 32) for epoch in (50, 40, 30, 20, 10)]
    everywhere = {stage: set(places) for stage in range(NUM_STAGES)}
    assert states_to_keep(places, everywhere, NUM_STAGES) == set(places[:2])
    assert states_to_keep(places, everywhere, NUM_STAGES, places[3]) == {*places[:2], places[3]}
    assert safe_place(run(), NUM_STAGES) is None
    two = [*run(member("d", 1, copies=((0, OLD),))), member("v", 2, OLD)]
    assert safe_place(two, NUM_STAGES) == OLD


def test_a_record_tells_of_copies() -> None:
    identity = Identity.generate()
    record = make_member(identity.peer_id, stage=1, copies=((0, NEW), (2, OLD)))
    again = open_member(sign_member(record, identity))
    assert again == record and again.places_of(0) == (NEW,) and again.places_of(1) == ()
