"""Placement: which span a new node should take. Pure functions of the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swarm.records import ShardRecord, ShardState
from swarm.span import Span

# A joining node has not measured itself yet; count it as an average one so that its blocks are not taken twice.
_UNMEASURED_S_PER_BLOCK = 0.002


def block_rates(records: Iterable[ShardRecord], num_blocks: int) -> list[float]:
    """For each block the tokens per second that all its peers offer together (one row, decoding the peer's whole span)."""
    rates = [0.0] * num_blocks
    for record in records:
        if record.state == ShardState.LEAVING:
            continue
        rate = 1.0 / ((record.decode_s_per_block or _UNMEASURED_S_PER_BLOCK) * len(record.span))
        for block in record.span:
            if block < num_blocks:
                rates[block] += rate
    return rates


def choose_span(rates: Sequence[float], length: int) -> Span:
    """The window of `length` blocks that is served worst: least rates first, compared from the worst block up; the first on a tie.

    A swarm is as fast as its worst block, so windows are compared by their sorted rates: one unserved block outweighs any number of
    slow ones. Among windows with equally bad blocks the one whose remaining blocks are worse off wins.
    """
    if not 1 <= length <= len(rates):
        raise ValueError(f"cannot place {length} blocks in a model of {len(rates)}")
    starts = range(len(rates) - length + 1)
    best = min(starts, key=lambda start: (sorted(rates[start : start + length]), start))
    return Span(best, best + length)


def blocks_that_fit(block_bytes: Sequence[int], memory_bytes: int) -> int:
    """How many of the largest blocks fit into memory_bytes; 0 if not even one does."""
    used = count = 0
    for size in sorted(block_bytes, reverse=True):
        used += size
        if used > memory_bytes:
            break
        count += 1
    return count
