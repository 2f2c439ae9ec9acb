"""Load: how long the next microbatch would take on each peer, from what one client has sent and measured. Pure; the clock is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from swarm.records import ShardRecord
from swarm.routing import DEFAULT_BLOCK_S

# What was said of a queue says less and less: without this a peer that was busy once would never be asked again.
QUEUE_HALF_LIFE_S = 5.0
_NEWEST_WEIGHT = 0.3


@dataclass(slots=True)
class _PeerLoad:
    waiting: float = 0.0  # tokens x blocks that we have sent and that were not answered yet
    s_per_token_block: float | None = None
    queue_s: float = 0.0
    queue_seen_at: float = 0.0


@dataclass(slots=True)
class Load:
    """Work is counted in tokens x blocks."""

    peers: dict[str, _PeerLoad] = field(default_factory=dict)

    def _of(self, peer_id: str) -> _PeerLoad:
        return self.peers.setdefault(peer_id, _PeerLoad())

    def sent(self, peer_id: str, work: float) -> None:
        self._of(peer_id).waiting += work

    def answered(self, peer_id: str, work: float, *, compute_s: float, queue_s: float, now: float) -> None:
        """The peer computed so long, after the work had waited so long for its device."""
        peer = self._of(peer_id)
        peer.waiting = max(0.0, peer.waiting - work)
        measured, old = compute_s / work, peer.s_per_token_block
        peer.s_per_token_block = measured if old is None else old + _NEWEST_WEIGHT * (measured - old)
        peer.queue_s, peer.queue_seen_at = queue_s, now

    def failed(self, peer_id: str, work: float) -> None:
        """The work was not done."""
        peer = self._of(peer_id)
        peer.waiting = max(0.0, peer.waiting - work)

    def s_per_token_block(self, record: ShardRecord) -> float:
        """Seconds for one token and block: as measured, else as announced, else a guess."""
        measured = self._of(record.peer_id).s_per_token_block
        if measured is not None:
            return measured
        if record.prefill_tokens_per_s > 0:
            return 1.0 / (record.prefill_tokens_per_s * len(record.span))
        return DEFAULT_BLOCK_S / 10

    def waiting_s(self, record: ShardRecord, now: float) -> float:
        """How long new work would wait there: for our own work, or as long as it last did, whichever is longer."""
        peer = self._of(record.peer_id)
        faded = peer.queue_s * math.exp2(-(now - peer.queue_seen_at) / QUEUE_HALF_LIFE_S)
        return max(peer.waiting * self.s_per_token_block(record), faded)
