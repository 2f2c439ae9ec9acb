"""How a member that lacks its stage's state gets it from replicas: where they are at once, and a snapshot of it from their disks.

    asker: GetPlace                 replica: StateHeader with place and commit: there the asker takes part, without weights yet
    asker: GetSnapshot              replica: saves its state if it has to, and says of which place: the same for all, mostly
    asker: GetSaved, GetPieces      saved_transfer.py, from all that have it

What is averaged meanwhile the asker keeps (Checkpoints.keep_step), and applies to the snapshot.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Sequence

from protos import training_pb2
from swarm.epoch.messages import Commit, Place
from swarm.errors import BadReply, PeerFailed
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.terminal import ProgressBar
from swarm.training.parameters import StageParameters, StageState
from swarm.training.requests import Donor, open_request, received
from swarm.training.saved_transfer import fetch_state
from swarm.training.wire import (
    commit_from_wire,
    commit_to_wire,
    decode,
    is_signed,
    place_from_wire,
    place_to_wire,
)

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 60.0


async def send_place(stream: FramedStream, place: Place, commit: Commit | None) -> None:
    """Answer GetPlace or GetSnapshot."""
    header = training_pb2.StateHeader(place=place_to_wire(place))
    if commit is not None:
        header.commit.CopyFrom(commit_to_wire(commit))
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        await stream.send([training_pb2.MemberMessage(state=header).SerializeToString()])
        await stream.receive()  # the asker ends the stream


async def ask_place(
    host: Host, donor: Donor, run_id: bytes, stage: int, at_least: Place
) -> tuple[Place, Commit | None]:
    """Where a replica is, and how it came there. PeerFailed if that is before at_least; BadReply if it cannot prove it."""
    header = await _ask(host, donor, run_id, stage, training_pb2.MemberMessage(get_place=training_pb2.GetPlace()))
    place = place_from_wire(header.place)
    commit = commit_from_wire(header.commit) if header.HasField("commit") else None
    if not place.follows(commit, run_id) or (commit is not None and not is_signed(commit, run_id)):
        raise BadReply(f"peer {donor.peer_id[-8:]} cannot prove how it came to epoch {place.epoch}")
    if place.is_behind(at_least):
        raise PeerFailed(f"peer {donor.peer_id[-8:]} is at epoch {place.epoch} of another history, or behind")
    return place, commit


async def fetch_snapshot(
    host: Host, replicas: Sequence[Donor], run_id: bytes, stage: int, at_least: Place, parameters: StageParameters
) -> tuple[Place, Commit | None, StageState]:
    """A state at a place or beyond, from all of these replicas that have the same one. Raises PeerFailed if there is none."""
    request = training_pb2.MemberMessage(get_snapshot=training_pb2.GetSnapshot(at_least=place_to_wire(at_least)))
    answers = await asyncio.gather(
        *(_ask(host, replica, run_id, stage, request) for replica in replicas), return_exceptions=True
    )
    donors: dict[Place, list[Donor]] = collections.defaultdict(list)
    for replica, answer in zip(replicas, answers, strict=True):
        if isinstance(answer, training_pb2.StateHeader):
            donors[place_from_wire(answer.place)].append(replica)
        elif isinstance(answer, PeerFailed | TimeoutError):
            log.info("no snapshot from peer=%s reason=%s", replica.peer_id[-8:], answer)
        else:
            raise answer
    places = [place for place in donors if place.leads_to(at_least) or not place.is_behind(at_least)]
    if not places:
        raise PeerFailed("no replica has a snapshot yet")
    place = max(places, key=lambda one: (len(donors[one]), one.epoch))
    num_vectors = len(parameters.state.tensors)
    num_bytes = 0
    with ProgressBar("downloading the stage's state", 4 * num_vectors * parameters.size) as bar:

        def on_bytes(count: int) -> None:
            nonlocal num_bytes
            num_bytes += count
            bar.advance(count)

        head, state = await fetch_state(
            host, run_id, stage, place, donors[place], parameters.size,
            num_vectors=num_vectors, on_bytes=on_bytes,
        )  # fmt: skip
    log.info("snapshot fetched epoch=%d donors=%d bytes=%d", place.epoch, len(donors[place]), num_bytes)
    return at_least if place.leads_to(at_least) else place, head.saved.commit, state


async def _ask(
    host: Host, replica: Donor, run_id: bytes, stage: int, request: training_pb2.MemberMessage
) -> training_pb2.StateHeader:
    """Raises PeerFailed or TimeoutError."""
    async with open_request(
        host, replica, run_id, stage, request,
        connect_timeout_s=_CONNECT_TIMEOUT_S, introduction_timeout_s=_CONNECT_TIMEOUT_S,
    ) as stream:  # fmt: skip
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            message = decode(await received(stream))
        if message.WhichOneof("kind") != "state":
            raise BadReply(f"peer {replica.peer_id[-8:]} answered something else")
        return message.state
