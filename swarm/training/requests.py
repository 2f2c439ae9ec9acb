"""Requests to members of a run: each has a stream of its own, on which the answer comes, and perhaps a file in raw messages after it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from protos import training_pb2
from swarm.errors import BadReply, PeerFailed
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.training.member_config import RUN_PROTOCOL
from swarm.training.run_host import introduce

_PIECE_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Donor:
    """A peer that has, or says that it has, what is asked for."""

    peer_id: str
    addresses: tuple[str, ...]


@contextlib.asynccontextmanager
async def open_request(
    host: Host,
    donor: Donor,
    run_id: bytes,
    stage: int,
    request: training_pb2.MemberMessage,
    *,
    connect_timeout_s: float,
    introduction_timeout_s: float,
) -> AsyncIterator[FramedStream]:
    """A stream on which the answer to a request of a stage's replica is the next message. Raises PeerFailed."""
    stream = await host.open_stream(donor.peer_id, RUN_PROTOCOL, connect_timeout_s, donor.addresses)
    try:
        await introduce(stream, run_id, stage, stage, introduction_timeout_s, request)
        yield stream
    finally:
        await stream.aclose()


async def received(stream: FramedStream) -> bytes:
    """The next message. Raises PeerFailed if there is none."""
    raw = await stream.receive()
    if raw is None:
        raise PeerFailed(f"peer {stream.peer_id[-8:]} ended the stream")
    return raw


async def send_whole(stream: FramedStream, answer: training_pb2.MemberMessage, content: bytes) -> None:
    """An answer, which says how long the content is, and the content."""
    await stream.send([answer.SerializeToString()])
    await send_content(stream, content)


async def send_content(stream: FramedStream, content: bytes) -> None:
    """In raw messages."""
    for start in range(0, len(content), _PIECE_BYTES):
        await stream.send([content[start : start + _PIECE_BYTES]])


async def receive_whole(stream: FramedStream, num_bytes: int, max_bytes: int) -> bytes:
    """The content of which the answer said that it has num_bytes. BadReply if that is more than max_bytes, or nothing comes."""
    if not 0 < num_bytes <= max_bytes:
        raise BadReply(f"peer {stream.peer_id[-8:]} announced {num_bytes} bytes, at most {max_bytes} are taken")
    content = bytearray()
    while len(content) < num_bytes:
        piece = await received(stream)
        if not piece:
            raise BadReply(f"peer {stream.peer_id[-8:]} sends nothing, again and again")
        content += piece
    return bytes(content)
