"""Links: the streams between the members of a run. Letters go out in order; who does not answer any more is told as lost.

A link dials when there is something to send, and uses whatever stream there is, its own or the peer's. It keeps nothing over a
breakdown: the state machine says again what matters.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from protos import training_pb2
from swarm.epoch.messages import Message
from swarm.errors import BadReply, PeerFailed
from swarm.messages import own_version, versions_meet
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.training.member_config import RUN_PROTOCOL, LinkConfig
from swarm.training.wire import MAX_MESSAGE_BYTES, decode, from_wire, to_wire

log = logging.getLogger(__name__)

_MAX_WAITING = 4096
_INTRODUCTION_TIMEOUT_S = 10.0
_REDIAL_PAUSE_S = 0.5


@dataclass(slots=True)
class _Link:
    peer_id: str
    addresses: tuple[str, ...] = ()
    outbox: collections.deque[bytes] = field(default_factory=collections.deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    streams: list[FramedStream] = field(default_factory=list)
    stage: int | None = None
    task: asyncio.Task[None] | None = None


RequestHandler = Callable[[str, training_pb2.MemberMessage, FramedStream], Awaitable[None]]


class Links:
    """All links of one member. Made by `await start()`, ended by `await aclose()`."""

    def __init__(
        self,
        host: Host,
        run_id: bytes,
        stage: int,
        *,
        on_message: Callable[[str, Message], None],
        on_found: Callable[[str, int], None],
        on_lost: Callable[[str], None],
        on_request: RequestHandler,
        config: LinkConfig | None = None,
    ) -> None:
        self._host, self._run_id, self._stage = host, run_id, stage
        self._on_message, self._on_found, self._on_lost, self._on_request = on_message, on_found, on_lost, on_request
        self._config = config or LinkConfig()
        self._links: dict[str, _Link] = {}
        self._watching: set[asyncio.Task[None]] = set()
        self._is_closing = False

    async def start(self) -> None:
        await self._host.serve(RUN_PROTOCOL, self._accept)

    async def aclose(self) -> None:
        self._is_closing = True
        tasks = [link.task for link in self._links.values() if link.task is not None] + list(self._watching)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        for link in self._links.values():
            for stream in list(link.streams):
                await stream.aclose()

    def addresses_of(self, peer_id: str) -> tuple[str, ...]:
        link = self._links.get(peer_id)
        return link.addresses if link is not None else ()

    def know(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        """Where a peer can be dialled."""
        self._link(peer_id).addresses = addresses

    def is_up(self, peer_id: str) -> bool:
        link = self._links.get(peer_id)
        return link is not None and any(not stream.is_broken for stream in link.streams)

    def probe(self, peer_id: str) -> None:
        """Dial a peer that we have no stream to; the answer is on_found or on_lost."""
        link = self._link(peer_id)
        if not self.is_up(peer_id):
            link.filled.set()

    def send(self, peer_id: str, message: Message) -> None:
        """Put a letter in the outbox. It is lost if the peer is."""
        link = self._link(peer_id)
        if len(link.outbox) >= _MAX_WAITING:
            link.outbox.clear()
        link.outbox.append(to_wire(message).SerializeToString())
        link.filled.set()

    async def flush(self, timeout_s: float) -> None:
        """Wait until the outboxes are empty."""
        try:
            async with asyncio.timeout(timeout_s):
                while any(link.outbox for peer, link in self._links.items() if self.is_up(peer)):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pass

    async def open_request(self, peer_id: str, request: training_pb2.MemberMessage) -> FramedStream:
        """A stream of its own for one request. Raises PeerFailed."""
        stream = await self._dial(peer_id, self._link(peer_id).addresses, is_request=True)
        try:
            await stream.send([request.SerializeToString()])
        except BaseException:
            await stream.aclose()
            raise
        return stream

    def _link(self, peer_id: str) -> _Link:
        link = self._links.get(peer_id)
        if link is None:
            link = self._links[peer_id] = _Link(peer_id)
            if not self._is_closing:
                link.task = asyncio.create_task(self._drive(link))
        return link

    async def _drive(self, link: _Link) -> None:
        """Send what is in the outbox, dialling first if need be."""
        while True:
            await link.filled.wait()
            link.filled.clear()
            stream = next((s for s in link.streams if not s.is_broken), None)
            try:
                if stream is None:
                    stream = await self._dial(link.peer_id, link.addresses)
                    self._adopt(link, stream)
                while link.outbox:
                    raw = link.outbox.popleft()
                    if not stream.send_at_once([raw]):
                        async with asyncio.timeout(self._config.ping_timeout_s):
                            await stream.send([raw])
            except (PeerFailed, TimeoutError) as error:
                if stream is not None:
                    await self._drop(link, stream, str(error))
                else:
                    link.outbox.clear()
                    log.debug("member not reached peer=%s reason=%s", link.peer_id[-8:], error)
                    self._on_lost(link.peer_id)
                    await asyncio.sleep(_REDIAL_PAUSE_S)

    async def _dial(self, peer_id: str, addresses: tuple[str, ...], *, is_request: bool = False) -> FramedStream:
        stream = await self._host.open_stream(peer_id, RUN_PROTOCOL, self._config.connect_timeout_s, addresses)
        try:
            stream.accept_messages_of(MAX_MESSAGE_BYTES)
            await stream.send([self._introduction(is_request).SerializeToString()])
            async with asyncio.timeout(self._config.connect_timeout_s):
                self._link(peer_id).stage = self._check_introduction(await stream.receive(), peer_id).stage
        except TimeoutError:
            await stream.aclose()
            raise PeerFailed(f"peer {peer_id[-8:]} did not introduce itself in time") from None
        except BaseException:
            await stream.aclose()
            raise
        return stream

    def _introduction(self, is_request: bool = False) -> training_pb2.MemberMessage:
        introduction = training_pb2.Introduction(
            version=own_version(), run_id=self._run_id, stage=self._stage, is_request=is_request
        )
        return training_pb2.MemberMessage(introduction=introduction)

    def _check_introduction(self, raw: bytes | None, peer_id: str) -> training_pb2.Introduction:
        if raw is None:
            raise PeerFailed(f"peer {peer_id[-8:]} ended the stream")
        message = decode(raw)
        kind = message.WhichOneof("kind")
        if kind == "refusal":
            raise PeerFailed(f"peer {peer_id[-8:]} refused: {message.refusal.message[:200]!r}")
        if kind != "introduction":
            raise BadReply(f"peer {peer_id[-8:]} did not introduce itself")
        if not versions_meet(message.introduction.version):
            raise PeerFailed(
                f"peer {peer_id[-8:]} speaks another version of the protocol; one of the two must be upgraded"
            )
        if message.introduction.run_id != self._run_id:
            raise PeerFailed(f"peer {peer_id[-8:]} takes part in another run")
        return message.introduction

    def _adopt(self, link: _Link, stream: FramedStream) -> None:
        """Use a stream that both sides introduced themselves on."""
        link.streams.append(stream)
        task = asyncio.create_task(self._watch(link, stream))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)
        if link.stage is not None:
            self._on_found(link.peer_id, link.stage)

    async def _watch(self, link: _Link, stream: FramedStream) -> None:
        """Receive until the stream breaks, and see that the peer is alive when it is silent."""
        reason = "it ended the stream"
        try:
            while not self._is_closing:
                try:
                    async with asyncio.timeout(self._config.ping_every_s):
                        raw = await stream.receive()
                except TimeoutError:
                    await stream.ping(self._config.ping_timeout_s)
                    continue
                if raw is None:
                    break
                self._on_message(link.peer_id, from_wire(decode(raw)))
        except PeerFailed as error:
            reason = str(error)
        await self._drop(link, stream, reason)

    async def _drop(self, link: _Link, stream: FramedStream, reason: str) -> None:
        if stream not in link.streams:
            return
        link.streams.remove(stream)
        await stream.aclose()
        if not link.streams and not self._is_closing:
            link.outbox.clear()
            log.info("member lost peer=%s reason=%s", link.peer_id[-8:], reason)
            self._on_lost(link.peer_id)

    async def _accept(self, stream: FramedStream) -> None:
        """A peer opened a stream: a link, or a request."""
        stream.accept_messages_of(MAX_MESSAGE_BYTES)
        try:
            async with asyncio.timeout(_INTRODUCTION_TIMEOUT_S):
                introduction = self._check_introduction(await stream.receive(), stream.peer_id)
                await stream.send([self._introduction().SerializeToString()])
                if introduction.is_request:
                    raw = await stream.receive()
        except (PeerFailed, TimeoutError) as error:
            await stream.fail(str(error) or "no introduction came")
            return
        if introduction.is_request:
            if raw is not None:
                await self._on_request(stream.peer_id, decode(raw), stream)
            return
        link = self._link(stream.peer_id)
        link.stage = introduction.stage
        link.streams.append(stream)
        link.filled.set()
        self._on_found(stream.peer_id, introduction.stage)
        await self._watch(link, stream)
