"""Health: what one client has learned about peers. Pure; the clock is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_BAN_S = 5.0
MAX_BAN_S = 300.0
BLAME_FACTOR = 12.0


@dataclass(slots=True)
class _PeerHealth:
    failures: int = 0
    banned_until: float = 0.0
    round_trip_s: float | None = None
    worked: bool = False


@dataclass(slots=True)
class Health:
    """Bans with exponential backoff, and smoothed round-trip times.

    A ban is doubled with every failure in a row (FIRST_BAN_S .. MAX_BAN_S); blame (a nonsense reply) counts BLAME_FACTOR times.
    """

    peers: dict[str, _PeerHealth] = field(default_factory=dict)

    def _of(self, peer_id: str) -> _PeerHealth:
        return self.peers.setdefault(peer_id, _PeerHealth())

    def failed(self, peer_id: str, *, now: float, blame: bool = False) -> None:
        peer = self._of(peer_id)
        ban = min(MAX_BAN_S, FIRST_BAN_S * 2**peer.failures * (BLAME_FACTOR if blame else 1.0))
        peer.failures = min(peer.failures + 1, 10)
        peer.banned_until = now + ban

    def succeeded(self, peer_id: str, *, round_trip_s: float | None = None) -> None:
        peer = self._of(peer_id)
        peer.failures, peer.banned_until, peer.worked = 0, 0.0, True
        if round_trip_s is not None:
            old = peer.round_trip_s
            peer.round_trip_s = round_trip_s if old is None else 0.8 * old + 0.2 * round_trip_s

    def is_banned(self, peer_id: str, *, now: float) -> bool:
        peer = self.peers.get(peer_id)
        return peer is not None and now < peer.banned_until

    def has_worked(self, peer_id: str) -> bool:
        """Whether this peer ever did what we asked."""
        peer = self.peers.get(peer_id)
        return peer is not None and peer.worked

    def round_trip_s(self, peer_id: str) -> float | None:
        peer = self.peers.get(peer_id)
        return None if peer is None else peer.round_trip_s
