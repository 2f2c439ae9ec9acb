"""Files of a run from peer to peer: what a member takes from whom, what it asks for, and to whom an owner hands a manifest."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protos import training_pb2
from swarm.client import owner, trainer_data
from swarm.client.trainer import Trainer
from swarm.client.trainer_config import TrainerConfig
from swarm.client.trainer_data import TrainerData
from swarm.epoch import member as m
from swarm.epoch.messages import Place, Term
from swarm.errors import BadReply, BadRequest, PeerFailed, UserError
from swarm.identity import Identity
from swarm.p2p.framing import FramedStream
from swarm.run_orders import NO_ORDERS, Amendment
from swarm.run_spec import DataSpec, sign_spec
from swarm.run_store import RunStore
from swarm.training import artifacts
from swarm.training.manifest import MAX_MANIFEST_BYTES
from swarm.training.requests import received, send_content
from tests.support.runs import make_data, make_member, make_spec

OWNER = Identity.generate()
FIRST, OTHER, MISTAKE = b"the first manifest", b"another manifest", b"nobody has this manifest"


def digest_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def data_of(content: bytes) -> DataSpec:
    return make_data(manifest_digest=digest_of(content))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    spec = make_spec(data=data_of(FIRST))
    return RunStore.save(sign_spec(spec, OWNER), spec.run_id(OWNER.peer_id), tmp_path)


@contextlib.asynccontextmanager
async def offered(store: RunStore, content: bytes, num_bytes: int | None = None) -> AsyncIterator[FramedStream]:
    """A stream on which a member has been offered a file."""
    offer = training_pb2.PutArtifact(digest=digest_of(content), num_bytes=num_bytes or len(content))
    streams = [
        await FramedStream.start(*await asyncio.open_connection(sock=sock), peer_id="12D3KooWpeer")
        for sock in socket.socketpair()
    ]
    taking = asyncio.create_task(artifacts.take_artifact(streams[1], store, offer))
    try:
        yield streams[0]
    finally:
        for stream in streams:
            await stream.aclose()
        await asyncio.gather(taking, return_exceptions=True)


async def give(store: RunStore, content: bytes, num_bytes: int | None = None, sent: bytes | None = None) -> None:
    async with offered(store, content, num_bytes) as stream, asyncio.timeout(30):
        with contextlib.suppress(PeerFailed):
            await send_content(stream, sent or content)
        await received(stream)


async def test_a_member_takes_what_its_owners_orders_name_and_nothing_else(store: RunStore) -> None:
    for content in (FIRST, OTHER):
        with pytest.raises(BadReply, match="has that file, or does not need it"):
            await give(store, content)
    store.learn(data_of(OTHER))
    with pytest.raises(BadReply, match="a manifest has at most"):
        await give(store, OTHER, MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BadReply, match="are not the run's manifest-"):
        await give(store, OTHER, sent=bytes(len(OTHER)))
    await give(store, OTHER)
    assert store.manifest(data_of(OTHER)) == OTHER
    with pytest.raises(BadReply, match="has that file, or does not need it"):
        await give(store, OTHER)


async def test_one_offer_is_taken_at_a_time(store: RunStore) -> None:
    store.learn(data_of(OTHER))
    async with offered(store, OTHER):
        await asyncio.sleep(0)
        assert store.is_taking_offer
        with pytest.raises(BadReply, match="another file just now: try later"):
            await give(store, OTHER)
    await give(store, OTHER)


class Members:
    """All that others have, by peer id."""

    peer_id = "me"

    def __init__(self, files: dict[str, list[bytes]]) -> None:
        self.files = files
        self.asked: list[tuple[str, bytes]] = []

    async def find_members(self, run_id: bytes, stages: object) -> list[Any]:
        return [make_member(name, stage=2) for name in self.files]

    async def fetch(self, host: object, run_id: bytes, member: Any, digest: bytes) -> bytes:
        self.asked.append((member.peer_id, digest))
        for content in self.files[member.peer_id]:
            if hashlib.sha256(content).digest().startswith(digest):
                return content
        raise BadReply("this member does not have that file")


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Members:
    found = Members({"one": [FIRST, OTHER, b"vocabulary"]})
    monkeypatch.setattr(artifacts, "_fetch", found.fetch)
    return found


def data_for(members: Members, store: RunStore) -> TrainerData:
    config = TrainerConfig(run_id=store.run_id, initial_peers=("/ip4/127.0.0.1/tcp/1/p2p/x",))
    return TrainerData(members, members, store, config, None)  # type: ignore[arg-type]


async def test_what_nobody_has_keeps_nobody_from_the_rest(members: Members, store: RunStore) -> None:
    for content in (MISTAKE, OTHER):
        store.learn(data_of(content))
    with pytest.raises(UserError, match="1 files of the run"):
        await artifacts.fetch_artifacts(members, members, store, 1)  # type: ignore[arg-type]
    assert store.missing() == [digest_of(MISTAKE)]


async def test_data_that_was_named_by_mistake_is_not_needed_for_other_data(
    members: Members, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_data, "_FETCH_ROUNDS", 1)
    monkeypatch.setattr(TrainerData, "_read", lambda self, data: data)
    for content in (MISTAKE, OTHER):
        store.learn(data_of(content))
    data = data_for(members, store)
    assert await data.of(data_of(OTHER)) == data_of(OTHER)  # type: ignore[comparison-overlap]
    assert {digest for _, digest in members.asked} == {*store.spec.tokenizer.values(), digest_of(OTHER)}
    with pytest.raises(UserError, match="with nobody who can be reached"):
        await data.of(data_of(MISTAKE))


async def test_data_is_opened_before_it_is_needed_and_not_when_its_time_is_over(
    members: Members, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(TrainerData, "_read", lambda self, data: opened.append(data))
    manifests = {5: b"over", 10: b"in force", 20: b"to come", 30: b"later"}
    orders = NO_ORDERS.amended(Amendment(epoch=25, lr=0.1))
    for epoch, content in manifests.items():
        orders = orders.amended(Amendment(epoch=epoch, data=data_of(content)))
        store.learn(data_of(content))
    members.files["one"] += manifests.values()
    for epoch, expected in ((12, manifests.keys() - {5}), (3, manifests.keys())):
        opened.clear()
        data = data_for(members, store)
        data.prepare(orders, epoch)
        for task in data._opening.values():
            await task
        assert sorted(one.manifest_digest for one in opened) == sorted(digest_of(manifests[one]) for one in expected)


async def test_a_bug_in_a_microbatch_ends_the_trainer(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.done, trainer.failure, trainer._units, trainer._kept = asyncio.Event(), None, {}, {}
    member = SimpleNamespace(rules=SimpleNamespace(num_units=4))
    membership: Any = SimpleNamespace(member=member, samples_of=lambda unit: None)
    trainer.membership = membership
    with caplog.at_level(logging.ERROR):
        trainer.run(m.Run(Term(1, "leader"), 0, 0, ()), Place(0, b""))
        async with asyncio.timeout(30):
            await trainer.done.wait()
    assert isinstance(trainer.failure, BadRequest) and "AttributeError" in str(trainer.failure)
    assert "Traceback" in caplog.text


async def test_an_owner_hands_a_file_to_two_members_of_the_ends_at_once(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, both = [], asyncio.Event()

    async def hand(host: object, store: RunStore, member: Any, digest: bytes) -> None:
        asked.append(member.peer_id)
        if len(asked) == 2:
            both.set()
        await both.wait()
        if member.peer_id == "slow":
            await asyncio.Event().wait()
        raise PeerFailed("it has that file")

    monkeypatch.setattr(owner, "give_artifact", hand)
    monkeypatch.setattr(owner, "_HAND_OVER_S", 0.1)
    steering = owner._Steering(None, None, store, OWNER)  # type: ignore[arg-type]
    records = [make_member("node", stage=0), make_member("slow", stage=2), *(make_member(n, stage=2) for n in "abc")]
    async with asyncio.timeout(30):
        await steering._hand_out(b"d" * 16, records)
    assert asked == ["slow", "a"]
    asked.clear()
    await steering._hand_out(b"d" * 16, records[:1])
    assert asked == ["node"], "without any of the ends it is better than nothing"
