"""SessionTable: who may open a session, and who makes room for whom when pages run out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from node.backend.span_cache import SpanCache
from node.kv_cache import PAGE_TOKENS, SessionLimits, SessionTable
from node.session import Session
from node.session_pages import SessionPages
from protos import node_pb2
from swarm.messages import Refused
from swarm.span import Span

HOP = Span(2, 6)
BYTES_PER_TOKEN = 100
NUM_PAGES = 20


def make_table(**changes: Any) -> SessionTable:
    limits = {
        "cache_bytes": NUM_PAGES * PAGE_TOKENS * BYTES_PER_TOKEN,
        "max_sessions": 4,
        "max_sessions_per_peer": 2,
        "idle_s": 30.0,
    }
    return SessionTable(SessionLimits(**{**limits, **changes}), BYTES_PER_TOKEN)


def admit(table: SessionTable, peer: str, number: int, *, batch: int = 1, max_length: int = 10) -> Session:
    session_id = bytes([number]) * 16
    table.admit(peer, session_id, batch, max_length)
    session = Session(
        session_id=session_id,
        peer_id=peer,
        hop=HOP,
        batch=batch,
        max_length=max_length,
        last_used=1000.0,
        pages=SessionPages(table.pool, batch, b"origin"),
    )
    table.add(session)
    return session


def grow(table: SessionTable, session: Session, num_tokens: int) -> None:
    """As a step does it: first the room, then the pages."""
    lengths = session.pages.lengths
    missing = session.pages.num_missing(lengths, [num_tokens] * session.batch)
    table.make_room(session, missing)
    for row in range(session.batch):
        session.pages.grow(row, num_tokens, None)


def refusal(table: SessionTable, peer: str, number: int, **fields: Any) -> tuple[int, str]:
    before = (len(table.sessions), table.used_bytes)
    with pytest.raises(Refused) as caught:
        admit(table, peer, number, **fields)
    assert (len(table.sessions), table.used_bytes) == before
    return caught.value.code, str(caught.value)


def test_a_session_takes_pages_as_it_grows() -> None:
    table = make_table()
    session = admit(table, "a", 1, batch=3, max_length=90)
    assert table.used_bytes == 0
    grow(table, session, PAGE_TOKENS)
    assert table.used_bytes == 3 * PAGE_TOKENS * BYTES_PER_TOKEN
    grow(table, session, 1)
    assert table.used_bytes == 6 * PAGE_TOKENS * BYTES_PER_TOKEN


def test_no_session_is_longer_than_the_model_allows() -> None:
    table = make_table()
    table.longest_text = 12
    code, reason = refusal(table, "a", 1, max_length=13)
    assert code == node_pb2.THE_CACHE_IS_TOO_SMALL
    assert "13 tokens are more than the 12 up to which this model's rotary tables (longrope) stay as they are" in reason
    admit(table, "a", 1, max_length=12)


def test_closing_frees_the_pages_and_closing_twice_is_fine() -> None:
    table = make_table()
    one, other = admit(table, "a", 1), admit(table, "b", 1)
    grow(table, one, 10)
    grow(table, other, 10)
    assert table.is_open(one) and not table.empty.is_set()
    table.close(one)
    table.close(one)
    assert not table.is_open(one) and table.pool.num_held == 1 and not table.empty.is_set()
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
    code, message = refusal(table, "a", 1, max_length=NUM_PAGES * PAGE_TOKENS + 1)
    assert code == node_pb2.THE_CACHE_IS_TOO_SMALL and f"at most {NUM_PAGES * PAGE_TOKENS} tokens" in message
    first = admit(table, "a", 1, max_length=NUM_PAGES * PAGE_TOKENS)
    grow(table, first, (NUM_PAGES - 2) * PAGE_TOKENS)
    code, message = refusal(table, "b", 1, max_length=3 * PAGE_TOKENS)
    assert code == node_pb2.THIS_NODE_HAS_NO_ROOM and "are free; try another node or later" in message
    admit(table, "b", 1, max_length=2 * PAGE_TOKENS)
    table.close(first)
    admit(table, "c", 1, max_length=NUM_PAGES * PAGE_TOKENS)


def test_many_are_admitted_whose_greatest_lengths_would_not_fit_together() -> None:
    table = make_table()
    sessions = [admit(table, peer, 1, max_length=NUM_PAGES * PAGE_TOKENS) for peer in "abcd"]
    for session in sessions:
        grow(table, session, 5 * PAGE_TOKENS)
    assert table.num_evicted == 0 and table.pool.num_available == 0


def test_the_youngest_session_makes_room_for_older_ones_and_never_the_other_way_round() -> None:
    table = make_table()
    old, middle, young = (admit(table, peer, 1, max_length=NUM_PAGES * PAGE_TOKENS) for peer in "abc")
    for session in (old, middle, young):
        grow(table, session, 6 * PAGE_TOKENS)
    with pytest.raises(Refused, match="older sessions hold the rest") as caught:
        grow(table, young, 3 * PAGE_TOKENS)
    assert caught.value.code == node_pb2.THIS_NODE_HAS_NO_ROOM and table.is_open(young)
    grow(table, middle, 3 * PAGE_TOKENS)
    assert not table.is_open(young) and young.made_room and "made room" in young.ended_because
    grow(table, old, 6 * PAGE_TOKENS)
    assert not table.is_open(middle) and table.is_open(old) and table.num_evicted == 2


def test_a_session_whose_step_is_under_way_makes_room_after_it() -> None:
    table = make_table()
    old, young = (admit(table, peer, 1, max_length=NUM_PAGES * PAGE_TOKENS) for peer in "ab")
    grow(table, young, 19 * PAGE_TOKENS)
    young.is_busy = True
    with pytest.raises(Refused, match="younger sessions are about to make room"):
        grow(table, old, 2 * PAGE_TOKENS)
    assert table.is_open(young) and young.must_make_room and not old.must_make_room
    young.is_busy = False
    grow(table, old, 2 * PAGE_TOKENS)
    assert not table.is_open(young)


def test_nobody_makes_room_in_vain() -> None:
    table = make_table()
    old, middle, young, busy = (admit(table, peer, 1, max_length=NUM_PAGES * PAGE_TOKENS) for peer in "abcd")
    grow(table, old, 13 * PAGE_TOKENS)
    for session in (middle, young, busy):
        grow(table, session, 2 * PAGE_TOKENS)
    busy.is_busy = True
    with pytest.raises(Refused, match="older sessions hold the rest"):
        grow(table, middle, 6 * PAGE_TOKENS)
    assert table.is_open(young) and not busy.must_make_room and table.num_evicted == 0
    grow(table, middle, 2 * PAGE_TOKENS)
    assert not table.is_open(young) and not busy.must_make_room


def test_what_a_younger_session_shares_with_an_older_one_does_not_come_free_with_it() -> None:
    table = make_table()
    old, middle, young = (admit(table, peer, 1, max_length=NUM_PAGES * PAGE_TOKENS) for peer in "abc")
    text = torch.ones(1, 8 * PAGE_TOKENS, 4)
    for session in (old, young):
        session.append(text, None)
        session.pages.computed()
    grow(table, middle, 10 * PAGE_TOKENS)
    assert table.pool.num_held == 18
    with pytest.raises(Refused, match="older sessions hold the rest"):
        grow(table, middle, 3 * PAGE_TOKENS)
    assert table.is_open(young)


def test_of_younger_sessions_one_of_the_peer_that_holds_most_goes_first() -> None:
    table = make_table()
    old = admit(table, "a", 1, max_length=NUM_PAGES * PAGE_TOKENS)
    large, small, alone = admit(table, "b", 1, max_length=200), admit(table, "b", 2), admit(table, "c", 1)
    grow(table, large, 10 * PAGE_TOKENS)
    grow(table, small, 1)
    grow(table, alone, 1)
    grow(table, old, 9 * PAGE_TOKENS)
    assert not table.is_open(small) and table.is_open(large) and table.is_open(alone)


def test_rows_of_a_session_with_a_cache_of_its_own_take_room_each_whatever_they_were_copied_from() -> None:
    """Its keys and values are tensors with a row for each, so after a beam search's reorder nothing is shared."""
    table = make_table()
    session = admit(table, "a", 1, batch=2, max_length=64)
    session.cache = SpanCache(HOP)
    session.append(torch.zeros(2, 20, 8), None)
    assert table.pool.num_held == 4
    assert session.num_missing(20, [1, 1], [1, 1]) == 0, "there is room in the last pages"
    session.reorder([1, 1])
    session.append(torch.zeros(2, 1, 8), None)
    assert table.pool.num_held == 4 and session.pages.copies == []


@pytest.mark.parametrize(("batch", "max_length"), [(0, 1), (1, 0), (-1, 1), (1025, 1), (1, 2**20 + 1), (2**32, 2**32)])
def test_absurd_sizes_are_refused_before_anything_is_computed(batch: int, max_length: int) -> None:
    code, message = refusal(make_table(), "a", 1, batch=batch, max_length=max_length)
    assert code == node_pb2.THE_REQUEST_IS_WRONG and "is out of range (1..1024, 1..1048576)" in message


@pytest.mark.parametrize("session_id", [b"", b"x", bytes(15), bytes(17), bytes(10_000)])
def test_a_session_id_has_sixteen_bytes(session_id: bytes) -> None:
    with pytest.raises(Refused, match=f"16 bytes, got {len(session_id)}"):
        make_table().admit("a", session_id, 1, 1)


def test_a_node_that_leaves_admits_nobody() -> None:
    table = make_table()
    table.leaving = True
    assert refusal(table, "a", 1) == (node_pb2.THIS_NODE_IS_LEAVING, "this node shuts down; use another")


def test_a_session_expires_after_being_idle() -> None:
    table = make_table()
    session = admit(table, "a", 1)
    assert table.idle_left_s(session, now=1010.0) == 20.0
    assert table.idle_left_s(session, now=1031.0) < 0
