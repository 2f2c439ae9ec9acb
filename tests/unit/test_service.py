"""NodeService: how a session's stream is answered while others use the node. A real shard and device; only the network is not there."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from node.backend.step_engine import StepEngine
from node.config import NodeConfig
from node.executor import Executor
from node.kv_cache import PAGE_TOKENS, SessionLimits, SessionTable
from node.microbatches import Microbatches, microbatch_limits_of
from node.service import NodeService
from node.shard import Shard
from node.step_queue import BatchLimits
from node.steps import Steps
from protos import node_pb2
from swarm.messages import decode_message, encode_message, own_version
from tests.support.engines import HIDDEN, NUM_PAGES, SPAN, assert_close, engines

__all__ = ["engines"]

DIGEST = b"m" * 16
BLOCK_DIGESTS = tuple(bytes([block]) * 16 for block in SPAN)


class Stream:
    """The network in the place of a FramedStream: what the peer says, and what it is answered."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.replies: asyncio.Queue[tuple[node_pb2.Reply, list[Tensor]]] = asyncio.Queue()
        self.pinged, self.pong = asyncio.Event(), asyncio.Event()

    async def receive(self) -> bytes | None:
        return await self.requests.get()

    def send_at_once(self, message: Sequence[Any]) -> bool:
        self.replies.put_nowait(decode_message(b"".join(map(bytes, message)), node_pb2.Reply))
        return True

    def accept_messages_of(self, message_bytes: int) -> None:
        assert message_bytes > 0

    async def ping(self, timeout_s: float) -> float:
        self.pinged.set()
        await self.pong.wait()
        return timeout_s

    async def fail(self, reason: str) -> None:
        raise AssertionError(reason)


class Peer:
    """A peer with one session."""

    def __init__(self, number: int, name: str) -> None:
        self.session_id = number.to_bytes(16, "big")
        self.stream = Stream(name)

    def say(self, request: node_pb2.Request, tensors: Sequence[Tensor] = ()) -> None:
        self.stream.requests.put_nowait(b"".join(map(bytes, encode_message(request, list(tensors)))))

    async def hear(self) -> tuple[node_pb2.Reply, list[Tensor]]:
        async with asyncio.timeout(30):
            return await self.stream.replies.get()

    async def open(self) -> None:
        request = node_pb2.OpenSession(
            version=own_version(),
            session_id=self.session_id,
            model_digest=DIGEST,
            start=SPAN.start,
            end=SPAN.end,
            block_digests=BLOCK_DIGESTS,
            batch=1,
            max_length=NUM_PAGES * PAGE_TOKENS,
        )
        self.say(node_pb2.Request(open=request))
        reply, _ = await self.hear()
        assert reply.WhichOneof("kind") == "opened", reply

    def send(self, position: int, hidden: Tensor, **fields: Any) -> None:
        request = node_pb2.Step(session_id=self.session_id, position=position, **fields)
        self.say(node_pb2.Request(step=request), [hidden])

    async def step(self, position: int, hidden: Tensor, **fields: Any) -> Tensor:
        self.send(position, hidden, **fields)
        reply, tensors = await self.hear()
        assert reply.WhichOneof("kind") == "step", reply
        return tensors[0]

    async def refusal(self) -> node_pb2.Refusal:
        reply, _ = await self.hear()
        assert reply.WhichOneof("kind") == "refusal", reply
        return reply.refusal


class Service:
    """A NodeService, and the peers that talk to it."""

    def __init__(self, engine: StepEngine, max_waiting: int) -> None:
        shard = Shard(engine.model, SPAN, DIGEST, BLOCK_DIGESTS, "fp32", 1)
        self.executor = Executor(100)
        self.steps = Steps(engine, self.executor, BatchLimits(chunk_tokens=64), max_waiting)
        limits = SessionLimits(cache_bytes=NUM_PAGES * PAGE_TOKENS, max_sessions=9, max_sessions_per_peer=9, idle_s=60)
        self.sessions = SessionTable(limits, 1)
        microbatches = Microbatches(shard, self.executor, microbatch_limits_of(NodeConfig(model="tiny")))
        self.service = NodeService(shard, "tiny", self.steps, self.sessions, microbatches)
        self.released = threading.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.peers: list[Peer] = []

    async def peer(self, name: str) -> Peer:
        """A peer with an open session."""
        self.peers.append(peer := Peer(len(self.peers), name))
        self.tasks.append(asyncio.create_task(self.service.handle(peer.stream)))
        await peer.open()
        return peer

    @contextlib.asynccontextmanager
    async def held_up(self) -> AsyncIterator[None]:
        self.released.clear()
        begun = threading.Event()
        blocker = asyncio.create_task(self.executor.run(lambda: begun.set() or self.released.wait(60)))
        await asyncio.to_thread(begun.wait)
        try:
            yield
        finally:
            self.released.set()
            await blocker

    async def until_waiting(self, number: int) -> None:
        async with asyncio.timeout(30):
            while len(self.steps._queue) != number:
                await asyncio.sleep(0)

    async def expected(self, engine: StepEngine, hidden: Tensor) -> Tensor:
        return await self.executor.run(lambda: engine.model.forward(hidden, engine.model.new_cache(SPAN)))


@contextlib.asynccontextmanager
async def service_of(engine: StepEngine, max_waiting: int = 50) -> AsyncIterator[Service]:
    service = Service(engine, max_waiting)
    try:
        yield service
        for peer in service.peers:
            peer.stream.requests.put_nowait(None)
        await asyncio.gather(*service.tasks)
        assert service.sessions.pool.num_held == 0
    finally:
        service.released.set()
        service.executor.close()


@pytest.fixture
def engine(engines: dict[str, StepEngine]) -> StepEngine:
    return engines["llama"]


def hidden(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(1, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


async def test_a_step_that_comes_when_too_many_wait_can_be_sent_again(engine: StepEngine) -> None:
    """Its session is as it was: a client asks again a few times, and goes elsewhere only then."""
    async with service_of(engine, max_waiting=1) as service:
        one, other = [await service.peer(name) for name in ("one", "other")]
        tokens = hidden(12)
        await other.step(0, tokens[:, :8])
        async with service.held_up():
            one.send(0, hidden(3, seed=1))
            await service.until_waiting(1)
            other.send(6, tokens[:, 6:], rewind_to=6, session_version=1)
            refusal = await other.refusal()
            assert refusal.code == node_pb2.THIS_NODE_HAS_NO_ROOM and "1 steps wait" in refusal.message
        await one.hear()
        output = await other.step(6, tokens[:, 6:], rewind_to=6, session_version=1)
        assert_close(output, (await service.expected(engine, tokens))[:, 6:])


async def test_a_step_that_is_said_twice_is_computed_once(engine: StepEngine) -> None:
    async with service_of(engine) as service:
        peer, tokens = await service.peer("one"), hidden(6)
        first = await peer.step(0, tokens)
        assert torch.equal(await peer.step(0, tokens), first)
        assert service.service.num_steps == 1 and service.steps.num_batches == 1
        whole = torch.cat([tokens, hidden(1, seed=2)], dim=1)
        assert_close(await peer.step(6, whole[:, 6:]), (await service.expected(engine, whole))[:, 6:])


@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_session_that_made_room_is_told_so_and_what_was_under_way_is_answered(
    is_busy: bool, engine: StepEngine
) -> None:
    async with service_of(engine) as service:
        old, young = [await service.peer(name) for name in ("old", "young")]
        tokens = hidden(NUM_PAGES * PAGE_TOKENS)
        half = tokens.shape[1] // 2
        await old.step(0, tokens[:, :half])
        await young.step(0, hidden(half - 3, seed=1))
        if is_busy:
            async with service.held_up():
                young.send(half - 3, hidden(2, seed=2))
                await service.until_waiting(1)
                old.send(half, tokens[:, half : half + 20])
                refusal = await old.refusal()
                assert refusal.code == node_pb2.THIS_NODE_HAS_NO_ROOM and "are about to make room" in refusal.message
            reply, _ = await young.hear()
            assert reply.WhichOneof("kind") == "step"
        output = await old.step(half, tokens[:, half : half + 20])
        assert_close(output, (await service.expected(engine, tokens[:, : half + 20]))[:, half:])
        young.send(half - 1 if is_busy else half - 3, hidden(1))
        refusal = await young.refusal()
        assert refusal.code == node_pb2.THIS_SESSION_MADE_ROOM and "open another and replay" in refusal.message
        assert service.sessions.num_evicted == 1
        # The oldest one can have all there is.
        await old.step(half + 20, tokens[:, half + 20 :])


async def test_peers_that_come_and_go_share_batches_and_what_they_have_in_common(engine: StepEngine) -> None:
    async with service_of(engine) as service:
        peers = [await service.peer(name) for name in "abcde"]
        prompt = hidden(2 * PAGE_TOKENS)
        first = await peers[0].step(0, prompt)
        async with service.held_up():
            for peer in peers[1:]:
                peer.send(0, prompt)
            await service.until_waiting(4)
        for peer in peers[1:]:
            _, (output,) = await peer.hear()
            assert torch.equal(output, first)
        assert service.steps.num_batches == 2 and service.service.num_found_tokens == 4 * 2 * PAGE_TOKENS
        async with service.held_up():
            for seed, peer in enumerate(peers):
                peer.send(2 * PAGE_TOKENS, hidden(1, seed))
            await service.until_waiting(5)
        for seed, peer in enumerate(peers):
            _, (output,) = await peer.hear()
            assert_close(output, (await service.expected(engine, torch.cat([prompt, hidden(1, seed)], dim=1)))[:, -1:])
        assert service.steps.num_batches == 3


async def test_a_node_that_leaves_waits_until_its_last_answer_is_with_the_peer(engine: StepEngine) -> None:
    """A pong comes behind all answers: what p2pd has not passed on when it ends is lost."""
    async with service_of(engine) as service:
        peer, fields = Peer(0, "one"), {"version": own_version(), "start": SPAN.start, "end": SPAN.end}
        task = asyncio.create_task(service.service.handle(peer.stream))
        opening = node_pb2.OpenMicrobatches(model_digest=DIGEST, block_digests=BLOCK_DIGESTS, **fields)
        peer.say(node_pb2.Request(open_microbatches=opening))
        assert (await peer.hear())[0].WhichOneof("kind") == "microbatches_opened"
        forward = node_pb2.Forward(microbatch_id=b"i" * 16, wants_gradients=True)
        peer.say(node_pb2.Request(forward=forward), [hidden(3)])
        assert (await peer.hear())[0].forward.is_stashed
        drained = asyncio.create_task(service.service.drain(30, asyncio.Event()))
        peer.say(node_pb2.Request(backward=node_pb2.Backward(microbatch_id=b"i" * 16)), [hidden(3)])
        assert (await peer.hear())[0].backward.was_stashed
        async with asyncio.timeout(30):
            await peer.stream.pinged.wait()
            assert not drained.done()
            peer.stream.pong.set()
            await drained
            peer.stream.requests.put_nowait(None)
            await task
