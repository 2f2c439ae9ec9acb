"""ModelSpec: what a model is, told by digests. Knows nothing of files, torch or the network.

Two peers speak of one model if and only if the digests are equal: of the config, of the ends (everything that is not a
block), and of each block. Names, shapes, dtypes and bytes all count, so weights that were de-quantised differ from the
original and never meet it in one route.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Buffer

DIGEST_BYTES = 16

# What differs between two copies of one model and changes nothing that it computes.
VOLATILE_CONFIG_KEYS = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype"})
MAX_BLOCKS = 10_000
MAX_HIDDEN_SIZE = 1_000_000


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model: what the user calls it, where the weights came from, its size, and its identity.

    name and source are for people and may differ between peers; `digest` decides.
    """

    name: str
    source: str
    num_blocks: int
    hidden_size: int
    config_digest: bytes
    ends_digest: bytes

    def __post_init__(self) -> None:
        if not self.name or not self.source:
            raise ValueError("a model needs a name and a source")
        if not 0 < self.num_blocks <= MAX_BLOCKS:
            raise ValueError(f"need 1..{MAX_BLOCKS} blocks, got {self.num_blocks}")
        if not 0 < self.hidden_size <= MAX_HIDDEN_SIZE:
            raise ValueError(f"need a hidden size of 1..{MAX_HIDDEN_SIZE}, got {self.hidden_size}")
        for digest in (self.config_digest, self.ends_digest):
            if len(digest) != DIGEST_BYTES:
                raise ValueError(f"need digests of {DIGEST_BYTES} bytes, got {len(digest)}")

    @property
    def digest(self) -> bytes:
        """Identity of the model apart from its blocks, which have their own digests. 16 bytes."""
        return _digest(b"shardswarm model 1", self.config_digest, self.ends_digest)


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """One tensor as stored: full checkpoint name, dtype ("float32"), shape, and its bytes in C order, little endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Buffer


def tensors_digest(tensors: Iterable[TensorBytes]) -> bytes:
    """Digest of a set of named tensors, in whatever order they come. 16 bytes.

    Every part goes in behind its length, so no two different sets are encoded alike. Raises ValueError for a name that
    comes twice.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    hasher = hashlib.sha256()
    _update(hasher, b"shardswarm tensors 1")
    _update(hasher, len(ordered).to_bytes(8, "big"))
    for previous, tensor in zip([None, *ordered], ordered, strict=False):
        if previous is not None and previous.name == tensor.name:
            raise ValueError(f"tensor {tensor.name!r} comes twice")
        _update(hasher, tensor.name.encode())
        _update(hasher, tensor.dtype.encode())
        _update(hasher, ",".join(map(str, tensor.shape)).encode())
        _update(hasher, tensor.content)
    return hasher.digest()[:DIGEST_BYTES]


def config_digest(config: Mapping[str, Any]) -> bytes:
    """Digest of a model's config.json, apart from keys that say who wrote it and in what precision. 16 bytes."""
    canonical = json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return _digest(b"shardswarm config 1", canonical.encode())


def _canonical(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _canonical(inner) for key, inner in value.items() if key not in VOLATILE_CONFIG_KEYS}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_canonical(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 10000.0 and 10000 are one rope_theta
    return value


def _digest(*parts: bytes) -> bytes:
    hasher = hashlib.sha256()
    for part in parts:
        _update(hasher, part)
    return hasher.digest()[:DIGEST_BYTES]


def _update(hasher: hashlib._Hash, part: Buffer) -> None:
    view = memoryview(part)
    hasher.update(view.nbytes.to_bytes(8, "big"))
    hasher.update(view)
