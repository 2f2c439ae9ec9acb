"""Artifacts: the tokenizer's files and the data's manifests, named by digest in the rules of a run, handed from peer to peer."""

from __future__ import annotations

import asyncio
import logging

from protos import training_pb2
from swarm.errors import BadReply, PeerFailed, UserError
from swarm.messages import own_version
from swarm.p2p.directory import Directory
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.run_store import MAX_ARTIFACT_BYTES, RunStore
from swarm.training.member_config import RUN_PROTOCOL
from swarm.training.wire import decode

log = logging.getLogger(__name__)

_PIECE_BYTES = 128 * 1024
_TIMEOUT_S = 30.0
_ROUNDS = 6
_PAUSE_S = 0.5


async def fetch_artifacts(host: Host, directory: Directory, store: RunStore, num_rounds: int = _ROUNDS) -> None:
    """Get what is missing on this disk from other members. Raises UserError if nobody has it."""
    for round_number in range(num_rounds):
        if not store.missing():
            return
        if round_number:
            await asyncio.sleep(_PAUSE_S)
        members = await directory.find_members(store.run_id, range(store.spec.num_stages))
        others = [member for member in members if member.peer_id != host.peer_id]
        # Trainers and keepers have them, other nodes only if they share a disk with one.
        for member in sorted(others, key=lambda member: (member.stage != store.spec.ends_stage, member.is_keeper)):
            for digest in list(store.missing()):
                try:
                    async with asyncio.timeout(_TIMEOUT_S):
                        content = await _fetch(host, store.run_id, member.peer_id, member.addresses, digest)
                    store.put(digest, content)
                except (PeerFailed, TimeoutError, ValueError) as error:
                    log.info("no artifact from peer=%s reason=%s", member.peer_id[-8:], error)
                    break
    if store.missing():
        raise UserError(
            f"{len(store.missing())} files of the run (tokenizer, list of its data) are with nobody who can be reached: "
            "start a trainer on the machine where the run was created"
        )


async def send_artifact(stream: FramedStream, store: RunStore, digest: bytes) -> None:
    """Answer GetArtifact."""
    try:
        content = await asyncio.to_thread(store.read, digest)
    except (UserError, KeyError):
        await stream.fail("this member does not have that file")
        return
    answer = training_pb2.MemberMessage(artifact=training_pb2.Artifact(num_bytes=len(content)))
    async with asyncio.timeout(_TIMEOUT_S):
        await stream.send([answer.SerializeToString()])
        for start in range(0, len(content), _PIECE_BYTES):
            await stream.send([content[start : start + _PIECE_BYTES]])
        await stream.receive()


async def _fetch(host: Host, run_id: bytes, peer_id: str, addresses: tuple[str, ...], digest: bytes) -> bytes:
    stream = await host.open_stream(peer_id, RUN_PROTOCOL, 5.0, addresses)
    try:
        introduction = training_pb2.Introduction(version=own_version(), run_id=run_id, is_request=True)
        await stream.send([training_pb2.MemberMessage(introduction=introduction).SerializeToString()])
        request = training_pb2.MemberMessage(get_artifact=training_pb2.GetArtifact(digest=digest))
        await stream.send([request.SerializeToString()])
        await _received(stream)  # its introduction
        num_bytes = decode(await _received(stream)).artifact.num_bytes
        if not 0 < num_bytes <= MAX_ARTIFACT_BYTES:
            raise BadReply(f"peer {peer_id[-8:]} announced a file of {num_bytes} bytes")
        content = bytearray()
        while len(content) < num_bytes:
            content += await _received(stream)
        return bytes(content)
    finally:
        await stream.aclose()


async def _received(stream: FramedStream) -> bytes:
    raw = await stream.receive()
    if not raw:
        raise PeerFailed(f"peer {stream.peer_id[-8:]} ended the stream")
    return raw
