"""Sessions of a node and the byte budget that their caches share.

Pure bookkeeping: the clock is handed in, caches are made by the caller. A session reserves its bytes when it opens, so a step that was
admitted never runs out of room.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from node.backend.span_cache import SpanCache
from node.config import NodeConfig
from protos import node_pb2
from swarm.messages import Refused
from swarm.span import Span
from swarm.tensors import Buffer


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


@dataclass(slots=True)
class Session:
    """One generation on one hop."""

    session_id: bytes
    peer_id: str
    hop: Span
    batch: int
    max_length: int
    reserved_bytes: int
    last_used: float
    cache: SpanCache
    answered: tuple[int, int] | None = None
    """(session version, position) of the last step, and its kept reply."""
    kept_reply: list[Buffer] = field(default_factory=list)


@dataclass(slots=True)
class SessionTable:
    """All open sessions. Every method that admits raises Refused with what to do."""

    limits: SessionLimits
    bytes_per_token: int
    """Cache bytes of one token of one row in one block."""
    sessions: dict[tuple[str, bytes], Session] = field(default_factory=dict)
    leaving: bool = False
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no session is open."""

    def __post_init__(self) -> None:
        self.empty.set()

    @property
    def used_bytes(self) -> int:
        return sum(session.reserved_bytes for session in self.sessions.values())

    def reserve(self, peer_id: str, session_id: bytes, hop: Span, batch: int, max_length: int) -> int:
        """The bytes that such a session takes, if it may open now."""
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
        needed = batch * max_length * self.bytes_per_token * len(hop)
        if needed > self.limits.cache_bytes:
            fits = self.limits.cache_bytes // (batch * self.bytes_per_token * len(hop))
            raise Refused(
                node_pb2.THE_CACHE_IS_TOO_SMALL,
                f"{max_length} tokens x {batch} rows need {needed / 2**20:.1f} MiB of cache, this node has {self.limits.cache_bytes / 2**20:.1f} MiB in all: at most {fits} tokens",
            )
        if needed > self.limits.cache_bytes - self.used_bytes:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"{needed / 2**20:.1f} MiB of cache are needed, {(self.limits.cache_bytes - self.used_bytes) / 2**20:.1f} MiB are free; try another node or later",
            )
        return needed

    def add(self, session: Session) -> None:
        self.sessions[session.peer_id, session.session_id] = session
        self.empty.clear()

    def is_open(self, session: Session) -> bool:
        return self.sessions.get((session.peer_id, session.session_id)) is session

    def close(self, session: Session) -> None:
        """Free the session's bytes. Closing twice is fine."""
        if self.is_open(session):
            del self.sessions[session.peer_id, session.session_id]
        if not self.sessions:
            self.empty.set()

    def idle_left_s(self, session: Session, now: float) -> float:
        """Seconds until the session expires; not positive: it has."""
        return session.last_used + self.limits.idle_s - now
