"""Member: a participant of a run, as a state machine. It obeys the highest term that it has seen, and leads when it is its turn.

    apply(event) -> actions

Events are what the network, the device and the user tell; actions are what they are to do. Letters to oneself are handled inside.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from swarm.epoch.coordinator import Coordinator, Letter, Phase
from swarm.epoch.ledger import Ledger
from swarm.epoch.messages import (
    EARLY,
    NO_TERM,
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
    Redirect,
    Report,
    RoundFailed,
    Rules,
    Term,
    UnitResult,
    Void,
    Where,
    equal_shares,
    rank_leaders,
)

# Events.


@dataclass(frozen=True, slots=True)
class Received:
    """A message came from a peer."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer does not answer any more."""

    peer: str


@dataclass(frozen=True, slots=True)
class Found:
    """A member of the run that can be reached (again)."""

    peer: str
    stage: int


@dataclass(frozen=True, slots=True)
class Tick:
    """A while has passed."""


@dataclass(frozen=True, slots=True)
class Steered:
    """The owner has said something: the course has changed."""


@dataclass(frozen=True, slots=True)
class Impatient:
    """Nobody led for too long."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A leased microbatch ran through all hops."""

    unit: int
    serial: int
    ledgers: tuple[int, ...]
    result: UnitResult


@dataclass(frozen=True, slots=True)
class DidNotRun:
    """A leased microbatch did not run."""

    unit: int
    serial: int
    culprit: str
    reason: str


@dataclass(frozen=True, slots=True)
class Averaged:
    """The exchange of an attempt ended; this process holds the sum."""

    term: Term
    attempt: int
    digest: bytes
    square_norm: float


@dataclass(frozen=True, slots=True)
class NotAveraged:
    """The exchange of an attempt failed."""

    term: Term
    attempt: int
    culprits: frozenset[str]


@dataclass(frozen=True, slots=True)
class Installed:
    """The state at another place was downloaded. commit: the one that led there; None: the start of the run."""

    place: Place
    commit: Commit | None


@dataclass(frozen=True, slots=True)
class Entered:
    """We take part from this place on; the weights are on their way. commit: the one that led there."""

    place: Place
    commit: Commit | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The weights are where we are."""


@dataclass(frozen=True, slots=True)
class InVain:
    """Nobody could tell where our stage is: look again."""


Event = (
    Received
    | Lost
    | Found
    | Tick
    | Steered
    | Impatient
    | Ran
    | DidNotRun
    | Averaged
    | NotAveraged
    | Installed
    | Entered
    | Ready
    | InVain
)


# Actions.


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message. It may be lost."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Run:
    """Run a microbatch through these owners, under this term."""

    term: Term
    unit: int
    serial: int
    owners: tuple[Owner, ...]


@dataclass(frozen=True, slots=True)
class StopRunning:
    """The leases of earlier terms and epochs are worth nothing: stop what runs."""

    is_epoch_over: bool
    """Then gradients of the ends that wait for AddEnds are worth nothing either."""


@dataclass(frozen=True, slots=True)
class AddEnds:
    """Add the kept gradient of the ends of this microbatch to the sum of this ledger (is_first), or forget it."""

    unit: int
    ledger_id: int
    is_first: bool


@dataclass(frozen=True, slots=True)
class Average:
    """Freeze done: sum the ledger with the group's, tell by Averaged or NotAveraged. Ends an earlier attempt."""

    term: Term
    attempt: int
    group: tuple[GroupMember, ...]


@dataclass(frozen=True, slots=True)
class StopAveraging:
    """The attempt is over: end its exchange, forget its sum."""

    term: Term
    attempt: int


@dataclass(frozen=True, slots=True)
class Step:
    """Step with the held sum (or not, if the commit says so), and go to the place after it."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class Download:
    """We missed a step: get the state of a replica of our stage at this place or a later one.

    Tell by Installed when it is there; or by Entered at once, then keep what Step says, and tell by Ready when all is there; or by InVain.
    """

    place: Place
    peer: str
    """Who is there."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Something worth a line in the log."""

    text: str


Action = Send | Run | StopRunning | AddEnds | Average | StopAveraging | Step | Download | Tell


@dataclass(frozen=True, slots=True)
class _Held:
    digest: bytes
    square_norm: float


_MAX_HELD = 2
_dice = random.SystemRandom()


class Member:
    """One participant."""

    def __init__(
        self,
        me: str,
        stage: int,
        course: Course,
        ledger: Ledger,
        place: Place,
        members: Mapping[str, int],
        *,
        commit: Commit | None = None,
        early: Ledger | None = None,
        capacity: int = 0,
        is_reachable: bool = True,
        share_out: Callable[[Sequence[float | None]], Sequence[int]] = equal_shares,
        term_step: int = 1,
    ) -> None:
        """term_step: terms are so far apart, the rest is chance, so that none is one of an earlier life of ours. commit: the one that led to the place. early: a second ledger, for runs with delay. members: peer and stage of those who are known to take part. capacity: microbatches that a trainer runs at once."""
        self.me, self.stage, self.course, self.ledger, self.capacity = me, stage, course, ledger, capacity
        self.early = early
        self.place = place
        self.known: dict[str, int] = {**members, me: stage}
        self.lost: set[str] = set()
        self.term = NO_TERM
        self.leader: Coordinator | None = None
        self.last_commit = commit
        self.rules: Rules = course.rules_at(place, self._orders)
        self.is_downloading = False
        self.is_ready = True
        """Whether the weights are where we are."""
        self.measured: tuple[Rate, ...] = ()
        """As in Hello; the process that measures it sets it."""
        self._is_reachable, self._share_out = is_reachable, share_out
        self._least_number, self._term_step = 0, term_step
        self._passed_over: set[str] = set()
        self._reported_term = NO_TERM
        self._attempt: tuple[Term, int] | None = None
        self._aborted: tuple[Term, int] = (NO_TERM, -1)
        """The last attempt of which we know that it is over."""
        self._held: dict[tuple[Term, int], _Held] = {}
        """Sums that a Commit may still ask for: of the last attempt, and of an earlier term's whose outcome we do not know."""
        self._running: dict[int, int] = {}
        """Serial of the last lease of each unit."""
        self._failed: dict[int, Failed] = {}
        self._done: dict[int, Done] = {}
        self._results: dict[int, UnitResult] = {}
        self._actions: list[Action] = []
        self._to_self: collections.deque[Message] = collections.deque()
        for one in self._ledgers:
            one.open(place)

    @property
    def _orders(self) -> bytes:
        """In force here."""
        return b"" if self.last_commit is None else self.last_commit.orders

    @property
    def _ledgers(self) -> list[Ledger]:
        return [self.ledger] if self.early is None else [self.ledger, self.early]

    def _ledger_for(self, unit: int) -> Ledger:
        return self.early if unit >= EARLY and self.early is not None else self.ledger

    def apply(self, event: Event) -> list[Action]:
        """What to do now."""
        self._actions = []
        self._handle(event)
        while self._to_self:
            self._on_message(self.me, self._to_self.popleft())
        return self._actions

    def hold(self, term: Term, attempt: int, digest: bytes, square_norm: float) -> None:
        """Before the start: a sum that an earlier life of this member held here, with an outcome that it did not learn."""
        self._held[term, attempt] = _Held(digest, square_norm)

    def start(self) -> list[Action]:
        """Begin to take part."""
        self._actions = []
        self._elect()
        self._ask_around()
        while self._to_self:
            self._on_message(self.me, self._to_self.popleft())
        return self._actions

    def _handle(self, event: Event) -> None:
        if isinstance(event, Ready):
            self.is_ready = True
            self._to_leader(self._hello())
        elif isinstance(event, InVain):
            self.is_downloading = False
            self._enter(self.place, self.last_commit, self.known)
            self._ask_around()
        elif isinstance(event, Installed | Entered):
            self.is_downloading, self.is_ready = False, isinstance(event, Installed)
            members = dict(event.commit.members) if event.commit else {}
            self._enter(event.place, event.commit, {**self.known, **members})
            self._ask_around()
        elif isinstance(event, Lost):
            self._on_lost(event.peer)
        elif isinstance(event, Found):
            self.lost.discard(event.peer)
            self.known.setdefault(event.peer, event.stage)
            if not self.is_downloading and event.peer != self.me:
                greeting = Redirect(self.place, self.term) if self.term.peer else self._hello()
                self._actions.append(Send(event.peer, greeting))
        elif self.is_downloading:
            return
        elif isinstance(event, Received):
            self._on_message(event.peer, event.message)
        elif isinstance(event, Tick):
            self._on_tick()
        elif isinstance(event, Steered):
            if self.leader is not None:
                self._post(self.leader.reconsider())
        elif isinstance(event, Impatient):
            self._on_impatient()
        elif isinstance(event, Ran):
            self._on_ran(event)
        elif isinstance(event, DidNotRun):
            self._on_did_not_run(event)
        elif isinstance(event, Averaged):
            self._on_averaged(event)
        elif self._attempt == (event.term, event.attempt):
            self._to_leader(RoundFailed(self.place, event.term, event.attempt, event.culprits))

    # Who leads.

    def _enter(
        self, place: Place, commit: Commit | None, members: Mapping[str, int], *, keeps_early: bool = False
    ) -> None:
        """Be at a place, at the start of its epoch. keeps_early: after a step, with what was added for it before that."""
        # We may have led here already: the same term again would be taken for that one.
        self._least_number = max(self._least_number, self.term.number) if place == self.place else 0
        if place != self.place:  # else it was a download in vain, and what we promised holds on
            for attempt in sorted({*self._held, *([self._attempt] if self._attempt else [])}):
                self._forget(attempt)
            self._attempt, self._reported_term = None, NO_TERM
        self.place, self.last_commit = place, commit
        self.rules = self.course.rules_at(place, self._orders)
        self.known = {**members, self.me: self.stage}
        self.term = NO_TERM
        self._aborted = (NO_TERM, -1)
        self.leader = None
        self._passed_over.clear()
        self._running.clear()
        self._failed.clear()
        self._done.clear()
        early = {unit - EARLY: r for unit, r in self._results.items() if unit >= EARLY and keeps_early}
        self._results = {unit: replace(result, unit=unit) for unit, result in early.items()}
        if self.early is not None and keeps_early:
            self.ledger, self.early = self.early, self.ledger
            self.ledger.promote(place, EARLY)
            self.early.open(place)
        else:
            for one in self._ledgers:
                one.open(place)
        self._actions.append(StopRunning(is_epoch_over=True))
        self._elect()

    def _elect(self) -> None:
        """Lead if everybody before us in the order is gone and nobody leads."""
        if self.is_downloading:
            return
        if self.term.peer and self.term.peer not in self.lost | self._passed_over:
            return
        candidates = [peer for peer in self.known if peer not in self.lost | self._passed_over]
        if rank_leaders(self.place, candidates)[0] != self.me:
            return
        self._lead()

    def _lead(self) -> None:
        highest = max(self.term.number, self._reported_term.number, self._least_number)
        number = highest // self._term_step + 1
        term = Term(number * self._term_step + _dice.randrange(self._term_step), self.me)
        present = {peer: stage for peer, stage in self.known.items() if peer not in self.lost}
        self._obey(term)
        self.leader = Coordinator(self.me, self.place, term, self.course, self._orders, present, self._share_out)
        if number > 1:
            self._actions.append(Tell(f"leading epoch={self.place.epoch} term={term.number}"))
        self._post(self.leader.start())

    def _obey(self, term: Term) -> None:
        """A term that is new and the highest so far."""
        self.term = term
        if self.leader is not None and self.leader.phase is not Phase.COMMITTED:
            self.leader = None
        for one in self._ledgers:
            one.obey(term)
        if self._attempt is not None and self._attempt not in self._held:
            self._forget_round()
        self._running.clear()
        self._failed.clear()
        self._actions.append(StopRunning(is_epoch_over=False))

    def _ask_around(self) -> None:
        """Of who is known, somebody may lead already."""
        if self.leader is None:
            for peer in sorted(self.known.keys() - self.lost - {self.me}):
                self._actions.append(Send(peer, self._hello()))

    def _on_lost(self, peer: str) -> None:
        if peer == self.me:
            return
        self.lost.add(peer)
        if self.leader is not None:
            self._post(self.leader.lose(peer))
        self._elect()

    def _on_impatient(self) -> None:
        if self.leader is not None:
            return
        if self.term.peer and self.term.peer not in self.lost | self._passed_over:
            self._passed_over.add(self.term.peer)
        else:
            candidates = [peer for peer in self.known if peer not in self.lost | self._passed_over]
            first = rank_leaders(self.place, candidates)[0]
            if first != self.me:
                self._passed_over.add(first)
        self._elect()

    def _on_tick(self) -> None:
        self._elect()
        if self.leader is not None:
            self._post(self.leader.tick())
        elif self.term.peer and self.term.peer not in self.lost:
            self._to_leader(self._hello())
        else:  # whose turn it is may be gone unnoticed
            self._ask_around()
        for done in self._done.values():
            self._to_leader(done)
        if self._attempt in self._held and self._reported_term == self.term:
            self._report()

    # What others say.

    def _on_message(self, peer: str, message: Message) -> None:
        if self.is_downloading:
            return
        if isinstance(message, Commit):
            self._on_commit(peer, message)
            return
        if isinstance(message, Committed):
            if self.leader is not None and self.leader.commit is not None and message.place == self.leader.commit.after:
                self._post(self.leader.receive(peer, message))
            return
        if message.place != self.place:
            self._on_elsewhere(peer, message)
            return
        if isinstance(message, Where):
            return
        if isinstance(message, Lead | Redirect):
            self._on_term(peer, message)
        elif isinstance(message, Hello):
            self._on_hello(peer, message)
        elif isinstance(message, Done | Failed | Report | RoundFailed):
            if self.leader is not None and peer not in self.lost:
                self._post(self.leader.receive(peer, message))
        elif message.term != self.term or peer != self.term.peer:
            if message.term < self.term:
                self._send(peer, Redirect(self.place, self.term))
        else:
            self._on_order(message)

    def _on_elsewhere(self, peer: str, message: Message) -> None:
        """The peer is in another epoch or history: give it our last Commit if that is all it lacks; or one follows the other."""
        assert not isinstance(message, Commit)
        theirs: Place = message.place
        is_next = self.last_commit is not None and self.last_commit.after == self.place
        if is_next and self.last_commit is not None and theirs == self.last_commit.before:
            self._send(peer, self.last_commit)
        elif isinstance(message, Where) and self.place.is_behind(theirs):
            self._download(theirs, peer)
        else:
            self._send(peer, Where(self.place))

    def _on_term(self, peer: str, message: Lead | Redirect) -> None:
        term = message.term
        if isinstance(message, Lead) and term.peer != peer:
            return
        self.lost.discard(peer)
        if term < self.term:
            self._send(peer, Redirect(self.place, self.term))
            return
        if term > self.term:
            if term.peer == self.me:  # of an earlier life of ours: beat it
                self.term = Term(term.number, "")
                self._lead()
                return
            self._obey(term)
            self.lost.discard(term.peer)
            self._passed_over.discard(term.peer)
            self.known.setdefault(term.peer, self.known.get(term.peer, self.rules.ends_stage))
        if self.term.peer != self.me or isinstance(message, Lead):
            self._greet()

    def _greet(self) -> None:
        """Tell the leader what we have, and again what it has not confirmed."""
        self._to_leader(self._hello())
        for unit, done in list(self._done.items()):
            ends_ledger = self._ledger_for(unit).ledger_id
            self._done[unit] = replace(done, term=self.term, ends_ledger=ends_ledger)
            self._to_leader(self._done[unit])

    def _hello(self) -> Hello:
        units = frozenset().union(*(one.units for one in self._ledgers))
        early_id = self.early.ledger_id if self.early is not None else 0
        results = tuple(self._results[unit] for unit in sorted(units)) if self.capacity else ()
        return Hello(
            self.place,
            self.term,
            self.stage,
            self.ledger.ledger_id,
            units,
            self.capacity,
            results,
            early_id,
            self._is_reachable,
            self.measured,
            self.is_ready,
        )

    def _on_hello(self, peer: str, hello: Hello) -> None:
        self.lost.discard(peer)
        self.known[peer] = hello.stage
        if self.leader is not None:
            self._post(self.leader.receive(peer, hello))
        elif self.term.peer:
            self._send(peer, Redirect(self.place, self.term))

    def _on_order(self, message: Message) -> None:
        """What the leader that we obey says."""
        if isinstance(message, Lease):
            self._on_lease(message)
        elif isinstance(message, Confirm):
            self._on_confirm(message)
        elif isinstance(message, Void):
            self._on_void(message)
        elif isinstance(message, Prepare):
            self._on_prepare(message)
        elif isinstance(message, Abort):
            self._aborted = max(self._aborted, (message.term, message.attempt))
            if self._attempt is not None and self._attempt <= self._aborted:
                self._forget_round()
        elif isinstance(message, Excluded):
            self._on_excluded(message)

    # Microbatches.

    def _on_lease(self, lease: Lease) -> None:
        if not self.capacity or self._running.get(lease.unit, 0) >= lease.serial:
            failed = self._failed.get(lease.unit)
            if failed is not None and failed.serial == lease.serial:
                self._to_leader(failed)
            return
        done = self._done.get(lease.unit)
        if done is not None and done.serial >= lease.serial and done.term == self.term:
            return
        self._running[lease.unit] = lease.serial
        self._done.pop(lease.unit, None)
        self._actions.append(Run(self.term, lease.unit, lease.serial, lease.owners))

    def _on_ran(self, event: Ran) -> None:
        if self._running.get(event.unit) != event.serial:
            return
        ends_ledger = self._ledger_for(event.unit).ledger_id
        done = Done(self.place, self.term, event.serial, event.ledgers, ends_ledger, event.result)
        self._done[event.unit] = done
        self._results[event.unit] = event.result
        self._to_leader(done)

    def _on_did_not_run(self, event: DidNotRun) -> None:
        if self._running.get(event.unit) == event.serial:
            failed = Failed(self.place, self.term, event.unit, event.serial, event.culprit, event.reason)
            self._failed[event.unit] = failed
            self._to_leader(failed)

    def _on_confirm(self, confirm: Confirm) -> None:
        ledger_id = self._ledger_for(confirm.unit).ledger_id
        if confirm.unit not in self._done or (confirm.is_first and confirm.ledger_id != ledger_id):
            return
        self._settle(confirm.unit, confirm.is_first)

    def _settle(self, unit: int, is_first: bool) -> None:
        done = self._done.pop(unit)
        if self._running.get(unit) == done.serial:
            # What confirmed it may have been of an earlier Done: a leader who says the lease again has heard of neither end of it.
            self._failed[unit] = Failed(self.place, self.term, unit, done.serial, "", "it had run before")
        ledger = self._ledger_for(unit)
        if is_first and unit not in ledger.units:
            self._actions.append(AddEnds(unit, ledger.ledger_id, True))
            ledger.units.add(unit)
        else:
            self._actions.append(AddEnds(unit, ledger.ledger_id, False))

    def _on_void(self, void: Void) -> None:
        if void.ledger_id == self.ledger.ledger_id:
            self.ledger.void()
            self._forget_round()
        elif self.early is not None and void.ledger_id == self.early.ledger_id:
            self.early.void()
        self._greet()

    def _on_excluded(self, message: Excluded) -> None:
        self._actions.append(Tell(f"this epoch goes on without us epoch={self.place.epoch} reason={message.reason}"))
        self._forget_round()

    # The round.

    def _on_prepare(self, prepare: Prepare) -> None:
        attempt = prepare.term, prepare.attempt
        if self.leader is not None and self.leader.commit is not None:
            self._to_leader(self.leader.commit)  # ours of an earlier term: somebody may have followed it
            return
        if self._attempt == attempt and attempt in self._held:
            self._report()
        if max(self._attempt or self._aborted, self._aborted) >= attempt:
            return
        if prepare.ledger_id == self.ledger.ledger_id:
            for unit in sorted(prepare.units - self.ledger.units):
                if unit in self._done:  # its Confirm was lost
                    self._settle(unit, True)
        if self._attempt is not None and (self._attempt[0] == prepare.term or self._attempt not in self._held):
            self._forget_round()
        if prepare.ledger_id != self.ledger.ledger_id or prepare.units != self.ledger.units:
            self._to_leader(RoundFailed(self.place, self.term, prepare.attempt, frozenset(), is_mismatch=True))
            return
        self.ledger.freeze(True)
        self._attempt = attempt
        self._actions.append(Average(prepare.term, prepare.attempt, prepare.group))

    def _on_averaged(self, event: Averaged) -> None:
        if self._attempt != (event.term, event.attempt):
            return
        self._held[self._attempt] = _Held(event.digest, event.square_norm)
        if len(self._held) > _MAX_HELD:
            self._forget(min(self._held))
        if event.term == self.term:
            self._report()

    def _report(self) -> None:
        assert self._attempt is not None
        term, attempt = self._attempt
        held = self._held[self._attempt]
        # From here on a Commit of an earlier term is refused: the leader of this one may decide another outcome.
        self._reported_term = term
        self._to_leader(Report(self.place, term, attempt, held.digest, held.square_norm))

    def _forget_round(self) -> None:
        """The current attempt is over. An earlier term's sum stays: what became of that term this one's leader does not know."""
        if self._attempt is not None and (self._attempt[0] == self.term or self._attempt not in self._held):
            self._forget(self._attempt)
        self._attempt = None
        self.ledger.freeze(False)

    def _forget(self, attempt: tuple[Term, int]) -> None:
        self._held.pop(attempt, None)
        self._actions.append(StopAveraging(*attempt))

    def _on_commit(self, peer: str, commit: Commit) -> None:
        if commit.after == self.place:
            self._send(peer, Committed(self.place))
            return
        if commit.before != self.place:
            if self.place.is_behind(commit.after):
                self._download(commit.after, peer)
            else:
                self._send(peer, Where(self.place))
            return
        if not self.course.allows(self.place, self._orders, commit.orders):
            self._actions.append(
                Tell(f"a commit of epoch {commit.epoch} takes back what the owner said: its leader is passed over")
            )
            self._passed_over.add(commit.term.peer)
            self._elect()
            return
        # Who leads knows that his own term has no outcome yet, and may follow another's; his followers follow him.
        may_decide = self.leader is not None and self.leader.commit is None
        if commit.term < self._reported_term and not may_decide and peer != self.term.peer:
            self._send(peer, Redirect(self.place, self.term))
            return
        held = self._held.get((commit.term, commit.attempt))
        holds = (
            held is not None
            and len(commit.digests) == self.rules.num_stages
            and held.digest == commit.digests[self.stage]
        )
        if not (holds or (commit.is_skipped and (self.me, self.stage) in commit.members)):
            if may_decide:  # our followers, who may hold what we lack, take it from nobody else
                for other in sorted(self.known.keys() - self.lost - {self.me, peer}):
                    self._send(other, commit)
            self._download(commit.after, peer)
            return
        self._actions.append(Step(commit))
        self._enter(commit.after, commit, dict(commit.members), keeps_early=True)
        if peer != self.me:
            self._send(peer, Committed(self.place))

    def _download(self, place: Place, peer: str) -> None:
        if self._attempt in self._held:  # it may be in vain
            self._attempt = None
        self._forget_round()
        self._actions.append(StopRunning(is_epoch_over=True))
        self.leader = None
        self.is_downloading = True
        self._actions.append(Download(place, peer))

    # Letters.

    def _to_leader(self, message: Message) -> None:
        if self.term.peer:
            self._send(self.term.peer, message)

    def _post(self, letters: list[Letter]) -> None:
        for peer, message in letters:
            self._send(peer, message)

    def _send(self, peer: str, message: Message) -> None:
        if peer == self.me:
            self._to_self.append(message)
        else:
            self._actions.append(Send(peer, message))
