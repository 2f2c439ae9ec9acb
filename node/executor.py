"""Executor: the one thread that owns the device. The event loop hands it functions and waits."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from node.device_share import DeviceShare, Purpose
from node.job_queue import JobKind, JobQueue
from protos import node_pb2
from swarm.messages import Refused

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Any]


class Executor:
    """Runs functions on the device thread, with a bound on how many of strangers wait.

    DeviceShare says whose turn it is, sessions' or training's, and of each of the two the JobQueue which job's.

    A plain queue and one wake-up each way: a ThreadPoolExecutor's futures cost 0.3 ms more per step between cold caches.
    """

    def __init__(
        self, max_waiting: int, share: DeviceShare | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """max_waiting: of each purpose, so that neither takes the other's room. share: None where there is one purpose only."""
        self._max_waiting = max_waiting
        self.share = share or DeviceShare()
        self._clock = clock
        self._num_waiting = dict.fromkeys(Purpose, 0)
        self._jobs: dict[Purpose, JobQueue[_Job]] = {purpose: JobQueue() for purpose in Purpose}
        self._lock = threading.Lock()
        """Guards _jobs."""
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """True for each job, put after it; False ends the thread."""
        self._thread = threading.Thread(target=self._work, name="device")
        self._thread.start()

    async def run(
        self,
        function: Callable[[], T],
        kind: JobKind = JobKind.STEP,
        purpose: Purpose = Purpose.SERVING,
        *,
        is_own: bool = False,
    ) -> T:
        """Raises Refused (no room) if max_waiting functions of this purpose wait already, and whatever function raises.

        is_own: nobody else asked for it, so it is not counted and never refused.
        """
        if not is_own and self._num_waiting[purpose] >= self._max_waiting:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"{self._num_waiting[purpose]} jobs wait for the device already; try another node or later",
            )
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._num_waiting[purpose] += not is_own
        with self._lock:
            self._jobs[purpose].push(kind, _Job(function, loop, answer))
        self._tokens.put(True)
        try:
            return await answer
        finally:
            self._num_waiting[purpose] -= not is_own

    def close(self) -> None:
        """Let the running function and those that wait finish, and end the thread."""
        self._tokens.put(False)
        self._thread.join()

    def _work(self) -> None:
        while self._tokens.get():
            with self._lock:
                purpose = self.share.choose([purpose for purpose in Purpose if self._jobs[purpose]])
                job = self._jobs[purpose].pop()
            if job.answer.cancelled():
                continue
            started = self._clock()
            try:
                value = job.function()
            except BaseException as error:  # noqa: BLE001  handed to whoever waits
                _tell(job, job.answer.set_exception, error)
            else:
                _tell(job, job.answer.set_result, value)
            self.share.charge(purpose, self._clock() - started)


def _tell(job: _Job, setter: Callable[[Any], None], outcome: Any) -> None:
    """Give the outcome to the loop, unless nobody waits for it any more."""

    def tell() -> None:
        if not job.answer.done():
            setter(outcome)

    if not job.loop.is_closed():
        job.loop.call_soon_threadsafe(tell)
