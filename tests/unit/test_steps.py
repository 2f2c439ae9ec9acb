"""Steps: batches on a real device thread. What goes wrong with one step is nobody else's business, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from node.admission import finish_step
from node.backend.step_engine import EngineStep, StepEngine
from node.executor import Executor
from node.job_queue import JobKind
from node.step_queue import BatchLimits
from node.steps import COMPUTE_ERRORS, Steps
from protos import node_pb2
from swarm.messages import Refused
from tests.support.engines import HIDDEN, Client, Node, engines

__all__ = ["engines"]

LIMITS = BatchLimits(chunk_tokens=16, max_tokens=64)


def hidden(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def encode(step: EngineStep) -> list[Any]:
    """In the place of a reply's bytes: what they are made of."""
    return [step.output]


class Device:
    """A node's sessions and steps, whose device thread can be held up."""

    def __init__(self, engine: StepEngine, max_waiting: int = 100) -> None:
        self.node = Node(engine)
        self.executor = Executor(max_waiting)
        self.steps = Steps(engine, self.executor, LIMITS, max_waiting)
        self._released = threading.Event()

    @contextlib.asynccontextmanager
    async def held_up(self) -> AsyncIterator[None]:
        """What is begun meanwhile is computed afterwards: all that waits then, as one batch."""
        self._released.clear()
        begun = threading.Event()

        def hold_up() -> None:
            begun.set()
            assert self._released.wait(60)

        blocker = asyncio.create_task(self.executor.run(hold_up))
        await asyncio.to_thread(begun.wait)
        try:
            yield
        finally:
            self._released.set()
            await blocker

    async def begin(
        self,
        client: Client,
        num_tokens: int,
        seed: int,
        encode: Callable[[EngineStep], list[Any]] = encode,
        **broken: Any,
    ) -> asyncio.Task[list[Any]]:
        """A step that waits for the device. broken: what is wrong with it."""
        self.node.send(client, hidden(num_tokens, seed))
        assert client.step is not None
        step = dataclasses.replace(client.step, **broken) if broken else client.step
        run = self.steps.run(step, client.session.peer_id, encode, lambda: False)
        task = asyncio.create_task(run)
        await asyncio.sleep(0)  # it runs until it waits
        return task

    async def finish(self, client: Client, task: asyncio.Task[list[Any]]) -> None:
        """Its reply is what the model gives for this session alone."""
        async with asyncio.timeout(30):
            (client.outputs,) = await task
        finish_step(self.node.table, client.session, 0.0)
        # There, too: only one thread at a time may use the model.
        await self.executor.run(lambda: self.node.assert_right(client), is_own=True)


@contextlib.asynccontextmanager
async def device_of(engine: StepEngine, **options: Any) -> AsyncIterator[Device]:
    device = Device(engine, **options)
    try:
        yield device
    finally:
        device._released.set()
        device.executor.close()


@pytest.fixture
def engine(engines: dict[str, StepEngine]) -> StepEngine:
    return engines["llama"]


async def test_steps_that_wait_together_share_a_batch(engine: StepEngine) -> None:
    async with device_of(engine) as device:
        clients = [device.node.open(peer=peer) for peer in "abcd"]
        async with device.held_up():
            tasks = [await device.begin(client, number + 1, number) for number, client in enumerate(clients)]
        for client, task in zip(clients, tasks, strict=True):
            await device.finish(client, task)
        assert (device.steps.num_batches, device.steps.num_batched) == (1, 4)


# A table that leads beyond the pages is found out by torch; one that is no list at all by nobody who expects it.
BROKEN = {"by torch": {"tables": [[10**6]]}, "by Python": {"tables": [None]}}


@pytest.mark.parametrize("found", BROKEN)
async def test_a_step_that_cannot_be_computed_fails_alone(
    found: str, engine: StepEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with device_of(engine) as device:
        good = [device.node.open(peer=peer) for peer in "abc"]
        bad = device.node.open(peer="bad")
        for round_number in range(2):  # as prompts, then as tokens
            async with device.held_up():
                tasks = [
                    await device.begin(client, 12 if round_number == 0 else 1, seed) for seed, client in enumerate(good)
                ]
                failing = await device.begin(bad, 3, 99, **BROKEN[found])
            with pytest.raises(Exception) as caught, caplog.at_level(logging.WARNING):  # noqa: PT011  what it is, is the parameter
                async with asyncio.timeout(30):
                    await failing
            assert isinstance(caught.value, COMPUTE_ERRORS) == (found == "by torch")
            device.node.table.close(bad.session)
            for client, task in zip(good, tasks, strict=True):
                await device.finish(client, task)
            bad = device.node.open(peer="bad")
        assert "batch failed, each step alone num_steps=" in caplog.text
        task = await device.begin(bad, 2, 5)
        await device.finish(bad, task)


async def test_a_reply_that_cannot_be_encoded_is_an_error_of_its_step_alone(engine: StepEngine) -> None:
    def fail(_: EngineStep) -> list[Any]:
        raise ArithmeticError("planted")

    async with device_of(engine) as device:
        first, bad, last = (device.node.open(peer=peer) for peer in "abc")
        async with device.held_up():
            tasks = [
                await device.begin(client, 2, seed, encode=fail if client is bad else encode)
                for seed, client in enumerate((first, bad, last))
            ]
        with pytest.raises(ArithmeticError, match="planted"):
            async with asyncio.timeout(30):
                await tasks[1]
        await device.finish(first, tasks[0])
        await device.finish(last, tasks[2])


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_whoever_goes_while_the_batch_waits_holds_up_nobody(gone: int, engine: StepEngine) -> None:
    """Also the one whose task carries the batch to the device."""
    async with device_of(engine) as device:
        clients = [device.node.open(peer=peer) for peer in "abc"]
        async with device.held_up():
            tasks = [await device.begin(client, 2, seed) for seed, client in enumerate(clients)]
            tasks[gone].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[gone]
            device.node.table.close(clients[gone].session)
        for client, task in zip(clients, tasks, strict=True):
            if not task.cancelled():
                await device.finish(client, task)
        assert device.steps.num_batched == 2


async def test_whoever_goes_while_the_batch_is_computed_holds_up_nobody(engine: StepEngine) -> None:
    async with device_of(engine) as device:
        clients = [device.node.open(peer=peer) for peer in "abc"]
        is_encoding, go_on = threading.Event(), threading.Event()

        def wait(step: EngineStep) -> list[Any]:
            is_encoding.set()
            assert go_on.wait(60)
            return encode(step)

        async with device.held_up():
            tasks = [await device.begin(client, 2, seed, encode=wait) for seed, client in enumerate(clients)]
        await asyncio.to_thread(is_encoding.wait)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        device.node.table.close(clients[0].session)
        newcomer = device.node.open()
        later = await device.begin(newcomer, 20, 9)  # in the pages of the one that is gone, if it likes
        go_on.set()
        for client, task in zip([*clients[1:], newcomer], [*tasks[1:], later], strict=True):
            await device.finish(client, task)


async def test_tokens_get_in_between_the_chunks_of_a_long_prompt(engine: StepEngine) -> None:
    async with device_of(engine) as device:
        order: list[str] = []

        def note(name: str) -> Callable[[EngineStep], list[Any]]:
            def encode_and_note(step: EngineStep) -> list[Any]:
                order.append(name)
                return encode(step)

            return encode_and_note

        prompt, talker = device.node.open(peer="a"), device.node.open(peer="b")
        async with device.held_up():
            long = await device.begin(prompt, 160, 1, encode=note("prompt"))  # ten chunks
            task = await device.begin(talker, 1, 2, encode=note("token"))
        for number in range(4):
            await device.finish(talker, task)
            task = await device.begin(talker, 1, 3 + number, encode=note("token"))
        await device.finish(talker, task)
        await device.finish(prompt, long)
        assert order.count("token") == 5 and order.index("prompt") >= 3
        assert device.steps.num_batches >= 10


async def test_too_many_steps_are_refused_before_anything_is_done_for_them(engine: StepEngine) -> None:
    async with device_of(engine, max_waiting=2) as device:
        clients = [device.node.open(peer=peer) for peer in "ab"]
        async with device.held_up():
            device.steps.check_room()
            tasks = [await device.begin(client, 1, 0) for client in clients]
            with pytest.raises(Refused, match="2 steps wait for the device already") as caught:
                device.steps.check_room()
            assert caught.value.code == node_pb2.THIS_NODE_HAS_NO_ROOM
        for client, task in zip(clients, tasks, strict=True):
            await device.finish(client, task)
        device.steps.check_room()


async def test_steps_that_were_let_in_are_computed_however_many_microbatches_wait(engine: StepEngine) -> None:
    async with device_of(engine, max_waiting=2) as device:
        client = device.node.open()
        async with device.held_up():
            microbatch = asyncio.create_task(device.executor.run(lambda: None, JobKind.FORWARD))
            await asyncio.sleep(0)
            with pytest.raises(Refused):
                await device.executor.run(lambda: None, JobKind.FORWARD)
            task = await device.begin(client, 3, 0)
        await device.finish(client, task)
        await microbatch


async def test_one_at_a_time_a_failing_step_fails_alone_too(engines: dict[str, StepEngine]) -> None:
    async with device_of(engines["bloom"]) as device:
        good, bad = device.node.open(peer="a"), device.node.open(peer="b")
        async with device.held_up():
            failing = await device.begin(bad, 3, 1, mask=torch.ones(1, 7))
            task = await device.begin(good, 3, 2)
        with pytest.raises(Exception, match="mask"):
            await failing
        await device.finish(good, task)
