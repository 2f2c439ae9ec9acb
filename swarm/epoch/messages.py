"""What the members of a run say to each other. All are values; protos/training.proto carries them."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

LINEAGE_BYTES = 32
EARLY = 2**18
"""Added to the number of a unit of the next epoch, which runs while this one's gradients are averaged (Rules.delay)."""


class Term(NamedTuple):
    """Who leads an epoch: a later number beats an earlier one, and no two leaders have the same term."""

    number: int
    peer: str


NO_TERM = Term(0, "")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where in which history: the number of optimizer steps taken, and the hash that names all of them."""

    epoch: int
    lineage: bytes
    era: int = 0
    """How often this history was rolled back. It follows from the lineage, but only who knows the history can tell."""

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """The smaller one is to be followed: that of the newer era, else of the longer history, and of equals of the smaller hash."""
        return (-self.era, -self.epoch, self.lineage)

    def is_behind(self, other: Place) -> bool:
        """Whether who is here has to go there when the two meet."""
        return other.rank < self.rank

    def rolled_back(self, era: int) -> Place:
        """Where a run goes on that was rolled back to here. Whoever decides so comes to the same place."""
        tag = b"shardswarm rollback 1" + era.to_bytes(8, "big")
        return Place(self.epoch, hashlib.sha256(tag + self.lineage).digest(), era)

    def leads_to(self, goal: Place) -> bool:
        """Whether the state here is that of the goal: it is the same place, or the run went back from there to here."""
        return goal == self or (goal.era > self.era and goal == self.rolled_back(goal.era))

    def follows(self, commit: Commit | None, run_id: bytes) -> bool:
        """Whether a commit (None: the start of the run) leads here, be it by rolling back to where it led."""
        return place_after(commit, run_id).leads_to(self)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the machine has to know of a RunSpec, and of an epoch's evaluation."""

    num_stages: int
    """With the ends, which are the last one."""
    num_units: int
    """Microbatches of an epoch."""
    num_eval_units: int = 0
    """Microbatches of held-out data in epochs that evaluate."""
    eval_every: int = 0
    min_replicas: int = 1
    """The first epoch waits until every stage, and the ends, have so many."""
    num_epochs: int = 2**48
    """Where the run ends."""
    delay: int = 0
    """1: a gradient is computed with the weights before the last step, so the next epoch may begin while this one is averaged."""
    num_next_units: int | None = None
    """Microbatches of the next epoch; None: as many."""
    eval_epochs: frozenset[int] = frozenset()
    """That evaluate besides."""

    @property
    def ends_stage(self) -> int:
        return self.num_stages - 1

    def units_of(self, epoch: int) -> range:
        """Numbers of the epoch's microbatches; those from num_units on are held-out data."""
        is_due = (self.eval_every > 0 and epoch % self.eval_every == 0) or epoch in self.eval_epochs
        return range(self.num_units + (self.num_eval_units if is_due else 0))

    @property
    def early_units(self) -> range:
        """Numbers of the next epoch's microbatches, while this one's gradients are averaged."""
        num_units = self.num_units if self.num_next_units is None else self.num_next_units
        return range(EARLY, EARLY + (num_units if self.delay else 0))


class Course(Protocol):
    """How the owner steers a run. orders: as in Commit, in force at a place."""

    @property
    def is_paused(self) -> bool:
        """Whether no epoch is to begin."""
        ...

    def rules_at(self, place: Place, orders: bytes) -> Rules:
        """The same for all members who are there."""
        ...

    def next_orders(self, place: Place, orders: bytes) -> bytes:
        """What a Commit that ends this epoch carries: newer ones, if they are known and may follow, or those in force."""
        ...

    def allows(self, place: Place, orders: bytes, following: bytes) -> bool:
        """Whether a Commit that ends this epoch may carry the orders `following`."""
        ...


@dataclass(frozen=True, slots=True)
class FixedCourse:
    """Of a run whose owner says nothing."""

    rules: Rules
    is_paused: bool = False

    def rules_at(self, place: Place, orders: bytes) -> Rules:
        return self.rules

    def next_orders(self, place: Place, orders: bytes) -> bytes:
        return orders

    def allows(self, place: Place, orders: bytes, following: bytes) -> bool:
        return orders == following


@dataclass(frozen=True, slots=True)
class Owner:
    """The ledger that a stage's gradient of a microbatch belongs into, and who keeps it."""

    peer: str
    ledger_id: int


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What a trainer found for one microbatch."""

    unit: int
    num_loss_tokens: int
    loss_sum: float

    @property
    def is_sound(self) -> bool:
        return self.num_loss_tokens >= 0 and math.isfinite(self.loss_sum)


@dataclass(frozen=True, slots=True)
class Commit:
    """The outcome of an epoch: everybody who holds the average that it names steps."""

    epoch: int
    parent: bytes
    term: Term
    attempt: int
    num_loss_tokens: int
    norm: float
    """Global L2 norm of the mean gradient; 0 if skipped."""
    is_skipped: bool
    """The gradient was not finite: the epoch passes without a step."""
    digests: tuple[bytes, ...]
    """Of the summed gradient of each stage; empty if skipped."""
    members: tuple[tuple[str, int], ...]
    """Peer and stage of everybody who takes part in the next epoch, sorted."""
    loss_sum: float
    eval_loss_sum: float = 0.0
    num_eval_tokens: int = 0
    era: int = 0
    """As in Place."""
    orders: bytes = b""
    """The owner's signed orders that are in force from the next epoch on."""
    signature: bytes = field(default=b"", compare=False)
    """Of the leader, over the lineage."""

    @property
    def lineage(self) -> bytes:
        """Names the history that ends with this step. SHA-256 over the parent and everything that was decided."""
        hasher = hashlib.sha256(b"shardswarm commit 1\0")
        fixed = struct.pack(
            "!QQQQdddQQ?",
            self.epoch,
            self.era,
            self.term.number,
            self.attempt,
            self.norm,
            self.loss_sum,
            self.eval_loss_sum,
            self.num_loss_tokens,
            self.num_eval_tokens,
            self.is_skipped,
        )
        members = [f"{peer}={stage}".encode() for peer, stage in self.members]
        orders = (b"", self.orders) if self.orders else ()
        for part in (self.parent, self.term.peer.encode(), fixed, *self.digests, b"", *members, *orders):
            hasher.update(len(part).to_bytes(4, "big") + part)
        return hasher.digest()

    @property
    def loss(self) -> float | None:
        """Mean per token, of the weights before the step; None of no tokens."""
        return self.loss_sum / self.num_loss_tokens if self.num_loss_tokens else None

    @property
    def eval_loss(self) -> float | None:
        """The same of held-out data."""
        return self.eval_loss_sum / self.num_eval_tokens if self.num_eval_tokens else None

    @property
    def before(self) -> Place:
        return Place(self.epoch, self.parent, self.era)

    @property
    def after(self) -> Place:
        return Place(self.epoch + 1, self.lineage, self.era)


def place_after(commit: Commit | None, run_id: bytes) -> Place:
    """Where a commit leads; None: the start of the run."""
    return Place(0, run_id) if commit is None else commit.after


@dataclass(frozen=True, slots=True)
class Lead:
    """Of a leader to everybody: obey this term."""

    place: Place
    term: Term


@dataclass(frozen=True, slots=True)
class Rate:
    """What a peer sends."""

    peer: str
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Hello:
    """To the leader: I am here, and this is in my ledger. The term is the one that I obey."""

    place: Place
    term: Term
    stage: int
    ledger_id: int
    units: frozenset[int]
    capacity: int = 0
    """Microbatches that a trainer runs at once; 0 for nodes."""
    results: tuple[UnitResult, ...] = ()
    """Of a trainer: for every unit in its ledger."""
    early_ledger_id: int = 0
    """Of the ledger for early units, which are among units and results, too."""
    is_reachable: bool = True
    """False: nobody can open a stream to it, so it reduces nothing."""
    measured: tuple[Rate, ...] = ()
    """What it saw the other replicas of its stage send."""
    is_ready: bool = True
    """False: its weights are still on their way, so it runs nothing, but takes part in rounds."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """To who thinks that I lead, or that he leads: this is the term that I obey."""

    place: Place
    term: Term


@dataclass(frozen=True, slots=True)
class Where:
    """This is where I am; one of us has to follow the other."""

    place: Place


@dataclass(frozen=True, slots=True)
class Lease:
    """To a trainer: run this microbatch through the owners, one for each stage of blocks."""

    place: Place
    term: Term
    unit: int
    serial: int
    """Of the leases of this term; a repeated one is ignored."""
    owners: tuple[Owner, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """Of a trainer: the microbatch ran, and these ledgers have it. Its own gradient of the ends waits for Confirm."""

    place: Place
    term: Term
    serial: int
    ledgers: tuple[int, ...]
    """One for each stage of blocks; of held-out data none."""
    ends_ledger: int
    result: UnitResult


@dataclass(frozen=True, slots=True)
class Failed:
    """Of a trainer: the microbatch did not run. culprit: who is to blame, or nobody ("")."""

    place: Place
    term: Term
    unit: int
    serial: int
    culprit: str
    reason: str


@dataclass(frozen=True, slots=True)
class Confirm:
    """To a trainer: whether its gradient of the ends is the first for this microbatch, and is to be added."""

    place: Place
    term: Term
    unit: int
    ledger_id: int
    is_first: bool


@dataclass(frozen=True, slots=True)
class Void:
    """Your ledger is fenced: it counts for nothing. Start another one."""

    place: Place
    term: Term
    ledger_id: int


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A replica in a round."""

    peer: str
    has_gradient: bool
    share: int
    """Of the vector, relative to the others' shares, it sums so much."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """To everybody: freeze your ledger, which must hold exactly these units, and sum it with the others of your group."""

    place: Place
    term: Term
    attempt: int
    group: tuple[GroupMember, ...]
    """The replicas of the receiver's stage, sorted by peer id."""
    ledger_id: int
    units: frozenset[int]


@dataclass(frozen=True, slots=True)
class Abort:
    """That attempt is over; the ledgers are as they were."""

    place: Place
    term: Term
    attempt: int


@dataclass(frozen=True, slots=True)
class Report:
    """To the leader: I hold a sum with this digest and this squared norm."""

    place: Place
    term: Term
    attempt: int
    digest: bytes
    square_norm: float


@dataclass(frozen=True, slots=True)
class RoundFailed:
    """To the leader: no sum came about, because of these peers; or my ledger does not hold what was said (no culprits)."""

    place: Place
    term: Term
    attempt: int
    culprits: frozenset[str]
    is_mismatch: bool = False


@dataclass(frozen=True, slots=True)
class Committed:
    """To who sent a Commit: I stepped."""

    place: Place
    """After the step."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """To a member: this epoch goes on without you. reason: one line for people."""

    place: Place
    term: Term
    reason: str


@dataclass(frozen=True, slots=True)
class Ordered:
    """To everybody: what the owner of the run has said, signed. Not for the machine (Course)."""

    orders: bytes


Message = (
    Lead
    | Hello
    | Redirect
    | Where
    | Lease
    | Done
    | Failed
    | Confirm
    | Void
    | Prepare
    | Abort
    | Report
    | RoundFailed
    | Commit
    | Committed
    | Excluded
)
Mail = Message | Ordered
"""What travels between members."""


def equal_shares(rates: Sequence[float | None]) -> list[int]:
    """A share for everybody but those whose rate is 0."""
    return [int(rate != 0) for rate in rates]


def rank_leaders(place: Place, peers: list[str]) -> list[str]:
    """Everybody in the order in which they lead this epoch: rendezvous hashing (Thaler and Ravishankar, 1998)."""
    return sorted(peers, key=lambda peer: hashlib.sha256(place.lineage + peer.encode()).digest())
