"""How a member takes up what the run's owner has said, however it hears of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from node.executor import Executor
from node.training.device_work import DeviceWork
from node.training.stage import TrainableStage
from protos import training_pb2
from swarm.epoch.messages import Commit, Mail, Ordered, Term
from swarm.identity import Identity
from swarm.p2p.directory import Directory
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import HostConfig, running_host
from swarm.run_orders import Orders, sign_orders
from swarm.run_store import RunStore
from swarm.training.initial import open_initial_weights
from swarm.training.links import Links
from swarm.training.member_name import member_name
from swarm.training.membership import Membership
from swarm.training.run_host import RunHost, run_host
from swarm.training.wire import sign_commit
from tests.support.training_swarm import make_run


@dataclass
class Stranger:
    """The links of a member of stage 1, without a member behind them."""

    name: str
    identity: Identity
    links: Links
    heard: asyncio.Queue[Mail]


@contextlib.asynccontextmanager
async def stranger(store: RunStore, member: str, addresses: tuple[str, ...]) -> AsyncIterator[Stranger]:
    async def refuse(stage: int, request: training_pb2.MemberMessage, stream: FramedStream) -> None:
        await stream.fail("nobody is here")

    heard: asyncio.Queue[Mail] = asyncio.Queue()
    async with running_host(HostConfig()) as host:
        links = Links(
            RunHost(host, None),  # type: ignore[arg-type]
            store.run_id, 1, on_message=lambda name, letter: heard.put_nowait(letter),
            on_found=lambda name: None, on_lost=lambda name: None, on_request=refuse,
        )  # fmt: skip
        links.start()
        links.know(member, addresses)
        links.probe(member)
        try:
            yield Stranger(member_name(host.peer_id, 1), host.identity, links, heard)
        finally:
            await links.aclose()


async def test_orders_that_come_with_a_commit_alone_are_told_to_the_others_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = make_run(tmp_path)
    orders = Orders(serial=1, is_paused=True)
    raw = sign_orders(orders, store.run_id, Identity.load_or_create(tmp_path / "owner"))
    executor = Executor(16)
    stage = TrainableStage(open_initial_weights(store.spec), store.spec, 0)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(executor.close)
        host = await stack.enter_async_context(running_host(HostConfig()))
        directory = await Directory.join(host, [], serves=True)
        stack.push_async_callback(directory.close)
        shared = await stack.enter_async_context(run_host(host, directory))
        member = Membership(shared, store, 0, stage.parameters, DeviceWork(executor))
        told: asyncio.Queue[Orders] = asyncio.Queue()
        member.on_orders.append(told.put_nowait)
        await stack.enter_async_context(member.running())
        addresses = tuple(await host.addresses())
        leader = await stack.enter_async_context(stranger(store, member.name, addresses))
        other = await stack.enter_async_context(stranger(store, member.name, addresses))
        async with asyncio.timeout(30):
            while not {leader.name, other.name} <= member.member.known.keys():
                await asyncio.sleep(0.01)

            term = Term(2**30, leader.name)
            commit = Commit(0, store.run_id, term, 0, 0, 0.0, True, (), ((member.name, 0),), 0.0, orders=raw)
            leader.links.send(member.name, sign_commit(commit, store.run_id, leader.identity))
            assert await told.get() == orders, "a trainer looks for the data that they name"
            while await other.heard.get() != Ordered(raw):
                pass
        assert "the owner has given orders serial=1 paused=True" in caplog.text
        assert store.read_orders() == raw
