"""Records are accepted only as their owner signed them, under their own keys."""

from __future__ import annotations

import dataclasses
import time

import pytest
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID
from hivemind.utils.serializer import MSGPackSerializer

from protos import record_pb2
from swarm.errors import UserError
from swarm.health import Health
from swarm.identity import Identity, verify_signature
from swarm.p2p.directory import RecordValidator
from swarm.records import MAX_RECORD_BYTES, ShardRecord, ShardState, open_record, sign_record
from swarm.span import Span
from tests.support.records import make_record

OWNER = Identity.generate()


def own_record(**fields) -> ShardRecord:
    return make_record(OWNER.peer_id, Span(0, 30), **fields)


def dht_record(raw: bytes, *, key=None, subkey=None, expires_at=None, record: ShardRecord) -> DHTRecord:
    key = record.dht_keys()[0] if key is None else key
    return DHTRecord(
        DHTID.generate(source=key).to_bytes(),
        MSGPackSerializer.dumps(record.peer_id if subkey is None else subkey),
        MSGPackSerializer.dumps(raw),
        record.expires_at if expires_at is None else expires_at,
    )


def test_a_record_comes_back_as_it_was_signed():
    record = own_record()
    opened = open_record(sign_record(record, OWNER))
    assert (
        dataclasses.replace(opened, decode_s_per_block=record.decode_s_per_block, started_at=record.started_at)
        == record
    )
    assert len(sign_record(record, OWNER)) < 1024


@pytest.mark.parametrize("state", list(ShardState))
def test_a_good_record_is_accepted_under_each_of_its_keys(state):
    record = own_record(state=state, block_digests=() if state == ShardState.JOINING else own_record().block_digests)
    raw = sign_record(record, OWNER)
    assert len(record.dht_keys()) == 32
    assert all(RecordValidator().validate(dht_record(raw, key=key, record=record)) for key in record.dht_keys())


def forged(record):
    """The owner's record signed by somebody else."""
    other = Identity.generate()
    signed = record_pb2.SignedRecord.FromString(sign_record(record, OWNER))
    signed.signature = other.sign(b"shardswarm ShardRecord 1\0" + signed.payload)
    return signed.SerializeToString()


def unsigned(record):
    signed = record_pb2.SignedRecord.FromString(sign_record(record, OWNER))
    signed.signature = b""
    return signed.SerializeToString()


@pytest.mark.parametrize(
    "make_raw", [forged, unsigned, lambda r: b"junk", lambda r: sign_record(r, OWNER)[:-5], lambda r: b"\0" * 5000]
)
def test_forged_unsigned_and_malformed_records_are_refused(make_raw):
    record = own_record()
    assert not RecordValidator().validate(dht_record(make_raw(record), record=record))


def test_a_good_record_is_refused_in_another_place_or_with_another_expiry():
    record = own_record()
    raw, validator = sign_record(record, OWNER), RecordValidator()
    assert validator.validate(dht_record(raw, record=record))
    assert not validator.validate(dht_record(raw, key="shardswarm/1/name/other", record=record))
    assert not validator.validate(dht_record(raw, subkey=Identity.generate().peer_id, record=record))
    assert not validator.validate(dht_record(raw, subkey=None, expires_at=record.expires_at + 100, record=record))
    assert not validator.validate(dht_record(raw, expires_at=float("inf"), record=record))
    assert not validator.validate(dataclasses.replace(dht_record(raw, record=record), subkey=b""))


def test_a_record_cannot_claim_to_live_for_ever():
    record = own_record(expires_at=round(time.time() + 1000, 3))
    assert not RecordValidator().validate(dht_record(sign_record(record, OWNER), record=record))


def test_too_large_and_senseless_records_cannot_be_made():
    with pytest.raises(ValueError, match="serve fewer blocks"):
        sign_record(
            make_record(OWNER.peer_id, Span(0, 200), num_blocks=200, digests=dict.fromkeys(range(200), b"d" * 16)),
            OWNER,
        )
    with pytest.raises(ValueError, match="own peer"):
        sign_record(make_record("12D3KooWother", Span(0, 1)), OWNER)
    with pytest.raises(ValueError, match="exceeds"):
        own_record(num_blocks=3)
    with pytest.raises(ValueError, match="finite"):
        own_record(decode_s_per_block=float("nan"))
    with pytest.raises(ValueError, match="printable"):
        own_record(source="\x1b[2J")
    with pytest.raises(ValueError, match="digests"):
        own_record(block_digests=())
    assert MAX_RECORD_BYTES == 2048


def test_signatures_are_bound_to_the_peer_id():
    signature = OWNER.sign(b"message")
    assert verify_signature(OWNER.peer_id, b"message", signature)
    assert not verify_signature(OWNER.peer_id, b"massage", signature)
    assert not verify_signature(Identity.generate().peer_id, b"message", signature)
    for nonsense in ("", "not base58 0OIl", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"):
        assert not verify_signature(nonsense, b"message", signature)


def test_an_identity_survives_a_restart_and_a_broken_file_is_named(tmp_path):
    path = tmp_path / "deep" / "identity"
    peer_id = Identity.load_or_create(path).peer_id
    assert Identity.load_or_create(path).peer_id == peer_id
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="not an Ed25519 identity file"):
        Identity.load_or_create(path)


def test_bans_double_end_and_are_longer_with_blame():
    health = Health()
    health.failed("a", now=0)
    assert health.is_banned("a", now=4.9) and not health.is_banned("a", now=5.1)
    health.failed("a", now=6)
    assert health.is_banned("a", now=15.9) and not health.is_banned("a", now=16.1)
    health.succeeded("a", round_trip_s=0.1)
    assert not health.is_banned("a", now=7)
    health.failed("b", now=0, blame=True)
    assert health.is_banned("b", now=59)
    for _ in range(50):
        health.failed("c", now=0)
    assert not health.is_banned("c", now=301)
    assert health.round_trip_s("a") == 0.1 and health.round_trip_s("nobody") is None
