"""Claims: how nodes that join at the same time come to serve different blocks, or to train different stages.

A joiner looks at the others' records, chooses its part (a span, or the number of a stage), says so, and looks again. Of two that
chose the same part without knowing of each other, at least one finds the other when it looks again: whichever spoke later looks
when the other's record is there. So a joiner that finds nobody keeps its part, and one that joins alone never waits.
Who finds a rival cannot tell whether it has been found, too. Hence

- it yields to one that has the smaller peer id: that one either has found us and waits, or never will,
- and to one that has settled, which never will;
- it waits a second for one with the larger id, which yields if it has found us, and else yields itself.

Who yields chooses again, and knows of its rivals this time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from swarm.member_record import MemberRecord
from swarm.records import ShardRecord, ShardState
from swarm.span import Span

log = logging.getLogger(__name__)

Part = TypeVar("Part", bound=Span | int)
Record = TypeVar("Record", bound=ShardRecord | MemberRecord)

_CHOICES_BEFORE_GIVING_UP = 5
# A rival that has found us chooses again and says so in 20 ms on one machine, and in some round trips through the DHT elsewhere,
# where our own looks take as long.
_LOOKS = 5
_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True)
class Claim(Generic[Part]):
    """What a peer has taken, as its record says."""

    peer_id: str
    part: Part
    is_settled: bool
    """It chooses no more."""


def claim_of_span(record: ShardRecord) -> Claim[Span]:
    return Claim(record.peer_id, record.span, record.state == ShardState.ONLINE)


def claim_of_stage(record: MemberRecord) -> Claim[int]:
    """Records of joiners that have settled say a lineage."""
    return Claim(record.peer_id, record.stage, record.state == ShardState.ONLINE or bool(record.lineage))


def rivals_of(
    own: Claim[Part], claims: Iterable[Claim[Part]], known: Collection[Claim[Part]] = ()
) -> list[Claim[Part]]:
    """Who else has taken the same part. known: from before it was chosen; who had it then was taken into account."""
    before = {claim.peer_id for claim in known if claim.part == own.part}
    return [one for one in claims if one.part == own.part and one.peer_id not in (own.peer_id, *before)]


def must_yield(own: Claim[Part], rivals: Iterable[Claim[Part]]) -> bool:
    """Whether a joiner has to choose again, for one of its rivals will not."""
    return any(rival.is_settled or rival.peer_id < own.peer_id for rival in rivals)


async def _pause() -> None:
    await asyncio.sleep(_PAUSE_S)


class Claimant(Generic[Record, Part]):
    """A joiner that does not know its part yet."""

    def __init__(
        self,
        peer_id: str,
        *,
        find: Callable[[], Awaitable[Sequence[Record]]],
        choose: Callable[[Sequence[Record]], Part],
        claim_of: Callable[[Record], Claim[Part]],
        announce: Callable[[Part], Awaitable[None]],
        pause: Callable[[], Awaitable[None]] = _pause,
    ) -> None:
        """find: the records of everybody, whatever they have taken. choose: the part to take beside the others that are there.

        announce: says it; when it returns, all find the record. It takes back what was announced before.
        """
        self._peer_id, self._claim_of = peer_id, claim_of
        self._find, self._choose, self._announce, self._pause = find, choose, announce, pause

    async def claim(self) -> Part:
        """The part that is ours, and announced."""
        for _ in range(_CHOICES_BEFORE_GIVING_UP):
            known = await self._others()
            part = self._choose(known)
            await self._announce(part)
            if await self._is_ours(part, [self._claim_of(record) for record in known]):
                break
            log.info("another joiner has taken the same part=%s", part)
        return part

    async def _is_ours(self, part: Part, known: Collection[Claim[Part]]) -> bool:
        own = Claim(self._peer_id, part, False)
        for look in range(_LOOKS):
            if look:
                await self._pause()
            others = await self._others()
            rivals = rivals_of(own, map(self._claim_of, others), known)
            if not rivals or self._choose(others) == part:  # it is the best one beside them, too
                return True
            if must_yield(own, rivals):
                return False
        return False

    async def _others(self) -> list[Record]:
        records = await self._find()
        return [one for one in records if one.peer_id != self._peer_id and one.state != ShardState.LEAVING]
