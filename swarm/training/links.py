"""Links: the streams of one member of a run to the others. Letters go out in order; who does not answer any more is told as lost.

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
from swarm.epoch.messages import Mail
from swarm.errors import BadReply, PeerFailed
from swarm.p2p.framing import FramedStream
from swarm.training.member_config import RUN_PROTOCOL, LinkConfig
from swarm.training.member_name import member_name, peer_of, stage_of
from swarm.training.run_host import RunHost, introduce, introduction_of
from swarm.training.wire import decode, from_wire, to_wire

log = logging.getLogger(__name__)

_MAX_WAITING = 4096
_REDIAL_PAUSE_S = 0.5


@dataclass(slots=True)
class _Link:
    name: str
    """Of the other member."""
    addresses: tuple[str, ...] = ()
    outbox: collections.deque[bytes] = field(default_factory=collections.deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    streams: list[FramedStream] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


RequestHandler = Callable[[str, training_pb2.MemberMessage, FramedStream], Awaitable[None]]


class Links:
    """All links of one member. Begun by `start()`, ended by `await aclose()`."""

    def __init__(
        self,
        run_host: RunHost,
        run_id: bytes,
        stage: int,
        *,
        on_message: Callable[[str, Mail], None],
        on_found: Callable[[str], None],
        on_lost: Callable[[str], None],
        on_request: RequestHandler,
        config: LinkConfig | None = None,
    ) -> None:
        """What the callbacks are given first is a member's name, or the peer id of who has a request."""
        self._run_host, self._run_id, self._stage = run_host, run_id, stage
        self._on_message, self._on_found, self._on_lost, self._on_request = on_message, on_found, on_lost, on_request
        self._config = config or LinkConfig()
        self._links: dict[str, _Link] = {}
        self._watching: set[asyncio.Task[None]] = set()
        self._is_closing = False

    def start(self) -> None:
        self._run_host.open_door(self._run_id, self._stage, self)

    async def aclose(self) -> None:
        self._is_closing = True
        self._run_host.close_door(self._run_id, self._stage)
        tasks = [link.task for link in self._links.values() if link.task is not None] + list(self._watching)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        for link in self._links.values():
            for stream in list(link.streams):
                await stream.aclose()

    def addresses_of(self, name: str) -> tuple[str, ...]:
        link = self._links.get(name)
        return link.addresses if link is not None else ()

    def know(self, name: str, addresses: tuple[str, ...]) -> None:
        """Where a peer can be dialled."""
        self._link(name).addresses = addresses

    def is_up(self, name: str) -> bool:
        if self._is_here(name):
            return True
        link = self._links.get(name)
        return link is not None and any(not stream.is_broken for stream in link.streams)

    def probe(self, name: str) -> None:
        """Dial a peer that we have no stream to; the answer is on_found or on_lost."""
        link = self._link(name)
        if not self.is_up(name):
            link.filled.set()

    def send(self, name: str, message: Mail) -> None:
        """Put a letter in the outbox. It is lost if the peer is."""
        if self._is_here(name):
            self._run_host.pass_on(self._run_id, self._stage, stage_of(name), message)
            return
        link = self._link(name)
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

    async def accept(self, stream: FramedStream, introduction: training_pb2.Introduction) -> None:
        """A peer opened a stream: a link, or a request."""
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await stream.send([introduction_of(self._run_id, self._stage).SerializeToString()])
                raw = await stream.receive() if introduction.is_request else None
        except TimeoutError:
            await stream.fail("no request came")
            return
        if introduction.is_request:
            if raw is not None:
                await self._on_request(stream.peer_id, decode(raw), stream)
            return
        link = self._link(member_name(stream.peer_id, introduction.stage))
        link.streams.append(stream)
        link.filled.set()
        self._on_found(link.name)
        await self._watch(link, stream)

    def hear(self, name: str, message: Mail) -> None:
        self._on_message(name, message)

    def on_found(self, name: str) -> None:
        self._on_found(name)

    def on_lost(self, name: str) -> None:
        self._on_lost(name)

    def _is_here(self, name: str) -> bool:
        return peer_of(name) == self._run_host.peer_id

    def _link(self, name: str) -> _Link:
        link = self._links.get(name)
        if link is None:
            link = self._links[name] = _Link(name)
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
                    stream = await self._dial(link.name, link.addresses)
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
                    log.debug("member not reached member=%s reason=%s", _short(link.name), error)
                    self._on_lost(link.name)
                    await asyncio.sleep(_REDIAL_PAUSE_S)

    async def _dial(self, name: str, addresses: tuple[str, ...]) -> FramedStream:
        peer_id, to_stage = peer_of(name), stage_of(name)
        if to_stage < 0:
            raise PeerFailed(f"no member can be called {name[:80]!r}")
        timeout_s = self._config.connect_timeout_s
        stream = await self._run_host.host.open_stream(peer_id, RUN_PROTOCOL, timeout_s, addresses)
        try:
            if await introduce(stream, self._run_id, self._stage, to_stage, timeout_s) != to_stage:
                raise BadReply(f"peer {peer_id[-8:]} is another member than the one that was asked for")
        except BaseException:
            await stream.aclose()
            raise
        return stream

    def _adopt(self, link: _Link, stream: FramedStream) -> None:
        """Use a stream that both sides introduced themselves on."""
        link.streams.append(stream)
        task = asyncio.create_task(self._watch(link, stream))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)
        self._on_found(link.name)

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
                message = decode(raw)
                if message.WhichOneof("kind") is not None:  # else of a newer minor version, which only adds
                    self._on_message(link.name, from_wire(message))
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
            log.info("member lost member=%s reason=%s", _short(link.name), reason)
            self._on_lost(link.name)


def _short(name: str) -> str:
    return f"{peer_of(name)[-8:]}/{stage_of(name)}"
