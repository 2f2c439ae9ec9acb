"""The exchange of gradients in a known group: who sums what, what the codec loses, how long a peer is awaited. Pure.

n members hold one float32 vector each (some hold none) and all are to end with the same bytes of the sum. The vector is cut into
parts, one for each reducer, and parts into chunks that fit a frame. A reducer gets its part of every member's vector, sums, and
sends the result back to everyone: 2 (n - 1) / n vectors sent by each member, whatever n is (Patarasuk and Yuan, 2009).
Sums are formed in the order of peer ids, from decoded bytes only, so that it does not matter to a bit who formed them.
swarm.p2p.averaging carries it out.
"""

from __future__ import annotations

import bisect
import enum
import hashlib
import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from protos import averaging_pb2, tensor_pb2
from swarm.errors import BadReply, BadRequest, PeerFailed
from swarm.tensors import INT8_BLOCK, Buffer, WireFormat, decode_tensors, encode_tensor, is_finite, wire_format_of

ROUND_ID_BYTES = 32
MAX_MEMBERS = 1024
# A chunk and its header make one frame of swarm.p2p.framing (256 KiB): the reader need not join pieces.
MAX_CHUNK_BYTES = 256 * 1024 - 256
# Values of a part's first chunks: a peer that was never measured is, before much has to be awaited from it.
_FIRST_CHUNKS = (4 * 1024, 16 * 1024)
_MAX_HEADER_BYTES = 512
_BYTES_OF_64_VALUES = {WireFormat.FP32: 256, WireFormat.BF16: 128, WireFormat.INT8: 68}
_LENGTH = struct.Struct("!I")
_CHUNK_FIELD: dict[type, str] = {averaging_pb2.ExchangeRequest: "contribution", averaging_pb2.ExchangeReply: "reduced"}

Message = TypeVar("Message", averaging_pb2.ExchangeRequest, averaging_pb2.ExchangeReply)


class ExchangeFailed(PeerFailed):
    """The round was abandoned, and everything is as before it. Try again without the culprits, under a new round id.

    culprits: peer ids that this member itself saw fail: gone, frozen, too slow, or sending nonsense. May be empty.
    gave_up: peer ids that ended the round in good order, or refused it; they saw another culprit, and may be asked which.
    A coordinator that hears all members' culprits knows everyone who failed, and how many say so.
    """

    def __init__(self, culprits: frozenset[str], gave_up: frozenset[str], reason: str) -> None:
        super().__init__(f"the round was abandoned: {reason}; the next attempt may succeed without the culprits")
        self.culprits = culprits
        self.gave_up = gave_up


# Who sums what ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExchangeMember:
    """One member of a group."""

    peer_id: str
    addresses: tuple[str, ...] = ()
    """Multiaddrs for connecting to it; may be empty when it reduces nothing, or when a connection exists."""
    has_gradient: bool = True
    """False: sends nothing (but may reduce), and gets the result."""


def cut_parts(size: int, shares: Sequence[int]) -> tuple[int, ...]:
    """How many of `size` values each member sums, in proportion to the shares.

    Whole numbers only, so that everybody who computes it gets the same. ValueError if nobody has a share.
    """
    total = sum(shares)
    if total <= 0 or min(shares) < 0:
        raise ValueError(f"need shares of which at least one is positive, got {list(shares)}")
    parts = [size * share // total for share in shares]
    parts[shares.index(max(shares))] += size - sum(parts)
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start .. end-1 of the flat vector: the index-th chunk of a part."""

    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """All that the members of one round must agree on.

    One member chooses everybody's share and tells it to all: computed by each for itself from the rates, the parts would hang on
    the versions of numerical libraries.
    """

    round_id: bytes
    """32 bytes; names run, epoch, lineage, stage and attempt, and is never used again."""
    members: tuple[ExchangeMember, ...]
    """In the order of their peer ids."""
    parts: tuple[int, ...]
    """How many values each member reduces, in the order of the vector."""
    wire: WireFormat

    def __post_init__(self) -> None:
        if len(self.round_id) != ROUND_ID_BYTES:
            raise ValueError(f"a round id has {ROUND_ID_BYTES} bytes, got {len(self.round_id)}")
        ids = [member.peer_id for member in self.members]
        if not 1 <= len(ids) <= MAX_MEMBERS or ids != sorted(set(ids)):
            raise ValueError(f"need 1 .. {MAX_MEMBERS} different members in the order of their peer ids, got {ids}")
        if len(self.parts) != len(ids) or min(self.parts) < 0 or sum(self.parts) == 0:
            raise ValueError(f"need a part of 0 or more values for each of {len(ids)} members, got {self.parts}")
        if not any(member.has_gradient for member in self.members):
            raise ValueError("no member of the group has a gradient")

    @property
    def size(self) -> int:
        """Values of the vector."""
        return sum(self.parts)

    @property
    def codec(self) -> WireFormat:
        """The wire format; of a group of one FP32, because nothing travels."""
        return self.wire if len(self.members) > 1 else WireFormat.FP32

    @property
    def reducers(self) -> list[int]:
        """Indices of the members that reduce something."""
        return [index for index, part in enumerate(self.parts) if part]

    @property
    def largest_value(self) -> float:
        """What no value of a contribution may exceed, so that neither a codec nor the sum makes it infinite."""
        return torch.finfo(torch.float32).max / (4 * len(self.members))

    def index_of(self, peer_id: str) -> int | None:
        """The place of a member; None: it is no member."""
        index = bisect.bisect_left(self.members, peer_id, key=lambda member: member.peer_id)
        return index if index < len(self.members) and self.members[index].peer_id == peer_id else None

    def chunks_of(self, index: int) -> Iterator[Chunk]:
        """The chunks of a member's part, in order."""
        start = sum(self.parts[:index])
        end = start + self.parts[index]
        largest = INT8_BLOCK * (MAX_CHUNK_BYTES // _BYTES_OF_64_VALUES[self.codec])
        for number in itertools.count():
            if start >= end:
                return
            size = _FIRST_CHUNKS[number] if number < len(_FIRST_CHUNKS) else largest
            yield Chunk(number, start, min(start + size, end))
            start += size

    @property
    def digest(self) -> bytes:
        """Of what the members must agree on (addresses and rates are not among it)."""
        hasher = hashlib.sha256(b"shardswarm exchange plan 1\0" + self.round_id + self.wire.encode() + b"\0")
        for member, part in zip(self.members, self.parts, strict=True):
            hasher.update(member.peer_id.encode() + struct.pack("!?Q", member.has_gradient, part))
        return hasher.digest()


# What the codec loses ---------------------------------------------------------------------------------------------------


class ErrorFeedback:
    """What one member puts on the wire in one attempt, and what a lossy codec loses of it (error feedback: Seide et al., 2014).

    The residual is what the group has not been told yet. It is added to this member's next contribution:

        new residual = (vector + residual - decoded contribution) + (sum - decoded sum, in the part that this member reduces)

    One buffer holds both errors, so parts may move between rounds: what a reducer lost goes out with its next contribution,
    whoever reduces that position then. A member without gradient adds its residual only where it reduces (there it is free) and
    keeps the rest for later. Over all rounds, sum of results + all residuals = sum of vectors, up to float32's rounding.

    Each chunk is encoded once. Nothing here is changed in place but the new residual, which the caller takes over if the round
    is committed, and drops if not.
    """

    def __init__(self, plan: ExchangePlan, vector: Tensor | None, residual: Tensor | None) -> None:
        """vector, residual: float32 [size] or None. Raises BadRequest if they are not that, or hold what must not be sent."""
        for name, values in (("vector", vector), ("residual", residual)):
            if values is not None:
                _check(name, values, plan)
        self._codec = plan.codec
        self._vector = None if vector is None else vector.detach()
        self._before = residual
        self.residual: Tensor | None = None
        """The new one; None stands for zeros."""
        if residual is not None:
            self.residual = residual.clone()
        elif plan.codec is not WireFormat.FP32:
            self.residual = torch.zeros(plan.size)

    def contribution(self, chunk: Chunk) -> tuple[tensor_pb2.TensorHeader, memoryview, Tensor]:
        """This member's values, encoded, and as everybody else decodes them (perhaps a view of the vector)."""
        assert self._vector is not None
        values = self._vector[chunk.start : chunk.end]
        if self._before is not None:
            values = values + self._before[chunk.start : chunk.end]
        header, raw, decoded = self._encode(values)
        if self.residual is not None:
            torch.sub(values, decoded, out=self.residual[chunk.start : chunk.end])
        return header, raw, decoded

    def result(self, chunk: Chunk, total: Tensor) -> tuple[tensor_pb2.TensorHeader, memoryview, Tensor]:
        """The sum of all contributions, encoded, and as everybody decodes it. After this member's own contribution, if any."""
        if self._vector is None and self._before is not None and self.residual is not None:
            total = total + self._before[chunk.start : chunk.end]
            self.residual[chunk.start : chunk.end] = 0
        header, raw, decoded = self._encode(total)
        if self.residual is not None:
            self.residual[chunk.start : chunk.end] += total - decoded
        return header, raw, decoded

    def _encode(self, values: Tensor) -> tuple[tensor_pb2.TensorHeader, memoryview, Tensor]:
        header, raw = encode_tensor(values, self._codec)
        if self._codec is WireFormat.FP32:
            return header, raw, values
        return header, raw, decode_tensors([header], raw)[0].float()


def _check(name: str, values: Tensor, plan: ExchangePlan) -> None:
    if values.dtype is not torch.float32 or values.shape != (plan.size,) or values.device.type != "cpu":
        raise BadRequest(
            f"the {name} must be float32 [{plan.size}] on the CPU, got {values.dtype} {list(values.shape)} on {values.device}"
        )
    smallest, largest = map(float, torch.aminmax(values.detach()))
    if not max(-smallest, largest) <= plan.largest_value:  # NaN is not
        raise BadRequest(f"the {name} holds NaN, infinite or absurdly large values; take no part in this round")


# Chunks on the wire -----------------------------------------------------------------------------------------------------


def chunk_message(
    kind: type[Message], plan: ExchangePlan, chunk: Chunk, header: tensor_pb2.TensorHeader, raw: memoryview
) -> list[Buffer]:
    """A contribution (ExchangeRequest) or a reduced chunk (ExchangeReply) as buffers to be written one after another."""
    message = kind(tensors=[header])
    name = averaging_pb2.ExchangeChunk(round_id=plan.round_id, index=chunk.index)
    getattr(message, _CHUNK_FIELD[kind]).CopyFrom(name)
    return [_with_length(message), raw]


def plain_message(header: averaging_pb2.ExchangeRequest | averaging_pb2.ExchangeReply) -> list[Buffer]:
    """A message without tensors."""
    return [_with_length(header)]


def _with_length(header: averaging_pb2.ExchangeRequest | averaging_pb2.ExchangeReply) -> bytes:
    encoded = header.SerializeToString()
    return _LENGTH.pack(len(encoded)) + encoded


def split_message(message: Buffer, kind: type[Message]) -> tuple[Message, memoryview]:
    """Header and tensor bytes. BadReply for anything malformed."""
    view = memoryview(message)
    if len(view) < _LENGTH.size:
        raise BadReply(f"sent a message of {len(view)} bytes")
    (length,) = _LENGTH.unpack_from(view)
    if length > min(_MAX_HEADER_BYTES, len(view) - _LENGTH.size):
        raise BadReply(f"sent a message of {len(view)} bytes with a header of {length}")
    try:
        header = kind.FromString(bytes(view[_LENGTH.size : _LENGTH.size + length]))
    except DecodeError:
        raise BadReply("sent a message that is not valid protobuf") from None
    return header, view[_LENGTH.size + length :]


def read_chunk(message: Buffer, kind: type[Message], plan: ExchangePlan, chunk: Chunk) -> Tensor:
    """float32 [values of the chunk], finite, not shared with the message. BadReply, saying what came instead, for anything else.

    What is allocated is known from the plan before the message is decoded.
    """
    header, payload = split_message(message, kind)
    field = _CHUNK_FIELD[kind]
    if header.WhichOneof("kind") != field:
        raise BadReply(f"sent a message of kind {header.WhichOneof('kind')} where a chunk was due")
    name: averaging_pb2.ExchangeChunk = getattr(header, field)
    if name.round_id != plan.round_id:
        raise BadReply(f"sent a chunk of round {name.round_id.hex()[:8]} in round {plan.round_id.hex()[:8]}")
    if name.index != chunk.index:
        raise BadReply(f"sent chunk {name.index} where chunk {chunk.index} was due")
    size = chunk.end - chunk.start
    if len(header.tensors) != 1 or wire_format_of(header.tensors[0]) is not plan.codec:
        raise BadReply(f"sent a chunk that is not one {plan.codec} tensor")
    if list(header.tensors[0].shape) != [size]:
        raise BadReply(f"sent a chunk of shape {list(header.tensors[0].shape)[:4]}, due were {size} values")
    try:
        values = decode_tensors(header.tensors, payload)[0]
    except BadRequest as error:
        raise BadReply(f"sent a malformed chunk: {error}") from error
    if not is_finite(values):
        raise BadReply("sent NaN or infinite values")
    return values.float()


# How long a peer is awaited ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PatienceSettings:
    """After how long a silent peer is asked whether it lives, and given up."""

    min_s: float = 2.0
    """A peer is not asked earlier, and has as long for the answer."""
    factor: float = 4.0
    """A peer is asked when it is silent for so many times what it was expected to take, but at the latest after cap_s / 3: one
    that is frozen is found before one that is slow."""
    cap_s: float = 30.0
    """A peer that lives must send, or take, the next chunk within this time."""
    first_rate_bytes_per_s: float = 64e3
    """Assumed of peers that were not measured yet: 0.5 Mbit/s."""

    def __post_init__(self) -> None:
        if not (0 < self.min_s <= self.cap_s / 3 and self.factor >= 1 and self.first_rate_bytes_per_s > 0):
            raise ValueError(f"need 0 < min_s <= cap_s / 3, factor >= 1 and a positive first rate, got {self}")


class RateMeter:
    """A peer's rate, from what came while we waited for it; recent bytes count more."""

    _HALF_LIFE_BYTES = 8 * 2**20

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def observe(self, num_bytes: int, seconds: float) -> None:
        """num_bytes came within seconds of waiting."""
        kept: float = 0.5 ** (num_bytes / self._HALF_LIFE_BYTES)
        self._bytes = kept * self._bytes + num_bytes
        self._seconds = kept * self._seconds + max(seconds, 0.0)

    @property
    def bytes_per_s(self) -> float | None:
        """None: nothing was measured."""
        return self._bytes / max(self._seconds, 1e-6) if self._bytes else None


class Verdict(enum.Enum):
    """What to think of a peer at this moment."""

    WAIT = enum.auto()
    PING = enum.auto()
    """Ask it whether it lives, once."""
    FROZEN = enum.auto()
    """It was asked, and not one byte came since: it is stopped or unreachable."""
    TOO_SLOW = enum.auto()
    """It lives, but the time is up."""


class Patience:
    """Judges one peer, wait by wait. Times are monotonic seconds and bytes are counters; both are handed in.

    Whatever bytes come from the peer prove that it lives: chunks, credit, answers to pings.
    """

    def __init__(self, settings: PatienceSettings, meter: RateMeter, *, longest_s: float, due_at: float) -> None:
        """longest_s: for one wait; due_at: when all waits must be over."""
        self._settings, self._meter = settings, meter
        self._longest_s, self._due_at = longest_s, due_at
        self._is_waiting = False
        self._began_at = self._heard_at = self.quiet_s = 0.0
        self._pinged_at: float | None = None
        self._heard_bytes = 0
        self._is_first = True
        self._was_prompt = False

    def begin(self, now: float, heard_bytes: int, num_bytes: int) -> None:
        """We wait from now on, for num_bytes to come or to be taken; heard_bytes came from the peer until now."""
        settings = self._settings
        rate = self._meter.bytes_per_s or (math.inf if self._was_prompt else settings.first_rate_bytes_per_s)
        self.quiet_s = min(max(settings.factor * num_bytes / rate, settings.min_s), settings.cap_s / 3)
        self._is_waiting, self._pinged_at = True, None
        self._began_at = self._heard_at = now
        self._heard_bytes = heard_bytes

    def end(self, now: float, moved_bytes: int) -> None:
        """The wait is over, and moved_bytes came, or were taken, meanwhile: none, if what we wanted was there already.

        The first wait shows how far the peer is, not how fast.
        """
        if moved_bytes and not self._is_first:
            self._meter.observe(moved_bytes, now - self._began_at)
        self._was_prompt = self._was_prompt or moved_bytes == 0
        self._is_waiting = self._is_first = False

    def verdict(self, now: float, heard_bytes: int) -> Verdict:
        if not self._is_waiting:
            return Verdict.WAIT
        if heard_bytes > self._heard_bytes:
            self._heard_bytes, self._heard_at, self._pinged_at = heard_bytes, now, None
        if now >= min(self._began_at + self._longest_s, self._due_at):
            return Verdict.TOO_SLOW
        if self._pinged_at is not None:
            return Verdict.FROZEN if now >= self._pinged_at + self.quiet_s else Verdict.WAIT
        if now >= self._heard_at + self.quiet_s:
            self._pinged_at = now
            return Verdict.PING
        return Verdict.WAIT

    def forgive(self, seconds: float) -> None:
        """We ourselves stood still for so long (stopped, swapped out), and could not hear the peer."""
        self._began_at += seconds
        self._heard_at += seconds
        if self._pinged_at is not None:
            self._pinged_at += seconds


def result_patience_s(settings: PatienceSettings) -> float:
    """How long a reducer that lives is awaited: longer than it may itself wait, for a contribution and then for one who does
    not take results, so that it is not blamed for others."""
    return 2 * settings.cap_s + settings.min_s
