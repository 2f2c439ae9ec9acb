"""Messages: a protobuf header plus the raw bytes of its tensors, and the refusals that travel as messages.

Layout: header length (4 bytes, big-endian), header, the tensors' bytes in the order of `header.tensors`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError
from torch import Tensor

from protos import node_pb2
from swarm.errors import BadReply, BadRequest, Busy, MicrobatchGone, Outdated, PeerFailed, SessionEvicted, SwarmError
from swarm.tensors import Buffer, WireFormat, decode_tensors, encode_tensor

NODE_PROTOCOL = "shardswarm/node"  # libp2p protocol id of the streams that nodes serve; versions meet inside
PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 4
SOFTWARE = "shardswarm 0.1.0"
MAX_HEADER_BYTES = 64 * 1024
MAX_TENSORS = 8

Header = TypeVar("Header", node_pb2.Request, node_pb2.Reply)
_LENGTH = struct.Struct("!I")

# One table for both directions: the code that a node sends for an error, and the error that a client raises for a code.
_ERROR_OF_CODE: dict[int, type[SwarmError]] = {
    node_pb2.THE_REQUEST_IS_WRONG: BadRequest,
    node_pb2.THIS_NODE_HAS_NO_ROOM: Busy,
    node_pb2.THIS_NODE_IS_LEAVING: PeerFailed,
    node_pb2.THE_BLOCKS_ARE_NOT_SERVED_HERE: PeerFailed,
    node_pb2.THE_WEIGHTS_DIFFER: BadReply,
    node_pb2.THE_VERSIONS_DO_NOT_MEET: PeerFailed,
    node_pb2.THE_SESSION_IS_UNKNOWN: PeerFailed,
    node_pb2.THE_CACHE_IS_TOO_SMALL: Busy,
    node_pb2.THE_COMPUTATION_FAILED: BadReply,
    node_pb2.THE_MICROBATCH_IS_UNKNOWN: MicrobatchGone,
    node_pb2.THE_MICROBATCH_IS_TOO_LARGE: BadRequest,
    node_pb2.THE_EPOCH_IS_ANOTHER: Outdated,
    node_pb2.THE_RUN_IS_ANOTHER: PeerFailed,
    node_pb2.THIS_SESSION_MADE_ROOM: SessionEvicted,
}


class Refused(SwarmError):
    """Raised inside a node to refuse a request: travels to the client as a Refusal and is raised there as its own error."""

    def __init__(self, code: node_pb2.RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def own_version() -> node_pb2.ProtocolVersion:
    return node_pb2.ProtocolVersion(major=PROTOCOL_MAJOR, minor=PROTOCOL_MINOR, software=SOFTWARE)


def versions_meet(other: node_pb2.ProtocolVersion) -> bool:
    """Whether a peer of that version understands us. A higher minor version only adds to the protocol."""
    return bool(other.major == PROTOCOL_MAJOR)


def encode_message(
    header: node_pb2.Request | node_pb2.Reply, tensors: Sequence[Tensor] = (), wire: WireFormat | None = None
) -> list[Buffer]:
    """The message as buffers to be written one after another. Sets header.tensors. wire: as for encode_tensor."""
    parts: list[Buffer] = []
    for tensor in tensors:
        tensor_header, raw = encode_tensor(tensor, wire)
        header.tensors.append(tensor_header)
        parts.append(raw)
    encoded = header.SerializeToString()
    return [_LENGTH.pack(len(encoded)) + encoded, *parts]


def decode_message(message: Buffer, kind: type[Header]) -> tuple[Header, list[Tensor]]:
    """Header and tensors of a message. BadRequest, naming what is wrong, for anything malformed."""
    view = memoryview(message)
    if len(view) < _LENGTH.size:
        raise BadRequest(f"message of {len(view)} bytes is too short")
    (length,) = _LENGTH.unpack_from(view)
    if length > min(MAX_HEADER_BYTES, len(view) - _LENGTH.size):
        raise BadRequest(f"message header of {length} bytes does not fit a message of {len(view)} bytes")
    try:
        header = kind.FromString(bytes(view[_LENGTH.size : _LENGTH.size + length]))
    except DecodeError as error:
        raise BadRequest("message header is not valid protobuf") from error
    if len(header.tensors) > MAX_TENSORS:
        raise BadRequest(f"message declares {len(header.tensors)} tensors, at most {MAX_TENSORS} are allowed")
    return header, decode_tensors(header.tensors, view[_LENGTH.size + length :])


def refusal_of(error: SwarmError) -> node_pb2.Reply:
    """The reply that tells a client of an error inside a node."""
    code = error.code if isinstance(error, Refused) else node_pb2.THE_REQUEST_IS_WRONG
    return node_pb2.Reply(refusal=node_pb2.Refusal(code=code, message=str(error)[:500]))


def error_of(refusal: node_pb2.Refusal, peer: str) -> SwarmError:
    """The error to raise for a refusal that came from peer."""
    sentence = (
        node_pb2.RefusalCode.Name(refusal.code)
        if refusal.code in node_pb2.RefusalCode.values()
        else "THE_REQUEST_IS_WRONG"
    )
    kind = _ERROR_OF_CODE.get(refusal.code, BadRequest)
    reason = "".join(character for character in refusal.message[:500] if character.isprintable())
    return kind(f"peer {peer[-8:]} refused ({sentence.lower().replace('_', ' ')}): {reason}")
