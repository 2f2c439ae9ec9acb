"""Shard records for tests."""

from __future__ import annotations

import time

from swarm.records import ShardRecord, ShardState
from swarm.span import Span


def digest(block: int) -> bytes:
    return bytes([block]) * 16


def make_record(
    peer_id: str,
    span: Span,
    *,
    s_per_block: float = 0.002,
    state: ShardState = ShardState.ONLINE,
    numeric_class: str = "fp32",
    digests: dict[int, bytes] | None = None,
    source: str = "dir:/model",
    num_blocks: int = 30,
    **fields: object,
) -> ShardRecord:
    values = {
        "peer_id": peer_id,
        "model_name": "tiny",
        "source": source,
        "model_digest": b"m" * 16,
        "num_blocks": num_blocks,
        "span": span,
        "block_digests": tuple((digests or {}).get(block, digest(block)) for block in span),
        "numeric_class": numeric_class,
        "state": state,
        "started_at": time.time(),
        "expires_at": round(time.time() + 60, 3),
        "decode_s_per_block": s_per_block,
        "prefill_tokens_per_s": 100.0,
        "addresses": ("/ip4/127.0.0.1/tcp/1",),
    }
    return ShardRecord(**{**values, **fields})
