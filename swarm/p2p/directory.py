"""Directory: the shard records of the swarm, kept in the DHT.

Every DHT node of ours validates what it stores and what it reads: signature, subkey = peer id, expiry as signed and at most
MAX_LIFETIME_S ahead, and that the record belongs under its key. Forged records are refused at the first honest node.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Iterable

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol, ValidationError
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer

from swarm.errors import JoinFailed, UserError
from swarm.p2p.host import Host, join
from swarm.records import (
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    NUM_PEER_BUCKETS,
    ShardRecord,
    block_key,
    name_key,
    open_record,
    peer_bucket_key,
    sign_record,
)

log = logging.getLogger(__name__)

# hivemind never delivers a value above 4 MiB, so an honest node must not let one key grow so far: 1500 x 2 KB = 3 MB.
MAX_RECORDS_PER_KEY = 1500
MAX_KEYS = 20_000
MAX_RECORDS = 100_000
# Clocks of peers may differ by this much (hivemind's limit, too).
CLOCK_TOLERANCE_S = 3.0
_CLOSE_TIMEOUT_S = 2.0
# Never reached by any expiry, not even an infinite one that a liar announces: so a search asks all nodes near the key.
_NEVER_SUFFICIENT = float("nan")


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Accepts only signed shard records under their own key and subkey. Everything else is refused, regular values included."""

    def validate(self, record: DHTRecord) -> bool:
        try:
            return self._accepts(record)
        except (ValueError, TypeError, KeyError, OverflowError):
            return False

    def _accepts(self, record: DHTRecord) -> bool:
        if len(record.value) > MAX_RECORD_BYTES + 16:
            return False
        raw, subkey = MSGPackSerializer.loads(record.value), MSGPackSerializer.loads(record.subkey)
        if not isinstance(raw, bytes):
            return False
        shard = _open(raw)
        return (
            subkey == shard.peer_id
            and abs(record.expiration_time - shard.expires_at) < 0.001
            and record.expiration_time <= time.time() + MAX_LIFETIME_S + CLOCK_TOLERANCE_S
            and record.key in {_key_id(key) for key in shard.dht_keys()}
        )


@functools.lru_cache(maxsize=4096)
def _key_id(key: str) -> bytes:
    return bytes(DHTID.generate(source=key).to_bytes())


class _BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's storage with caps on keys, on records per key and on all records: a flood must not make a key undeliverable or eat the memory."""

    num_records = 0  # at most so many; expired ones leave the count when it reaches the cap

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        held = self.get(key)
        if held is None and len(self) >= MAX_KEYS:
            return False
        records = held.value if held is not None and isinstance(held.value, DictionaryDHTValue) else {}
        if subkey in records:
            return bool(super().store_subkey(key, subkey, value, expiration_time))
        if len(records) >= MAX_RECORDS_PER_KEY or not self._has_room():
            return False
        self.num_records += 1
        return bool(super().store_subkey(key, subkey, value, expiration_time))

    def _has_room(self) -> bool:
        if self.num_records >= MAX_RECORDS:
            self.num_records = sum(len(held.value) for _, held in self.items())
        return self.num_records < MAX_RECORDS


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
        try:
            raw = sign_record(record, self._host.identity)
        except ValueError as error:
            raise UserError(str(error)) from error
        keys = record.dht_keys()
        stored = await self._dht.store_many(
            keys,
            [raw] * len(keys),
            expiration_time=round(record.expires_at * 1000) / 1000,
            subkeys=[record.peer_id] * len(keys),
        )
        return all(stored.values())

    async def find_blocks(self, model_digest: bytes, blocks: Iterable[int]) -> list[ShardRecord]:
        """Records of the peers that serve any of these blocks of a model; one per peer, the newest."""
        return await self._find([block_key(model_digest, block) for block in blocks])

    async def find_name(self, model_name: str) -> list[ShardRecord]:
        """Records of the peers that serve a model of this name, whatever its weights."""
        return await self._find([name_key(model_name)])

    async def find_all(self) -> list[ShardRecord]:
        """Records of all peers of the swarm."""
        return await self._find([peer_bucket_key(bucket) for bucket in range(NUM_PEER_BUCKETS)])

    def has_answered(self, peer_id: str) -> bool:
        """Whether this peer answered us on the DHT: a record alone proves only that somebody made a key."""
        return PeerID.from_base58(peer_id) in self._dht.protocol.routing_table.peer_id_to_uid

    async def _find(self, keys: list[str]) -> list[ShardRecord]:
        found = await self._dht.get_many(keys, sufficient_expiration_time=_NEVER_SUFFICIENT)
        newest: dict[str, ShardRecord] = {}
        for entry in found.values():
            if entry is None or not isinstance(entry.value, dict):
                continue
            for subkey, item in list(entry.value.items())[: 4 * MAX_RECORDS_PER_KEY]:
                record = _opened(item.value)
                if record is None or record.peer_id != subkey or record.expires_at < time.time():
                    continue
                known = newest.get(record.peer_id)
                if known is None or known.expires_at < record.expires_at:
                    newest[record.peer_id] = record
        return list(newest.values())


@functools.lru_cache(maxsize=4096)
def _open(raw: bytes) -> ShardRecord:
    """A record that several peers hold, under many keys, is verified once."""
    return open_record(raw)


def _opened(raw: object) -> ShardRecord | None:
    try:
        return _open(raw) if isinstance(raw, bytes) else None
    except ValueError:
        return None


def _why_not(reason: str) -> str:
    """hivemind's words for a failed bootstrap, as a cause and a next step."""
    if "local time must be within" in reason:
        return f"this machine's clock disagrees with the swarm's by more than {CLOCK_TOLERANCE_S:.0f} s: set it (for example with NTP) and try again"
    if "can't access this node" in reason:
        return "the initial peers cannot connect back to this node: open its port (--listen, --announce) or use --relay"
    return f"the initial peers did not answer on the DHT ({reason.split('(')[0].strip()}); check that they run the same software"
