"""Steps: carries the steps of all sessions of a shard to the device, in batches. The loop's side of node/backend/step_engine.py."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from node.backend.step_engine import EngineStep, StepEngine
from node.executor import Executor
from node.step_queue import BatchLimits, StepQueue, Waiting, gathering_s
from protos import node_pb2
from swarm.messages import Refused
from swarm.tensors import Buffer

log = logging.getLogger(__name__)

# What torch and transformers raise over a computation that they cannot do.
COMPUTE_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


@dataclass(slots=True, eq=False)
class _Job:
    step: EngineStep
    encode: Callable[[EngineStep], list[Buffer]]
    reply: list[Buffer] | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.reply is not None or self.error is not None


class Steps:
    """Whoever waits for a step and finds no batch under way starts the next one, with all that wait then."""

    def __init__(
        self,
        engine: StepEngine,
        executor: Executor,
        limits: BatchLimits,
        max_waiting: int,
        *,
        expected_returns: Callable[[], Sequence[float]] = lambda: (),
    ) -> None:
        """expected_returns: when (time.monotonic()) sessions are due that have nothing under way."""
        self.engine = engine
        self.num_batches = 0
        self.num_batched = 0
        """Steps in all batches: divided by num_batches, how many sessions share one."""
        self._executor = executor
        self._max_waiting = max_waiting
        self._queue: StepQueue[_Job] = StepQueue(limits, together=engine.computes_together)
        self._lock = threading.Lock()
        """Guards _queue, from which the device thread takes a batch when its turn has come."""
        self._expected_returns = expected_returns
        self._batch_s = 0.0
        self._is_running = False
        self._turn = asyncio.Condition()
        self._arrival = asyncio.Event()

    def check_room(self) -> None:
        """Raises Refused if too many steps wait. To be asked before anything is done for a step that could not be undone."""
        if len(self._queue) >= self._max_waiting:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"{len(self._queue)} steps wait for the device already; try another node or later",
            )

    async def run(
        self, step: EngineStep, peer_id: str, encode: Callable[[EngineStep], list[Buffer]], is_alone: Callable[[], bool]
    ) -> list[Buffer]:
        """The reply, encoded on the device thread. is_alone: whether no other session is open, so that nobody is delayed.

        Call check_room before. Raises what `encode` or the computation raises (COMPUTE_ERRORS).
        """
        job = _Job(step, encode)
        with self._lock:
            self._queue.add(Waiting(job, peer_id, step.hop, step.num_tokens))
        self._arrival.set()
        try:
            while not job.is_done:
                if self._is_running:
                    async with self._turn:
                        await self._turn.wait_for(lambda: job.is_done or not self._is_running)
                else:
                    await self._run_batch(is_alone())
        finally:
            with self._lock:
                self._queue.discard(job)
        if job.error is not None:
            raise job.error
        assert job.reply is not None
        return job.reply

    async def _run_batch(self, alone: bool) -> None:
        self._is_running = True
        try:
            if self.engine.computes_together:
                await self._gather()
            # Never refused, however many microbatches wait: these steps have been let in, and have a bound of their own.
            await self._executor.run(lambda: self._compute_next(alone), is_own=True)
        finally:
            self._is_running = False
            async with self._turn:
                self._turn.notify_all()

    async def _gather(self) -> None:
        """Wait a little for sessions that will be back at once."""
        deadline = time.monotonic() + 0.2 * self._batch_s
        while (now := time.monotonic()) < deadline:
            wait_s = min(gathering_s(self._expected_returns(), now, self._batch_s), deadline - now)
            if wait_s <= 0:
                return
            self._arrival.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _compute_next(self, alone: bool) -> None:
        """On the device thread."""
        with self._lock:
            batch = self._queue.next_batch(alone=alone)
        if not batch:
            return
        started = time.monotonic()
        self.num_batches += 1
        self.num_batched += len(batch)
        error = self._try_to_compute(batch)
        if error is not None and len(batch) > 1:
            log.warning("batch failed, each step alone num_steps=%d error=%s", len(batch), type(error).__name__)
        for job, count in batch:
            if error is not None:
                job.error = error if len(batch) == 1 else self._try_to_compute([(job, count)])
            if job.error is None and job.step.num_done == job.step.num_tokens:
                self._encode(job)
        self._batch_s = time.monotonic() - started

    def _try_to_compute(self, batch: Sequence[tuple[_Job, int]]) -> Exception | None:
        try:
            self.engine.compute([(job.step, count) for job, count in batch])
        except Exception as error:  # noqa: BLE001  handed to whoever waits for it
            return error
        return None

    def _encode(self, job: _Job) -> None:
        try:
            job.reply = job.encode(job.step)
        except Exception as error:  # noqa: BLE001  handed to whoever waits for it
            job.error = error
