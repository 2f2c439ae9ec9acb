"""When a run goes back to a checkpoint, and to which. Pure.

A stage whose newest state nobody has any more cannot go on, and so neither can the run. If every stage and the ends still have an
older state on some disk, all go back to the newest such place, in a new era of the history. Each member decides for itself from the
records; whoever decides the same comes to the same place (Place.rolled_back), and who decided otherwise follows the newer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from swarm.epoch.messages import Place
from swarm.member_record import MemberRecord
from swarm.records import ShardState
from swarm.training.checkpoints import is_complete


def newest(places: Iterable[Place]) -> Place | None:
    """Where everybody has to go in the end."""
    return min(places, key=lambda place: place.rank, default=None)


def saved_by_stage(records: Iterable[MemberRecord]) -> dict[int, set[Place]]:
    """What is on the members' disks."""
    saved: dict[int, set[Place]] = {}
    for record in records:
        for stage in {record.stage, *(stage for stage, _ in record.copies)}:
            saved.setdefault(stage, set()).update(record.places_of(stage))
    return saved


def complete_places(saved: Mapping[int, set[Place]], num_stages: int) -> set[Place]:
    """The places of which every stage and the ends have the state on some disk."""
    return {place for place in saved.get(0, ()) if is_complete(place, saved, num_stages)}


def newest_complete(saved: Mapping[int, set[Place]], num_stages: int) -> Place | None:
    """The newest of them: where a run can go on if newer states are lost."""
    return newest(complete_places(saved, num_stages))


def lost_stages(records: Sequence[MemberRecord], num_stages: int) -> tuple[list[int], list[int]]:
    """(stages without any member, stages whose members all lack the newest state)."""
    present = [record for record in records if record.state != ShardState.LEAVING]
    place = newest(record.place for record in present if record.lineage)
    empty = [stage for stage in range(num_stages) if not any(record.stage == stage for record in present)]
    behind = [
        stage
        for stage in range(num_stages)
        if stage not in empty
        and not any(r.stage == stage and r.place == place and r.state == ShardState.ONLINE for r in present)
    ]
    return empty, behind


@dataclass(frozen=True, slots=True)
class RollBack:
    """A decision to go back."""

    newest: Place
    """Where the run stands still."""
    lost: tuple[int, ...]
    """Stages whose members all lack the state there."""
    base: Place
    """Of which every stage has the state on some disk."""

    @property
    def goal(self) -> Place:
        """Where the run goes on."""
        return self.base.rolled_back(self.newest.era + 1)


@dataclass
class Watch:
    """Sees from one look at the records to the next how long a run has stood still."""

    num_stages: int
    patience_s: float
    _seen: Place | None = None
    _since_s: float = 0.0

    def look(self, records: Sequence[MemberRecord], own: Place, now_s: float) -> RollBack | None:
        """What to do; None: nothing, or nothing yet. now_s: of a clock that only goes forward.

        own: where this member is. Only who is at the newest place itself decides: others may invent places.
        """
        place = newest(record.place for record in records if record.lineage)
        _, behind = lost_stages(records, self.num_stages)
        if place != self._seen or place != own or not behind:
            self._seen, self._since_s = place, now_s
            return None
        if place is None or now_s - self._since_s < self.patience_s:
            return None
        base = newest_complete(saved_by_stage(records), self.num_stages)
        return None if base is None else RollBack(place, tuple(behind), base)
