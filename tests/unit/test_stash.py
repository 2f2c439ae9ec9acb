"""Stash: what fits, who must go, what expires."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.stash import Stash, StashEntry
from swarm.span import Span

HOP = Span(2, 6)
BUDGET, EXPIRY_S = 100, 30.0


def make_stash(budget=BUDGET):
    return Stash(budget, EXPIRY_S)


def make_entry(num_bytes):
    return StashEntry(HOP, None, None, num_bytes)


def fill(stash, *entries, now=0.0):
    """Put (peer, id, bytes) one after another."""
    return [stash.put(peer, microbatch_id, make_entry(num_bytes), now) for peer, microbatch_id, num_bytes in entries]


def contents(stash, now=0.0):
    """(peer, id) -> bytes, in a stash that is left as it is; agrees with what the stash counts."""
    drained = copy.deepcopy(stash)
    found = {}
    for peer in "abc":
        for microbatch_id in map(bytes, ([n] for n in range(256))):
            if (entry := drained.take(peer, microbatch_id, now)) is not None:
                found[peer, microbatch_id] = entry.num_bytes
    assert drained.used_bytes == 0 and drained.num_entries == 0
    return found


def test_what_was_put_can_be_taken_once():
    stash = make_stash()
    given_, output = torch.zeros(1, 2, 3, requires_grad=True), torch.ones(1, 2, 3)
    entry = StashEntry(HOP, given_, output, 60)
    assert stash.put("a", b"1", entry, 0.0)
    assert (stash.used_bytes, stash.num_entries) == (60, 1)
    assert stash.take("b", b"1", 0.0) is None and stash.take("a", b"2", 0.0) is None
    assert stash.take("a", b"1", 0.0) is entry
    assert stash.take("a", b"1", 0.0) is None and (stash.used_bytes, stash.num_entries) == (0, 0)


def test_an_id_belongs_to_a_peer():
    stash = make_stash()
    assert fill(stash, ("a", b"\1", 10), ("b", b"\1", 20)) == [True, True]
    assert contents(stash) == {("a", b"\1"): 10, ("b", b"\1"): 20}


def test_a_second_forward_of_an_id_replaces_the_first_and_its_bytes():
    stash = make_stash()
    assert fill(stash, ("a", b"\1", 60), ("b", b"\1", 40), ("a", b"\1", 50)) == [True, True, True]
    assert contents(stash) == {("a", b"\1"): 50, ("b", b"\1"): 40} and stash.used_bytes == 90


def test_an_entry_of_an_older_forward_is_gone_even_if_the_new_one_does_not_fit():
    stash = make_stash()
    assert fill(stash, ("a", b"\1", 60), ("a", b"\1", 101)) == [True, False]
    assert stash.take("a", b"\1", 0.0) is None and stash.used_bytes == 0


def test_entries_expire_oldest_first():
    stash = make_stash()
    fill(stash, ("a", b"\1", 10), now=0.0)
    fill(stash, ("b", b"\1", 20), now=10.0)
    fill(stash, ("a", b"\2", 30), now=20.0)
    fill(stash, ("b", b"\1", 25), now=25.0)  # replaced: as young as its last forward
    stash.purge(29.9)
    assert stash.used_bytes == 65
    assert stash.take("a", b"\1", 30.0) is None and stash.used_bytes == 55
    stash.purge(50.0)
    assert stash.used_bytes == 25
    stash.purge(55.0)
    assert stash.used_bytes == 0 and stash.num_entries == 0


def test_what_has_expired_makes_room_before_anybody_is_pushed_out():
    stash = make_stash()
    fill(stash, ("a", b"\1", 60), now=0.0)
    fill(stash, ("b", b"\1", 40), now=29.0)
    assert fill(stash, ("c", b"\1", 60), now=30.0) == [True]
    assert contents(stash, 30.0) == {("b", b"\1"): 40, ("c", b"\1"): 60}


def test_a_peer_that_leaves_frees_its_bytes_and_no_others():
    stash = make_stash()
    fill(stash, ("a", b"\1", 10), ("b", b"\1", 20), ("a", b"\2", 30))
    stash.drop_peer("a")
    stash.drop_peer("nobody")
    assert contents(stash) == {("b", b"\1"): 20} and stash.used_bytes == 20


def test_room_is_made_by_the_oldest_of_whoever_holds_the_most():
    stash = make_stash()
    fill(stash, ("b", b"\1", 20), ("a", b"\1", 30), ("a", b"\2", 20), ("a", b"\3", 20))
    assert fill(stash, ("b", b"\2", 20)) == [True]
    assert contents(stash) == {("b", b"\1"): 20, ("a", b"\2"): 20, ("a", b"\3"): 20, ("b", b"\2"): 20}


def test_a_peer_that_fills_the_stash_pushes_out_only_its_own():
    stash = make_stash()
    fill(stash, ("b", b"\1", 10))
    assert all(fill(stash, *(("a", bytes([number]), 20) for number in range(50))))
    assert contents(stash) == {("b", b"\1"): 10, **{("a", bytes([number])): 20 for number in range(46, 50)}}


def test_of_peers_that_would_hold_as_much_the_newcomer_waits():
    stash = make_stash()
    assert fill(stash, ("b", b"\1", 60), ("a", b"\1", 60), ("a", b"\2", 59)) == [True, False, True]
    assert contents(stash) == {("a", b"\2"): 59}


def test_what_would_have_to_push_out_itself_pushes_out_nothing():
    stash = make_stash()
    fill(stash, ("a", b"\1", 30), ("a", b"\2", 20), ("b", b"\1", 5), ("b", b"\2", 5))
    before = contents(stash)
    assert fill(stash, ("b", b"\3", 101), ("b", b"\3", 95), ("c", b"\1", 99)) == [False, False, False]
    assert contents(stash) == before and stash.used_bytes == 60


@pytest.mark.parametrize("num_bytes", [0, 1, 10**12])
def test_a_budget_of_nothing_keeps_nothing(num_bytes):
    stash = make_stash(0)
    assert fill(stash, ("a", b"\1", num_bytes)) == [False]
    assert (stash.used_bytes, stash.num_entries) == (0, 0) and stash.take("a", b"\1", 0.0) is None


PEERS, IDS = st.sampled_from("abc"), st.integers(0, 5).map(lambda number: bytes([number]))
PUT = st.tuples(st.just("put"), PEERS, IDS, st.integers(0, 110))
ACTIONS = st.one_of(
    PUT,
    PUT,
    PUT,
    st.tuples(st.just("take"), PEERS, IDS),
    st.tuples(st.just("drop"), PEERS),
    st.tuples(st.just("purge")),
)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.0, 1.0, 12.0, 31.0]), ACTIONS), max_size=40))
def test_bytes_add_up_and_nobody_pushes_out_who_holds_less(schedule):
    stash, now, expected = make_stash(), 0.0, {}  # expected: (peer, id) -> (bytes, put at), oldest first

    def held(entries, peer):
        return sum(num_bytes for (owner, _), (num_bytes, _) in entries.items() if owner == peer)

    for passes_s, (action, *arguments) in schedule:
        now += passes_s
        if action == "purge":
            stash.purge(now)
        expected = {key: kept for key, kept in expected.items() if action == "drop" or now - kept[1] < EXPIRY_S}
        if action == "drop":
            stash.drop_peer(*arguments)
            expected = {key: kept for key, kept in expected.items() if key[0] != arguments[0]}
        elif action == "take":
            entry = stash.take(*arguments, now)
            assert (entry and entry.num_bytes) == expected.pop(tuple(arguments), (None,))[0]
        elif action == "put":
            peer, microbatch_id, num_bytes = arguments
            expected.pop((peer, microbatch_id), None)
            was_kept = stash.put(peer, microbatch_id, make_entry(num_bytes), now)
            after = {**expected, (peer, microbatch_id): (num_bytes, now)}
            found = contents(stash, now)
            if not was_kept:
                assert found.keys() == expected.keys(), "nothing goes for what is not kept"
                assert num_bytes > BUDGET or sum(size for size, _ in after.values()) > BUDGET
            else:
                gone = [key for key in after if key not in found]
                left = {key: kept for key, kept in after.items() if key in found}
                assert (peer, microbatch_id) in found
                for owner, gone_id in gone:
                    own = [key for key in after if key[0] == owner]
                    assert own.index((owner, gone_id)) < sum(key[0] == owner for key in gone), "oldest first"
                    assert owner == peer or held(after, owner) > held(left, peer), "nobody pushes out who holds less"
                expected = left
        assert stash.used_bytes == sum(size for size, _ in expected.values()) <= BUDGET
        assert stash.num_entries == len(expected)
        if action in ("put", "take", "purge"):
            assert contents(stash, now) == {key: size for key, (size, _) in expected.items()}
