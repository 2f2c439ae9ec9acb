"""What a node keeps of microbatches between forward and backward, and the byte budget that peers share for it.

Pure bookkeeping: the clock is handed in, and never goes back.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from swarm.span import Span


@dataclass(frozen=True, slots=True)
class StashEntry:
    """One microbatch after its forward: output [B, T, H] hangs on the autograd graph that leads to given [B, T, H]."""

    hop: Span
    given: Tensor
    """A leaf that requires grad."""
    output: Tensor
    num_bytes: int
    """Of the graph, with given and output."""


@dataclass(frozen=True, slots=True)
class _Kept:
    entry: StashEntry
    expires: float


class Stash:
    """Entries by peer and microbatch id, each kept for expiry_s at most. A budget of 0 keeps nothing."""

    def __init__(self, budget_bytes: int, expiry_s: float) -> None:
        self.budget_bytes = budget_bytes
        self._used_bytes = 0
        self._expiry_s = expiry_s
        self._kept: defaultdict[str, dict[bytes, _Kept]] = defaultdict(dict)
        """Of each peer that has any, oldest first."""
        self._held: Counter[str] = Counter()
        """Bytes of each of these peers."""

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def num_entries(self) -> int:
        return sum(map(len, self._kept.values()))

    def put(self, peer_id: str, microbatch_id: bytes, entry: StashEntry, now: float) -> bool:
        """Whether entry is kept now. An older one of the same id goes in any case: it belongs to another forward.

        Where room is needed, the oldest entry of the peer that would hold the most bytes goes, again and again; of several that
        would hold as much, the peer's own. So nobody pushes out somebody who would hold no more than he does himself.
        """
        self.purge(now)
        self._remove(peer_id, microbatch_id)
        victims = self._victims(peer_id, entry.num_bytes)
        if victims is None:
            return False
        for victim in victims:
            self._remove(*victim)
        self._kept[peer_id][microbatch_id] = _Kept(entry, now + self._expiry_s)
        self._held[peer_id] += entry.num_bytes
        self._used_bytes += entry.num_bytes
        return True

    def take(self, peer_id: str, microbatch_id: bytes, now: float) -> StashEntry | None:
        """The entry, which is kept no longer. None: there is none, or it has expired."""
        self.purge(now)
        return self._remove(peer_id, microbatch_id)

    def drop_peer(self, peer_id: str) -> None:
        self._kept.pop(peer_id, None)
        self._used_bytes -= self._held.pop(peer_id, 0)

    def purge(self, now: float) -> None:
        """Drop what has expired."""
        for peer_id, kept in list(self._kept.items()):
            while kept and next(iter(kept.values())).expires <= now:
                self._remove(peer_id, next(iter(kept)))

    def _victims(self, peer_id: str, num_bytes: int) -> list[tuple[str, bytes]] | None:
        """What must go before peer_id can put num_bytes. None: that would be the new entry itself."""
        if num_bytes > self.budget_bytes or self.budget_bytes == 0:
            return None
        held = self._held.copy()
        held[peer_id] += num_bytes
        excess = self._used_bytes + num_bytes - self.budget_bytes
        oldest: dict[str, Iterator[tuple[bytes, _Kept]]] = {p: iter(kept.items()) for p, kept in self._kept.items()}
        victims = []
        while excess > 0:
            largest = max(held, key=lambda peer: (held[peer], peer == peer_id))
            if (item := next(oldest.get(largest, iter(())), None)) is None:
                return None
            victims.append((largest, item[0]))
            held[largest] -= item[1].entry.num_bytes
            excess -= item[1].entry.num_bytes
        return victims

    def _remove(self, peer_id: str, microbatch_id: bytes) -> StashEntry | None:
        if microbatch_id not in self._kept.get(peer_id, ()):
            return None
        entry = self._kept[peer_id].pop(microbatch_id).entry
        self._held[peer_id] -= entry.num_bytes
        self._used_bytes -= entry.num_bytes
        if not self._kept[peer_id]:
            self.drop_peer(peer_id)
        return entry
