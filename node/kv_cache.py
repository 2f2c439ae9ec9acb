"""Sessions of a node, and the pages that their caches share.

Pure bookkeeping: the clock is handed in. A session takes pages as it grows, so many may be open whose greatest lengths together would
not fit. When pages run out the youngest idle sessions make room for older ones: their clients open them again and replay, and
the oldest always goes on, so everybody's turn comes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from node.config import NodeConfig
from node.page_pool import PagePool
from node.session import Session
from protos import node_pb2
from swarm.messages import Refused

PAGE_TOKENS = 16
_FIRST_TOKENS = 64
"""A session may open if there is room for so many tokens of each row (or for all, if it wants fewer)."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a node grants."""

    cache_bytes: int
    max_sessions: int
    max_sessions_per_peer: int
    idle_s: float
    max_batch: int = 1024
    max_length: int = 2**20


def session_limits_of(config: NodeConfig, *, num_models: int = 1) -> SessionLimits:
    """Of each of so many models, which share the memory for caches."""
    return SessionLimits(
        cache_bytes=config.cache_bytes // num_models,
        max_sessions=config.max_sessions,
        max_sessions_per_peer=config.max_sessions_per_peer,
        idle_s=config.session_idle_s,
    )


def num_pages_of(limits: SessionLimits, bytes_per_token: int) -> int:
    """Pages that the budget allows, if one token of one row takes so much in all blocks."""
    return max(1, limits.cache_bytes // (PAGE_TOKENS * bytes_per_token))


@dataclass(slots=True)
class SessionTable:
    """All open sessions. Every method that admits raises Refused with what to do."""

    limits: SessionLimits
    bytes_per_token: int
    """Cache bytes of one token of one row, in all blocks of the span."""
    longest_text: int | None = None
    """Tokens that any session may have, because of the model; None if it sets no bound (swarm/decoder.py:longest_text)."""
    sessions: dict[tuple[str, bytes], Session] = field(default_factory=dict)
    """The oldest first."""
    leaving: bool = False
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no session is open."""
    num_evicted: int = 0
    pool: PagePool = field(init=False)

    def __post_init__(self) -> None:
        self.empty.set()
        self.pool = PagePool(num_pages_of(self.limits, self.bytes_per_token), PAGE_TOKENS)

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * self.bytes_per_token

    @property
    def used_bytes(self) -> int:
        """Of pages that sessions hold."""
        return self.pool.num_held * self.page_bytes

    def admit(self, peer_id: str, session_id: bytes, batch: int, max_length: int) -> None:
        """Whether such a session may open now."""
        if self.leaving:
            raise Refused(node_pb2.THIS_NODE_IS_LEAVING, "this node shuts down; use another")
        if len(session_id) != 16:
            raise Refused(node_pb2.THE_REQUEST_IS_WRONG, f"a session id has 16 bytes, got {len(session_id)}")
        if not 1 <= batch <= self.limits.max_batch or not 1 <= max_length <= self.limits.max_length:
            raise Refused(
                node_pb2.THE_REQUEST_IS_WRONG,
                f"batch {batch} or max_length {max_length} is out of range (1..{self.limits.max_batch}, 1..{self.limits.max_length})",
            )
        if (peer_id, session_id) in self.sessions:
            raise Refused(node_pb2.THE_REQUEST_IS_WRONG, "this session is open already")
        if sum(session.peer_id == peer_id for session in self.sessions.values()) >= self.limits.max_sessions_per_peer:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"one peer may have {self.limits.max_sessions_per_peer} sessions here; close some",
            )
        if len(self.sessions) >= self.limits.max_sessions:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"{len(self.sessions)} sessions are open, no more are served; try another node or later",
            )
        if self.longest_text is not None and max_length > self.longest_text:
            raise Refused(
                node_pb2.THE_CACHE_IS_TOO_SMALL,
                f"{max_length} tokens are more than the {self.longest_text} up to which this model's rotary tables (longrope) stay as they are",
            )
        needed = batch * self.pool.pages_of(max_length)
        if needed > self.pool.num_pages:
            fits = self.pool.num_pages // batch * PAGE_TOKENS
            raise Refused(
                node_pb2.THE_CACHE_IS_TOO_SMALL,
                f"{max_length} tokens x {batch} rows need {self._mib(needed)} of cache, this node has {self._mib(self.pool.num_pages)} in all: at most {fits} tokens",
            )
        first = batch * self.pool.pages_of(min(max_length, _FIRST_TOKENS))
        if first > self.pool.num_available:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"{self._mib(first)} of cache are needed to begin, {self._mib(self.pool.num_available)} are free; try another node or later",
            )

    def add(self, session: Session) -> None:
        self.sessions[session.peer_id, session.session_id] = session
        self.empty.clear()

    def is_open(self, session: Session) -> bool:
        return self.sessions.get((session.peer_id, session.session_id)) is session

    def expected_returns(self) -> list[float]:
        """When those sessions are due that have nothing under way and whose pace is known."""
        return [at for session in self.sessions.values() if (at := session.expected_at()) is not None]

    def make_room(self, session: Session, num_pages: int) -> None:
        """See that so many pages are free for a session, if need be by ending younger ones. Raises Refused.

        Of these, the youngest of the peer that holds the most pages goes first. One whose step is under way ends after it: then
        the older session is refused for now. Nobody ends if that would not be enough.
        """
        if num_pages <= self.pool.num_available:
            return
        younger = list(self.sessions.values())
        younger = younger[younger.index(session) + 1 :]
        if num_pages > self.pool.num_available + self._num_held_by_these_alone(younger):
            raise self._no_room(num_pages, "older sessions hold the rest")
        held: Counter[str] = Counter()
        for other in self.sessions.values():
            held[other.peer_id] += other.pages.num_pages
        promised = 0
        # Pages that two hold come free only with the second: count on what has come free, not on what each held.
        while self.pool.num_available + promised < num_pages and younger:
            victim = max(younger, key=lambda other: (not other.is_busy, held[other.peer_id], younger.index(other)))
            younger.remove(victim)
            held[victim.peer_id] -= victim.pages.num_pages
            if victim.is_busy:
                victim.must_make_room = True
                promised += victim.pages.num_pages
            else:
                self.evict(victim)
        if self.pool.num_available < num_pages:
            raise self._no_room(num_pages, "younger sessions are about to make room")

    def evict(self, session: Session) -> None:
        """End a session for an older one's sake."""
        self.num_evicted += 1
        session.made_room = True
        self.close(session, "it made room for an older session; open another and replay")

    def close(self, session: Session, reason: str = "") -> None:
        """Free the session's pages. Closing twice is fine."""
        session.ended_because = session.ended_because or reason
        session.pages.release()
        if self.is_open(session):
            del self.sessions[session.peer_id, session.session_id]
        if not self.sessions:
            self.empty.set()

    def idle_left_s(self, session: Session, now: float) -> float:
        """Seconds until the session expires; not positive: it has."""
        return session.last_used + self.limits.idle_s - now

    def _num_held_by_these_alone(self, sessions: Sequence[Session]) -> int:
        held = Counter(page for session in sessions for page in session.pages.held())
        return sum(self.pool.num_holders(page) == count for page, count in held.items())

    def _no_room(self, num_pages: int, why: str) -> Refused:
        return Refused(
            node_pb2.THIS_NODE_HAS_NO_ROOM,
            f"{self._mib(num_pages)} more of cache are needed, {self._mib(self.pool.num_available)} are free; {why}; try another node or later",
        )

    def _mib(self, num_pages: int) -> str:
        return f"{num_pages * self.page_bytes / 2**20:.1f} MiB"
