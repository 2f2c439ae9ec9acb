"""Identity: the Ed25519 key pair of a peer. The peer id is its public key, so a signature needs nothing beside the id.

The file is libp2p's PrivateKey message (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md), which p2pd reads too.
Knows nothing of sockets.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from swarm.errors import UserError

# Protobuf encoding of {key type: Ed25519 (1), data: N bytes}, and libp2p's "identity" multihash of a 36-byte public key.
_PRIVATE_KEY_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
_MAX_PEER_ID_CHARS = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and the peer id that goes with it."""

    key: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read the identity from path; if there is no such file, write a new one (mode 0600) there."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            identity = cls.generate()
            identity.save(path)
            return identity
        except OSError as error:
            raise UserError(f"cannot read the identity file {path}: {error.strerror}") from error
        if len(raw) != 68 or not raw.startswith(_PRIVATE_KEY_PREFIX):
            raise UserError(f"{path} is not an Ed25519 identity file; move it away and a new one is made")
        return cls(Ed25519PrivateKey.from_private_bytes(raw[4:36]))

    def save(self, path: Path) -> None:
        secret = self.key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        public = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_PRIVATE_KEY_PREFIX + secret + public)
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write the identity file {path}: {error.strerror}") from error

    @property
    def peer_id(self) -> str:
        return base58.b58encode(
            _PEER_ID_PREFIX + self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        ).decode()

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message)


def public_key_of(peer_id: str) -> bytes:
    """The Ed25519 key that a peer id is, 32 bytes. ValueError for ids that do not carry one, or are written in another way."""
    raw = base58.b58decode(peer_id) if len(peer_id) <= _MAX_PEER_ID_CHARS else b""
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError("the peer id is not that of an Ed25519 key")
    if base58.b58encode(raw).decode() != peer_id:  # the decoder overlooks blanks
        raise ValueError("the peer id is not in its canonical form")
    return raw[6:]


def verify_signature(peer_id: str, message: bytes, signature: bytes) -> bool:
    """Whether the owner of peer_id signed message. False for ids that do not carry an Ed25519 key."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key_of(peer_id)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
