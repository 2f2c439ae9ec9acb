"""JobQueue: which job of one purpose goes next on the device. Pure bookkeeping, not thread-safe."""

from __future__ import annotations

import enum
from collections import deque
from typing import Generic, TypeVar

Job = TypeVar("Job")

MAX_PASSED_OVER = 8


class JobKind(enum.IntEnum):
    """What a job does, the most urgent first: somebody watches the tokens of steps appear, or all wait for the run's next step."""

    STEP = 0
    FORWARD = 1
    BACKWARD = 2


class JobQueue(Generic[Job]):
    """The most urgent kind first, first come first served within a kind, and no kind starves.

    A kind is passed over when a job of any other kind is popped while it has one, and its count starts again at 0 when it gets
    a turn. At MAX_PASSED_OVER it is overdue. An overdue kind goes before all others, of several the one passed over most.

    So the oldest job of a kind is passed over at most MAX_PASSED_OVER + len(JobKind) - 2 times: once it is overdue only kinds
    that are too go before it, each once, for with its turn a kind's count is 0 and stays below the one that waits; and STEP,
    the most urgent, is passed over only by overdue kinds, so it never becomes overdue itself. It is passed over at most
    len(JobKind) - 1 times. A job with n before it in its kind is hence among the next (n + 1) * MOST_POPS_PER_TURN.
    """

    MOST_POPS_PER_TURN = MAX_PASSED_OVER + len(JobKind) - 1

    def __init__(self) -> None:
        self._jobs: dict[JobKind, deque[Job]] = {kind: deque() for kind in JobKind}
        self._passed_over = dict.fromkeys(JobKind, 0)

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def push(self, kind: JobKind, job: Job) -> None:
        self._jobs[kind].append(job)

    def pop(self) -> Job:
        """IndexError if there is none."""
        waiting = [kind for kind in JobKind if self._jobs[kind]]
        if not waiting:
            raise IndexError("pop from an empty JobQueue")
        overdue = [kind for kind in waiting if self._passed_over[kind] >= MAX_PASSED_OVER]
        chosen = max(overdue, key=self._passed_over.__getitem__) if overdue else waiting[0]
        for kind in waiting:
            self._passed_over[kind] += 1
        self._passed_over[chosen] = 0
        return self._jobs[chosen].popleft()
