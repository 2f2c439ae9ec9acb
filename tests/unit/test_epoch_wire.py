"""Members' messages come back as they were sent, and nothing comes in that no honest member says."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import node_pb2, training_pb2
from swarm.epoch import messages as m
from swarm.errors import BadReply
from swarm.identity import Identity
from swarm.training import wire

KINDS = typing.get_args(m.Mail)
LEADER, OTHER = Identity.generate(), Identity.generate()
RUN = b"r" * 32
PLACE, TERM = m.Place(3, b"p" * 32), m.Term(2, "leader")

TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
NUMBERS_OF_64 = {
    "epoch",
    "number",
    "ledger_id",
    "early_ledger_id",
    "ends_ledger",
    "ledgers",
    "num_loss_tokens",
    "num_eval_tokens",
}


def values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """What a field of this name and type may hold."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is frozenset:
        return st.frozensets(values(name, inner[0]), max_size=5)
    if origin is tuple and typing.get_origin(inner[0]) is tuple:
        return st.lists(st.tuples(TEXTS, st.integers(0, 100)), max_size=4).map(tuple)
    if origin is tuple:
        return st.lists(values(name, inner[0]), max_size=4).map(tuple)
    if hint is str:
        return TEXTS
    if hint is bytes:
        return st.binary(max_size=64)
    if hint is bool:
        return st.booleans()
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=name in ("loss_sum", "square_norm"))
    if hint is int and name == "rate":
        return st.integers(-1, 2**40)
    if hint is int and name in ("unit", "units"):
        return st.integers(0, wire.MAX_UNIT - 1)
    if hint is int:
        return st.integers(0, 2**64 - 1 if name in NUMBERS_OF_64 else 2**32 - 1)
    return instances(hint)


def instances(kind: Any) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values(name, hint) for name, hint in wire._hints(kind).items()})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was_sent(kind: Any) -> None:
    @settings(max_examples=60, deadline=None)
    @given(instances(kind))
    def round_trip(message: Any) -> None:
        raw = wire.to_wire(message).SerializeToString()
        back = wire.from_wire(wire.decode(raw))
        assert back == message and type(back) is kind
        if isinstance(message, m.Commit):
            assert back.signature == message.signature and back.lineage == message.lineage
            assert wire.commit_from_wire(wire.commit_to_wire(message)) == message

    round_trip()


def test_the_table_of_messages_is_complete() -> None:
    assert set(wire._FIELD_OF) == set(KINDS)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    try:
        message = wire.from_wire(wire.decode(raw))
    except BadReply:
        return
    assert isinstance(message, KINDS)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS).flatmap(instances), st.data())
def test_a_damaged_message_is_a_message_or_refused(message: Any, data: st.DataObject) -> None:
    raw = bytearray(wire.to_wire(message).SerializeToString())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        back = wire.from_wire(wire.decode(bytes(raw)))
    except BadReply:
        return
    assert isinstance(back, KINDS)


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(BadReply, match="no message"):
        wire.decode(b"\xff" * 20)


def test_a_message_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadReply, match="at most"):
        wire.decode(bytes(wire.MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize(
    "wrong",
    [
        training_pb2.MemberMessage(),
        training_pb2.MemberMessage(introduction=training_pb2.Introduction(stage=1)),
        training_pb2.MemberMessage(get_snapshot=training_pb2.GetSnapshot(at_least=training_pb2.Place(epoch=1))),
        training_pb2.MemberMessage(state=training_pb2.StateHeader(num_steps=1)),
        training_pb2.MemberMessage(get_artifact=training_pb2.GetArtifact(digest=b"d")),
        training_pb2.MemberMessage(artifact=training_pb2.Artifact(num_bytes=1)),
        training_pb2.MemberMessage(refusal=node_pb2.Refusal()),
    ],
    ids=lambda wrong: str(wrong.WhichOneof("kind")),
)
def test_what_is_no_letter_is_refused(wrong: training_pb2.MemberMessage) -> None:
    with pytest.raises(BadReply, match="makes no sense"):
        wire.from_wire(wrong)


RESULT = m.UnitResult(1, 10, 2.5)
COMMIT = m.Commit(
    epoch=3,
    parent=b"p" * 32,
    term=m.Term(2, LEADER.peer_id),
    attempt=1,
    num_loss_tokens=100,
    norm=1.5,
    is_skipped=False,
    digests=(b"d" * 32, b"e" * 32),
    members=(("a", 0), ("b", 1)),
    loss_sum=12.5,
    eval_loss_sum=3.5,
    num_eval_tokens=7,
)
MALFORMED: dict[str, Any] = {
    "a peer id of 501 characters": m.Lead(PLACE, m.Term(1, "x" * 501)),
    "a peer id with a line break": m.Lead(PLACE, m.Term(1, "x\ny")),
    "a peer id with an escape": m.Redirect(PLACE, m.Term(1, "\x1b[2J")),
    "a lineage of 65 bytes": m.Where(m.Place(1, b"x" * 65)),
    "a culprit too long": m.Failed(PLACE, TERM, 1, 1, "x" * 501, "reason"),
    "a reason too long": m.Failed(PLACE, TERM, 1, 1, "peer", "x" * 501),
    "a reason of two lines": m.Excluded(PLACE, TERM, "one\ntwo"),
    "a unit too large": m.Confirm(PLACE, TERM, wire.MAX_UNIT, 1, True),
    "a leased unit too large": m.Lease(PLACE, TERM, wire.MAX_UNIT, 1, ()),
    "a failed unit too large": m.Failed(PLACE, TERM, wire.MAX_UNIT, 1, "", ""),
    "units too large": m.Hello(PLACE, TERM, 0, 1, frozenset({0, wire.MAX_UNIT})),
    "prepared units too large": m.Prepare(PLACE, TERM, 0, (), 1, frozenset({wire.MAX_UNIT})),
    "the unit of a result too large": m.Done(PLACE, TERM, 1, (), 1, m.UnitResult(wire.MAX_UNIT, 1, 1.0)),
    "the unit of a result in a hello": m.Hello(
        PLACE, TERM, 0, 1, frozenset(), results=(m.UnitResult(wire.MAX_UNIT, 1, 1.0),)
    ),
    "an owner too long": m.Lease(PLACE, TERM, 1, 1, (m.Owner("x" * 501, 1),)),
    "a group's member too long": m.Prepare(PLACE, TERM, 0, (m.GroupMember("x" * 501, True, 1),), 1, frozenset()),
    "a culprit of a round too long": m.RoundFailed(PLACE, TERM, 0, frozenset({"x" * 501})),
    "a digest too long": m.Report(PLACE, TERM, 0, b"d" * 65, 1.0),
    "a norm that is no number": dataclasses.replace(COMMIT, norm=math.nan),
    "an infinite norm": dataclasses.replace(COMMIT, norm=math.inf),
    "an evaluation that is no number": dataclasses.replace(COMMIT, eval_loss_sum=math.nan),
    "a parent too long": dataclasses.replace(COMMIT, parent=b"x" * 65),
    "a digest of a Commit too long": dataclasses.replace(COMMIT, digests=(b"d" * 65,)),
    "a member of a Commit too long": dataclasses.replace(COMMIT, members=(("x" * 501, 0),)),
    "a member of a Commit with a line break": dataclasses.replace(COMMIT, members=(("x\n", 0),)),
    "a signature too long": dataclasses.replace(COMMIT, signature=b"s" * 65),
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
def test_a_field_that_makes_no_sense_is_refused(message: Any) -> None:
    raw = wire.to_wire(message).SerializeToString()
    with pytest.raises(BadReply, match="makes no sense"):
        wire.from_wire(wire.decode(raw))


def test_losses_and_norms_that_are_not_finite_come_through_since_the_leader_decides_on_them() -> None:
    done = m.Done(PLACE, TERM, 1, (), 1, m.UnitResult(0, 1, math.inf))
    report = m.Report(PLACE, TERM, 0, b"d", math.inf)
    assert wire.from_wire(wire.to_wire(done)) == done and wire.from_wire(wire.to_wire(report)) == report


# Signatures ------------------------------------------------------------------------------------------------------------


def test_a_commit_is_signed_by_its_terms_leader_for_one_run() -> None:
    signed = wire.sign_commit(COMMIT, RUN, LEADER)
    assert wire.is_signed(signed, RUN)
    assert wire.is_signed(wire.commit_from_wire(wire.commit_to_wire(signed)), RUN)
    assert not wire.is_signed(signed, b"s" * 32)
    assert not wire.is_signed(COMMIT, RUN)
    assert not wire.is_signed(wire.sign_commit(COMMIT, RUN, OTHER), RUN)
    assert not wire.is_signed(dataclasses.replace(signed, signature=bytes(64)), RUN)


OTHER_VALUES: dict[str, Any] = {
    "epoch": 4,
    "parent": b"q" * 32,
    "term": m.Term(3, LEADER.peer_id),
    "orders": b"owner",
    "era": 3,
    "attempt": 2,
    "num_loss_tokens": 101,
    "norm": 1.25,
    "is_skipped": True,
    "digests": (b"d" * 32, b"f" * 32),
    "members": (("a", 0), ("b", 0)),
    "loss_sum": 12.25,
    "eval_loss_sum": 3.25,
    "num_eval_tokens": 8,
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_changed_field_spoils_the_signature_and_the_lineage(name: str) -> None:
    signed = wire.sign_commit(COMMIT, RUN, LEADER)
    changed = dataclasses.replace(signed, **{name: OTHER_VALUES[name]})
    assert not wire.is_signed(changed, RUN) and changed.lineage != COMMIT.lineage


def test_every_field_of_a_commit_is_tried() -> None:
    assert {field.name for field in dataclasses.fields(m.Commit)} == {*OTHER_VALUES, "signature"}


def test_a_commit_whose_leader_is_no_peer_id_is_not_signed() -> None:
    signed = wire.sign_commit(COMMIT, RUN, LEADER)
    assert not wire.is_signed(dataclasses.replace(signed, term=m.Term(2, "nobody")), RUN)


def test_digests_and_members_cannot_be_exchanged_for_each_other() -> None:
    one = dataclasses.replace(COMMIT, digests=(b"a=0",), members=())
    other = dataclasses.replace(COMMIT, digests=(), members=(("a", 0),))
    assert one.lineage != other.lineage
