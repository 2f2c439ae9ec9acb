"""Copies: checkpoints of stages that too few disks have, on the disks of nodes that hold other stages. Pure, but for `CopyStore`.

A stage with one replica has one disk; when that is gone, so is what the stage has learned. So when a checkpoint is complete (all
stages and the ends have saved it), and fewer than `NUM_DISKS` peers have the state of some stage, a node that does not hold that
stage fetches it and keeps it in a folder of its own. Which node: the first by rendezvous hashing, or the next ones if that one does
not do it in time.
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
from swarm.training.parameters import StageState
from swarm.training.rollback import complete_places, newest, saved_by_stage
from swarm.training.saved_states import SavedStates

NUM_DISKS = 2
"""Peers that should have the state of each stage at the newest complete checkpoint."""
TURN_S = 20.0
"""After so long the next node in the order makes the copy."""
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
        return hashlib.sha256(run_id + copy.place.lineage + bytes([copy.stage % 256]) + one.encode()).digest()

    return sorted(nodes, key=rank).index(peer_id)


@dataclass
class CopyWatch:
    """Sees from one look at the records to the next how long a copy has been missing."""

    peer_id: str
    run_id: bytes
    num_stages: int
    _since_s: dict[Copy, float] = field(default_factory=dict)

    def look(self, records: Sequence[MemberRecord], now_s: float) -> Copy | None:
        """A copy that it is our turn to make. now_s: of a clock that only goes forward."""
        missing = missing_copies(records, self.num_stages)
        self._since_s = {copy: self._since_s.get(copy, now_s) for copy in missing}
        for copy in missing:
            turn = turn_of(self.peer_id, records, copy, self.run_id)
            if turn is not None and now_s - self._since_s[copy] >= turn * TURN_S:
                return copy
        return None


class CopyStore:
    """Copies on this disk: ROOT/runs/RUN_ID/copies, files as in SavedStates. Blocking; raises UserError for the disk's trouble."""

    def __init__(self, store: RunStore, stage: int) -> None:
        """stage: the one that this node holds; what is here of it belongs to its own states, and goes there."""
        self._store, self._stage = store, stage
        self._adopt(stage)
        self.places: tuple[tuple[int, Place], ...] = ()
        """For the record."""
        self._look()

    def states(self, stage: int) -> SavedStates:
        """Those of one stage."""
        return SavedStates(self._store.folder / "copies", self._store.run_id, stage)

    def is_here(self, copy: Copy) -> bool:
        """Whether this disk has the state already: as a copy, or because a replica of that stage uses the same folder."""
        own = SavedStates(self._store.folder / "states", self._store.run_id, copy.stage)
        return any(saved.place == copy.place for saved in (*own.found(), *self.states(copy.stage).found()))

    def keep(self, copy: Copy, commit: Commit | None, state: StageState) -> None:
        """Write a copy down; of older ones of the stage only the newest stay."""
        states = self.states(copy.stage)
        states.save(copy.place, commit, state)
        states.prune([saved.place for saved in states.found()[:NUM_KEPT]])
        self._look()

    def _look(self) -> None:
        stages = range(self._store.spec.num_stages)
        places = [(s, saved.place) for s in stages if s != self._stage for saved in self.states(s).found()[:NUM_KEPT]]
        newest_first = sorted(places, key=lambda one: one[1].rank)
        self.places = tuple(newest_first[:MAX_COPIES])

    def _adopt(self, stage: int) -> None:
        own = SavedStates(self._store.folder / "states", self._store.run_id, stage)
        try:
            for saved in self.states(stage).found():
                own.folder.mkdir(parents=True, exist_ok=True)
                os.replace(saved.path, own.folder / saved.path.name)
        except OSError as error:
            raise disk_error(self._store.folder, error) from error
