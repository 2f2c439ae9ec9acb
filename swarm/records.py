"""ShardRecord: what a node tells the swarm about its shard. Signed, expiring, bound to the peer id and to its DHT keys.

Also the envelope that all records of peers share (`seal`, `unseal`); see swarm/member_record.py for the other kind.
Pure: the clock is handed in; storing and fetching are swarm.p2p.directory's.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from protos import node_pb2, record_pb2
from swarm.identity import Identity, verify_signature
from swarm.model_spec import DIGEST_BYTES
from swarm.span import Span

MAX_RECORD_BYTES = 2048
MAX_LIFETIME_S = 300
MAX_ADDRESSES = 8
# A record names a key for each of its blocks: without a bound a record of a hundred bytes could name four billion.
MAX_BLOCKS = 1024
NUM_PEER_BUCKETS = 16

RecordMessage = TypeVar("RecordMessage", record_pb2.ShardRecord, record_pb2.MemberRecord)
# Each kind is signed under a tag of its own, so none can be passed off as another.
_KINDS: dict[type, tuple[record_pb2.RecordKind, bytes]] = {
    record_pb2.ShardRecord: (record_pb2.SHARD_RECORD, b"shardswarm ShardRecord 1\0"),
    record_pb2.MemberRecord: (record_pb2.MEMBER_RECORD, b"shardswarm MemberRecord 1\0"),
}


class ShardState(enum.IntEnum):
    """Life of a shard, or of a member of a run. Only ONLINE ones get work."""

    JOINING = record_pb2.JOINING
    ONLINE = record_pb2.ONLINE
    LEAVING = record_pb2.LEAVING


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One node's shard. Times are Unix time in seconds, with millisecond precision."""

    peer_id: str
    model_name: str
    source: str
    model_digest: bytes
    num_blocks: int
    span: Span
    block_digests: tuple[bytes, ...]
    numeric_class: str
    state: ShardState
    started_at: float
    expires_at: float
    decode_s_per_block: float = 0.0
    prefill_tokens_per_s: float = 0.0
    addresses: tuple[str, ...] = ()
    protocol_major: int = 1
    protocol_minor: int = 0
    software: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"shard record: {problem}")

    def _problem(self) -> str | None:
        online = self.state == ShardState.ONLINE
        rates = (self.decode_s_per_block, self.prefill_tokens_per_s)
        if len(self.model_digest) != DIGEST_BYTES or any(len(d) != DIGEST_BYTES for d in self.block_digests):
            return f"digests must have {DIGEST_BYTES} bytes"
        if self.num_blocks > MAX_BLOCKS:
            return f"{self.num_blocks} blocks, at most {MAX_BLOCKS} are allowed"
        if self.span.end > self.num_blocks:
            return f"span {self.span} exceeds {self.num_blocks} blocks"
        if len(self.block_digests) != len(self.span) and (online or self.block_digests):
            return f"{len(self.block_digests)} digests for {len(self.span)} blocks"
        texts = (self.peer_id, self.model_name, self.source, self.numeric_class, self.software)
        return problem_with_rates(rates) or problem_with_texts(texts, self.addresses)

    @property
    def subkey(self) -> str:
        """Its subkey in the DHT, under each of its keys."""
        return self.peer_id

    def digest_of(self, block: int) -> bytes:
        """Digest of a block of the span."""
        return self.block_digests[block - self.span.start]

    def dht_keys(self) -> list[str]:
        """The DHT keys under which this record belongs: by model and block, by model name, and by peer."""
        return [
            *(block_key(self.model_digest, block) for block in self.span),
            name_key(self.model_name),
            peer_bucket_key(bucket_of(self.peer_id)),
        ]


def block_key(model_digest: bytes, block: int) -> str:
    """Where the records of the nodes that serve a block of a model are."""
    return f"shardswarm/1/block/{model_digest.hex()}/{block}"


def name_key(model_name: str) -> str:
    """Where the records of all nodes that serve a model of this name are, whatever its weights."""
    return f"shardswarm/1/name/{model_name.lower()}"


def peer_bucket_key(bucket: int) -> str:
    """Where the records of all nodes of the swarm are, spread over NUM_PEER_BUCKETS keys."""
    return f"shardswarm/1/peers/{bucket}"


def bucket_of(peer_id: str) -> int:
    return sum(peer_id.encode()) % NUM_PEER_BUCKETS


def sign_record(record: ShardRecord, identity: Identity) -> bytes:
    """The signed record as bytes. ValueError if it is larger than MAX_RECORD_BYTES or of another peer."""
    message = record_pb2.ShardRecord(
        peer_id=record.peer_id,
        expires_at_ms=round(record.expires_at * 1000),
        version=node_pb2.ProtocolVersion(
            major=record.protocol_major, minor=record.protocol_minor, software=record.software
        ),
        model_name=record.model_name,
        source=record.source,
        model_digest=record.model_digest,
        num_blocks=record.num_blocks,
        start=record.span.start,
        end=record.span.end,
        block_digests=record.block_digests,
        numeric_class=record.numeric_class,
        state=record_pb2.ShardState.Name(record.state),
        started_at_ms=round(record.started_at * 1000),
        decode_s_per_block=record.decode_s_per_block,
        prefill_tokens_per_s=record.prefill_tokens_per_s,
        addresses=record.addresses,
    )
    return seal(message, identity, "serve fewer blocks")


def open_record(raw: bytes) -> ShardRecord:
    """The record in raw, its signature verified. ValueError, naming the reason, for anything else.

    The caller compares expiry, subkey and key with those of the DHT entry.
    """
    message = unseal(raw, record_pb2.ShardRecord)
    return ShardRecord(
        peer_id=message.peer_id,
        model_name=message.model_name,
        source=message.source,
        model_digest=message.model_digest,
        num_blocks=message.num_blocks,
        span=Span(message.start, message.end),
        block_digests=tuple(message.block_digests),
        numeric_class=message.numeric_class,
        state=ShardState(message.state),
        started_at=message.started_at_ms / 1000,
        expires_at=message.expires_at_ms / 1000,
        decode_s_per_block=message.decode_s_per_block,
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        addresses=tuple(message.addresses),
        protocol_major=message.version.major,
        protocol_minor=message.version.minor,
        software=message.version.software,
    )


def problem_with_rates(rates: Sequence[float]) -> str | None:
    """What is wrong with figures that a peer announces about itself, if anything."""
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        return "rates must be finite and not negative"
    return None


def problem_with_texts(texts: Sequence[str], addresses: Sequence[str]) -> str | None:
    """What is wrong with the texts of a record, if anything: they are shown on terminals and in logs."""
    if len(addresses) > MAX_ADDRESSES or not all(len(t) <= 200 and t.isprintable() for t in (*texts, *addresses)):
        return f"texts must be printable and have at most 200 characters, and addresses be at most {MAX_ADDRESSES}"
    return None


def seal(message: record_pb2.ShardRecord | record_pb2.MemberRecord, identity: Identity, remedy: str) -> bytes:
    """A record's message, signed. ValueError, with the remedy, if it is larger than MAX_RECORD_BYTES, or of another peer."""
    if identity.peer_id != message.peer_id:
        raise ValueError("a record is signed by its own peer")
    kind, tag = _KINDS[type(message)]
    payload = message.SerializeToString(deterministic=True)
    signed = record_pb2.SignedRecord(payload=payload, signature=identity.sign(tag + payload), kind=kind)
    raw = signed.SerializeToString()
    if len(raw) > MAX_RECORD_BYTES:
        raise ValueError(f"the record has {len(raw)} bytes, at most {MAX_RECORD_BYTES} are allowed: {remedy}")
    return raw


def unseal(raw: bytes, message_type: type[RecordMessage]) -> RecordMessage:
    """The message in a record of this kind, its signature verified. ValueError, naming the reason, for anything else."""
    kind, tag = _KINDS[message_type]
    signed = _envelope(raw)
    if signed.kind != kind:
        raise ValueError("record of another kind")
    try:
        message = message_type.FromString(signed.payload)
    except DecodeError as error:
        raise ValueError("record is not valid protobuf") from error
    if not verify_signature(message.peer_id, tag + signed.payload, signed.signature):
        raise ValueError("record is not signed by its peer")
    return message


def kind_of(raw: bytes) -> record_pb2.RecordKind:
    """Which kind of record raw says that it is. ValueError if it is none."""
    return _envelope(raw).kind


def _envelope(raw: bytes) -> record_pb2.SignedRecord:
    if len(raw) > MAX_RECORD_BYTES:
        raise ValueError(f"record of {len(raw)} bytes")
    try:
        return record_pb2.SignedRecord.FromString(raw)
    except DecodeError as error:
        raise ValueError("record is not valid protobuf") from error
