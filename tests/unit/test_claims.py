"""Nodes that join at the same time take different parts, whoever speaks first and however long words travel; who is alone never waits."""

from __future__ import annotations

import heapq
import random
import types
from collections import Counter
from collections.abc import Coroutine, Generator, Sequence
from typing import Any

import pytest

from node.claims import Claimant, claim_of_span, claim_of_stage, must_yield, rivals_of
from node.placement import block_rates, choose_span
from swarm.records import ShardRecord, ShardState
from swarm.span import Span
from tests.support.records import make_record
from tests.support.runs import make_member


def test_of_two_that_took_the_same_span_at_once_one_yields() -> None:
    a, b = (claim_of_span(make_record(name, Span(0, 2), state=ShardState.JOINING)) for name in "ab")
    assert must_yield(b, rivals_of(b, [a, b])) and not must_yield(a, rivals_of(a, [a, b]))


def test_of_two_who_chose_the_same_stage_at_the_same_time_the_larger_id_yields() -> None:
    a, b = (claim_of_stage(make_member(name, stage=1, state=ShardState.JOINING, lineage=b"", epoch=0)) for name in "ab")
    assert must_yield(b, rivals_of(b, [a, b])) and not must_yield(a, rivals_of(a, [a, b]))
    elsewhere = claim_of_stage(make_member("a", stage=0, state=ShardState.JOINING, lineage=b"", epoch=0))
    downloads, works = (
        claim_of_stage(make_member("c", stage=1, state=state)) for state in (ShardState.JOINING, ShardState.ONLINE)
    )
    assert not rivals_of(b, [elsewhere, a, downloads, works], known=[a, downloads, works]), "it was chosen beside them"
    assert rivals_of(b, [a], known=[elsewhere]) == [a]
    assert must_yield(b, [downloads]) and must_yield(b, [works]), "who has settled does not look again"


# Joiners in virtual time: what takes time yields the seconds that it takes.


@types.coroutine
def lasting(seconds: float) -> Generator[float]:
    yield seconds


def play(joiners: Sequence[Coroutine[float, None, Any]], starts: Sequence[float]) -> list[Any]:
    """What each of them returns."""
    results: list[Any] = [None] * len(joiners)
    waiting = [(start, number) for number, start in enumerate(starts)]
    heapq.heapify(waiting)
    while waiting:
        now, number = heapq.heappop(waiting)
        try:
            heapq.heappush(waiting, (now + joiners[number].send(None), number))
        except StopIteration as end:
            results[number] = end.value
    return results


class Joining:
    """Nodes that choose spans beside each other. Asking and saying take up to 2 * slow_s each, and show their effect somewhere in between."""

    def __init__(self, seed: int, num_blocks: int, length: int, slow_s: float) -> None:
        self.rng = random.Random(seed)
        self.records: dict[str, ShardRecord] = {}
        self.num_pauses = 0
        self._num_blocks, self._length, self._slow_s = num_blocks, length, slow_s

    async def _travel(self) -> None:
        await lasting(self.rng.uniform(0, self._slow_s))

    async def join(self, name: str) -> Span:
        async def find() -> list[ShardRecord]:
            await self._travel()
            found = list(self.records.values())
            await self._travel()
            return found

        async def announce(span: Span, state: ShardState = ShardState.JOINING) -> None:
            await self._travel()
            self.records[name] = make_record(name, span, state=state)
            await self._travel()

        async def pause() -> None:
            self.num_pauses += 1
            await lasting(0.25)

        def choose(others: Sequence[ShardRecord]) -> Span:
            return choose_span(block_rates(others, self._num_blocks), self._length)

        claimant = Claimant(
            name, find=find, choose=choose, claim_of=claim_of_span, announce=announce, pause=pause
        )  # fmt: skip
        span = await claimant.claim()
        await lasting(self.rng.uniform(0, 3))  # it loads
        await announce(span, ShardState.ONLINE)
        return span


@pytest.mark.parametrize("slow_s", [0.01, 0.1, 0.3])
@pytest.mark.parametrize(("num_nodes", "num_blocks"), [(2, 4), (3, 6), (4, 8), (4, 4)])
def test_nodes_that_join_at_the_same_time_share_the_blocks(num_nodes: int, num_blocks: int, slow_s: float) -> None:
    for seed in range(100):
        joining = Joining(seed, num_blocks, 2, slow_s)
        names = joining.rng.sample("abcdefgh", num_nodes)
        spread_s = joining.rng.choice([0.0, 2 * slow_s, 1.0])
        starts = [joining.rng.uniform(0, spread_s) for _ in names]
        counts = Counter(play([joining.join(name) for name in names], starts))
        assert len(counts) == num_blocks // 2 and set(counts.values()) == {2 * num_nodes // num_blocks}, (seed, counts)


def test_who_comes_alone_or_has_no_choice_does_not_wait() -> None:
    one_after_another = Joining(0, 8, 2, 0.1)
    play([one_after_another.join(name) for name in "dcba"], [0.0, 1.0, 2.0, 3.0])
    assert len({record.span for record in one_after_another.records.values()}) == 4
    assert one_after_another.num_pauses == 0
    whole = Joining(0, 2, 2, 0.1)
    assert set(play([whole.join(name) for name in "abc"], [0.0] * 3)) == {Span(0, 2)}
    assert whole.num_pauses == 0


def test_who_was_leaving_and_comes_back_is_a_rival_like_any_other() -> None:
    gone, back = (make_record("a", Span(0, 2), state=state) for state in (ShardState.LEAVING, ShardState.JOINING))
    looks = [[gone], [back], [back], [back]]

    async def find() -> list[ShardRecord]:
        return looks.pop(0)

    async def announce(span: Span) -> None: ...

    claimant: Claimant[ShardRecord, Span] = Claimant(
        "b", find=find, choose=lambda others: choose_span(block_rates(others, 4), 2), claim_of=claim_of_span,
        announce=announce,
    )  # fmt: skip
    assert play([claimant.claim()], [0.0]) == [Span(2, 4)] and looks == []


def test_who_spoke_too_late_to_be_found_yields_to_a_larger_id_that_loads_for_long() -> None:
    """The larger one has looked again before the smaller one spoke, and is not done within the second that it is waited for."""
    own = make_record("b", Span(0, 2), state=ShardState.JOINING)
    asked: list[Span] = []
    swarm: list[ShardRecord] = []
    pauses: list[float] = []

    async def find() -> list[ShardRecord]:
        return list(swarm)

    async def announce(span: Span) -> None:
        asked.append(span)
        swarm[:] = [own]

    async def pause() -> None:
        pauses.append(0.25)

    claimant: Claimant[ShardRecord, Span] = Claimant(
        "a", find=find, choose=lambda others: choose_span(block_rates(others, 4), 2), claim_of=claim_of_span,
        announce=announce, pause=pause,
    )  # fmt: skip
    (span,) = play([claimant.claim()], [0.0])
    assert span == Span(2, 4) and asked == [Span(0, 2), Span(2, 4)] and sum(pauses) == 1.0
