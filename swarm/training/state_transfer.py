"""The state of a replica on its way to another: weights, moments, and where in which history they are. Verified by digest."""

from __future__ import annotations

import asyncio

from protos import training_pb2
from swarm.epoch.messages import Commit, Place
from swarm.errors import BadReply, PeerFailed
from swarm.p2p.framing import FramedStream
from swarm.terminal import ProgressBar
from swarm.training.links import Links
from swarm.training.parameters import StageParameters, StageState
from swarm.training.wire import (
    commit_from_wire,
    commit_to_wire,
    decode,
    is_signed,
    place_from_wire,
    place_to_wire,
)

_PIECE_BYTES = 128 * 1024
_STALL_S = 15.0


async def send_state(stream: FramedStream, place: Place, commit: Commit | None, state: StageState) -> None:
    """Answer GetState."""
    digest = await asyncio.to_thread(state.digest)
    header = training_pb2.StateHeader(
        place=place_to_wire(place),
        commit=None if commit is None else commit_to_wire(commit),
        num_parameters=state.values.numel(),
        num_steps=state.num_steps,
        digest=digest,
    )
    await stream.send([training_pb2.MemberMessage(state=header).SerializeToString()])
    for tensor in state.tensors:
        raw = tensor.numpy().data.cast("B")
        for start in range(0, len(raw), _PIECE_BYTES):
            async with asyncio.timeout(_STALL_S):
                await stream.send([raw[start : start + _PIECE_BYTES]])
    async with asyncio.timeout(_STALL_S):
        await stream.receive()  # the receiver ends the stream when it has everything


async def fetch_state(
    links: Links, peer_id: str, run_id: bytes, at_least: Place, parameters: StageParameters
) -> tuple[Place, Commit | None, StageState]:
    """The state of a replica of the same stage that is at a place, or further. Raises PeerFailed or BadReply."""
    size = parameters.size
    request = training_pb2.MemberMessage(get_state=training_pb2.GetState(at_least=place_to_wire(at_least)))
    stream = await links.open_request(peer_id, request)
    try:
        header = decode(await _receive(stream)).state
        place, commit = place_from_wire(header.place), None
        if header.num_parameters != size:
            raise BadReply(f"peer {peer_id[-8:]} has a stage of {header.num_parameters} parameters, not {size}")
        if header.HasField("commit"):
            commit = commit_from_wire(header.commit)
        if not place.follows(commit, run_id) or (commit is not None and not is_signed(commit, run_id)):
            raise BadReply(f"peer {peer_id[-8:]} cannot prove how it came to epoch {place.epoch}")
        if place.is_behind(at_least):
            raise PeerFailed(f"peer {peer_id[-8:]} is at epoch {place.epoch} of another history")
        state = parameters.empty_state(header.num_steps)
        with ProgressBar("downloading the stage's state", len(state.tensors) * 4 * size) as bar:
            for tensor in state.tensors:
                raw, offset = tensor.numpy().data.cast("B"), 0
                while offset < len(raw):
                    piece = await _receive(stream)
                    if not 0 < len(piece) <= len(raw) - offset:
                        raise BadReply(f"peer {peer_id[-8:]} sent {len(piece)} bytes too many")
                    raw[offset : offset + len(piece)] = piece
                    offset += len(piece)
                    bar.advance(len(piece))
        if await asyncio.to_thread(state.digest) != header.digest:
            raise BadReply(f"the state from peer {peer_id[-8:]} does not have the digest that it announced")
        return place, commit, state
    finally:
        await stream.aclose()


async def _receive(stream: FramedStream) -> bytes:
    try:
        async with asyncio.timeout(_STALL_S):
            raw = await stream.receive()
    except TimeoutError:
        raise PeerFailed(f"peer {stream.peer_id[-8:]} sent nothing for {_STALL_S:.0f} s") from None
    if raw is None:
        raise PeerFailed(f"peer {stream.peer_id[-8:]} ended the stream too early")
    return raw
