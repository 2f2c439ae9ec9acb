"""Routing: from records to the fastest chain of hops. Pure functions of what they are handed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from swarm.records import ShardRecord, ShardState
from swarm.span import Span

# Seconds that a hop costs beside its blocks when nothing is known of the peer yet (loopback: 1.5 ms).
DEFAULT_HOP_S = 0.0015
DEFAULT_BLOCK_S = 0.002


@dataclass(frozen=True, slots=True)
class Hop:
    """A peer and the blocks that it computes for one route; perhaps a part of its shard."""

    record: ShardRecord
    span: Span

    def __post_init__(self) -> None:
        if not self.record.span.covers(self.span):
            raise ValueError(f"hop {self.span} is not in the peer's span {self.record.span}")

    @property
    def peer_id(self) -> str:
        return self.record.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.record.addresses


Route = tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Peers that announce other weights for a block than those that are wanted (or than each other)."""

    block: int
    sources: tuple[str, ...]
    peer_ids: tuple[str, ...]

    def __str__(self) -> str:
        return f"block {self.block} is served with other weights by {len(self.peer_ids)} peer(s), from {' and '.join(self.sources)}"


class NoRoute(Exception):
    """Blocks that nobody usable serves: an outcome that the caller turns into an error with a deadline."""

    def __init__(self, missing: list[Span]) -> None:
        super().__init__(f"nobody serves blocks {', '.join(map(str, missing))}")
        self.missing = missing


def agreeing_digests(
    records: Iterable[ShardRecord], num_blocks: int, expected: Sequence[bytes] | None
) -> tuple[list[bytes | None], list[Conflict]]:
    """The digest to accept for each block, and every block on which peers disagree with it.

    With `expected` (the client holds the whole checkpoint) those are the digests. Otherwise a block's digest is the one that most
    peers announce; on a tie nobody is believed (None), because a wrong guess would be a wrong answer.
    """
    records = [record for record in records if record.block_digests]
    accepted: list[bytes | None] = []
    conflicts = []
    for block in range(num_blocks):
        holders = [record for record in records if record.span.has(block)]
        votes = Counter(record.digest_of(block) for record in holders).most_common()
        if expected is not None:
            digest = expected[block]
        elif not votes or (len(votes) > 1 and votes[0][1] == votes[1][1]):
            digest = None
        else:
            digest = votes[0][0]
        others = [record for record in holders if record.digest_of(block) != digest]
        if others:
            conflicts.append(
                Conflict(block, tuple(sorted({r.source for r in others})), tuple(sorted(r.peer_id for r in others)))
            )
        accepted.append(digest)
    return accepted, conflicts


def usable_spans(record: ShardRecord, accepted: Sequence[bytes | None]) -> list[Span]:
    """The parts of an ONLINE record's span in which every block has an accepted digest; none if one block has another digest.

    One tensor that differs makes another model, whose other blocks were not made to go with these.
    """
    if record.state != ShardState.ONLINE:
        return []
    if any(accepted[block] not in (None, record.digest_of(block)) for block in record.span):
        return []
    spans: list[Span] = []
    start: int | None = None
    for block in record.span:
        if accepted[block] is not None:
            start = block if start is None else start
        elif start is not None:
            spans.append(Span(start, block))
            start = None
    if start is not None:
        spans.append(Span(start, record.span.end))
    return spans


def plan_route(
    records: Iterable[ShardRecord],
    wanted: Span,
    accepted: Sequence[bytes | None],
    *,
    hop_s: Callable[[ShardRecord], float] = lambda _: DEFAULT_HOP_S,
    block_s: Callable[[ShardRecord], float] = lambda record: record.decode_s_per_block or DEFAULT_BLOCK_S,
    numeric_class: str | None = None,
) -> Route:
    """The chain of hops over `wanted` with the least time: sum of hop_s + blocks x block_s, by default for one token as announced.

    A shortest path over block boundaries. With numeric_class only peers of that class are used. Raises NoRoute.
    """
    pieces = [
        (record, span)
        for record in records
        if numeric_class is None or record.numeric_class == numeric_class
        for span in usable_spans(record, accepted)
    ]
    boundaries = {wanted.start, wanted.end} | {edge for _, span in pieces for edge in (span.start, span.end)}
    edges = sorted(edge for edge in boundaries if wanted.start <= edge <= wanted.end)
    best: dict[int, tuple[float, Route]] = {wanted.start: (0.0, ())}
    for edge in edges:
        if edge not in best:
            continue
        cost, route = best[edge]
        for record, span in pieces:
            if not span.has(edge):
                continue
            per_block = block_s(record)
            for stop in edges:
                if edge < stop <= span.end:
                    total = cost + hop_s(record) + per_block * (stop - edge)
                    if stop not in best or total < best[stop][0]:
                        best[stop] = (total, (*route, Hop(record, Span(edge, stop))))
    if wanted.end not in best:
        raise NoRoute(missing_spans([span for _, span in pieces], wanted))
    return best[wanted.end][1]


def missing_spans(spans: Iterable[Span], wanted: Span) -> list[Span]:
    """The parts of wanted that no span covers, in order."""
    spans = list(spans)
    missing: list[Span] = []
    for block in wanted:
        if any(span.has(block) for span in spans):
            continue
        if missing and missing[-1].end == block:
            missing[-1] = Span(missing[-1].start, block + 1)
        else:
            missing.append(Span(block, block + 1))
    return missing
