"""RunHost: what the members of runs in one process share: the host, the directory, the exchange, and the door for other members."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Protocol

from protos import training_pb2
from swarm.epoch.messages import Mail
from swarm.errors import BadReply, PeerFailed
from swarm.messages import own_version, versions_meet
from swarm.p2p.averaging import Averager
from swarm.p2p.directory import Directory
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.training.member_config import RUN_PROTOCOL
from swarm.training.member_name import member_name
from swarm.training.wire import MAX_MESSAGE_BYTES, decode

log = logging.getLogger(__name__)

_INTRODUCTION_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 5.0


class Door(Protocol):
    """Where others find a member of this process."""

    async def accept(self, stream: FramedStream, introduction: training_pb2.Introduction) -> None:
        """A stream whose other side has introduced itself as a member, or as somebody with a request."""
        ...

    def hear(self, name: str, message: Mail) -> None:
        """A letter from a member of this same process: a peer cannot dial itself."""
        ...

    def on_found(self, name: str) -> None: ...

    def on_lost(self, name: str) -> None: ...


class RunHost:
    """Made by `async with run_host(host, directory)`."""

    def __init__(self, host: Host, directory: Directory) -> None:
        self.host, self.directory = host, directory
        self.averager = Averager(host)
        self._doors: dict[tuple[bytes, int], Door] = {}

    @property
    def peer_id(self) -> str:
        return self.host.peer_id

    def open_door(self, run_id: bytes, stage: int, door: Door) -> None:
        """From now on streams to this member are handed to it."""
        assert (run_id, stage) not in self._doors, "a peer holds one replica of a stage"
        for other_stage, other in self._doors_of(run_id):
            other.on_found(member_name(self.peer_id, stage))
            door.on_found(member_name(self.peer_id, other_stage))
        self._doors[run_id, stage] = door

    def close_door(self, run_id: bytes, stage: int) -> None:
        if self._doors.pop((run_id, stage), None) is not None:
            for _, other in self._doors_of(run_id):
                other.on_lost(member_name(self.peer_id, stage))

    def pass_on(self, run_id: bytes, stage: int, to_stage: int, message: Mail) -> None:
        """Give a letter to another member of this process; it is lost if there is none."""
        door = self._doors.get((run_id, to_stage))
        if door is not None:
            door.hear(member_name(self.peer_id, stage), message)

    def _doors_of(self, run_id: bytes) -> list[tuple[int, Door]]:
        return [(stage, door) for (its_run_id, stage), door in self._doors.items() if its_run_id == run_id]

    async def _accept(self, stream: FramedStream) -> None:
        stream.accept_messages_of(MAX_MESSAGE_BYTES)
        try:
            async with asyncio.timeout(_INTRODUCTION_TIMEOUT_S):
                introduction = check_introduction(await stream.receive(), stream.peer_id)
            door = self._find_door(introduction)
        except (PeerFailed, TimeoutError) as error:
            await stream.fail(str(error) or "no introduction came")
            return
        await door.accept(stream, introduction)

    def _find_door(self, introduction: training_pb2.Introduction) -> Door:
        """Raises PeerFailed. Requests are answered by any member of the run, if the one that is meant is not here."""
        doors = dict(self._doors_of(introduction.run_id))
        if introduction.to_stage in doors:
            return doors[introduction.to_stage]
        if not (doors and introduction.is_request):
            raise PeerFailed("this peer does not hold that stage of that run")
        return next(iter(doors.values()))


@contextlib.asynccontextmanager
async def run_host(host: Host, directory: Directory) -> AsyncIterator[RunHost]:
    """Let other members open streams to this process while the body runs."""
    shared = RunHost(host, directory)
    await shared.averager.start()
    await host.serve(RUN_PROTOCOL, shared._accept)
    try:
        yield shared
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await shared.averager.aclose()


def introduction_of(
    run_id: bytes, stage: int, *, to_stage: int = 0, is_request: bool = False
) -> training_pb2.MemberMessage:
    introduction = training_pb2.Introduction(
        version=own_version(), run_id=run_id, stage=stage, is_request=is_request, to_stage=to_stage
    )
    return training_pb2.MemberMessage(introduction=introduction)


async def introduce(
    stream: FramedStream,
    run_id: bytes,
    stage: int,
    to_stage: int,
    timeout_s: float,
    request: training_pb2.MemberMessage | None = None,
) -> int:
    """Say who we are, and what we want if that is all; of which stage the member at the other side is. Raises PeerFailed."""
    stream.accept_messages_of(MAX_MESSAGE_BYTES)
    try:
        async with asyncio.timeout(timeout_s):
            own = introduction_of(run_id, stage, to_stage=to_stage, is_request=request is not None)
            await stream.send([own.SerializeToString()])
            if request is not None:
                await stream.send([request.SerializeToString()])
            answer = check_introduction(await stream.receive(), stream.peer_id)
    except TimeoutError:
        raise PeerFailed(f"peer {stream.peer_id[-8:]} did not introduce itself in time") from None
    if answer.run_id != run_id:
        raise BadReply(f"peer {stream.peer_id[-8:]} is of another run than the one that was asked for")
    return answer.stage


def check_introduction(raw: bytes | None, peer_id: str) -> training_pb2.Introduction:
    """What a peer says first. Raises PeerFailed or BadReply."""
    if raw is None:
        raise PeerFailed(f"peer {peer_id[-8:]} ended the stream")
    message = decode(raw)
    kind = message.WhichOneof("kind")
    if kind == "refusal":
        raise PeerFailed(f"peer {peer_id[-8:]} refused: {message.refusal.message[:200]!r}")
    if kind != "introduction":
        raise BadReply(f"peer {peer_id[-8:]} did not introduce itself")
    if not versions_meet(message.introduction.version):
        raise PeerFailed(f"peer {peer_id[-8:]} speaks another version of the protocol; one of the two must be upgraded")
    return message.introduction
