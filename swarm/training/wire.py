"""The members' messages as protobuf and back. What comes from a peer is checked here: whatever gets through is a value that makes sense."""

from __future__ import annotations

import dataclasses
import math
import typing
from functools import cache
from typing import Any

from google.protobuf.message import DecodeError

from protos import training_pb2
from swarm.epoch import messages
from swarm.errors import BadReply
from swarm.identity import Identity, verify_signature
from swarm.run_orders import MAX_ORDERS_BYTES
from swarm.training.member_name import peer_of

MAX_MESSAGE_BYTES = 2 * 2**20
MAX_UNIT = 2**20
_MAX_TEXT = 500
_COMMIT_TAG = b"shardswarm Commit 1\0"

_FIELD_OF: dict[type, str] = {
    messages.Lead: "lead",
    messages.Hello: "hello",
    messages.Redirect: "redirect",
    messages.Where: "where",
    messages.Lease: "lease",
    messages.Done: "done",
    messages.Failed: "failed",
    messages.Confirm: "confirm",
    messages.Void: "void",
    messages.Prepare: "prepare",
    messages.Abort: "abort",
    messages.Report: "report",
    messages.RoundFailed: "round_failed",
    messages.Commit: "commit",
    messages.Committed: "committed",
    messages.Excluded: "excluded",
    messages.Ordered: "ordered",
}
_TYPE_OF = {field: kind for kind, field in _FIELD_OF.items()}


def to_wire(message: messages.Mail) -> training_pb2.MemberMessage:
    wire = training_pb2.MemberMessage()
    target = getattr(wire, _FIELD_OF[type(message)])
    target.SetInParent()
    _fill(target, message)
    return wire


def from_wire(wire: training_pb2.MemberMessage) -> messages.Mail:
    """BadReply for what no honest member says."""
    kind = wire.WhichOneof("kind")
    if kind not in _TYPE_OF:
        raise BadReply(f"a member sent a message of kind {kind} where it makes no sense")
    try:
        message: messages.Mail = _read(_TYPE_OF[kind], getattr(wire, kind))
    except (ValueError, TypeError) as error:
        raise BadReply(f"a member sent a {kind} that makes no sense: {error}") from error
    return message


def decode(raw: bytes) -> training_pb2.MemberMessage:
    """BadReply for what is no message."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise BadReply(f"a member sent a message of {len(raw)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        return training_pb2.MemberMessage.FromString(raw)
    except DecodeError as error:
        raise BadReply("a member sent bytes that are no message") from error


def place_to_wire(place: messages.Place) -> training_pb2.Place:
    return training_pb2.Place(epoch=place.epoch, lineage=place.lineage, era=place.era)


def place_from_wire(wire: training_pb2.Place) -> messages.Place:
    return messages.Place(wire.epoch, wire.lineage, wire.era)


def commit_to_wire(commit: messages.Commit) -> training_pb2.Commit:
    wire = training_pb2.Commit()
    _fill(wire, commit)
    return wire


def commit_from_wire(wire: training_pb2.Commit) -> messages.Commit:
    return typing.cast(messages.Commit, from_wire(training_pb2.MemberMessage(commit=wire)))


def sign_commit(commit: messages.Commit, run_id: bytes, identity: Identity) -> messages.Commit:
    """The Commit with its leader's signature."""
    return dataclasses.replace(commit, signature=identity.sign(_COMMIT_TAG + run_id + commit.lineage))


def is_signed(commit: messages.Commit, run_id: bytes) -> bool:
    """Whether the leader of the commit's term signed it."""
    return verify_signature(peer_of(commit.term.peer), _COMMIT_TAG + run_id + commit.lineage, commit.signature)


def _hints(kind: type) -> dict[str, Any]:
    return _cached_hints(kind)


@cache
def _cached_hints(kind: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set(kind._fields)
    return {name: hint for name, hint in typing.get_type_hints(kind).items() if name in names}


def _fill(target: Any, value: Any) -> None:
    for name, hint in _hints(type(value)).items():
        field = getattr(value, name)
        if typing.get_origin(hint) in (tuple, frozenset):
            items = sorted(field) if isinstance(field, frozenset) else field
            for item in items:
                if isinstance(item, int | bytes | str):
                    getattr(target, name).append(item)
                elif isinstance(item, tuple) and not hasattr(item, "_fields"):
                    getattr(target, name).add(peer=item[0], stage=item[1])
                else:
                    _fill(getattr(target, name).add(), item)
        elif isinstance(field, int | float | bytes | str):
            setattr(target, name, field)
        else:
            getattr(target, name).SetInParent()
            _fill(getattr(target, name), field)


def _read(kind: type, wire: Any) -> Any:
    values = {name: _value(name, hint, getattr(wire, name)) for name, hint in _hints(kind).items()}
    return kind(**values)


def _value(name: str, hint: Any, raw: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is frozenset:
        return frozenset(_value(name, typing.get_args(hint)[0], item) for item in raw)
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        if typing.get_origin(inner) is tuple:
            return tuple((_value("peer", str, item.peer), int(item.stage)) for item in raw)
        return tuple(_value(name, inner, item) for item in raw)
    if hint is str:
        if len(raw) > _MAX_TEXT or not raw.isprintable():
            raise ValueError(f"{name} is no short line of text")
        return raw
    if hint is bytes:
        if len(raw) > (MAX_ORDERS_BYTES if name == "orders" else 64):
            raise ValueError(f"{name} has {len(raw)} bytes")
        return raw
    if hint is float:
        if name not in ("loss_sum", "square_norm") and not math.isfinite(raw):
            raise ValueError(f"{name} is not finite")
        return raw
    if hint is int:
        if name in ("unit", "units") and raw >= MAX_UNIT:
            raise ValueError(f"unit {raw}")
        return raw
    if hint is bool:
        return raw
    return _read(hint, raw)
