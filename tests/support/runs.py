"""Run specs and member records for tests."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from swarm.member_record import MemberRecord
from swarm.records import ShardState
from swarm.run_spec import DataKind, DataSpec, RunSpec
from swarm.span import Span

CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32, "vocab_size": 288}


def make_data(**fields: Any) -> DataSpec:
    values = {
        "kind": DataKind.JSONL,
        "source": "corpora/tiny",
        "files": ("a.jsonl", "b/c.jsonl"),
        "manifest_digest": b"m" * 16,
        "num_samples": 100,
    }
    return DataSpec(**{**values, **fields})


def make_spec(**fields: Any) -> RunSpec:
    """A spec in which everything is filled in."""
    values = {
        "name": "tiny",
        "config": CONFIG,
        "initial_digests": (b"1" * 16, b"2" * 16, b"e" * 16),
        "tokenizer": {"tokenizer.json": hashlib.sha256(b"vocabulary").digest()},
        "stages": (Span(0, 2), Span(2, 4)),
        "sequence_length": 64,
        "target_batch": 32,
        "microbatch": 4,
        "data": make_data(),
        "num_epochs": 10,
    }
    return RunSpec(**{**values, **fields})


def make_member(peer_id: str, **fields: Any) -> MemberRecord:
    values = {
        "peer_id": peer_id,
        "run_id": b"r" * 32,
        "stage": 1,
        "state": ShardState.ONLINE,
        "epoch": 7,
        "lineage": b"l" * 32,
        "tokens_per_s": 100.0,
        "bandwidth_bytes_per_s": 1e6,
        "loss": 2.5,
        "addresses": ("/ip4/127.0.0.1/tcp/1",),
        "software": "shardswarm 0.1.0",
        "expires_at": round(time.time() + 60, 3),
    }
    return MemberRecord(**{**values, **fields})
