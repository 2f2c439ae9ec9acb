"""Copies: checkpoints of stages that too few disks have, on the disks of nodes that hold other stages. Pure, but for `CopyStore`.

A stage with one replica has one disk; when that is gone, so is what the stage has learned. So when a checkpoint is complete (all
stages and the ends have saved it), and fewer than `NUM_DISKS` peers have the state of some stage, a node that does not hold that
stage fetches it and keeps it in a folder of its own. Which node: the first by rendezvous hashing, the same for every checkpoint of
a stage, or the next ones if that one does not do it in time. A node keeps as many copies as its record can tell of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.cache import disk_error
from swarm.epoch.messages import Commit, Place
from swarm.member_record import MAX_COPIES, MemberRecord
from swarm.records import ShardState
from swarm.run_store import RunStore
from swarm.training.member_config import MembershipConfig
from swarm.training.parameters import StageState
from swarm.training.rollback import complete_places, newest, saved_by_stage
from swarm.training.saved_states import SavedStates

NUM_DISKS = 2
"""Peers that should have the state of each stage at the newest complete checkpoint."""
TURN_S = 20.0
"""Beside the time that the download takes, after so long the next node in the order makes the copy."""
FIRST_PAUSE_S = 10.0
"""After a copy could not be made; twice as long after each further time."""
LONGEST_PAUSE_S = 300.0
NUM_KEPT = 2
"""Copies of each stage."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The state of a stage at a place."""

    stage: int
    place: Place


def safe_place(records: Sequence[MemberRecord], num_stages: int) -> Place | None:
    """The newest place whose states are all on so many disks that one may go: others must keep theirs of it, too."""
    complete = complete_places(saved_by_stage(records), num_stages)
    return newest(p for p in complete if all(len(_peers_of(records, s, p)) >= NUM_DISKS for s in range(num_stages)))


def missing_copies(records: Sequence[MemberRecord], num_stages: int) -> list[Copy]:
    """States of the newest complete checkpoint that fewer than NUM_DISKS peers have."""
    place = newest(complete_places(saved_by_stage(records), num_stages))
    if place is None:
        return []
    missing = []
    for stage in range(num_stages):
        if 0 < len(_peers_of(records, stage, place)) < NUM_DISKS:
            missing.append(Copy(stage, place))
    return missing


def _peers_of(records: Sequence[MemberRecord], stage: int, place: Place) -> set[str]:
    return {r.peer_id for r in records if place in r.places_of(stage) and r.state != ShardState.LEAVING}


def turn_of(peer_id: str, records: Sequence[MemberRecord], copy: Copy, run_id: bytes) -> int | None:
    """How many nodes come before this one in making a copy; None: it has the state, or is no node of the run."""
    present = [record for record in records if record.state == ShardState.ONLINE]
    have = {record.peer_id for record in present if copy.place in record.places_of(copy.stage)}
    holders = {record.peer_id for record in present if record.stage == copy.stage}
    ends_stage = max((record.stage for record in present), default=0)
    nodes = {record.peer_id for record in present if record.stage != ends_stage or record.is_keeper} - have - holders
    if peer_id not in nodes:
        return None

    def rank(one: str) -> bytes:
        return hashlib.sha256(run_id + bytes([copy.stage % 256]) + one.encode()).digest()

    return sorted(nodes, key=rank).index(peer_id)


@dataclass(frozen=True, slots=True)
class _Failed:
    """A copy could not be made."""

    num_times: int
    until_s: float
    """It is left alone."""


@dataclass
class CopyWatch:
    """Sees from one look at the records to the next how long a copy has been missing."""

    peer_id: str
    run_id: bytes
    state_bytes: Sequence[int]
    """Of each stage, and of the ends."""
    _since_s: dict[Copy, float] = field(default_factory=dict)
    _failed: dict[Copy, _Failed] = field(default_factory=dict)

    def look(self, records: Sequence[MemberRecord], now_s: float) -> list[Copy]:
        """All copies that it is our turn to make. now_s: of a clock that only goes forward."""
        missing = missing_copies(records, len(self.state_bytes))
        self._since_s = {copy: self._since_s.get(copy, now_s) for copy in missing}
        self._failed = {copy: failed for copy, failed in self._failed.items() if copy in self._since_s}
        return [copy for copy in missing if self._is_due(copy, records, now_s)]

    def failed(self, copy: Copy, now_s: float) -> None:
        """It could not be made: leave it alone for a while."""
        num_times = self._failed[copy].num_times + 1 if copy in self._failed else 1
        pause_s = min(FIRST_PAUSE_S * 2 ** min(num_times - 1, 16), LONGEST_PAUSE_S)
        self._failed[copy] = _Failed(num_times, now_s + pause_s)

    def turn_s(self, stage: int) -> float:
        """How long a node has to make a copy of a stage, from donors that give at the default rate."""
        return TURN_S + self.state_bytes[stage] / (MembershipConfig().donor_mib_per_s * 2**20)

    def _is_due(self, copy: Copy, records: Sequence[MemberRecord], now_s: float) -> bool:
        if copy in self._failed and now_s < self._failed[copy].until_s:
            return False
        turn = turn_of(self.peer_id, records, copy, self.run_id)
        return turn is not None and now_s - self._since_s[copy] >= turn * self.turn_s(copy.stage)


class CopyStore:
    """Copies on this disk: ROOT/runs/RUN_ID/copies, files as in SavedStates. Blocking; raises UserError for the disk's trouble."""

    def __init__(self, store: RunStore, stage: int) -> None:
        """stage: the one that this node holds; what is here of it belongs to its own states, and goes there."""
        stages = range(store.spec.num_stages)
        self._stage, self._store = stage, store
        self._copies = {one: SavedStates(store.folder / "copies", store.run_id, one) for one in stages}
        self._own = {one: SavedStates(store.folder / "states", store.run_id, one) for one in stages}
        self._adopt()
        self.places: tuple[tuple[int, Place], ...] = ()
        """For the record."""
        self.look()

    def states(self, stage: int) -> SavedStates:
        """Those of one stage, the same ones each time: they know which files turned out to be damaged."""
        return self._copies.get(stage) or SavedStates(self._store.folder / "copies", self._store.run_id, stage)

    def look(self) -> bool:
        """Whether other copies are here than before: one may have turned out to be damaged."""
        before = self.places
        stages = [stage for stage in self._copies if stage != self._stage]
        found = [(stage, saved.place) for stage in stages for saved in self.states(stage).found()[:NUM_KEPT]]
        self.places = tuple(sorted(found, key=lambda one: one[1].rank)[:MAX_COPIES])
        return self.places != before

    def is_here(self, copy: Copy) -> bool:
        """Whether this disk has the state already: as a copy, or because a replica of that stage uses the same folder."""
        saved = (*self._own[copy.stage].found(), *self.states(copy.stage).found())
        return any(one.place == copy.place for one in saved)

    def has_place_for(self, copy: Copy) -> bool:
        """Whether it would be among the copies that are kept."""
        return sum(place.rank <= copy.place.rank for _, place in self.places) < MAX_COPIES

    def keep(self, copy: Copy, commit: Commit | None, state: StageState) -> None:
        """Write a copy down. Older ones that others will not be told of any more are removed."""
        self.states(copy.stage).save(copy.place, commit, state)
        self.look()
        for stage, states in self._copies.items():
            if stage != self._stage:  # those are for whoever else uses the folder
                states.prune([place for its_stage, place in self.places if its_stage == stage])

    def _adopt(self) -> None:
        own = self._own[self._stage]
        try:
            for saved in self.states(self._stage).found():
                own.folder.mkdir(parents=True, exist_ok=True)
                os.replace(saved.path, own.folder / saved.path.name)
        except OSError as error:
            raise disk_error(self._store.folder, error) from error
