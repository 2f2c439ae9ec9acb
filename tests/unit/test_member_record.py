"""Records of members of a run, and rules of runs, are accepted only as they were signed, in their own place in the DHT."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID
from hivemind.utils.serializer import MSGPackSerializer

from protos import record_pb2, run_pb2
from swarm.identity import Identity
from swarm.member_record import MemberRecord, open_member, sign_member
from swarm.p2p import directory as directory_module
from swarm.p2p.directory import RecordValidator, _BoundedStorage
from swarm.records import MAX_LIFETIME_S, MAX_RECORD_BYTES, ShardState, open_record, sign_record
from swarm.run_id import SPEC_SUBKEY, run_key, run_member_key
from swarm.run_spec import MAX_SPEC_BYTES, certified_run_id, sign_spec
from swarm.span import Span
from tests.support.records import make_record
from tests.support.runs import make_member, make_spec

OWNER, OTHER = Identity.generate(), Identity.generate()


def entry(raw: object, key: str, subkey: object, expires_at: float) -> DHTRecord:
    return DHTRecord(
        DHTID.generate(source=key).to_bytes(),
        MSGPackSerializer.dumps(subkey),
        MSGPackSerializer.dumps(raw),
        expires_at,
    )


def is_accepted(raw: object, key: str, subkey: object, expires_at: float) -> bool:
    return RecordValidator().validate(entry(raw, key, subkey, expires_at))


# Members ---------------------------------------------------------------------------------------------------------------


def member_entry(record: MemberRecord, raw: bytes | None = None, **changes: Any) -> tuple[Any, ...]:
    fields = {
        "raw": sign_member(record, OWNER) if raw is None else raw,
        "key": record.dht_keys()[0],
        "subkey": record.peer_id,
        "expires_at": record.expires_at,
    }
    return tuple({**fields, **changes}.values())


def test_a_member_record_comes_back_as_it_was_signed_and_is_small() -> None:
    record = make_member(OWNER.peer_id)
    raw = sign_member(record, OWNER)
    assert open_member(raw) == record and len(raw) < 512
    assert open_member(sign_member(make_member(OWNER.peer_id, loss=None), OWNER)).loss is None
    joining = make_member(OWNER.peer_id, state=ShardState.JOINING, lineage=b"", epoch=0, loss=None)
    assert open_member(sign_member(joining, OWNER)) == joining


@pytest.mark.parametrize("state", list(ShardState))
def test_a_proper_member_record_is_accepted_under_its_stage(state: ShardState) -> None:
    record = make_member(OWNER.peer_id, state=state)
    assert record.dht_keys() == [run_member_key(record.run_id, 1)]
    assert is_accepted(*member_entry(record))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": run_member_key(b"r" * 32, 2)},
        {"key": run_member_key(b"s" * 32, 1)},  # of another run
        {"key": run_key(b"r" * 32)},
        {"key": "shardswarm/1/peers/0"},
        {"subkey": OTHER.peer_id},
        {"subkey": OWNER.peer_id + " "},
        {"subkey": SPEC_SUBKEY},
        {"subkey": None},
        {"subkey": "x" * 10_000},
        {"expires_at": time.time() + 61},
        {"expires_at": float("inf")},
        {"expires_at": float("nan")},
    ],
    ids=itertools.count(),  # keys differ from process to process
)
def test_a_member_record_is_refused_in_another_place_or_with_another_expiry(changes: dict[str, Any]) -> None:
    assert not is_accepted(*member_entry(make_member(OWNER.peer_id), **changes))


def resigned(signer: Identity, tag: bytes, **fields: Any) -> bytes:
    signed = record_pb2.SignedRecord.FromString(sign_member(make_member(OWNER.peer_id), OWNER))
    signed.signature = signer.sign(tag + signed.payload)
    for name, value in fields.items():
        setattr(signed, name, value)
    return signed.SerializeToString()


MEMBER_TAG, SHARD_TAG = b"shardswarm MemberRecord 1\0", b"shardswarm ShardRecord 1\0"


@pytest.mark.parametrize(
    "make_raw",
    [
        lambda: resigned(OTHER, MEMBER_TAG),
        lambda: resigned(OWNER, SHARD_TAG),
        lambda: resigned(OWNER, b""),
        lambda: resigned(OWNER, MEMBER_TAG, signature=b""),
        lambda: resigned(OWNER, MEMBER_TAG, kind=record_pb2.SHARD_RECORD),
        lambda: resigned(OWNER, SHARD_TAG, kind=record_pb2.SHARD_RECORD),
        lambda: resigned(OWNER, MEMBER_TAG, kind=7),
        lambda: resigned(OWNER, MEMBER_TAG)[:-5],
        lambda: b"junk",
        lambda: b"\0" * (MAX_RECORD_BYTES + 1),
        lambda: resigned(OWNER, MEMBER_TAG) + b"\xa2\x06\x88\x27" + bytes(5000),
    ],
)
def test_forged_and_malformed_member_records_are_refused(make_raw: Callable[[], bytes]) -> None:
    assert not is_accepted(*member_entry(make_member(OWNER.peer_id), make_raw()))


def test_no_bit_of_a_member_record_can_be_changed() -> None:
    record = make_member(OWNER.peer_id)
    raw = sign_member(record, OWNER)
    for position in range(len(raw)):
        mutated = bytearray(raw)
        mutated[position] ^= 1 << position % 8
        assert not is_accepted(*member_entry(record, bytes(mutated))), position


def test_a_member_record_cannot_claim_to_live_for_ever() -> None:
    record = make_member(OWNER.peer_id, expires_at=round(time.time() + 1000, 3))
    assert not is_accepted(*member_entry(record))


def test_one_kind_of_record_is_not_taken_for_another() -> None:
    with pytest.raises(ValueError, match="another kind"):
        open_record(sign_member(make_member(OWNER.peer_id), OWNER))
    with pytest.raises(ValueError, match="another kind"):
        open_member(sign_record(make_record(OWNER.peer_id, Span(0, 2)), OWNER))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"run_id": b"short"}, "a run id has 32 bytes"),
        ({"stage": -1}, "stage -1, at most 256"),
        ({"stage": 257}, "stage 257, at most 256"),
        ({"epoch": -1}, "epoch -1"),
        ({"epoch": 2**48 + 1}, "at most 281474976710656"),
        ({"lineage": b""}, "a lineage has 16 to 32 bytes, this one has 0"),
        ({"lineage": b"x" * 33}, "a lineage has 16 to 32 bytes"),
        ({"lineage": b"x" * 15, "state": ShardState.JOINING}, "a lineage has 16 to 32 bytes"),
        ({"tokens_per_s": -1.0}, "rates must be finite and not negative"),
        ({"bandwidth_bytes_per_s": float("inf")}, "rates must be finite"),
        ({"loss": float("nan")}, "the loss must be finite"),
        ({"addresses": ("x",) * 9}, "addresses be at most 8"),
        ({"addresses": ("\x1b[2J",)}, "printable"),
        ({"software": "x" * 201}, "at most 200 characters"),
    ],
)
def test_a_senseless_member_record_cannot_be_made(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"member record: .*{sentence}"):
        make_member(OWNER.peer_id, **fields)


def test_a_member_record_is_signed_by_its_own_peer_and_bounded() -> None:
    with pytest.raises(ValueError, match="own peer"):
        sign_member(make_member(OTHER.peer_id), OWNER)
    with pytest.raises(ValueError, match="at most 2048 are allowed: announce fewer addresses"):
        sign_member(make_member(OWNER.peer_id, addresses=("é" * 200,) * 8), OWNER)


# Rules of runs ---------------------------------------------------------------------------------------------------------

SPEC = sign_spec(make_spec(), OWNER)
RUN_ID = certified_run_id(SPEC)


def spec_entry(**changes: Any) -> tuple[Any, ...]:
    fields = {"raw": SPEC, "key": run_key(RUN_ID), "subkey": SPEC_SUBKEY, "expires_at": time.time() + 200}
    return tuple({**fields, **changes}.values())


def test_the_rules_of_a_run_may_be_stored_by_anybody_for_five_minutes_at_most() -> None:
    assert is_accepted(*spec_entry())
    assert is_accepted(*spec_entry(expires_at=time.time() + MAX_LIFETIME_S))
    for expires_at in (time.time() + MAX_LIFETIME_S + 10, float("inf"), float("nan")):
        assert not is_accepted(*spec_entry(expires_at=expires_at))


def test_the_rules_of_another_run_are_refused_by_their_hash_and_so_is_every_changed_bit() -> None:
    foreign = sign_spec(make_spec(name="other"), OWNER)
    stolen = sign_spec(make_spec(), OTHER)
    assert not is_accepted(*spec_entry(raw=foreign)) and not is_accepted(*spec_entry(raw=stolen))
    assert is_accepted(*spec_entry(raw=foreign, key=run_key(certified_run_id(foreign))))
    for position in range(len(SPEC)):
        mutated = bytearray(SPEC)
        mutated[position] ^= 1 << position % 8
        assert not is_accepted(*spec_entry(raw=bytes(mutated))), position


@pytest.mark.parametrize(
    "changes",
    [
        {"key": run_member_key(RUN_ID, 0)},
        {"key": run_key(bytes(32))},
        {"subkey": OWNER.peer_id},
        {"subkey": "spec2"},
        {"subkey": None},
        {"raw": b"junk"},
        {"raw": b""},
        {"raw": "text"},
        {"raw": [SPEC]},
        {"raw": bytes(MAX_SPEC_BYTES + 1)},
        {"raw": SPEC + b"\xa2\x06\x04junk"},
    ],
    ids=itertools.count(),  # keys differ from process to process
)
def test_what_is_no_spec_in_its_place_is_refused(changes: dict[str, Any]) -> None:
    assert not is_accepted(*spec_entry(**changes))


def test_an_unsigned_spec_with_the_right_hash_is_refused() -> None:
    envelope = run_pb2.SignedRunSpec.FromString(SPEC)
    for signature in (b"", bytes(64), OTHER.sign(b"shardswarm RunSpec 1\0" + envelope.payload)):
        envelope.signature = signature
        assert not is_accepted(*spec_entry(raw=envelope.SerializeToString(deterministic=True)))


def test_a_shard_record_under_the_key_of_a_run_is_refused() -> None:
    record = make_record(OWNER.peer_id, Span(0, 2))
    raw = sign_record(record, OWNER)
    for key in (run_key(RUN_ID), run_member_key(RUN_ID, 0)):
        assert not is_accepted(raw, key, record.peer_id, record.expires_at)
    tricky = make_record(OWNER.peer_id, Span(0, 2), model_name=f"../run/{RUN_ID.hex()}")
    assert run_key(RUN_ID) not in tricky.dht_keys()


def test_what_a_member_of_the_dht_keeps_of_runs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "MAX_SPECS", 3)
    monkeypatch.setattr(directory_module, "MAX_RECORDS", 5)
    storage, soon = _BoundedStorage(), time.time() + 100
    keys = [DHTID.generate(source=f"run{number}") for number in range(4)]
    assert [storage.store_subkey(key, SPEC_SUBKEY, b"x", soon) for key in keys] == [True, True, True, False]
    assert storage.store_subkey(keys[0], SPEC_SUBKEY, b"x", soon + 1), "what is there can be renewed"
    other = DHTID.generate(source="members")
    assert [storage.store_subkey(other, f"peer{n}", b"x", soon) for n in range(6)] == [True] * 5 + [False]
    short_lived = _BoundedStorage()
    for key in keys[:3]:
        short_lived.store_subkey(key, SPEC_SUBKEY, b"x", time.time() - 1)
    assert short_lived.store_subkey(keys[3], SPEC_SUBKEY, b"x", soon), "those that expired leave the count"
