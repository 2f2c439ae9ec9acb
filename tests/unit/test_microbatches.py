"""How a batch is split, and to whom its microbatches go: pure decisions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.microbatch import PassOptions, split_rows
from swarm.load import QUEUE_HALF_LIFE_S, Load
from swarm.records import ShardRecord
from swarm.routing import plan_route
from swarm.span import Span
from tests.support.records import make_record


@given(st.integers(1, 200), st.integers(1, 500), st.integers(1, 4096))
def test_rows_are_split_into_the_fewest_equal_parts_that_fit(rows: int, tokens: int, limit: int) -> None:
    parts = split_rows(rows, tokens, limit)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert all(size == 1 or size * tokens <= limit for size in sizes)
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-rows // max(1, limit // tokens))


def test_options_follow_their_rows() -> None:
    options = PassOptions(torch.eye(4, dtype=torch.bool), torch.arange(4)[None], dropout_seed=10)
    part = options.rows(slice(1, 3))
    assert part.mask is not None and part.mask.tolist() == torch.eye(4, dtype=torch.bool)[1:3].tolist()
    assert part.positions is options.positions, "one row of positions is for all"
    assert part.dropout_seed == 11
    assert PassOptions(None, torch.zeros(4, 4)).rows(slice(1, 3)).positions.shape == (2, 4)  # type: ignore[union-attr]


def chosen(load: Load, records: list[ShardRecord], tokens: int, now: float = 0.0) -> str:
    (hop,) = plan_route(
        records,
        Span(0, 4),
        list(records[0].block_digests),
        hop_s=lambda record: load.waiting_s(record, now),
        block_s=lambda record: tokens * load.s_per_token_block(record),
    )
    return hop.peer_id


@pytest.fixture
def records() -> list[ShardRecord]:
    return [
        make_record("quick", Span(0, 4), prefill_tokens_per_s=300.0),
        make_record("slow", Span(0, 4), prefill_tokens_per_s=100.0),
    ]


def test_microbatches_are_shared_out_by_announced_speed(records: list[ShardRecord]) -> None:
    load, taken = Load(), []
    for _ in range(8):
        taken.append(chosen(load, records, 100))
        load.sent(taken[-1], 400)
    assert (taken.count("quick"), taken.count("slow")) == (6, 2)


def test_measured_speed_counts_more_than_announced(records: list[ShardRecord]) -> None:
    load = Load()
    load.sent("quick", 400)
    load.answered("quick", 400, compute_s=40.0, queue_s=0.0, now=0.0)
    assert chosen(load, records, 100) == "slow"


def test_a_queue_at_a_peer_sends_work_elsewhere_until_it_is_old_news(records: list[ShardRecord]) -> None:
    load = Load()
    load.sent("quick", 400)
    load.answered("quick", 400, compute_s=400 / (300 * 4), queue_s=30.0, now=0.0)
    assert chosen(load, records, 100, now=0.0) == "slow"
    assert chosen(load, records, 100, now=10 * QUEUE_HALF_LIFE_S) == "quick"


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["answered", "failed"]), st.floats(1, 1e4))))
def test_what_was_sent_and_ended_waits_no_more(events: list[tuple[str, str, float]]) -> None:
    load = Load()
    for peer, _, work in events:
        load.sent(peer, work)
    for peer, outcome, work in events:
        if outcome == "answered":
            load.answered(peer, work, compute_s=1.0, queue_s=0.0, now=0.0)
        else:
            load.failed(peer, work)
    assert all(peer.waiting == pytest.approx(0, abs=1e-6) for peer in load.peers.values())
