"""StepQueue: which waiting steps, and how much of each, make up the next batch. Pure bookkeeping, not thread-safe.

Short steps (a few tokens: somebody watches them appear) all go at once, with long ones (prompts) in chunks between them: so a long
prompt delays nobody by more than one chunk. Peers take turns: who has had fewer tokens goes first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Step = TypeVar("Step")


@dataclass(slots=True)
class Waiting(Generic[Step]):
    """A step, or what is left of one."""

    step: Step
    peer_id: str
    group: Hashable
    """Only steps of one group can be computed together."""
    num_tokens: int
    """Still to be computed; 0: it only waits for its answer to be put together."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may be."""

    chunk_tokens: int
    """Of long steps in one batch, while others have sessions here."""
    max_tokens: int = 512
    short_tokens: int = 8
    """A step of at most so many tokens is short."""


def gathering_s(expected_returns: Sequence[float], now: float, batch_s: float) -> float:
    """How long to wait before a batch, for sessions that are about to be back; 0: begin at once.

    A batch takes hardly longer for one session more, while whoever misses it waits for all of it. So it is worth a fifth of its
    time, batch_s; who is due later, or is late already, is not waited for.
    """
    longest_s = 0.2 * batch_s
    due = [at - now for at in expected_returns if -0.25 * longest_s < at - now < longest_s]
    return min(max(due) + 0.25 * longest_s, longest_s) if due else 0.0


class StepQueue(Generic[Step]):
    """Steps in the order in which they came."""

    def __init__(self, limits: BatchLimits, *, together: bool) -> None:
        """together: whether steps can be computed together at all. Otherwise a batch is one step, or a chunk of one."""
        self._limits, self._together = limits, together
        self._waiting: list[Waiting[Step]] = []
        self._served: Counter[str] = Counter()
        """Tokens that each peer with anything waiting has had, from a common start."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting[Step]) -> None:
        peers = {other.peer_id for other in self._waiting}
        if waiting.peer_id not in peers:
            # Time in which a peer wanted nothing is not saved up.
            least = min((self._served[peer] for peer in peers), default=0)
            self._served[waiting.peer_id] = max(self._served[waiting.peer_id], least)
        self._waiting.append(waiting)

    def discard(self, step: Step) -> None:
        """The step is not wanted any more, if it is here."""
        self._waiting = [waiting for waiting in self._waiting if waiting.step is not step]
        self._forget_the_absent()

    def next_batch(self, *, alone: bool = False) -> list[tuple[Step, int]]:
        """Steps and how many tokens of each are next; these count as done. alone: nobody else has a session, so nobody is delayed.

        A step whose last tokens are among these is not in the queue any more.
        """
        if not self._waiting:
            return []
        in_turn = self._in_turn()
        if self._together:
            group = self._waiting[0].group
            in_turn = [waiting for waiting in in_turn if waiting.group == group]
        chosen = self._choose(in_turn, alone)
        for waiting, count in chosen:
            waiting.num_tokens -= count
            self._served[waiting.peer_id] += count
            self._waiting.remove(waiting)
            if waiting.num_tokens:
                self._waiting.append(waiting)  # behind those that have had nothing yet
        self._forget_the_absent()
        return [(waiting.step, count) for waiting, count in chosen]

    def _in_turn(self) -> list[Waiting[Step]]:
        """A step of each peer, then a second one of each, and so on; peers by how little they have had.

        Where steps go one by one, by who waits for longest: a chunk counts for no more than a token, or nobody's prompt would end.
        """
        rank: defaultdict[str, int] = defaultdict(int)
        keyed = []
        for order, waiting in enumerate(self._waiting):
            had = self._served[waiting.peer_id] if self._together else 0
            keyed.append(((rank[waiting.peer_id], had, order), waiting))
            rank[waiting.peer_id] += 1
        return [waiting for _, waiting in sorted(keyed, key=lambda pair: pair[0])]

    def _choose(self, in_turn: list[Waiting[Step]], alone: bool) -> list[tuple[Waiting[Step], int]]:
        limits = self._limits
        chunk = limits.max_tokens if alone and len(self._waiting) == 1 else min(limits.chunk_tokens, limits.max_tokens)
        if not self._together:
            return [(in_turn[0], min(in_turn[0].num_tokens, chunk))]
        room = limits.max_tokens
        chosen = []
        for waiting in in_turn:
            if waiting.num_tokens <= limits.short_tokens and waiting.num_tokens <= room:
                chosen.append((waiting, waiting.num_tokens))
                room -= waiting.num_tokens
        room = min(room, chunk)
        for waiting in in_turn:
            if waiting.num_tokens > limits.short_tokens and room:
                chosen.append((waiting, min(waiting.num_tokens, room)))
                room -= min(waiting.num_tokens, room)
        return chosen

    def _forget_the_absent(self) -> None:
        present = {waiting.peer_id for waiting in self._waiting}
        if len(self._served) > 4 * len(present) + 64:
            self._served = Counter({peer: count for peer, count in self._served.items() if peer in present})
