"""Framed streams: messages of any size, credit, pings, and what a hostile or vanishing peer can do. Over a real socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import pytest

from swarm.errors import BadReply, PeerFailed
from swarm.p2p.framing import FIRST_WINDOW_BYTES, MAX_FRAME_BYTES, FramedStream, FrameKind


@contextlib.asynccontextmanager
async def stream_pair():
    left, right = socket.socketpair()
    streams = [
        await FramedStream.start(*await asyncio.open_connection(sock=sock), peer_id=f"12D3KooW{name}")
        for sock, name in ((left, "right"), (right, "left"))
    ]
    try:
        yield streams
    finally:
        for stream in streams:
            await stream.aclose()


@contextlib.asynccontextmanager
async def raw_and_stream():
    """The raw end of a socket for a hostile peer, and our stream at the other end."""
    left, right = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=left)
    stream = await FramedStream.start(*await asyncio.open_connection(sock=right), peer_id="12D3KooWhostile")
    try:
        yield reader, writer, stream
    finally:
        writer.close()
        await stream.aclose()


def frame(kind, payload=b"", number=0, size=None):
    return struct.pack("!IBI", len(payload) if size is None else size, kind, number) + payload


@pytest.mark.parametrize("size", [0, 1, 8192, MAX_FRAME_BYTES, MAX_FRAME_BYTES + 1, 3 * 2**20])
async def test_messages_of_any_size_arrive_whole_and_in_order(size):
    async with stream_pair() as (a, b):
        b.accept_messages_of(2**23)
        payload = bytes(range(256)) * (size // 256 + 1)
        sending = asyncio.gather(a.send([payload[:size]]), a.ping(5))
        assert await b.receive() == payload[:size]
        await sending
        await a.send([b"one", b"", b"two"])
        assert await b.receive() == b"onetwo"


async def test_the_end_is_told_from_a_break():
    async with stream_pair() as (a, b):
        await a.send([b"last"])
        await a.aclose()
        assert await b.receive() == b"last"
        assert await b.receive() is None
        with pytest.raises(PeerFailed, match="closed"):
            await a.send([b"more"])
    async with raw_and_stream() as (_, writer, stream):
        writer.write(frame(FrameKind.LAST, b"hello")[:-2])
        writer.close()
        with pytest.raises(PeerFailed, match="broke off"):
            await stream.receive()


async def test_a_slow_reader_holds_no_more_than_its_window():
    async with stream_pair() as (a, b):
        sent = 0

        async def send_for_ever():
            nonlocal sent
            while True:
                await a.send([b"x" * 10_000])
                sent += 1

        task = asyncio.create_task(send_for_ever())
        await a.ping(5)
        while b._unread_bytes < FIRST_WINDOW_BYTES - 10_000:
            await a.ping(5)
        await a.ping(5)
        before = sent
        assert before * 10_000 <= FIRST_WINDOW_BYTES + 10_000 and b._unread_bytes <= FIRST_WINDOW_BYTES
        for _ in range(before):
            await b.receive()
        await b.receive()  # only possible with the credit that came back
        task.cancel()
        await asyncio.wait([task])


async def test_a_ping_is_answered_while_nobody_receives():
    async with stream_pair() as (a, b):
        await a.send([b"unread"])
        assert 0 < await a.ping(5) < 5
        assert await b.receive() == b"unread"


async def test_a_peer_that_answers_no_ping_is_found_in_time():
    async with raw_and_stream() as (_, _, stream):
        with pytest.raises(PeerFailed, match=r"did not answer a ping within 0\.1 s"):
            await stream.ping(0.1)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (frame(FrameKind.LAST, size=MAX_FRAME_BYTES + 1), "announced a frame of"),
        (frame(FrameKind.LAST, size=2**32 - 1), "announced a frame of"),
        (frame(FrameKind.LAST, b"x", number=5), "sent frame 5 where 0 was due"),
        (frame(99, b"x"), "unknown kind 99"),
        (frame(FrameKind.CREDIT, b"xyz"), "unknown kind 5"),
        (frame(FrameKind.ERROR, b"go \x1b[31maway"), r"ended the stream: go \[31maway"),
        (b"".join(frame(FrameKind.MORE, b"x" * MAX_FRAME_BYTES, number=n) for n in range(4)), "more than the window"),
    ],
)
async def test_nonsense_breaks_the_stream_with_blame(raw, reason):
    async with raw_and_stream() as (_, writer, stream):
        writer.write(raw)
        with pytest.raises(BadReply, match=reason):
            await stream.receive()
        assert stream.is_broken
        with pytest.raises(BadReply):
            await stream.send([b"x"])


async def test_an_error_reaches_the_other_side():
    async with stream_pair() as (a, b):
        await a.fail("the session expired")
        with pytest.raises(BadReply, match="the session expired"):
            await b.receive()
