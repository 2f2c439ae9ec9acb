"""StepQueue: which waiting steps, and how much of each, make up the next batch. Pure bookkeeping, not thread-safe.

Short steps (a few tokens: somebody watches them appear) all go at once, with long ones (prompts) in chunks between them: so a long
prompt delays nobody by more than one chunk. Peers take turns, and so do groups of steps that cannot be computed together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

Step = TypeVar("Step")


@dataclass(slots=True, eq=False)
class Waiting(Generic[Step]):
    """A step, or what is left of one."""

    step: Step
    peer_id: str
    group: Hashable
    """Only steps of one group can be computed together."""
    num_tokens: int
    """Still to be computed; 0: it only waits for its answer to be put together."""
    num_passed_over: int = 0
    """Batches of other groups since it came, or since its own group's last one."""


_Chosen: TypeAlias = list[tuple[Waiting[Step], int]]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may be."""

    chunk_tokens: int
    """Of long steps in one batch, while others have sessions here."""
    max_tokens: int = 512
    short_tokens: int = 8
    """A step of at most so many tokens is short."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.max_tokens < 4 or self.short_tokens > self.max_tokens - self.max_tokens // 4:
            raise ValueError(f"a short step must fit beside a part of a long one, and a chunk has tokens: got {self}")


def gathering_s(expected_returns: Sequence[float], now: float, batch_s: float) -> float:
    """How long to wait before a batch, for sessions that are about to be back; 0: begin at once.

    A batch takes hardly longer for one session more, while whoever misses it waits for all of it. So it is worth a fifth of its
    time, batch_s; who is due later, or is late already, is not waited for.
    """
    longest_s = 0.2 * batch_s
    due = [at - now for at in expected_returns if -0.25 * longest_s < at - now < longest_s]
    return min(max(due) + 0.25 * longest_s, longest_s) if due else 0.0


class StepQueue(Generic[Step]):
    """Steps in the order in which they came.

    How long a step waits, in batches, where steps are computed together:

    - for its group's turn: at most as many as other groups wait when it comes. A turn ends a group's waiting, and whoever waits
      counts the turns of others, so none has a second one before it.
    - if it is short: no batch of its group goes without it, as long as those before it leave room. Long steps that wait may have
      at least a quarter of the batch (less if chunks are smaller), so short ones with n tokens in all before it let it wait for
      n / (3/4 max_tokens - short_tokens) batches at most.
    - if it is long, until it gets a chunk: one batch of its group for each other peer that waits there when it comes, at most. Long steps
      go by how long ago their peer's last turn is, and who comes later is behind those who wait. What is left of the room goes to the
      next one, and costs it no turn. A peer's own long steps take turns, too.

    Where steps are computed one at a time, all of them go as the long ones do.
    """

    def __init__(self, limits: BatchLimits, *, together: bool) -> None:
        """together: whether steps can be computed together at all. Otherwise a batch is one step, or a chunk of one."""
        self._limits, self._together = limits, together
        self._waiting: list[Waiting[Step]] = []
        self._num_batches = 0
        self._last_turn: dict[tuple[str, Hashable], int] = {}
        """Of each peer that waits in a group: the batch in which it last had its turn there, or the last but one before it came."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting[Step]) -> None:
        # Behind all who wait, but for whoever had its turn just now. Time in which a peer wanted nothing is not saved up.
        self._last_turn.setdefault(self._who(waiting), self._num_batches - 1)
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
        self._num_batches += 1
        limits = self._limits
        chunk = limits.max_tokens if alone and len(self._waiting) == 1 else min(limits.chunk_tokens, limits.max_tokens)
        chosen, in_turn = self._choose(chunk) if self._together else self._choose_one(chunk)
        for waiting, count in chosen:
            waiting.num_tokens -= count
        for waiting in in_turn[:1]:
            self._last_turn[self._who(waiting)] = self._num_batches
            self._waiting.remove(waiting)
            self._waiting.append(waiting)  # behind its peer's other steps
        done = {id(waiting) for waiting, _ in chosen if not waiting.num_tokens}
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in done]
        self._forget_the_absent()
        return [(waiting.step, count) for waiting, count in chosen]

    def _choose_one(self, chunk: int) -> tuple[_Chosen[Step], list[Waiting[Step]]]:
        in_turn = self._in_turn(self._waiting)
        return [(in_turn[0], min(in_turn[0].num_tokens, chunk))], in_turn

    def _choose(self, chunk: int) -> tuple[_Chosen[Step], list[Waiting[Step]]]:
        """Steps with tokens for each, and the long ones in their turn."""
        limits, group = self._limits, self._next_group()
        steps = [waiting for waiting in self._waiting if waiting.group == group]
        long = self._in_turn([waiting for waiting in steps if waiting.num_tokens > limits.short_tokens])
        room = limits.max_tokens - (min(chunk, limits.max_tokens // 4) if long else 0)
        chosen = []
        for waiting in steps:
            if waiting.num_tokens <= min(limits.short_tokens, room):
                chosen.append((waiting, waiting.num_tokens))
                room -= waiting.num_tokens
        room = min(chunk, limits.max_tokens - sum(count for _, count in chosen))
        for waiting in long:
            if room:
                chosen.append((waiting, min(waiting.num_tokens, room)))
                room -= chosen[-1][1]
        return chosen, long

    def _next_group(self) -> Hashable:
        """The one that waits for longest, by turns of others."""
        group = max(self._waiting, key=lambda waiting: waiting.num_passed_over).group
        for waiting in self._waiting:
            waiting.num_passed_over = 0 if waiting.group == group else waiting.num_passed_over + 1
        return group

    def _in_turn(self, steps: list[Waiting[Step]]) -> list[Waiting[Step]]:
        """A step of each peer, then a second one of each, and so on; peers by how long ago their last turn is."""
        rank: Counter[str] = Counter()
        keyed = []
        for order, waiting in enumerate(steps):
            keyed.append(((rank[waiting.peer_id], self._last_turn[self._who(waiting)], order), waiting))
            rank[waiting.peer_id] += 1
        return [waiting for _, waiting in sorted(keyed, key=lambda pair: pair[0])]

    def _forget_the_absent(self) -> None:
        present = set(map(self._who, self._waiting))
        self._last_turn = {who: turn for who, turn in self._last_turn.items() if who in present}

    def _who(self, waiting: Waiting[Step]) -> tuple[str, Hashable]:
        """Who takes turns."""
        return waiting.peer_id, waiting.group if self._together else None
