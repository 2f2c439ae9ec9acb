"""Directory: what the swarm knows in common, kept in the DHT: records of shards and of members of runs, and the rules of runs.

Every DHT node of ours validates what it stores and what it reads. Records of peers: signature, subkey = peer id, expiry as
signed and at most MAX_LIFETIME_S ahead, and that the record belongs under its key. Rules of runs: that they hash to the run id
in the key, and the owner's signature; their expiry is anybody's, because everybody who takes part publishes them again.
What is forged is refused at the first honest node.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol, ValidationError
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer

from protos import record_pb2
from swarm.errors import JoinFailed, UserError
from swarm.member_record import MemberRecord, open_member, sign_member
from swarm.p2p.host import Host, join
from swarm.records import (
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    NUM_PEER_BUCKETS,
    ShardRecord,
    block_key,
    kind_of,
    name_key,
    open_record,
    peer_bucket_key,
    sign_record,
)
from swarm.run_id import SPEC_SUBKEY, run_key, run_member_key
from swarm.run_spec import MAX_SPEC_BYTES, certified_run_id

log = logging.getLogger(__name__)

# hivemind never delivers a value above 4 MiB, so an honest node must not let one key grow so far: 1500 x 2 KB = 3 MB.
MAX_RECORDS_PER_KEY = 1500
MAX_KEYS = 20_000
MAX_RECORDS = 100_000
# Rules of runs are up to 24 KiB each: 48 MiB.
MAX_SPECS = 2000
MAX_SUBKEY_BYTES = 256
# Clocks of peers may differ by this much (hivemind's limit, too).
CLOCK_TOLERANCE_S = 3.0
_CLOSE_TIMEOUT_S = 2.0
# Never reached by any expiry, not even an infinite one that a liar announces: so a search asks all nodes near the key.
_NEVER_SUFFICIENT = float("nan")


PeerRecord = TypeVar("PeerRecord", ShardRecord, MemberRecord)


class Placed(Protocol):
    """A verified value, and where in the DHT it belongs."""

    @property
    def subkey(self) -> str: ...

    @property
    def expires_at(self) -> float | None:
        """As signed; None: as whoever publishes it says, within MAX_LIFETIME_S."""

    def dht_keys(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class _PlacedSpec:
    """The rules of a run."""

    run_id: bytes
    subkey: str = SPEC_SUBKEY
    expires_at: float | None = None

    def dht_keys(self) -> list[str]:
        return [run_key(self.run_id)]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of value in the DHT. open verifies bytes, and raises ValueError for what is not of this kind."""

    max_bytes: int
    open: Callable[[bytes], Placed]


@functools.lru_cache(maxsize=4096)
def _open_peer_record(raw: bytes) -> ShardRecord | MemberRecord:
    """A record that several peers hold, under many keys, is verified once."""
    return open_member(raw) if kind_of(raw) == record_pb2.MEMBER_RECORD else open_record(raw)


_PEER_RECORD = _Kind(MAX_RECORD_BYTES, _open_peer_record)
_SPEC = _Kind(MAX_SPEC_BYTES, lambda raw: _PlacedSpec(certified_run_id(raw)))


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Accepts only values of the kinds above, under their own key and subkey. Everything else is refused, regular values included."""

    def validate(self, record: DHTRecord) -> bool:
        try:
            return self._accepts(record)
        except (ValueError, TypeError, KeyError, OverflowError):
            return False

    def _accepts(self, record: DHTRecord) -> bool:
        if len(record.subkey) > MAX_SUBKEY_BYTES:
            return False
        subkey = MSGPackSerializer.loads(record.subkey)
        kind = _SPEC if subkey == SPEC_SUBKEY else _PEER_RECORD
        if len(record.value) > kind.max_bytes + 16:
            return False
        raw = MSGPackSerializer.loads(record.value)
        if not isinstance(raw, bytes):
            return False
        placed = kind.open(raw)
        return (
            subkey == placed.subkey
            and (placed.expires_at is None or abs(record.expiration_time - placed.expires_at) < 0.001)
            and record.expiration_time <= time.time() + MAX_LIFETIME_S + CLOCK_TOLERANCE_S
            and record.key in {_key_id(key) for key in placed.dht_keys()}
        )


@functools.lru_cache(maxsize=4096)
def _key_id(key: str) -> bytes:
    return bytes(DHTID.generate(source=key).to_bytes())


class _BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's storage with caps on keys, on records per key and on all values: a flood must not make a key undeliverable or eat the memory."""

    num_records = 0  # at most so many; expired ones leave the count when it reaches the cap
    num_specs = 0  # likewise

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        held = self.get(key)
        if held is None and len(self) >= MAX_KEYS:
            return False
        records = held.value if held is not None and isinstance(held.value, DictionaryDHTValue) else {}
        if subkey in records:
            return bool(super().store_subkey(key, subkey, value, expiration_time))
        if subkey == SPEC_SUBKEY:
            if not self._has_room_for_spec():
                return False
            self.num_specs += 1
        else:
            if len(records) >= MAX_RECORDS_PER_KEY or not self._has_room_for_record():
                return False
            self.num_records += 1
        return bool(super().store_subkey(key, subkey, value, expiration_time))

    def _has_room_for_record(self) -> bool:
        if self.num_records >= MAX_RECORDS:
            self.num_records = sum(len(held.value) for _, held in self.items()) - self._count_specs()
        return self.num_records < MAX_RECORDS

    def _has_room_for_spec(self) -> bool:
        if self.num_specs >= MAX_SPECS:
            self.num_specs = self._count_specs()
        return self.num_specs < MAX_SPECS

    def _count_specs(self) -> int:
        return sum(SPEC_SUBKEY in held.value for _, held in self.items())


class _NoStorage(DHTLocalStorage):  # type: ignore[misc]
    """In the place of hivemind's cache: whoever asks has his record cached, and one that expires last hides all others of its key."""

    def store(self, *_: object, **__: object) -> bool:
        return False

    def store_subkey(self, *_: object, **__: object) -> bool:
        return False


def _validate_dictionary(protocol: DHTProtocol, key_bytes: bytes, dictionary: object) -> bool:
    """False for more records than an honest peer keeps. A peer does not say how many records may be merged with its own."""
    if not isinstance(dictionary, DictionaryDHTValue) or len(dictionary.data) > MAX_RECORDS_PER_KEY:
        return False
    dictionary.maxsize = float("inf")
    return bool(DHTProtocol._validate_dictionary(protocol, key_bytes, dictionary))


class Directory:
    """Publishes our records and finds those of others. Made by `await Directory.join(...)`."""

    def __init__(self, dht: DHTNode, host: Host) -> None:
        self._dht = dht
        self._host = host

    @classmethod
    async def join(cls, host: Host, initial_peers: list[str], *, serves: bool, timeout_s: float = 15.0) -> Directory:
        """Take part in the DHT: as a full member (serves=True: nodes, bootstrap peers) or as a client that only asks.

        Raises JoinFailed with the reason: no initial peer answered, clocks differ, or others cannot reach us.
        """
        answered = await join(host, initial_peers, timeout_s)
        reachable = [address for address in initial_peers if address.rpartition("/p2p/")[2] in answered]
        try:
            async with asyncio.timeout(timeout_s):
                dht = await DHTNode.create(
                    p2p=host.p2p,
                    initial_peers=reachable,
                    client_mode=not serves,
                    record_validator=RecordValidator(),
                    # Records change state within seconds, so nothing is cached; and a cached reply could be a liar's.
                    cache_locally=False,
                    cache_nearest=0,
                    cache_on_store=False,
                    reuse_get_requests=False,  # sorts by expiry, which our NaN cannot be
                    num_replicas=5,
                    wait_timeout=3,
                    blacklist_time=2.0,
                )
        except TimeoutError:
            raise JoinFailed(
                f"the initial peers did not let us into the DHT within {timeout_s:.0f} s; try again, or another initial peer"
            ) from None
        except (ValidationError, RuntimeError) as error:
            raise JoinFailed(_why_not(str(error))) from error
        dht.protocol.storage, dht.protocol.cache = _BoundedStorage(), _NoStorage()
        # DHTNode.create makes the protocol itself, and handlers are named after its class: only this one method is changed.
        dht.protocol._validate_dictionary = functools.partial(_validate_dictionary, dht.protocol)
        return cls(dht, host)

    async def close(self) -> None:
        """Leave the DHT. Bounded: a p2pd that died never confirms that the handlers are removed."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._dht.shutdown()
        except TimeoutError:
            log.info("left the DHT without p2pd's answer after_s=%.0f", _CLOSE_TIMEOUT_S)

    async def publish(self, record: ShardRecord) -> bool:
        """Store a record of ours under all its keys. False if under some key nobody took it."""
        return await self._publish(record, lambda: sign_record(record, self._host.identity))

    async def publish_member(self, record: MemberRecord) -> bool:
        """Store our record of a stage of a run. False if nobody took it."""
        return await self._publish(record, lambda: sign_member(record, self._host.identity))

    async def _publish(self, record: ShardRecord | MemberRecord, sign: Callable[[], bytes]) -> bool:
        try:
            raw = sign()
        except ValueError as error:
            raise UserError(str(error)) from error
        return await self._store(raw, record, round(record.expires_at * 1000) / 1000)

    async def publish_run(self, raw: bytes, *, lifetime_s: float = MAX_LIFETIME_S) -> bool:
        """Store the signed rules of a run, ours or not, for so long. False if nobody has them afterwards.

        Everybody who takes part does this again before they expire. Raises ValueError if raw is no run's rules.
        """
        spec = _PlacedSpec(certified_run_id(raw))
        if await self._store(raw, spec, time.time() + min(lifetime_s, MAX_LIFETIME_S)):
            return True
        # Members refuse what expires no later than what they hold: then somebody else published it just now.
        return await self.find_run(spec.run_id) is not None

    async def _store(self, raw: bytes, placed: Placed, expires_at: float) -> bool:
        keys = placed.dht_keys()
        stored = await self._dht.store_many(
            keys, [raw] * len(keys), expiration_time=expires_at, subkeys=[placed.subkey] * len(keys)
        )
        return all(stored.values())

    async def find_blocks(self, model_digest: bytes, blocks: Iterable[int]) -> list[ShardRecord]:
        """Records of the peers that serve any of these blocks of a model; one per peer, the newest."""
        return await self._find_shards([block_key(model_digest, block) for block in blocks])

    async def find_name(self, model_name: str) -> list[ShardRecord]:
        """Records of the peers that serve a model of this name, whatever its weights."""
        return await self._find_shards([name_key(model_name)])

    async def find_all(self) -> list[ShardRecord]:
        """Records of all peers of the swarm."""
        return await self._find_shards([peer_bucket_key(bucket) for bucket in range(NUM_PEER_BUCKETS)])

    async def find_members(self, run_id: bytes, stages: Iterable[int]) -> list[MemberRecord]:
        """Records of the peers that hold any of these stages of a run; one per peer and stage, the newest."""
        keys = [run_member_key(run_id, stage) for stage in stages]
        return await self._find(keys, MemberRecord, lambda record: (record.peer_id, record.stage))

    async def find_run(self, run_id: bytes) -> bytes | None:
        """The signed rules of a run, checked against its id; None if nobody has them."""
        [entry] = (await self._dht.get_many([run_key(run_id)], sufficient_expiration_time=_NEVER_SUFFICIENT)).values()
        if entry is None or not isinstance(entry.value, dict) or SPEC_SUBKEY not in entry.value:
            return None
        raw = entry.value[SPEC_SUBKEY].value
        try:
            return raw if isinstance(raw, bytes) and certified_run_id(raw) == run_id else None
        except ValueError:
            return None

    def has_answered(self, peer_id: str) -> bool:
        """Whether this peer answered us on the DHT: a record alone proves only that somebody made a key."""
        return PeerID.from_base58(peer_id) in self._dht.protocol.routing_table.peer_id_to_uid

    async def _find_shards(self, keys: list[str]) -> list[ShardRecord]:
        return await self._find(keys, ShardRecord, lambda record: record.peer_id)

    async def _find(
        self, keys: list[str], kind: type[PeerRecord], subject: Callable[[PeerRecord], Hashable]
    ) -> list[PeerRecord]:
        """Records of this kind under the keys; of several on one subject the newest."""
        found = await self._dht.get_many(keys, sufficient_expiration_time=_NEVER_SUFFICIENT)
        newest: dict[Hashable, PeerRecord] = {}
        for entry in found.values():
            if entry is None or not isinstance(entry.value, dict):
                continue
            for subkey, item in list(entry.value.items())[: 4 * MAX_RECORDS_PER_KEY]:
                record = _opened(item.value)
                if not isinstance(record, kind) or record.peer_id != subkey or record.expires_at < time.time():
                    continue
                known = newest.get(subject(record))
                if known is None or known.expires_at < record.expires_at:
                    newest[subject(record)] = record
        return list(newest.values())


def _opened(raw: object) -> ShardRecord | MemberRecord | None:
    try:
        return _open_peer_record(raw) if isinstance(raw, bytes) else None
    except ValueError:
        return None


def _why_not(reason: str) -> str:
    """hivemind's words for a failed bootstrap, as a cause and a next step."""
    if "local time must be within" in reason:
        return f"this machine's clock disagrees with the swarm's by more than {CLOCK_TOLERANCE_S:.0f} s: set it (for example with NTP) and try again"
    if "can't access this node" in reason:
        return "the initial peers cannot connect back to this node: open its port (--listen, --announce) or use --relay"
    return f"the initial peers did not answer on the DHT ({reason.split('(')[0].strip()}); check that they run the same software"
