"""SessionTable: who may open a session, and what it reserves."""

from __future__ import annotations

from typing import Any

import pytest

from node.kv_cache import Session, SessionLimits, SessionTable
from protos import node_pb2
from swarm.messages import Refused
from swarm.span import Span

HOP = Span(2, 6)
BYTES_PER_TOKEN = 100


def make_table(**changes: Any) -> SessionTable:
    limits = {"cache_bytes": 100_000, "max_sessions": 4, "max_sessions_per_peer": 2, "idle_s": 30.0}
    return SessionTable(SessionLimits(**{**limits, **changes}), BYTES_PER_TOKEN)


def admit(table: SessionTable, peer: str, number: int, *, batch: int = 1, max_length: int = 10) -> Session:
    session_id = bytes([number]) * 16
    reserved = table.reserve(peer, session_id, HOP, batch, max_length)
    session = Session(
        session_id=session_id,
        peer_id=peer,
        hop=HOP,
        batch=batch,
        max_length=max_length,
        reserved_bytes=reserved,
        last_used=1000.0,
        cache=None,  # type: ignore[arg-type]
    )
    table.add(session)
    return session


def refusal(table: SessionTable, peer: str, number: int, **fields: Any) -> tuple[int, str]:
    before = (len(table.sessions), table.used_bytes)
    with pytest.raises(Refused) as caught:
        admit(table, peer, number, **fields)
    assert (len(table.sessions), table.used_bytes) == before
    return caught.value.code, str(caught.value)


def test_a_session_reserves_all_tokens_of_all_rows_in_all_blocks_of_its_hop() -> None:
    table = make_table()
    session = admit(table, "a", 1, batch=3, max_length=7)
    assert table.used_bytes == session.reserved_bytes == 3 * 7 * len(HOP) * BYTES_PER_TOKEN


def test_closing_frees_what_was_reserved_and_closing_twice_is_fine() -> None:
    table = make_table()
    one, other = admit(table, "a", 1), admit(table, "b", 1)
    assert table.is_open(one) and not table.empty.is_set()
    table.close(one)
    table.close(one)
    assert not table.is_open(one) and table.used_bytes == other.reserved_bytes and not table.empty.is_set()
    table.close(other)
    assert table.used_bytes == 0 and table.empty.is_set()


def test_closing_a_session_leaves_a_later_one_of_the_same_id_alone() -> None:
    table = make_table()
    first = admit(table, "a", 1)
    table.close(first)
    second = admit(table, "a", 1)
    table.close(first)
    assert table.is_open(second)


def test_two_peers_may_use_the_same_session_id() -> None:
    table = make_table()
    admit(table, "a", 1)
    admit(table, "b", 1)
    assert refusal(table, "a", 1) == (node_pb2.THE_REQUEST_IS_WRONG, "this session is open already")


def test_a_peer_has_its_share_and_a_node_its_limit() -> None:
    table = make_table()
    admit(table, "a", 1)
    admit(table, "a", 2)
    code, message = refusal(table, "a", 3)
    assert code == node_pb2.THIS_NODE_HAS_NO_ROOM and "one peer may have 2 sessions here" in message
    admit(table, "b", 1)
    admit(table, "c", 1)
    code, message = refusal(table, "d", 1)
    assert code == node_pb2.THIS_NODE_HAS_NO_ROOM and "4 sessions are open, no more are served" in message


def test_what_can_never_fit_is_told_apart_from_what_does_not_fit_now() -> None:
    table = make_table()
    code, message = refusal(table, "a", 1, max_length=251)
    assert code == node_pb2.THE_CACHE_IS_TOO_SMALL and "at most 250 tokens" in message
    first = admit(table, "a", 1, max_length=200)
    code, message = refusal(table, "b", 1, max_length=51)
    assert code == node_pb2.THIS_NODE_HAS_NO_ROOM and "MiB are free; try another node or later" in message
    admit(table, "b", 1, max_length=50)
    assert table.used_bytes == 100_000
    table.close(first)
    admit(table, "c", 1, max_length=200)


@pytest.mark.parametrize(("batch", "max_length"), [(0, 1), (1, 0), (-1, 1), (1025, 1), (1, 2**20 + 1), (2**32, 2**32)])
def test_absurd_sizes_are_refused_before_anything_is_computed(batch: int, max_length: int) -> None:
    code, message = refusal(make_table(), "a", 1, batch=batch, max_length=max_length)
    assert code == node_pb2.THE_REQUEST_IS_WRONG and "is out of range (1..1024, 1..1048576)" in message


@pytest.mark.parametrize("session_id", [b"", b"x", bytes(15), bytes(17), bytes(10_000)])
def test_a_session_id_has_sixteen_bytes(session_id: bytes) -> None:
    with pytest.raises(Refused, match=f"16 bytes, got {len(session_id)}"):
        make_table().reserve("a", session_id, HOP, 1, 1)


def test_a_node_that_leaves_admits_nobody() -> None:
    table = make_table()
    table.leaving = True
    assert refusal(table, "a", 1) == (node_pb2.THIS_NODE_IS_LEAVING, "this node shuts down; use another")


def test_a_session_expires_after_being_idle() -> None:
    table = make_table()
    session = admit(table, "a", 1)
    assert table.idle_left_s(session, now=1010.0) == 20.0
    assert table.idle_left_s(session, now=1031.0) < 0
