"""MemberRecord: what a peer tells the others of a run about its replica of one stage. Signed and bound as ShardRecord is.

The DHT only finds members: nothing that they count or decide is taken from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protos import node_pb2, record_pb2
from swarm.epoch.messages import Place
from swarm.identity import Identity
from swarm.records import ShardState, problem_with_rates, problem_with_texts, seal, unseal
from swarm.run_id import RUN_ID_BYTES, run_member_key

# A run has at most 256 stages, and the ends count as one more.
MAX_STAGE = 256
MAX_EPOCH = 2**48
MAX_SAVED = 4
MAX_COPIES = 4
MIN_LINEAGE_BYTES, MAX_LINEAGE_BYTES = 16, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """One peer's part in a run: a replica of one stage, or of the ends. expires_at is Unix time in seconds, with millisecond precision."""

    peer_id: str
    run_id: bytes
    stage: int
    """0, 1, ...; the number of stages stands for the ends."""
    state: ShardState
    epoch: int
    """Optimizer steps that its weights have had."""
    lineage: bytes
    """Which history of the weights it holds, 16 to 32 bytes; empty only while JOINING, before there are any."""
    expires_at: float
    tokens_per_s: float = 0.0
    """Forward and backward, through the whole stage; 0: not measured."""
    bandwidth_bytes_per_s: float = 0.0
    """What it can send; 0: not measured."""
    loss: float | None = None
    """Mean per token over the last epoch that it took part in; None: nothing to tell."""
    addresses: tuple[str, ...] = ()
    era: int = 0
    """How often the run was rolled back before it came there."""
    is_keeper: bool = False
    """A node that holds the ends beside its stage: they outlive the trainers with it."""
    saved: tuple[Place, ...] = ()
    """Of which places it has the state on its disk, newest first."""
    copies: tuple[tuple[int, Place], ...] = ()
    """States of other stages on its disk: stage and place."""
    protocol_major: int = 1
    protocol_minor: int = 0
    software: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"member record: {problem}")

    def _problem(self) -> str | None:
        if len(self.run_id) != RUN_ID_BYTES:
            return f"a run id has {RUN_ID_BYTES} bytes, this one has {len(self.run_id)}"
        if not 0 <= self.stage <= MAX_STAGE:
            return f"stage {self.stage}, at most {MAX_STAGE} is allowed"
        if not 0 <= self.epoch <= MAX_EPOCH:
            return f"epoch {self.epoch}, at most {MAX_EPOCH} is allowed"
        joins_without = self.state == ShardState.JOINING and not self.lineage
        if not joins_without and not MIN_LINEAGE_BYTES <= len(self.lineage) <= MAX_LINEAGE_BYTES:
            return f"a lineage has {MIN_LINEAGE_BYTES} to {MAX_LINEAGE_BYTES} bytes, this one has {len(self.lineage)}"
        if self.loss is not None and not math.isfinite(self.loss):
            return "the loss must be finite; leave it out if there is none"
        if len(self.saved) > MAX_SAVED or any(len(place.lineage) != MAX_LINEAGE_BYTES for place in self.saved):
            return f"at most {MAX_SAVED} saved places, each with a lineage of {MAX_LINEAGE_BYTES} bytes"
        if len(self.copies) > MAX_COPIES or any(
            stage > MAX_STAGE or stage == self.stage or len(place.lineage) != MAX_LINEAGE_BYTES
            for stage, place in self.copies
        ):
            return f"at most {MAX_COPIES} copies, of other stages, each with a lineage of {MAX_LINEAGE_BYTES} bytes"
        rates = (self.tokens_per_s, self.bandwidth_bytes_per_s)
        return problem_with_rates(rates) or problem_with_texts((self.peer_id, self.software), self.addresses)

    @property
    def place(self) -> Place:
        """Where its weights are."""
        return Place(self.epoch, self.lineage, self.era)

    def places_of(self, stage: int) -> tuple[Place, ...]:
        """Of which places it has the state of this stage on its disk."""
        if stage == self.stage:
            return self.saved
        return tuple(place for its_stage, place in self.copies if its_stage == stage)

    @property
    def subkey(self) -> str:
        """Its subkey in the DHT, under each of its keys."""
        return self.peer_id

    def dht_keys(self) -> list[str]:
        """The DHT key under which this record belongs."""
        return [run_member_key(self.run_id, self.stage)]


def sign_member(record: MemberRecord, identity: Identity) -> bytes:
    """The signed record as bytes. ValueError if it is larger than MAX_RECORD_BYTES or of another peer."""
    message = record_pb2.MemberRecord(
        peer_id=record.peer_id,
        expires_at_ms=round(record.expires_at * 1000),
        version=node_pb2.ProtocolVersion(
            major=record.protocol_major, minor=record.protocol_minor, software=record.software
        ),
        run_id=record.run_id,
        stage=record.stage,
        state=record_pb2.ShardState.Name(record.state),
        epoch=record.epoch,
        lineage=record.lineage,
        tokens_per_s=record.tokens_per_s,
        bandwidth_bytes_per_s=record.bandwidth_bytes_per_s,
        loss=record.loss,
        addresses=record.addresses,
        is_keeper=record.is_keeper,
        era=record.era,
        saved=[_to_wire(place) for place in record.saved],
        copies=[record_pb2.SavedCopy(stage=stage, place=_to_wire(place)) for stage, place in record.copies],
    )
    return seal(message, identity, "announce fewer addresses")


def open_member(raw: bytes) -> MemberRecord:
    """The record in raw, its signature verified. ValueError, naming the reason, for anything else.

    The caller compares expiry, subkey and key with those of the DHT entry.
    """
    message = unseal(raw, record_pb2.MemberRecord)
    return MemberRecord(
        peer_id=message.peer_id,
        run_id=message.run_id,
        stage=message.stage,
        state=ShardState(message.state),
        epoch=message.epoch,
        lineage=message.lineage,
        expires_at=message.expires_at_ms / 1000,
        tokens_per_s=message.tokens_per_s,
        bandwidth_bytes_per_s=message.bandwidth_bytes_per_s,
        loss=message.loss if message.HasField("loss") else None,
        addresses=tuple(message.addresses),
        is_keeper=message.is_keeper,
        era=message.era,
        saved=tuple(_from_wire(one) for one in message.saved),
        copies=tuple((one.stage, _from_wire(one.place)) for one in message.copies),
        protocol_major=message.version.major,
        protocol_minor=message.version.minor,
        software=message.version.software,
    )


def _to_wire(place: Place) -> record_pb2.SavedPlace:
    return record_pb2.SavedPlace(epoch=place.epoch, lineage=place.lineage, era=place.era)


def _from_wire(wire: record_pb2.SavedPlace) -> Place:
    return Place(wire.epoch, wire.lineage, wire.era)
