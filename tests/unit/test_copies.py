"""Which states are copied to other nodes' disks, and by whom."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from node.training import copier
from swarm.epoch.messages import Commit, Place, Term
from swarm.errors import PeerFailed, UserError
from swarm.identity import Identity
from swarm.member_record import MAX_COPIES, MemberRecord, open_member, sign_member
from swarm.records import ShardState
from swarm.run_spec import sign_spec
from swarm.run_store import RunStore
from swarm.span import Span
from swarm.training import copies as copies_module
from swarm.training import saved_states
from swarm.training.checkpoints import states_to_keep
from swarm.training.copies import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    TURN_S,
    Copy,
    CopyStore,
    CopyWatch,
    missing_copies,
    safe_place,
    turn_of,
)
from swarm.training.parameters import StageState
from swarm.training.rollback import newest_complete, saved_by_stage
from swarm.training.wire import sign_commit
from tests.support.runs import CONFIG, make_member, make_spec

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
    seconds = 75
    watches = {name: CopyWatch(name, b"r" * 32, [seconds * 32 * 2**20, 0, 0]) for name in "abctu"}
    assert [name for name, watch in watches.items() if watch.look(run(), 5.0)] == [first]
    early = 5.0 + TURN_S + seconds - 1
    assert [name for name, watch in watches.items() if watch.look(run(), early)] == [first], "a large state takes long"
    later = {name: watch.look(run(), early + 1) for name, watch in watches.items()}
    assert {name for name, copies in later.items() if copies} == {first, second} and later[second] == [Copy(0, NEW)]


def test_the_same_node_copies_a_stage_at_every_checkpoint() -> None:
    nodes = [member("a", 0, NEW), *(member(name, 1) for name in "bcdefghij")]
    places = [Place(epoch, bytes([epoch]) * 32) for epoch in range(30)]
    for name in "bcdefghij":
        assert len({turn_of(name, nodes, Copy(0, place), b"r" * 32) for place in places}) == 1


def test_a_copy_that_cannot_be_made_waits_longer_each_time_and_holds_up_no_other() -> None:
    alone = [member("a", 0, NEW), member("b", 1, NEW), member("t", 2, NEW), member("c", 1)]
    watch = CopyWatch("c", b"r" * 32, [0, 0, 0])
    watch.look(alone, 5.0)
    now_s, pauses = 5.0 + 3 * TURN_S, []
    both = watch.look(alone, now_s)
    assert both == [Copy(0, NEW), Copy(2, NEW)]
    for _ in range(8):
        watch.failed(both[0], now_s)
        assert watch.look(alone, now_s) == both[1:]
        since_s = now_s
        while both[0] not in watch.look(alone, now_s):
            now_s += 1.0
        pauses.append(now_s - since_s)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S] and pauses[-1] == LONGEST_PAUSE_S


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


LEADER = Identity.generate()
NUM_BLOCKS = 12


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    config = CONFIG | {"num_hidden_layers": NUM_BLOCKS}
    stages = tuple(Span(start, start + 1) for start in range(NUM_BLOCKS))
    spec = make_spec(config=config, stages=stages, initial_digests=(b"d" * 16,) * (NUM_BLOCKS + 1))
    return RunStore.save(sign_spec(spec, LEADER), spec.run_id(LEADER.peer_id), tmp_path)


def commit_to(epoch: int, store: RunStore) -> Commit:
    members = ((LEADER.peer_id, 0),)
    commit = Commit(epoch - 1, b"p" * 32, Term(1, LEADER.peer_id), 0, 1, 1.0, False, (b"d" * 32,), members, 1.0)
    return sign_commit(commit, store.run_id, LEADER)


def keep(copies: CopyStore, store: RunStore, stage: int, epoch: int) -> Copy:
    commit = commit_to(epoch, store)
    copy = Copy(stage, commit.after)
    copies.keep(copy, commit, StageState(torch.ones(100), torch.zeros(100), torch.zeros(100), epoch))
    return copy


def files_of(store: RunStore) -> set[str]:
    return {path.name for path in (store.folder / "copies").iterdir()}


def test_only_copies_that_others_are_told_of_stay_on_the_disk(store: RunStore) -> None:
    copies = CopyStore(store, 0)
    for epoch in range(10, 210, 10):
        made = keep(copies, store, 1 + epoch // 10 % NUM_BLOCKS, epoch)
        assert (made.stage, made.place) in copies.places and len(files_of(store)) == len(copies.places) <= MAX_COPIES
    assert [place.epoch for _, place in copies.places] == [200, 190, 180, 170]


def test_a_copy_for_which_there_is_no_place_is_not_wanted(store: RunStore) -> None:
    copies = CopyStore(store, 0)
    made = [keep(copies, store, stage, 10) for stage in range(1, MAX_COPIES + 1)]
    assert not copies.has_place_for(Copy(MAX_COPIES + 1, made[0].place)), (
        "it would push out one that is as new, and so on"
    )
    assert copies.has_place_for(Copy(1, Place(11, b"n" * 32)))


def test_copies_of_the_own_stage_belong_to_others_who_use_the_folder(store: RunStore) -> None:
    one, other = CopyStore(store, 0), CopyStore(store, 1)
    kept = keep(other, store, 0, 10)
    keep(one, store, 2, 20)
    assert other.is_here(kept) and len(files_of(store)) == 2


def test_a_copy_that_turns_out_to_be_damaged_is_not_announced_any_more_and_made_again(store: RunStore) -> None:
    copies = CopyStore(store, 0)
    copy = keep(copies, store, 1, 10)
    states = copies.states(1)
    (saved,) = states.found()
    content = saved.path.read_bytes()
    saved.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with states.open(saved) as opened, pytest.raises(UserError, match="cannot be used"):
        opened.read_piece(0)
    assert copies.places and copies.look() and copies.places == ()
    assert not copies.is_here(copy)
    keep(copies, store, 1, 10)
    assert copies.places == ((1, copy.place),) and saved.path.read_bytes() == content


class Swarm:
    """What a copier sees of the others, and what it asks them for."""

    def __init__(self, store: RunStore, records: list[MemberRecord], refuses: int | None = None) -> None:
        self.peer_id, self.host, self.directory = "me", None, self
        self.asked: list[int] = []
        self.looks = 0
        self._store, self._records, self._refuses = store, records, refuses
        self.is_over = asyncio.Event()

    async def find_members(self, run_id: bytes, stages: object) -> list[MemberRecord]:
        self.looks += 1
        if self.looks > 5:
            self.is_over.set()
        return self._records

    async def fetch_state(
        self, host: object, run_id: bytes, stage: int, place: Place, *rest: object
    ) -> tuple[SimpleNamespace, StageState]:
        self.asked.append(stage)
        if stage == self._refuses:
            raise PeerFailed("its disk is damaged")
        state = StageState(torch.ones(100), torch.zeros(100), torch.zeros(100), 10)
        return SimpleNamespace(saved=SimpleNamespace(commit=commit_to(10, self._store))), state

    def hear_orders_of(self, commit: Commit) -> None: ...

    def has_news(self) -> None: ...


async def copy_for_a_while(swarm: Swarm, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> CopyStore:
    monkeypatch.setattr(copier, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(copier, "fetch_state", swarm.fetch_state)
    monkeypatch.setattr(copier, "_sizes_of", lambda spec: [100] * spec.num_stages)
    copies = CopyStore(store, 0)
    task = asyncio.create_task(copier.Copier(swarm, store, swarm, copies).run())  # type: ignore[arg-type]
    async with asyncio.timeout(30):
        await swarm.is_over.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return copies


def lone_stages(store: RunStore) -> list[MemberRecord]:
    """Everything is on two disks, but for stages 1 and 2."""
    place = commit_to(10, store).after
    records = [member("me", 0, place), member("other", 0, place)]
    for stage in range(1, store.spec.num_stages):
        records += [member(f"{stage}.{number}", stage, place) for number in range(1 if stage in (1, 2) else 2)]
    return [one if one.peer_id in ("me", "1.0", "2.0") else replace(one, state=ShardState.JOINING) for one in records]


async def test_a_donor_that_fails_keeps_no_other_copy_from_being_made(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies_module, "TURN_S", 0.0)
    swarm = Swarm(store, lone_stages(store), refuses=1)
    copies = await copy_for_a_while(swarm, store, monkeypatch)
    assert swarm.asked == [1, 2], "and the donor is not asked again at once"
    assert [stage for stage, _ in copies.places] == [2]


async def test_nothing_is_downloaded_for_which_the_disk_has_no_room(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies_module, "TURN_S", 0.0)
    monkeypatch.setattr(saved_states.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * 4 * 100 - 1))
    swarm = Swarm(store, lone_stages(store))
    await copy_for_a_while(swarm, store, monkeypatch)
    assert swarm.asked == [] and swarm.looks > 5
