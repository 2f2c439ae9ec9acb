"""Executor: one device thread for jobs of several kinds. Real threads and a real loop; nothing here waits for time to pass."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from node.device_share import DeviceShare, Purpose
from node.executor import Executor
from node.job_queue import MAX_PASSED_OVER, JobKind
from node.training.device_work import DeviceWork
from protos import node_pb2
from swarm.messages import Refused

STEP, FORWARD, BACKWARD = JobKind


class Blocked:
    """An executor whose device thread is busy until release(), and the order in which its other jobs ran."""

    def __init__(self, max_waiting=100):
        self.executor = Executor(max_waiting)
        self.order = []
        self._released = threading.Event()
        self._begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def start(self):
        self._blocker = asyncio.create_task(self.executor.run(self._block))
        await self._begun.wait()

    def _block(self):
        self._loop.call_soon_threadsafe(self._begun.set)
        assert self._released.wait(60)

    async def queue(self, kind, name=None):
        """A task that has queued a job which notes its name (or kind)."""
        job = asyncio.create_task(self.executor.run(lambda: self.order.append(kind if name is None else name), kind))
        await asyncio.sleep(0)  # a task runs until it waits for its answer
        return job

    async def release(self, *jobs):
        self._released.set()
        await asyncio.gather(self._blocker, *jobs)

    def stop(self):
        self._released.set()
        self.executor.close()


@contextlib.asynccontextmanager
async def blocked_executor(**options):
    blocked = Blocked(**options)
    try:
        await blocked.start()
        yield blocked
    finally:
        blocked.stop()


async def test_results_and_errors_come_back_from_one_other_thread():
    executor = Executor(10)
    try:
        threads = {await executor.run(threading.get_ident, kind) for kind in JobKind}
        assert len(threads) == 1 and threading.get_ident() not in threads
        with pytest.raises(ZeroDivisionError):
            await executor.run(lambda: 1 // 0, FORWARD)
        assert await executor.run(lambda: "still there") == "still there"
    finally:
        executor.close()


async def test_jobs_run_by_urgency_and_then_in_the_order_they_came():
    async with blocked_executor() as blocked:
        kinds = [BACKWARD, FORWARD, STEP, BACKWARD, STEP, FORWARD]
        await blocked.release(*[await blocked.queue(kind, (kind, number)) for number, kind in enumerate(kinds)])
        assert blocked.order == [(STEP, 2), (STEP, 4), (FORWARD, 1), (FORWARD, 5), (BACKWARD, 0), (BACKWARD, 3)]


async def test_a_backward_has_its_turn_among_many_steps_and_forwards():
    async with blocked_executor() as blocked:
        jobs = [await blocked.queue(kind) for kind in [BACKWARD] + [FORWARD] * 20 + [STEP] * 20]
        await blocked.release(*jobs)
        assert blocked.order[: MAX_PASSED_OVER + 2] == [STEP] * MAX_PASSED_OVER + [FORWARD, BACKWARD]
        assert len(blocked.order) == len(jobs)


async def test_a_job_is_a_step_unless_it_says_otherwise():
    async with blocked_executor() as blocked:
        forward = await blocked.queue(FORWARD)
        plain = asyncio.create_task(blocked.executor.run(lambda: blocked.order.append("plain")))
        await asyncio.sleep(0)
        await blocked.release(forward, plain)
        assert blocked.order == ["plain", FORWARD]


async def test_jobs_of_all_kinds_share_the_bound_on_waiting():
    async with blocked_executor(max_waiting=4) as blocked:
        jobs = [await blocked.queue(kind) for kind in JobKind]
        for kind in JobKind:
            with pytest.raises(Refused, match="4 jobs wait for the device already") as caught:
                await blocked.executor.run(lambda: None, kind)
            assert caught.value.code == node_pb2.THIS_NODE_HAS_NO_ROOM
        await blocked.release(*jobs)
        assert await blocked.executor.run(lambda: "room again") == "room again"


async def test_a_cancelled_job_does_not_run_and_frees_its_place():
    async with blocked_executor(max_waiting=3) as blocked:
        first, second = await blocked.queue(STEP, "first"), await blocked.queue(STEP, "second")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        third = await blocked.queue(BACKWARD, "third")
        await blocked.release(second, third)
        assert blocked.order == ["second", "third"]


async def test_closing_runs_what_was_queued_before_and_ends_the_thread():
    async with blocked_executor() as blocked:
        jobs = [await blocked.queue(kind) for kind in (BACKWARD, STEP, FORWARD)]
    assert blocked.order == [STEP, FORWARD, BACKWARD]
    await asyncio.gather(*jobs)


async def test_many_jobs_from_many_tasks_all_run_once():
    executor = Executor(3000)
    try:
        numbers = await asyncio.gather(*(executor.run(lambda n=n: n, JobKind(n % 3)) for n in range(3000)))
        assert numbers == list(range(3000))
    finally:
        executor.close()


async def test_sessions_and_training_share_the_device_by_the_seconds_of_their_jobs():
    now_s = 0.0

    def job(purpose, seconds):
        def work():
            nonlocal now_s
            now_s += seconds
            order.append(purpose)

        return executor.run(work, STEP if purpose is Purpose.SERVING else BACKWARD, purpose)

    order, released = [], threading.Event()
    executor = Executor(100, DeviceShare(0.25), clock=lambda: now_s)
    try:
        blocker = asyncio.create_task(executor.run(lambda: released.wait(60)))
        jobs = [asyncio.create_task(job(Purpose.SERVING, 1)) for _ in range(4)]
        jobs += [asyncio.create_task(job(Purpose.TRAINING, 2)) for _ in range(5)]
        await asyncio.sleep(0)
        released.set()
        await asyncio.gather(blocker, *jobs)
        serving, training = Purpose
        assert order == [serving, training, training, serving, training, serving, training, training, serving]
        await executor.run(lambda: None)  # the last job's time is noted after its answer
        assert executor.share.used_s == {serving: 4, training: 10}
    finally:
        released.set()
        executor.close()


async def test_neither_purpose_takes_the_others_room():
    async with blocked_executor(max_waiting=2) as blocked:
        jobs = [await blocked.queue(STEP)]
        with pytest.raises(Refused, match="2 jobs wait"):
            await blocked.executor.run(lambda: None)
        jobs += [asyncio.create_task(blocked.executor.run(lambda: None, STEP, Purpose.TRAINING)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="2 jobs wait"):
            await blocked.executor.run(lambda: None, BACKWARD, Purpose.TRAINING)
        await blocked.release(*jobs)


async def test_the_nodes_own_jobs_are_never_refused_and_take_nobodys_room():
    async with blocked_executor(max_waiting=3) as blocked:
        work = DeviceWork(blocked.executor)
        own = [asyncio.create_task(work.on_device(lambda: "own")) for _ in range(10)]
        await asyncio.sleep(0)

        def ask():
            return blocked.executor.run(lambda: "peer's", FORWARD, Purpose.TRAINING)

        jobs = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="3 jobs wait"):
            await ask()
        own.append(asyncio.create_task(work.on_device(lambda: "own")))
        await asyncio.sleep(0)
        await blocked.release(*own, *jobs)
        assert [job.result() for job in own] == ["own"] * 11
