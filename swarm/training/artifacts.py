"""Artifacts: the tokenizer's files and the data's manifests, named by digest in the rules of a run, handed from peer to peer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from protos import training_pb2
from swarm.errors import BadReply, PeerFailed, UserError
from swarm.member_record import MemberRecord
from swarm.p2p.directory import Directory
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.run_store import MAX_ARTIFACT_BYTES, RunStore
from swarm.training.manifest import MAX_MANIFEST_BYTES
from swarm.training.requests import Donor, open_request, receive_whole, received, send_content, send_whole
from swarm.training.wire import decode

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_TIMEOUT_S = 30.0
_ROUNDS = 6
_PAUSE_S = 0.5


async def fetch_artifacts(
    host: Host,
    directory: Directory,
    store: RunStore,
    num_rounds: int = _ROUNDS,
    wanted: Collection[bytes] | None = None,
) -> None:
    """Get what is missing on this disk from other members. Raises UserError if nobody has it.

    wanted: digests of the files that are needed; None: all.
    """
    for round_number in range(num_rounds):
        if not store.missing(wanted):
            return
        if round_number:
            await asyncio.sleep(_PAUSE_S)
        members = await directory.find_members(store.run_id, range(store.spec.num_stages))
        others = [member for member in members if member.peer_id != host.peer_id]
        # Trainers and keepers have them, other nodes only if they share a disk with one.
        for member in sorted(others, key=lambda member: (member.stage != store.spec.ends_stage, member.is_keeper)):
            for digest in store.missing(wanted):
                try:
                    async with asyncio.timeout(_TIMEOUT_S):
                        content = await _fetch(host, store.run_id, member, digest)
                    store.put(digest, content)
                except BadReply as error:  # it does not have this one, and may have the next
                    log.info("no artifact from peer=%s reason=%s", member.peer_id[-8:], error)
                except (PeerFailed, TimeoutError, ValueError) as error:
                    log.info("no artifact from peer=%s reason=%s", member.peer_id[-8:], error)
                    break
    if missing := store.missing(wanted):
        raise UserError(
            f"{len(missing)} files of the run (tokenizer, list of its data) are with nobody who can be reached: "
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
        await send_whole(stream, answer, content)
        await stream.receive()


async def take_artifact(stream: FramedStream, store: RunStore, offer: training_pb2.PutArtifact) -> None:
    """Answer PutArtifact: keep the file if the owner's orders name it and it is not here. One offer is taken at a time."""
    if store.is_taking_offer:
        await stream.fail("this member is taking another file just now: try later")
        return
    store.is_taking_offer = True
    try:
        await _take(stream, store, offer)
    except (ValueError, UserError) as error:
        await stream.fail(str(error))
    finally:
        store.is_taking_offer = False


async def _take(stream: FramedStream, store: RunStore, offer: training_pb2.PutArtifact) -> None:
    """Raises ValueError or UserError if it is not taken."""
    if not (store.is_learned(offer.digest) and await asyncio.to_thread(store.is_missing, offer.digest)):
        raise ValueError("this member has that file, or does not need it")
    if offer.num_bytes > MAX_MANIFEST_BYTES:
        raise ValueError(f"{offer.num_bytes} bytes are offered, a manifest has at most {MAX_MANIFEST_BYTES}")
    async with asyncio.timeout(_TIMEOUT_S):
        content = await receive_whole(stream, offer.num_bytes, MAX_MANIFEST_BYTES)
    await asyncio.to_thread(store.put, offer.digest, content)
    answer = training_pb2.MemberMessage(artifact=training_pb2.Artifact(num_bytes=len(content)))
    async with asyncio.timeout(_TIMEOUT_S):
        await stream.send([answer.SerializeToString()])
        await stream.receive()


async def give_artifact(host: Host, store: RunStore, member: MemberRecord, digest: bytes) -> None:
    """Hand a file to a member. Raises PeerFailed if it does not take it, be it that it has it already."""
    content = await asyncio.to_thread(store.read, digest)
    offer = training_pb2.MemberMessage(put_artifact=training_pb2.PutArtifact(digest=digest, num_bytes=len(content)))
    donor = Donor(member.peer_id, member.addresses)
    async with (
        asyncio.timeout(_TIMEOUT_S),
        open_request(
            host,
            donor,
            store.run_id,
            member.stage,
            offer,
            connect_timeout_s=_CONNECT_TIMEOUT_S,
            introduction_timeout_s=_TIMEOUT_S,
        ) as stream,
    ):
        await send_content(stream, content)
        await received(stream)


async def _fetch(host: Host, run_id: bytes, member: MemberRecord, digest: bytes) -> bytes:
    request = training_pb2.MemberMessage(get_artifact=training_pb2.GetArtifact(digest=digest))
    async with open_request(
        host, Donor(member.peer_id, member.addresses), run_id, member.stage, request,
        connect_timeout_s=_CONNECT_TIMEOUT_S, introduction_timeout_s=_TIMEOUT_S,
    ) as stream:  # fmt: skip
        num_bytes = decode(await received(stream)).artifact.num_bytes
        return await receive_whole(stream, num_bytes, MAX_ARTIFACT_BYTES)
