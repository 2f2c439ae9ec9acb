"""Coordinator: one epoch in the eyes of the member that leads it.

It waits for everybody who took part in the last step, leases microbatches, counts what ledgers hold, fences what is lost, and when
every stage and the ends hold every microbatch exactly once runs the round and decides the Commit.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from swarm.epoch.messages import (
    EARLY,
    Abort,
    Commit,
    Committed,
    Confirm,
    Course,
    Done,
    Excluded,
    Failed,
    GroupMember,
    Hello,
    Lead,
    Lease,
    Message,
    Owner,
    Place,
    Prepare,
    Rate,
    Report,
    RoundFailed,
    Term,
    UnitResult,
    Void,
    equal_shares,
)

Letter = tuple[str, Message]
"""To whom, what."""

# A peer that so many leases failed at, or rounds in a row, goes for this epoch.
_MAX_FAILED_LEASES = 3
_MAX_OUTDATED_LEASES = 100
_MAX_FAILED_ROUNDS = 2
# Ticks for which an epoch waits for a member of the last step that is there but does not say hello (it downloads, perhaps).
_MAX_TICKS_WAITING = 10


class Phase(enum.Enum):
    COLLECTING = "collecting"
    ROUND = "round"
    COMMITTED = "committed"


@dataclass(slots=True)
class _Peer:
    stage: int
    ledger_id: int
    early_ledger_id: int
    capacity: int
    is_reachable: bool
    measured: tuple[Rate, ...]
    is_ready: bool


@dataclass(slots=True)
class _Lease:
    trainer: str
    serial: int
    owners: tuple[Owner, ...]


@dataclass(slots=True)
class _Counts:
    """What belongs where. A key is (stage, unit)."""

    owner: dict[tuple[int, int], int] = field(default_factory=dict)
    """The only ledger that the gradient may go into, until that is fenced."""
    held: dict[tuple[int, int], int] = field(default_factory=dict)
    """The ledger that has it."""
    held_by: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Units of each ledger."""

    def hold(self, stage: int, unit: int, ledger_id: int) -> None:
        self.owner[stage, unit] = self.held[stage, unit] = ledger_id
        self.held_by[ledger_id].add(unit)

    def forget(self, ledger_id: int) -> None:
        self.owner = {key: ledger for key, ledger in self.owner.items() if ledger != ledger_id}
        self.held = {key: ledger for key, ledger in self.held.items() if ledger != ledger_id}
        self.held_by.pop(ledger_id, None)


class Coordinator:
    """Leads one epoch under one term. Every method returns the letters to be sent, some of them to its own process."""

    def __init__(
        self,
        me: str,
        place: Place,
        term: Term,
        course: Course,
        orders: bytes,
        known: Mapping[str, int],
        share_out: Callable[[Sequence[float | None]], Sequence[int]] = equal_shares,
    ) -> None:
        """orders: in force at the place. known: peer and stage of everybody who took part in the last step and is not known to be gone.

        share_out: what part of a vector each replica sums, by their rates in bytes/s (None: not measured, 0: nobody can reach it).
        """
        self._share_out = share_out
        self.me, self.place, self.term, self.rules = me, place, term, course.rules_at(place, orders)
        self._course, self._orders = course, orders
        self.phase = Phase.COLLECTING
        self.attempt = 0
        self.commit: Commit | None = None
        self.excluded: dict[str, str] = {}
        """Peers, and why."""
        self._stage_of_excluded: dict[str, int] = {}
        self._known = dict(known)
        self._waiting = set(known)
        self._ticks_waiting = 0
        self._peers: dict[str, _Peer] = {}
        self._counts = _Counts()
        self._fenced: set[int] = set()
        self._results: dict[int, UnitResult] = {}
        self._poisoned: set[int] = set()
        self._leases: dict[int, _Lease] = {}
        self._serial = 0
        self._group: dict[str, _Peer] = {}
        self._reports: dict[str, Report] = {}
        self._acks: set[str] = set()
        self._failed_leases: Counter[tuple[str, bool]] = Counter()
        self._failed_rounds: Counter[str] = Counter()

    @property
    def num_done(self) -> int:
        """Microbatches that every stage and the ends hold."""
        return sum(self._is_done(unit) for unit in self.rules.units_of(self.place.epoch))

    @property
    def num_peers(self) -> Counter[int]:
        """Members of each stage that are here, with their weights."""
        return Counter(peer.stage for peer in self._peers.values() if peer.is_ready)

    @property
    def waits_for(self) -> frozenset[str]:
        return frozenset(self._waiting)

    def start(self) -> list[Letter]:
        return [(peer, Lead(self.place, self.term)) for peer in sorted(self._waiting)]

    def tick(self) -> list[Letter]:
        """Say again what may have been lost; everything may come twice."""
        if self.phase is Phase.COMMITTED:
            assert self.commit is not None
            return [(peer, self.commit) for peer in sorted(self._others() - self._acks)]
        self._admit_if_needed()
        self._ticks_waiting += 1
        if self._waiting and self._ticks_waiting > _MAX_TICKS_WAITING:
            self._waiting.clear()
            return self._go_on()
        letters = self.start() + [
            (peer, Lead(self.place, self.term)) for peer in sorted(self._others() - self._waiting)
        ]
        if self.phase is Phase.ROUND:
            letters += [letter for letter in self._prepare() if letter[0] not in self._reports]
        elif self.attempt > 0:
            letters += [(peer, Abort(self.place, self.term, self.attempt - 1)) for peer in sorted(self._peers)]
        letters += [(lease.trainer, self._lease_message(unit, lease)) for unit, lease in sorted(self._leases.items())]
        return letters

    def receive(self, peer: str, message: Message) -> list[Letter]:
        """What a member says, who speaks of this epoch."""
        if isinstance(message, Hello):
            return self._on_hello(peer, message)
        if isinstance(message, Committed):
            return self._on_committed(peer)
        if getattr(message, "term", None) != self.term or peer not in self._peers or self.phase is Phase.COMMITTED:
            return []
        if isinstance(message, Done):
            return self._on_done(peer, message)
        if isinstance(message, Failed):
            return self._on_failed(peer, message)
        if isinstance(message, Report):
            return self._on_report(peer, message)
        if isinstance(message, RoundFailed):
            return self._on_round_failed(peer, message)
        return []

    def lose(self, peer: str) -> list[Letter]:
        """Nothing is heard of a peer any more."""
        self._waiting.discard(peer)
        if self.phase is Phase.COMMITTED:
            self._peers.pop(peer, None)
            return self._commit_alone()
        letters: list[Letter] = []
        gone = self._peers.pop(peer, None)
        if gone is not None:
            letters += self._fence(gone.ledger_id)
            self._counts.forget(gone.early_ledger_id)
            for unit, lease in list(self._leases.items()):
                if lease.trainer == peer:
                    del self._leases[unit]
            if self.phase is Phase.ROUND and peer in self._group:
                letters += self._abort()
        return letters + self._go_on()

    def exclude(self, peer: str, reason: str) -> list[Letter]:
        """Go on without a peer that spoils this epoch."""
        if peer in self.excluded or peer == self.me or peer not in self._peers:
            return []
        self.excluded[peer] = reason
        self._stage_of_excluded[peer] = self._peers[peer].stage
        return [(peer, Excluded(self.place, self.term, reason)), *self.lose(peer)]

    def reconsider(self) -> list[Letter]:
        """The owner has said something."""
        return self._go_on()

    def _admit_if_needed(self) -> None:
        """A stage that has nobody else gets its excluded replicas another chance, one a tick."""
        present = self.num_peers
        for peer, stage in self._stage_of_excluded.items():
            if stage not in present:
                del self.excluded[peer], self._stage_of_excluded[peer]
                self._failed_rounds[peer] = 0
                self._failed_leases[peer, True] = self._failed_leases[peer, False] = 0
                return

    # What members say.

    def _on_hello(self, peer: str, hello: Hello) -> list[Letter]:
        if peer in self.excluded:
            return [(peer, Excluded(self.place, self.term, self.excluded[peer]))]
        if hello.term != self.term:
            return [(peer, Lead(self.place, self.term))]
        if self.phase is Phase.COMMITTED:
            assert self.commit is not None
            return [(peer, self.commit)]
        if not 0 <= hello.stage < self.rules.num_stages:
            return [(peer, Excluded(self.place, self.term, f"there is no stage {hello.stage} in this run"))]
        for ledger_id in {hello.ledger_id, hello.early_ledger_id} - {0}:  # 0: it has no second one
            if ledger_id in self._fenced:
                return [(peer, Void(self.place, self.term, ledger_id))]
            if any(
                ledger_id in (one.ledger_id, one.early_ledger_id) for other, one in self._peers.items() if other != peer
            ):
                return [(peer, Void(self.place, self.term, ledger_id))]  # one of the two lies, and we cannot tell who
        letters: list[Letter] = []
        known = self._peers.get(peer)
        if known is not None and (known.ledger_id, known.early_ledger_id) != (hello.ledger_id, hello.early_ledger_id):
            letters += self.lose(peer)
        elif known is not None:
            # An older letter may come later. Who loses its weights starts other ledgers.
            known.capacity, known.is_ready = hello.capacity, known.is_ready or hello.is_ready
            known.is_reachable, known.measured = hello.is_reachable, hello.measured
            return self._go_on()
        results = {result.unit: result for result in hello.results if result.is_sound}
        for unit in sorted(hello.units):
            is_counted = hello.stage != self.rules.ends_stage or unit in results
            if not self._is_training(unit) or (hello.stage, unit) in self._counts.held or not is_counted:
                is_early = unit >= EARLY and self.rules.delay > 0
                ledger_id = hello.early_ledger_id if is_early else hello.ledger_id
                self._fenced.add(ledger_id)
                return [*letters, (peer, Void(self.place, self.term, ledger_id))]
        for unit in hello.units:
            ledger_id = hello.early_ledger_id if unit >= EARLY else hello.ledger_id
            self._counts.hold(hello.stage, unit, ledger_id)
            if hello.stage == self.rules.ends_stage:
                self._results[unit] = results[unit]
        self._peers[peer] = _Peer(
            hello.stage,
            hello.ledger_id,
            hello.early_ledger_id,
            hello.capacity,
            hello.is_reachable,
            hello.measured,
            hello.is_ready,
        )
        self._waiting.discard(peer)
        return letters + self._go_on()

    def _on_done(self, peer: str, done: Done) -> list[Letter]:
        unit, trainer = done.result.unit, self._peers[peer]
        is_known = self._is_training(unit) or unit in self.rules.units_of(self.place.epoch)
        if not is_known or trainer.stage != self.rules.ends_stage:
            return self.exclude(peer, f"it told of microbatch {unit}, which it cannot have run")
        lease = self._leases.get(unit)
        if lease is not None and (lease.trainer, lease.serial) == (peer, done.serial):
            del self._leases[unit]
        if not self._is_training(unit):
            # A held-out loss that is not finite would be none the next time either.
            self._results.setdefault(unit, done.result if done.result.is_sound else UnitResult(unit, 0, 0.0))
            return [(peer, Confirm(self.place, self.term, unit, done.ends_ledger, False)), *self._go_on()]
        letters: list[Letter] = []
        if self.phase is Phase.COLLECTING or unit >= EARLY:
            if not done.result.is_sound and not self._is_done(unit):
                self._poisoned.add(unit)
            for stage, ledger_id in enumerate(done.ledgers[: self.rules.ends_stage]):
                if self._counts.owner.get((stage, unit)) == ledger_id:
                    self._counts.hold(stage, unit, ledger_id)
            letters += self._confirm(peer, trainer, done)
        return letters + self._go_on()

    def _confirm(self, peer: str, trainer: _Peer, done: Done) -> list[Letter]:
        unit, key = done.result.unit, (self.rules.ends_stage, done.result.unit)
        ledger_id = trainer.early_ledger_id if unit >= EARLY else trainer.ledger_id
        if done.ends_ledger != ledger_id:
            return [(peer, Void(self.place, self.term, done.ends_ledger))]
        holder = self._counts.held.get(key)
        if holder is None and unit not in self._poisoned:
            self._counts.hold(*key, ledger_id)
            self._results[unit] = done.result
        is_first = self._counts.held.get(key) == ledger_id
        return [(peer, Confirm(self.place, self.term, unit, ledger_id, is_first))]

    def _on_failed(self, peer: str, failed: Failed) -> list[Letter]:
        lease = self._leases.get(failed.unit)
        if lease is None or (lease.trainer, lease.serial) != (peer, failed.serial):
            return []
        del self._leases[failed.unit]
        # With nobody to blame the owner had just changed its ledger or term; that does not happen for ever.
        blamed = failed.culprit if failed.culprit in {owner.peer for owner in lease.owners} else peer
        self._failed_leases[blamed, bool(failed.culprit)] += 1
        limit = _MAX_FAILED_LEASES if failed.culprit else _MAX_OUTDATED_LEASES
        if self._failed_leases[blamed, bool(failed.culprit)] >= limit:
            return [*self.exclude(blamed, f"microbatches failed there {limit} times: {failed.reason}"), *self._go_on()]
        return self._go_on()

    def _on_report(self, peer: str, report: Report) -> list[Letter]:
        if self.phase is not Phase.ROUND or report.attempt != self.attempt or peer not in self._group:
            return []
        self._reports[peer] = report
        if self._reports.keys() != self._group.keys():
            return []
        digests: list[bytes] = []
        for stage in range(self.rules.num_stages):
            votes = Counter(self._reports[p].digest for p, v in self._group.items() if v.stage == stage)
            (winner, _), *others = sorted(votes.items(), key=lambda vote: (-vote[1], vote[0]))
            if others:
                losers = [p for p, v in self._group.items() if v.stage == stage and self._reports[p].digest != winner]
                return self._blame(losers, "its sum of gradients differs from the other replicas'")
            digests.append(winner)
        return self._decide(tuple(digests))

    def _on_round_failed(self, peer: str, failed: RoundFailed) -> list[Letter]:
        if self.phase is not Phase.ROUND or failed.attempt != self.attempt or peer not in self._group:
            return []
        if failed.is_mismatch:
            ledger_id = self._peers[peer].ledger_id
            return [*self._fence(ledger_id), (peer, Void(self.place, self.term, ledger_id)), *self._go_on()]
        same_stage = {p for p, v in self._group.items() if v.stage == self._group[peer].stage} - {peer}
        culprits = sorted(failed.culprits & same_stage) or [peer]
        return self._blame(culprits, "the exchange of gradients failed because of it")

    def _on_committed(self, peer: str) -> list[Letter]:
        if self.phase is not Phase.COMMITTED or peer == self.me:
            return []
        self._acks.add(peer)
        assert self.commit is not None
        return [(self.me, self.commit)]

    # What follows.

    def _go_on(self) -> list[Letter]:
        """Lease what is missing, or run the round when nothing is."""
        if self.phase is Phase.COMMITTED or self._waiting or self.place.epoch >= self.rules.num_epochs:
            return []
        if self.phase is Phase.ROUND:
            return self._lease_early()
        needed = self.rules.min_replicas if self.place.epoch == 0 else 1
        num_trainers = sum(view.capacity > 0 and view.is_ready for view in self._peers.values())
        if any(self.num_peers[stage] < needed for stage in range(self.rules.num_stages)) or num_trainers < needed:
            return []
        has_begun = bool(self._leases or self._results or self._poisoned or self._counts.held)
        if self._course.is_paused and not has_begun:
            return []
        missing = [unit for unit in self.rules.units_of(self.place.epoch) if not self._is_done(unit)]
        if missing:
            return self._lease([unit for unit in missing if unit not in self._leases])
        if any(unit < EARLY for unit in self._poisoned):
            self._group = dict(self._peers)
            return self._decide(())
        self.phase = Phase.ROUND
        self._group = {peer: replace(view) for peer, view in self._peers.items()}
        self._reports = {}
        return [*self._prepare(), *self._lease_early()]

    def _lease_early(self) -> list[Letter]:
        """Begin with the next epoch, where the run allows its gradients to be computed before this one's step."""
        if self._course.is_paused or self.place.epoch + 1 >= self.rules.num_epochs:
            return []
        if any(stage not in self.num_peers for stage in range(self.rules.num_stages)):
            return []
        units = self.rules.early_units
        return self._lease([unit for unit in units if unit not in self._leases and not self._is_done(unit)])

    def _is_training(self, unit: int) -> bool:
        """Whether a unit is one of the epoch's, or an early one of the next, and no held-out data."""
        if unit >= EARLY:
            return unit in self.rules.early_units
        return unit < self.rules.num_units

    def _is_done(self, unit: int) -> bool:
        if not self._is_training(unit):
            return unit in self._results
        return unit in self._poisoned or all(
            (stage, unit) in self._counts.held for stage in range(self.rules.num_stages)
        )

    def _lease(self, units: list[int]) -> list[Letter]:
        """Give units to trainers with room, each time to the one with the largest share of its room free."""
        letters: list[Letter] = []
        running = Counter(lease.trainer for lease in self._leases.values())
        under_way = Counter(owner.ledger_id for lease in self._leases.values() for owner in lease.owners)
        for unit in units:
            free = {
                peer: running[peer] / view.capacity
                for peer, view in self._peers.items()
                if view.stage == self.rules.ends_stage and view.is_ready and running[peer] < view.capacity
            }
            if not free:
                break
            trainer = min(free, key=lambda peer: (free[peer], running[peer], peer))
            owners = tuple(self._choose_owner(stage, unit, under_way) for stage in range(self.rules.ends_stage))
            self._serial += 1
            lease = self._leases[unit] = _Lease(trainer, self._serial, owners)
            running[trainer] += 1
            under_way.update(owner.ledger_id for owner in owners)
            letters.append((trainer, self._lease_message(unit, lease)))
        return letters

    def _choose_owner(self, stage: int, unit: int, under_way: Counter[int]) -> Owner:
        """The owner that the unit has, or the replica with the fewest microbatches under way: who is faster gets more."""
        ledgers = {
            view.early_ledger_id if unit >= EARLY else view.ledger_id: peer
            for peer, view in self._peers.items()
            if view.stage == stage and view.is_ready
        }
        ledger_id = self._counts.owner.get((stage, unit))
        if ledger_id not in ledgers:
            ledger_id = min(
                ledgers, key=lambda one: (under_way[one], len(self._counts.held_by.get(one, ())), ledgers[one])
            )
            if self._is_training(unit):
                self._counts.owner[stage, unit] = ledger_id
        return Owner(ledgers[ledger_id], ledger_id)

    def _lease_message(self, unit: int, lease: _Lease) -> Lease:
        return Lease(self.place, self.term, unit, lease.serial, lease.owners)

    def _prepare(self) -> list[Letter]:
        groups = [self._group_of(stage) for stage in range(self.rules.num_stages)]
        return [
            (
                peer,
                Prepare(
                    self.place,
                    self.term,
                    self.attempt,
                    groups[view.stage],
                    view.ledger_id,
                    frozenset(self._counts.held_by.get(view.ledger_id, ())),
                ),
            )
            for peer, view in sorted(self._group.items())
        ]

    def _group_of(self, stage: int) -> tuple[GroupMember, ...]:
        """The replicas of a stage in this round. A peer sends to all at once: its rate is the sum of what the others saw of it."""
        members = sorted((peer, view) for peer, view in self._group.items() if view.stage == stage)
        seen: Counter[str] = Counter()
        for peer, view in members:
            seen.update({rate.peer: rate.bytes_per_s for rate in view.measured if rate.peer != peer})
        rates = [float(seen[peer]) or None if view.is_reachable else 0.0 for peer, view in members]
        if not any(view.is_reachable for _, view in members):
            rates = [None] * len(members)  # the exchange will say who could not be reached
        shares = self._share_out(rates)
        return tuple(
            GroupMember(peer, bool(self._counts.held_by.get(view.ledger_id)), share)
            for (peer, view), share in zip(members, shares, strict=True)
        )

    def _abort(self) -> list[Letter]:
        letters: list[Letter] = [
            (peer, Abort(self.place, self.term, self.attempt)) for peer in sorted(self._group) if peer in self._peers
        ]
        self.attempt += 1
        self.phase, self._group, self._reports = Phase.COLLECTING, {}, {}
        return letters

    def _fence(self, ledger_id: int) -> list[Letter]:
        self._fenced.add(ledger_id)
        self._counts.forget(ledger_id)
        return self._abort() if self.phase is Phase.ROUND else []

    def _blame(self, culprits: list[str], reason: str) -> list[Letter]:
        """Try once more with everybody; after that without them. A dead one is lost by then."""
        letters = self._abort()
        for culprit in culprits:
            self._failed_rounds[culprit] += 1
            if self._failed_rounds[culprit] >= _MAX_FAILED_ROUNDS:
                letters += self.exclude(culprit, reason)
        return letters + self._go_on()

    def _decide(self, digests: tuple[bytes, ...]) -> list[Letter]:
        """The epoch's outcome. Of each group one report is enough: their sums are the same bytes."""
        num_tokens = sum(r.num_loss_tokens for unit, r in self._results.items() if unit < self.rules.num_units)
        squares = {self._group[peer].stage: report.square_norm for peer, report in self._reports.items()}
        norm = math.sqrt(sum(squares.values())) / max(num_tokens, 1) if digests else 0.0
        is_skipped = not digests or not math.isfinite(norm)
        of_data = [r for unit, r in self._results.items() if unit < self.rules.num_units]
        of_eval = [r for unit, r in self._results.items() if self.rules.num_units <= unit < EARLY]
        self.commit = Commit(
            epoch=self.place.epoch,
            parent=self.place.lineage,
            term=self.term,
            attempt=self.attempt,
            num_loss_tokens=num_tokens,
            norm=0.0 if is_skipped else norm,
            is_skipped=is_skipped,
            digests=() if is_skipped else digests,
            members=tuple(sorted((peer, view.stage) for peer, view in self._group.items())),
            loss_sum=math.fsum(r.loss_sum for r in of_data),
            eval_loss_sum=math.fsum(r.loss_sum for r in of_eval),
            num_eval_tokens=sum(r.num_loss_tokens for r in of_eval),
            era=self.place.era,
            orders=self._course.next_orders(self.place, self._orders),
        )
        self.phase = Phase.COMMITTED
        self._leases.clear()
        return [*((peer, self.commit) for peer in sorted(self._others())), *self._commit_alone()]

    def _others(self) -> set[str]:
        return self._peers.keys() - {self.me}

    def _commit_alone(self) -> list[Letter]:
        """With nobody left who holds a sum too the leader itself steps; else when the first other one has."""
        assert self.commit is not None
        return [] if self._others() & self._group.keys() else [(self.me, self.commit)]
