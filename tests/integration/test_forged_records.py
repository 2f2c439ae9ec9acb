"""Forged records, lying members of the DHT and thousands of invented peers do not keep a client from the real nodes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from swarm.identity import Identity
from swarm.member_record import sign_member
from swarm.p2p import directory as directory_module
from swarm.p2p.directory import MAX_RECORDS_PER_KEY, Directory, RecordValidator, _BoundedStorage
from swarm.p2p.host import Host, HostConfig, running_host
from swarm.records import (
    MAX_BLOCKS,
    ShardRecord,
    ShardState,
    block_key,
    name_key,
    sign_record,
)
from swarm.run_id import SPEC_SUBKEY, run_key, run_member_key
from swarm.run_spec import certified_run_id, sign_spec
from swarm.span import Span
from tests.support.fork_server import ForkServer
from tests.support.models import NUM_BLOCKS, save_tiny
from tests.support.probes import ProgramRuns
from tests.support.processes import LocalSwarm, Process, local_swarm
from tests.support.records import make_record
from tests.support.runs import make_member, make_spec

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_FORGED = 5_000
ALL = Span(0, NUM_BLOCKS)


@pytest.fixture(scope="module")
def swarm(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with local_swarm(tmp_path_factory.mktemp("forged"), fork_server=fork_server) as running:
        yield running


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> Path:
    return save_tiny("llama", swarm.folder / "tiny")


@pytest.fixture(scope="module")
def nodes(swarm: LocalSwarm, model: Path) -> list[Process]:
    return swarm.start_nodes(model, "0:2", "2:4")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    async with running_host(HostConfig()) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(swarm: LocalSwarm, nodes: list[Process], host: Host) -> AsyncIterator[Directory]:
    directory = await Directory.join(host, swarm.initial_peers, serves=False)
    yield directory
    await directory.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(client: Directory) -> list[ShardRecord]:
    records = await client.find_name("tiny")
    assert len(records) == 2 and all(record.state == ShardState.ONLINE for record in records)
    return records


@contextlib.asynccontextmanager
async def attacker(swarm: LocalSwarm, *, member: bool) -> AsyncIterator[DHTNode]:
    """A plain hivemind DHT node that checks nothing."""
    async with running_host(HostConfig()) as host:
        await host.connect(swarm.bootstrap.peer_id, swarm.initial_peers, 5)
        node = await DHTNode.create(p2p=host.p2p, initial_peers=swarm.initial_peers, client_mode=not member)
        try:
            yield node
        finally:
            await node.shutdown()


async def force(
    node: DHTNode,
    peer_id: str,
    key: str,
    records: Sequence[tuple[Any, bytes, float]],
    *,
    in_cache: bool = False,
) -> int:
    """Ask a peer to store (subkey, value, expiration) records under a key; how many it took. subkey None: a regular value."""
    taken = 0
    for start in range(0, len(records), 500):
        lot = records[start : start + 500]
        stored = await node.protocol.call_store(
            PeerID.from_base58(peer_id),
            [DHTID.generate(source=key)] * len(lot),
            [value for _, value, _ in lot],
            [expiration for _, _, expiration in lot],
            [subkey for subkey, _, _ in lot],
            in_cache=in_cache,
        )
        taken += sum(stored or [])
    return taken


def packed(record: ShardRecord, identity: Identity) -> bytes:
    return bytes(MSGPackSerializer.dumps(sign_record(record, identity)))


def sybils(real: Sequence[ShardRecord], count: int, **fields: object) -> list[tuple[ShardRecord, bytes]]:
    """Records of peers that do not exist, with the right weights and a speed that nobody has, and their signed bytes."""
    digests = {block: record.digest_of(block) for record in real for block in record.span}
    made = []
    for number in range(count):
        identity = Identity.generate()
        record = make_record(
            identity.peer_id,
            ALL,
            s_per_block=1e-6,
            digests=digests,
            num_blocks=NUM_BLOCKS,
            model_digest=real[0].model_digest,
            addresses=(f"/ip4/127.0.0.1/tcp/{1 + number % 1000}",),
            expires_at=round(time.time() + 290, 3),
            **fields,
        )
        made.append((record, packed(record, identity)))
    return made


async def assert_finds_the_real_nodes(client: Directory, real: Sequence[ShardRecord], within_s: float) -> None:
    started = time.monotonic()
    found = {record.peer_id for record in await client.find_blocks(real[0].model_digest, ALL)}
    named = {record.peer_id for record in await client.find_name("tiny")}
    seconds = time.monotonic() - started
    print(f"found after {seconds:.2f} s")
    assert {record.peer_id for record in real} <= found & named
    assert seconds < within_s


async def test_unsigned_and_forged_records_are_refused_by_every_honest_member(
    swarm: LocalSwarm, nodes: list[Process], client: Directory, real: list[ShardRecord]
) -> None:
    key = block_key(real[0].model_digest, 0)
    owner, other = Identity.generate(), Identity.generate()
    soon = round(time.time() + 60, 3)
    good = make_record(owner.peer_id, ALL, num_blocks=NUM_BLOCKS, model_digest=real[0].model_digest, expires_at=soon)
    raw = packed(good, owner)
    elsewhere = make_record(owner.peer_id, ALL, num_blocks=NUM_BLOCKS, expires_at=soon)
    late = make_record(
        owner.peer_id, ALL, num_blocks=NUM_BLOCKS, model_digest=real[0].model_digest, expires_at=soon + 3600
    )
    victim = real[0].peer_id
    forged = [
        *((f"peer{number}", b"junk%d" % number, soon) for number in range(NUM_FORGED - 12)),
        (owner.peer_id, raw[:-1] + bytes([raw[-1] ^ 1]), soon),  # signature broken
        (victim, raw, soon),  # in the name of a real node
        (other.peer_id, raw, soon),
        (owner.peer_id, raw, soon + 1),  # lives longer than signed
        (owner.peer_id, raw, float("inf")),
        (owner.peer_id, raw, float("nan")),
        (owner.peer_id, packed(late, owner), soon + 3600),  # signed, but for too long
        (owner.peer_id, packed(elsewhere, owner), soon),  # signed, but for another key
        (owner.peer_id, bytes(100_000), soon),
        (None, raw, soon),  # a regular value
        (None, b"junk", float("inf")),
        (7, raw, soon),
    ]
    assert len(forged) == NUM_FORGED
    async with attacker(swarm, member=False) as node:
        for peer_id in (swarm.bootstrap.peer_id, nodes[0].peer_id):
            for in_cache in (False, True):
                assert await force(node, peer_id, key, forged, in_cache=in_cache) == 0
            assert await force(node, peer_id, key, [(owner.peer_id, raw, soon)]) == 1, "a proper one is taken"
            await node.protocol.call_store(
                PeerID.from_base58(peer_id), [DHTID.generate(source=key)], [DictionaryDHTValue()], float("inf")
            )
    assert {record.peer_id for record in await client.find_blocks(real[0].model_digest, [0])} == {
        owner.peer_id,
        *(record.peer_id for record in real if record.span.has(0)),
    }


async def test_members_and_rules_of_a_run_are_found_and_forged_ones_are_refused(
    swarm: LocalSwarm, nodes: list[Process], host: Host, client: Directory
) -> None:
    owner, other = Identity.generate(), Identity.generate()
    rules, foreign = sign_spec(make_spec(), owner), sign_spec(make_spec(name="other"), owner)
    run_id = certified_run_id(rules)
    assert await client.find_run(run_id) is None and await client.find_members(run_id, range(3)) == []
    assert await client.publish_run(rules, lifetime_s=60)
    assert await client.publish_run(rules, lifetime_s=30), "somebody else's copy lives longer"
    members = [make_member(host.peer_id, run_id=run_id, stage=stage) for stage in (0, 2)]
    for member in members:
        assert await client.publish_member(member)

    soon = round(time.time() + 100, 3)
    theirs = make_member(other.peer_id, run_id=run_id, stage=0, expires_at=soon)
    elsewhere = make_member(other.peer_id, run_id=run_id, stage=1, expires_at=soon)
    signed, moved = (bytes(MSGPackSerializer.dumps(sign_member(record, other))) for record in (theirs, elsewhere))
    key, stage_key = run_key(run_id), run_member_key(run_id, 0)
    packed_rules, packed_foreign = (bytes(MSGPackSerializer.dumps(raw)) for raw in (rules, foreign))
    forged_rules = [
        (SPEC_SUBKEY, packed_foreign, soon),
        (SPEC_SUBKEY, packed_rules[:-1] + bytes([packed_rules[-1] ^ 1]), soon),
        (SPEC_SUBKEY, packed_rules, soon + 3600),
        (SPEC_SUBKEY, packed_rules, float("inf")),
        (SPEC_SUBKEY, bytes(100_000), soon),
        ("other", packed_rules, soon),
        (other.peer_id, signed, soon),
        (None, packed_rules, soon),
    ]
    forged_members = [
        (other.peer_id, moved, soon),  # signed, but for another stage
        (host.peer_id, signed, soon),
        (other.peer_id, signed, soon + 1),
        (other.peer_id, signed[:-1] + bytes([signed[-1] ^ 1]), soon),
        (SPEC_SUBKEY, packed_rules, soon),
        *((f"peer{number}", b"junk%d" % number, soon) for number in range(1000)),
    ]
    async with attacker(swarm, member=False) as node:
        for peer_id in (swarm.bootstrap.peer_id, nodes[0].peer_id):
            assert await force(node, peer_id, key, forged_rules) == 0
            assert await force(node, peer_id, stage_key, forged_members) == 0
            assert await force(node, peer_id, stage_key, [(other.peer_id, signed, soon)]) == 1, "a proper one is taken"
    assert await client.find_run(run_id) == rules
    assert await client.find_run(certified_run_id(foreign)) is None
    found = await client.find_members(run_id, range(3))
    assert sorted(found, key=lambda m: (m.stage, m.peer_id)) == sorted(
        [*members, theirs], key=lambda m: (m.stage, m.peer_id)
    )


async def test_a_signed_record_in_the_cache_of_the_members_does_not_hide_those_of_others(
    swarm: LocalSwarm, nodes: list[Process], client: Directory, real: list[ShardRecord]
) -> None:
    [(record, raw)] = sybils(real, 1)
    async with attacker(swarm, member=False) as node:
        for peer_id in (swarm.bootstrap.peer_id, *(process.peer_id for process in nodes)):
            for key in (*(block_key(record.model_digest, block) for block in ALL), name_key("tiny")):
                await force(node, peer_id, key, [(record.peer_id, raw, record.expires_at)], in_cache=True)
    await assert_finds_the_real_nodes(client, real, within_s=5)


def _junk_records() -> DictionaryDHTValue:
    value = DictionaryDHTValue()
    for number in range(NUM_FORGED):
        value.store(f"peer{number}", b"x" * 500, time.time() + 100)
    return value


def _empty(maxsize: Any) -> DictionaryDHTValue:
    value = DictionaryDHTValue()
    value.maxsize = maxsize
    return value


LIES: dict[str, Callable[[], tuple[Any, float]]] = {
    "thousands_of_junk_records": lambda: (_junk_records(), time.time() + 100),
    "a_regular_value_for_ever": lambda: (b"junk", float("inf")),
    "an_empty_dictionary_for_ever": lambda: (_empty(float("inf")), float("inf")),
    "a_dictionary_for_one_record": lambda: (_empty(1), float("inf")),
    "a_dictionary_for_no_number_of_records": lambda: (_empty("many"), float("inf")),
    "more_than_four_mebibytes": lambda: (b"x" * 5 * 2**20, time.time() + 100),
    "an_expiry_that_is_no_number": lambda: (_empty(float("nan")), float("nan")),
}


class _LyingStorage:
    """Answers every question with the same lie, and never gets full."""

    def __init__(self, lie: tuple[Any, float]) -> None:
        self._lie = ValueWithExpiration(*lie)

    def get(self, _: DHTID) -> Any:
        return self._lie

    def items(self) -> list[Any]:
        return []

    def store(self, *_: Any) -> bool:
        return True

    store_subkey = store


@pytest.mark.parametrize("lie", LIES)
async def test_members_of_the_dht_that_lie_do_not_hide_the_real_nodes(
    swarm: LocalSwarm, nodes: list[Process], real: list[ShardRecord], lie: str
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for liar in await asyncio.gather(*(stack.enter_async_context(attacker(swarm, member=True)) for _ in range(3))):
            liar.protocol.storage = _LyingStorage(LIES[lie]())
        host = await stack.enter_async_context(running_host(HostConfig()))
        client = await Directory.join(host, swarm.initial_peers, serves=False)
        stack.push_async_callback(client.close)
        # A reply above 4 MiB never arrives: hivemind waits 3 s for it, once for each liar, and then asks no more.
        await assert_finds_the_real_nodes(client, real, within_s=10)


async def test_a_record_cannot_name_four_billion_blocks() -> None:
    joining = make_record(Identity.generate().peer_id, ALL, state=ShardState.JOINING, block_digests=())
    with pytest.raises(ValueError, match=f"at most {MAX_BLOCKS} are allowed"):
        dataclasses.replace(joining, span=Span(0, 2**32 - 1), num_blocks=2**32 - 1)


async def test_what_a_member_keeps_is_bounded_by_records_per_key_keys_and_all_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directory_module, "MAX_KEYS", 4)
    monkeypatch.setattr(directory_module, "MAX_RECORDS", 4000)
    storage, soon = _BoundedStorage(), time.time() + 100
    keys = [DHTID.generate(source=f"key{number}") for number in range(5)]
    for key in keys:
        for number in range(MAX_RECORDS_PER_KEY + 10):
            storage.store_subkey(key, f"peer{number}", b"x", soon)
    held = [len(storage.get(key).value) if storage.get(key) else 0 for key in keys]
    assert held == [1500, 1500, 1000, 0, 0]
    assert storage.store_subkey(keys[0], "peer0", b"y", soon + 1), "a record that is there can be renewed"


async def test_a_validator_survives_whatever_it_is_given() -> None:
    class Entry:
        def __init__(self, *fields: Any) -> None:
            self.key, self.subkey, self.value, self.expiration_time = fields

    junk = [
        b"",
        b"\xc1",
        b"\xd4\x50",
        b"\xc7\xff\x50" + bytes(255),
        MSGPackSerializer.dumps(5),
        bytes(3000),
        b"\x91" * 500,
    ]
    assert not any(
        RecordValidator().validate(Entry(bytes(20), subkey, value, expiry))  # type: ignore[arg-type]
        for subkey in junk
        for value in junk
        for expiry in (0.0, float("inf"), float("nan"))
    )


async def test_a_client_generates_among_five_thousand_invented_peers_that_claim_to_be_the_fastest(
    fork_server: ForkServer,
    swarm: LocalSwarm,
    model: Path,
    nodes: list[Process],
    client: Directory,
    real: list[ShardRecord],
) -> None:
    invented = await asyncio.to_thread(sybils, real, NUM_FORGED)
    taken = 0
    async with attacker(swarm, member=False) as node:
        for peer_id in (swarm.bootstrap.peer_id, *(process.peer_id for process in nodes)):
            for block in ALL:
                lot = invented[block :: len(ALL)]
                key = block_key(real[0].model_digest, block)
                stored = await force(node, peer_id, key, [(r.peer_id, raw, r.expires_at) for r, raw in lot])
                taken += stored
            named = [(r.peer_id, raw, r.expires_at) for r, raw in invented[:1000]]
            await force(node, peer_id, name_key("tiny"), named)
    assert taken == NUM_FORGED * (1 + len(nodes)), "they are properly signed, so they are kept"
    started = time.monotonic()
    found = await client.find_blocks(real[0].model_digest, ALL)
    print(f"{len(found)} records fetched after {time.monotonic() - started:.2f} s")
    assert len(found) >= NUM_FORGED
    runs = ProgramRuns(fork_server)
    try:
        peers = ["--initial-peers", swarm.bootstrap.address]
        runs.start("g", "swarm", "generate", "hello", *peers, "--model", str(model), "--max-new-tokens", "4", "--json")
        done = await asyncio.to_thread(lambda: runs["g"])
    finally:
        runs.close()
    print(f"generated after {done.seconds:.1f} s: {done.out} {done.err}")
    assert done.code == 0, done
    assert all(any(real_record.peer_id[-8:] in hop for real_record in real) for hop in json.loads(done.out)["route"])
    assert done.seconds < 60
