"""Routes, digests and placement, as pure functions of records."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.placement import block_rates, blocks_that_fit, choose_span
from swarm.records import ShardState
from swarm.routing import NoRoute, agreeing_digests, missing_spans, plan_route, usable_spans
from swarm.span import Span
from tests.support.records import digest, make_record


def hops(route):
    return [(hop.peer_id, str(hop.span)) for hop in route]


def plan(records, num_blocks=6, **options):
    accepted, _ = agreeing_digests(records, num_blocks, None)
    return plan_route(records, Span(0, num_blocks), accepted, **options)


def test_the_fastest_chain_wins_and_a_hop_may_be_a_part_of_a_shard():
    records = [
        make_record("slow", Span(0, 6), s_per_block=0.010),
        make_record("fast", Span(1, 4), s_per_block=0.001),
    ]
    assert hops(plan(records)) == [("slow", "0:1"), ("fast", "1:4"), ("slow", "4:6")]


def test_a_hop_costs_something_so_one_peer_beats_two_of_equal_speed():
    records = [make_record("a", Span(0, 3)), make_record("b", Span(3, 6)), make_record("whole", Span(0, 6))]
    assert hops(plan(records)) == [("whole", "0:6")]


def test_a_far_peer_loses_against_a_near_one():
    records = [make_record("far", Span(0, 6)), make_record("near", Span(0, 6))]
    assert hops(plan(records, hop_s=lambda r: 0.2 if r.peer_id == "far" else 0.001)) == [("near", "0:6")]


def test_missing_blocks_are_named():
    with pytest.raises(NoRoute) as problem:
        plan([make_record("a", Span(0, 2)), make_record("b", Span(3, 5))])
    assert problem.value.missing == [Span(2, 3), Span(5, 6)]


@pytest.mark.parametrize("state", [ShardState.JOINING, ShardState.LEAVING])
def test_only_online_peers_are_used(state):
    with pytest.raises(NoRoute):
        plan([make_record("a", Span(0, 6), state=state)])


def test_a_numeric_class_can_be_demanded():
    records = [make_record("bf16", Span(0, 6), numeric_class="bf16"), make_record("fp32", Span(0, 6), s_per_block=0.1)]
    assert hops(plan(records, numeric_class="fp32")) == [("fp32", "0:6")]
    assert hops(plan(records)) == [("bf16", "0:6")]


def test_a_peer_with_one_other_block_is_not_used_at_all():
    expected = [digest(block) for block in range(6)]
    bad = make_record("bad", Span(0, 6), digests={3: b"x" * 16})
    accepted, conflicts = agreeing_digests([bad], 6, expected)
    assert usable_spans(bad, accepted) == []
    assert [conflict.block for conflict in conflicts] == [3]
    assert "block 3" in str(conflicts[0]) and bad.source in str(conflicts[0])


def test_without_the_checkpoint_most_peers_are_believed_and_on_a_tie_nobody():
    good = [make_record(name, Span(0, 2)) for name in "ab"]
    bad = make_record("z", Span(0, 2), digests={1: b"x" * 16}, source="elsewhere")
    accepted, conflicts = agreeing_digests([*good, bad], 2, None)
    assert accepted == [digest(0), digest(1)] and conflicts[0].peer_ids == ("z",)
    accepted, conflicts = agreeing_digests([good[0], bad], 2, None)
    assert accepted == [digest(0), None] and conflicts[0].sources == ("dir:/model", "elsewhere")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_routes_cover_every_block_once_and_are_never_slower_than_brute_force(seed):
    rng = random.Random(seed)
    num_blocks = rng.randint(1, 5)
    records = []
    for index in range(rng.randint(0, 4)):
        start = rng.randrange(num_blocks)
        span = Span(start, rng.randint(start + 1, num_blocks))
        records.append(make_record(f"p{index}", span, s_per_block=rng.choice([0.001, 0.002, 0.01])))
    best = _brute_force(records, num_blocks)
    if best is None:
        with pytest.raises(NoRoute) as problem:
            plan(records, num_blocks)
        assert problem.value.missing == missing_spans([r.span for r in records], Span(0, num_blocks))
        return
    route = plan(records, num_blocks)
    assert [block for hop in route for block in hop.span] == list(range(num_blocks))
    assert _cost([(hop.record, len(hop.span)) for hop in route]) == pytest.approx(best)


def _cost(hops):
    return sum(0.0015 + record.decode_s_per_block * length for record, length in hops)


def _brute_force(records, num_blocks):
    """The cost of the best assignment of a peer to every block, runs of one peer being one hop."""
    choices = [[]]
    for block in range(num_blocks):
        choices = [[*c, r] for c in choices for r in records if r.span.has(block)]
    costs = []
    for chosen in choices:
        runs = []
        for record in chosen:
            if runs and runs[-1][0] is record:
                runs[-1] = (record, runs[-1][1] + 1)
            else:
                runs.append((record, 1))
        costs.append(_cost(runs))
    return min(costs, default=None)


def test_a_new_node_takes_the_unserved_blocks_first():
    records = [make_record("a", Span(0, 4)), make_record("b", Span(8, 12))]
    assert choose_span(block_rates(records, 12), 4) == Span(4, 8)


def test_three_nodes_of_equal_size_cover_the_model_one_after_another():
    records, spans = [], []
    for name in "abc":
        span = choose_span(block_rates(records, 30), 10)
        spans.append(str(span))
        records.append(make_record(name, span, state=ShardState.JOINING))
    assert sorted(spans) == ["0:10", "10:20", "20:30"]


def test_leaving_peers_do_not_count():
    records = [make_record("a", Span(0, 2), state=ShardState.LEAVING), make_record("b", Span(2, 4))]
    assert choose_span(block_rates(records, 4), 2) == Span(0, 2)


def test_memory_bounds_the_span():
    assert blocks_that_fit([10, 10, 20], 30) == 2
    assert blocks_that_fit([10, 10], 5) == 0
    with pytest.raises(ValueError, match="cannot place 7 blocks"):
        choose_span([0.0] * 6, 7)
