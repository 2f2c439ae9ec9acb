"""Run id: the hash of a run's rules and of its owner's key. As text it is hexadecimal; under it the DHT keeps what concerns the run."""

from __future__ import annotations

import hashlib
import re

RUN_ID_BYTES = 32
SPEC_SUBKEY = "spec"
_TAG = b"shardswarm run id 1\0"


def make_run_id(payload: bytes, owner_public_key: bytes) -> bytes:
    """The id of the run whose serialised rules are payload. owner_public_key: 32 bytes, Ed25519."""
    return hashlib.sha256(_TAG + payload + owner_public_key).digest()


def parse_run_id(text: str) -> bytes:
    """The run id that a user typed. ValueError with what was expected."""
    if re.fullmatch(rf"[0-9a-fA-F]{{{2 * RUN_ID_BYTES}}}", text.strip()) is None:
        raise ValueError(
            f"{text!r} is not a run id: give the {2 * RUN_ID_BYTES} hexadecimal digits that `swarm run create` printed"
        )
    return bytes.fromhex(text.strip())


def run_key(run_id: bytes) -> str:
    """Where the rules of a run are, under SPEC_SUBKEY."""
    return f"shardswarm/1/run/{run_id.hex()}"


def run_member_key(run_id: bytes, stage: int) -> str:
    """Where the records of the members of a run that hold a stage are. The ends count as the last stage."""
    return f"shardswarm/1/run/{run_id.hex()}/{stage}"
