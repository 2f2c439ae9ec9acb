"""PeerStream: questions to a peer and their answers, one at a time, on one long-lived stream. Sessions and microbatches build on it."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from protos import node_pb2
from swarm.client.config import ClientConfig
from swarm.errors import BadReply, BadRequest, Busy, PeerFailed, SessionEvicted
from swarm.messages import NODE_PROTOCOL, decode_message, encode_message, error_of, versions_meet
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.tensors import Buffer

_BUSY_PAUSES_S = (0.05, 0.1, 0.2, 0.4)


class Reachable(Protocol):
    """Who a stream leads to."""

    @property
    def peer_id(self) -> str: ...
    @property
    def addresses(self) -> tuple[str, ...]: ...


HopT = TypeVar("HopT", bound=Reachable)


class PeerStream(Generic[HopT]):
    """A stream that a peer has opened for one hop."""

    def __init__(self, hop: HopT, stream: FramedStream, opened: node_pb2.Reply, config: ClientConfig) -> None:
        self.hop = hop
        self.opened = opened
        """The peer's answer to the opening."""
        self._stream = stream
        self._config = config

    @property
    def peer_id(self) -> str:
        return self.hop.peer_id

    @property
    def is_broken(self) -> bool:
        return self._stream.is_broken

    @property
    def bytes_moved(self) -> int:
        return self._stream.bytes_sent + self._stream.bytes_received

    @classmethod
    async def open(
        cls, host: Host, hop: HopT, request: node_pb2.Request, answer: str, config: ClientConfig, deadline: float
    ) -> PeerStream[HopT]:
        """Connect, open a stream and send the opening request, which must be answered by the kind of reply called `answer`.

        Raises PeerFailed, BadReply, Busy or BadRequest.
        """
        timeout_s = min(max(deadline - time.monotonic(), 0.1), 5.0)
        stream = await host.open_stream(hop.peer_id, NODE_PROTOCOL, timeout_s, hop.addresses)
        try:
            async with asyncio.timeout(timeout_s):
                await stream.send(encode_message(request))
                header, _ = _decoded(await stream.receive(), hop.peer_id)
            if header.WhichOneof("kind") != answer or not versions_meet(getattr(header, answer).version):
                raise BadReply(f"peer {hop.peer_id[-8:]} did not answer the opening of a stream")
            return cls(hop, stream, header, config)
        except TimeoutError:
            await stream.aclose()
            raise PeerFailed(f"peer {hop.peer_id[-8:]} did not open a stream within {timeout_s:.0f} s") from None
        except BaseException:
            await stream.aclose()
            raise

    def accept_messages_of(self, message_bytes: int) -> None:
        """Let the peer send messages of up to so many bytes."""
        self._stream.accept_messages_of(message_bytes)

    async def ask(self, message: list[Buffer], answer: str, deadline: float) -> tuple[node_pb2.Reply, list[Tensor]]:
        """Send one request and wait for its reply; again, a few times, when the peer is too busy (it has changed nothing then).

        deadline: time.monotonic() at which to give up. Raises what error_of names, PeerFailed and BadReply.
        """
        for pause_s in _BUSY_PAUSES_S:
            try:
                await self._send(message, deadline)
                return await self._reply(answer, deadline)
            except SessionEvicted:
                raise
            except Busy:
                if time.monotonic() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
        await self._send(message, deadline)
        return await self._reply(answer, deadline)

    async def aclose(self) -> None:
        """End the stream. What the peer keeps for it goes."""
        await self._stream.aclose()

    async def _send(self, message: list[Buffer], deadline: float) -> None:
        if self._stream.send_at_once(message):
            return
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.05)):
                await self._stream.send(message)
        except TimeoutError:
            raise PeerFailed(f"peer {self.peer_id[-8:]} took no data until the deadline") from None

    async def _reply(self, answer: str, deadline: float) -> tuple[node_pb2.Reply, list[Tensor]]:
        """Wait for the reply as long as the peer proves that it is alive, but at most half of the time that is left."""
        give_up = time.monotonic() + max(0.5 * (deadline - time.monotonic()), 0.05)
        while True:
            try:
                async with asyncio.timeout(self._config.stall_s):
                    message = await self._stream.receive()
                break
            except TimeoutError:
                await self._stream.ping(self._config.ping_timeout_s)
                if time.monotonic() > give_up:
                    raise PeerFailed(f"peer {self.peer_id[-8:]} is alive but does not answer the {answer}") from None
        header, tensors = _decoded(message, self.peer_id)
        if header.WhichOneof("kind") != answer:
            raise BadReply(f"peer {self.peer_id[-8:]} answered a {answer} with something else")
        return header, tensors


def _decoded(message: bytes | None, peer_id: str) -> tuple[node_pb2.Reply, list[Tensor]]:
    """A reply, or the error that it stands for."""
    if message is None:
        raise PeerFailed(f"peer {peer_id[-8:]} ended the stream")
    try:
        header, tensors = decode_message(message, node_pb2.Reply)
    except BadRequest as error:
        raise BadReply(f"peer {peer_id[-8:]} sent a malformed reply: {error}") from error
    if header.WhichOneof("kind") == "refusal":
        raise error_of(header.refusal, peer_id)
    return header, tensors
