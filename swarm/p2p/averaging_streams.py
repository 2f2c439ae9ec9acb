"""Streams of the exchange: one to a peer during one round (Link), and what outlives rounds (StreamPool)."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Iterable

from swarm.errors import PeerFailed
from swarm.exchange import ExchangeMember, Patience, RateMeter, Verdict
from swarm.p2p.framing import FramedStream, FrameKind
from swarm.p2p.host import Host
from swarm.wire_format import Buffer

EXCHANGE_PROTOCOL = "shardswarm/exchange"
_LAST_WORDS_TIMEOUT_S = 1.0
# For what was under way to reach a slow peer before its stream's END.
_LEAVE_TIMEOUT_S = 15.0
_MAX_METERS = 4096


async def leave(stream: FramedStream, timeout_s: float = _LEAVE_TIMEOUT_S) -> None:
    """End a stream in good order while the peer may still be sending: read until it has closed its side, too.

    A socket that is closed with bytes unread makes p2pd reset the stream, and then the peer sees a break and not our END.
    """
    try:
        if not stream.is_broken:
            stream._write_frame(FrameKind.END)
            async with asyncio.timeout(timeout_s):
                while await stream.receive() is not None:
                    pass
    except (PeerFailed, TimeoutError):
        pass
    finally:
        await stream.aclose()


class StreamPool:
    """What outlives rounds: streams to reducers that may carry another one or are being left, and the rates of peers."""

    def __init__(self, host: Host, connect_timeout_s: float) -> None:
        self._host, self._connect_timeout_s = host, connect_timeout_s
        self._idle: collections.defaultdict[str, list[FramedStream]] = collections.defaultdict(list)
        self._meters: collections.OrderedDict[tuple[str, str], RateMeter] = collections.OrderedDict()
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def meter(self, peer_id: str, what: str) -> RateMeter:
        """What is known of a peer's rate: of "contributions" from it, "results" from it, or its "taking" of results."""
        meter = self._meters.setdefault((peer_id, what), RateMeter())
        self._meters.move_to_end((peer_id, what))
        if len(self._meters) > _MAX_METERS:
            self._meters.popitem(last=False)
        return meter

    async def open(self, member: ExchangeMember) -> FramedStream:
        """A new stream. Raises PeerFailed."""
        return await self._host.open_stream(
            member.peer_id, EXCHANGE_PROTOCOL, self._connect_timeout_s, member.addresses
        )

    def take(self, peer_id: str) -> FramedStream | None:
        """A stream that an earlier round left, if there is one."""
        streams = self._idle.get(peer_id, [])
        while streams:
            stream = streams.pop()
            if not stream.is_broken:
                return stream
        return None

    async def keep(self, stream: FramedStream) -> None:
        """Keep a stream for a later round, and forget those that broke since."""
        if not self._is_closed:
            self._idle[stream.peer_id].append(stream)
        for peer_id, streams in list(self._idle.items()):
            broken = [one for one in streams if one.is_broken]
            self._idle[peer_id] = [one for one in streams if not one.is_broken]
            if not self._idle[peer_id]:
                del self._idle[peer_id]
            for one in broken:
                await one.aclose()

    def leave(self, stream: FramedStream) -> None:
        """End a stream in good order, in the background."""
        task = asyncio.create_task(leave(stream))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def aclose(self, timeout_s: float) -> None:
        self._is_closed = True
        for streams in self._idle.values():
            for stream in streams:
                self.leave(stream)
        self._idle.clear()
        if self._leaving:
            _, late = await asyncio.wait(self._leaving, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


class PeerOut(Exception):
    """Ends a round because of peers. gave_up: they ended or refused it in good order."""

    def __init__(self, peer_ids: Iterable[str], reason: str, gave_up: bool = False) -> None:
        super().__init__(reason)
        self.peer_ids, self.gave_up = frozenset(peer_ids), gave_up


class Link:
    """A stream to one peer during one round."""

    def __init__(self, stream: FramedStream, receiving: Patience, sending: Patience | None = None) -> None:
        self.stream = stream
        self.receiving, self.sending = receiving, sending
        self.is_done = False
        """All that this round needs of the stream has passed: it may carry another one."""
        self._bytes_before = stream.bytes_sent, stream.bytes_received

    @property
    def peer_id(self) -> str:
        return self.stream.peer_id

    @property
    def bytes_sent(self) -> int:
        return self.stream.bytes_sent - self._bytes_before[0]

    @property
    def bytes_received(self) -> int:
        return self.stream.bytes_received - self._bytes_before[1]

    @property
    def is_lost(self) -> bool:
        """Whether results that are still to be sent cannot be. (Results that are to come may have come before a stream ended.)"""
        return self.sending is not None and not self.is_done and self.stream.is_broken

    async def receive(self, num_bytes: int) -> bytes:
        """The next message, of about num_bytes. Raises PeerOut."""
        before = self.stream.bytes_received
        self.receiving.begin(time.monotonic(), before, num_bytes)
        try:
            message = await self.stream.receive()
        except PeerFailed as error:
            raise self.out(str(error)) from error
        finally:
            self.receiving.end(time.monotonic(), self.stream.bytes_received - before)
        if message is None:
            raise self.out(f"peer {self.peer_id[-8:]} left the round", gave_up=True)
        return message

    async def send(self, message: list[Buffer]) -> None:
        """Raises PeerOut."""
        num_bytes = sum(map(len, message))
        if self.sending is not None:
            self.sending.begin(time.monotonic(), self.stream.bytes_received, num_bytes)
        try:
            await self.stream.send(message)
        except PeerFailed as error:
            raise await self.last_words(str(error)) from error
        finally:
            if self.sending is not None:
                self.sending.end(time.monotonic(), num_bytes)

    async def last_words(self, reason: str) -> PeerOut:
        """Whether a peer to which nothing can be sent any more had ended the stream in good order, or went away (for reason)."""
        try:
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                while await self.stream.receive() is not None:
                    pass
        except PeerFailed as error:
            return self.out(str(error))
        except TimeoutError:
            return self.out(reason)
        return self.out(f"peer {self.peer_id[-8:]} left the round", gave_up=True)

    def out(self, reason: str, gave_up: bool = False) -> PeerOut:
        return PeerOut([self.peer_id], reason, gave_up)

    def judge(self, now: float) -> float | None:
        """Seconds that the peer has for the answer to a ping which is to be sent now; None: none is. Raises PeerOut."""
        for patience in filter(None, (self.receiving, self.sending)):
            verdict = patience.verdict(now, self.stream.bytes_received)
            if verdict is Verdict.FROZEN:
                raise self.out(f"peer {self.peer_id[-8:]} answers no ping")
            if verdict is Verdict.TOO_SLOW:
                what = "send" if patience is self.receiving else "take"
                raise self.out(f"peer {self.peer_id[-8:]} did not {what} the next message in time")
            if verdict is Verdict.PING:
                return patience.quiet_s
        return None

    def forgive(self, seconds: float) -> None:
        for patience in filter(None, (self.receiving, self.sending)):
            patience.forgive(seconds)

    async def ping(self, timeout_s: float) -> None:
        """Only asks: that something came since is for the link's patience to see."""
        with contextlib.suppress(PeerFailed):
            await self.stream.ping(timeout_s)
