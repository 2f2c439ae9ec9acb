"""Router: keeps the records of one model fresh and turns them into routes, within a deadline."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from swarm.client.config import ClientConfig
from swarm.errors import RouteBroken
from swarm.health import Health
from swarm.load import Load
from swarm.messages import PROTOCOL_MAJOR
from swarm.model_spec import ModelSpec
from swarm.p2p.directory import Directory
from swarm.records import ShardRecord, ShardState
from swarm.routing import DEFAULT_HOP_S, Conflict, NoRoute, Route, agreeing_digests, plan_route
from swarm.span import Span

log = logging.getLogger(__name__)

# Keys cost nothing, so anybody can announce thousands of peers that do not exist and are the fastest of all. When more peers than
# this were never heard of, only those that were are believed, as long as they cover the blocks.
MAX_UNPROVEN_PEERS = 16


@dataclass(frozen=True, slots=True)
class Work:
    """A microbatch of so many tokens, and how busy the peers are."""

    num_tokens: int
    load: Load


class Router:
    """Plans routes over the peers that serve one model with the right weights."""

    def __init__(
        self,
        directory: Directory,
        spec: ModelSpec,
        expected_digests: Sequence[bytes] | None,
        config: ClientConfig,
        namesakes: Sequence[ShardRecord] = (),
    ) -> None:
        """namesakes: records of peers that serve a model of this name, perhaps with other weights; for error messages."""
        self.spec = spec
        self.health = Health()
        self._directory = directory
        self._expected = expected_digests
        self._config = config
        self._namesakes = [r for r in namesakes if r.model_digest != spec.digest and r.state == ShardState.ONLINE]
        self._records: list[ShardRecord] = []
        self._fetched_at = -1e9
        self._warned: set[Conflict] = set()

    @property
    def is_fleeting(self) -> bool:
        """Whether the model is a state of a run, which is served until newer ones are."""
        return self.spec.source.startswith("run:")

    @property
    def all_blocks(self) -> Span:
        return Span(0, self.spec.num_blocks)

    async def plan(
        self,
        wanted: Span,
        *,
        timeout_s: float,
        numeric_class: str | None = None,
        avoid: Collection[str] = (),
        patience_s: float | None = None,
        work: Work | None = None,
    ) -> Route:
        """The fastest route over `wanted` now. Waits for missing blocks until the deadline, asking the directory again.

        work: what the route is for; None: one token at a time. patience_s: give up earlier, unless a peer that serves the missing blocks is joining.
        Raises RouteBroken, naming the blocks that nobody serves and who serves them with other weights.
        """
        started, pause_s = time.monotonic(), 0.2
        max_age_s = self._config.records_max_age_s
        while True:
            left_s = started + timeout_s - time.monotonic()
            await self._refresh(max_age_s, max(left_s, 0.1))
            try:
                return self._plan_now(wanted, numeric_class, avoid, work)
            except NoRoute as problem:
                waited_s = time.monotonic() - started
                patient = patience_s is None or waited_s + pause_s < patience_s or self._is_joining(problem.missing)
                if self._fetched_at >= started and (not patient or waited_s + pause_s >= timeout_s):
                    raise RouteBroken(self._explain(problem, waited_s)) from None
            if self._fetched_at >= started:
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
                pause_s = min(2 * pause_s, 2.0)
            max_age_s = 0.0

    def _plan_now(self, wanted: Span, numeric_class: str | None, avoid: Collection[str], work: Work | None) -> Route:
        unproven = [r for r in self._records if not self._is_proven(r.peer_id)]
        if len(unproven) > MAX_UNPROVEN_PEERS:
            try:
                return self._plan_over(
                    [r for r in self._records if self._is_proven(r.peer_id)], wanted, numeric_class, avoid, work
                )
            except NoRoute:
                log.debug("peers that were heard of do not cover span=%s num_unproven=%d", wanted, len(unproven))
        return self._plan_over(self._records, wanted, numeric_class, avoid, work)

    def _is_proven(self, peer_id: str) -> bool:
        return self.health.has_worked(peer_id) or self._directory.has_answered(peer_id)

    def _plan_over(
        self,
        records: Sequence[ShardRecord],
        wanted: Span,
        numeric_class: str | None,
        avoid: Collection[str],
        work: Work | None,
    ) -> Route:
        now = time.monotonic()
        usable = [
            record
            for record in records
            if record.protocol_major == PROTOCOL_MAJOR
            and record.peer_id not in avoid
            and not self.health.is_banned(record.peer_id, now=now)
        ]
        accepted, conflicts = agreeing_digests(records, self.spec.num_blocks, self._expected)
        for conflict in conflicts:
            if conflict not in self._warned:
                self._warned.add(conflict)
                log.warning("other weights refused %s", conflict)
        if work is None:
            return plan_route(usable, wanted, accepted, hop_s=self._hop_s, numeric_class=numeric_class)
        return plan_route(
            usable,
            wanted,
            accepted,
            hop_s=lambda record: self._hop_s(record) + work.load.waiting_s(record, now),
            block_s=lambda record: work.num_tokens * work.load.s_per_token_block(record),
            numeric_class=numeric_class,
        )

    def _hop_s(self, record: ShardRecord) -> float:
        round_trip_s = self.health.round_trip_s(record.peer_id)
        return DEFAULT_HOP_S if round_trip_s is None else DEFAULT_HOP_S + round_trip_s

    async def _refresh(self, max_age_s: float, timeout_s: float) -> None:
        if time.monotonic() - self._fetched_at <= max_age_s and self._records:
            return
        try:
            async with asyncio.timeout(timeout_s):
                records = await self._directory.find_blocks(self.spec.digest, self.all_blocks)
        except TimeoutError:
            raise RouteBroken(
                f"the directory did not answer within {timeout_s:.0f} s; check the network and the initial peers"
            ) from None
        self._records = [
            r for r in records if r.model_digest == self.spec.digest and r.num_blocks == self.spec.num_blocks
        ]
        self._fetched_at = time.monotonic()

    def _is_joining(self, missing: list[Span]) -> bool:
        joining = [record.span for record in self._records if record.state == ShardState.JOINING]
        return all(any(span.has(block) for span in joining) for part in missing for block in part)

    def _explain(self, problem: NoRoute, waited_s: float) -> str:
        """One line: what is missing, why, and what to do."""
        missing = ", ".join(map(str, problem.missing)) or str(self.all_blocks)
        parts = [f"nobody serves blocks {missing} of {self.spec.name} (waited {waited_s:.0f} s)"]
        online = [record for record in self._records if record.state == ShardState.ONLINE]
        if not online:
            parts = [f"nobody serves {self.spec.name} in this swarm (blocks {missing}; waited {waited_s:.0f} s)"]
            if self._namesakes:
                sources = sorted({record.source for record in self._namesakes})
                parts.append(
                    f"peers serve other weights under this name, from {', '.join(sources)}, while yours are from {self.spec.source}"
                )
        _, conflicts = agreeing_digests(online, self.spec.num_blocks, self._expected)
        relevant = [c for c in conflicts if any(part.has(c.block) for part in problem.missing)]
        if relevant:
            sources = sorted({source for conflict in relevant for source in conflict.sources})
            parts.append(
                f"peers serve them with other weights, from {', '.join(sources)}, while yours are from {self.spec.source}"
            )
        if any(record.protocol_major != PROTOCOL_MAJOR for record in online):
            parts.append(
                f"some peers speak another version of the protocol than {PROTOCOL_MAJOR}; upgrade the older side"
            )
        banned = [r for r in online if self.health.is_banned(r.peer_id, now=time.monotonic())]
        if banned:
            parts.append(f"{len(banned)} peer(s) that announce blocks failed just now")
        if self.is_fleeting:
            parts.append(
                "these weights of the run are not served (any more): begin again with newer ones, or use `swarm chat --follow`"
            )
            return "; ".join(parts)
        parts.append(
            f"start a node: swarm-node run --model {self.spec.name} --initial-peers {self._config.initial_peers[0]}"
        )
        return "; ".join(parts)
