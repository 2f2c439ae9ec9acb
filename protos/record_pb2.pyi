from protos import node_pb2 as _node_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARD_RECORD: _ClassVar[RecordKind]
    MEMBER_RECORD: _ClassVar[RecordKind]

class ShardState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARD_STATE_UNSPECIFIED: _ClassVar[ShardState]
    JOINING: _ClassVar[ShardState]
    ONLINE: _ClassVar[ShardState]
    LEAVING: _ClassVar[ShardState]
SHARD_RECORD: RecordKind
MEMBER_RECORD: RecordKind
SHARD_STATE_UNSPECIFIED: ShardState
JOINING: ShardState
ONLINE: ShardState
LEAVING: ShardState

class SignedRecord(_message.Message):
    __slots__ = ("payload", "signature", "kind")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    kind: RecordKind
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., kind: _Optional[_Union[RecordKind, str]] = ...) -> None: ...

class ShardRecord(_message.Message):
    __slots__ = ("peer_id", "expires_at_ms", "version", "model_name", "source", "model_digest", "num_blocks", "start", "end", "block_digests", "numeric_class", "state", "started_at_ms", "decode_s_per_block", "prefill_tokens_per_s", "addresses")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    BLOCK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    expires_at_ms: int
    version: _node_pb2.ProtocolVersion
    model_name: str
    source: str
    model_digest: bytes
    num_blocks: int
    start: int
    end: int
    block_digests: _containers.RepeatedScalarFieldContainer[bytes]
    numeric_class: str
    state: ShardState
    started_at_ms: int
    decode_s_per_block: float
    prefill_tokens_per_s: float
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer_id: _Optional[str] = ..., expires_at_ms: _Optional[int] = ..., version: _Optional[_Union[_node_pb2.ProtocolVersion, _Mapping]] = ..., model_name: _Optional[str] = ..., source: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., block_digests: _Optional[_Iterable[bytes]] = ..., numeric_class: _Optional[str] = ..., state: _Optional[_Union[ShardState, str]] = ..., started_at_ms: _Optional[int] = ..., decode_s_per_block: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class SavedPlace(_message.Message):
    __slots__ = ("epoch", "lineage", "era")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    ERA_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lineage: bytes
    era: int
    def __init__(self, epoch: _Optional[int] = ..., lineage: _Optional[bytes] = ..., era: _Optional[int] = ...) -> None: ...

class SavedCopy(_message.Message):
    __slots__ = ("stage", "place")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    stage: int
    place: SavedPlace
    def __init__(self, stage: _Optional[int] = ..., place: _Optional[_Union[SavedPlace, _Mapping]] = ...) -> None: ...

class MemberRecord(_message.Message):
    __slots__ = ("peer_id", "expires_at_ms", "version", "run_id", "stage", "state", "epoch", "lineage", "tokens_per_s", "bandwidth_bytes_per_s", "loss", "addresses", "is_keeper", "era", "saved", "copies")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    IS_KEEPER_FIELD_NUMBER: _ClassVar[int]
    ERA_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    expires_at_ms: int
    version: _node_pb2.ProtocolVersion
    run_id: bytes
    stage: int
    state: ShardState
    epoch: int
    lineage: bytes
    tokens_per_s: float
    bandwidth_bytes_per_s: float
    loss: float
    addresses: _containers.RepeatedScalarFieldContainer[str]
    is_keeper: bool
    era: int
    saved: _containers.RepeatedCompositeFieldContainer[SavedPlace]
    copies: _containers.RepeatedCompositeFieldContainer[SavedCopy]
    def __init__(self, peer_id: _Optional[str] = ..., expires_at_ms: _Optional[int] = ..., version: _Optional[_Union[_node_pb2.ProtocolVersion, _Mapping]] = ..., run_id: _Optional[bytes] = ..., stage: _Optional[int] = ..., state: _Optional[_Union[ShardState, str]] = ..., epoch: _Optional[int] = ..., lineage: _Optional[bytes] = ..., tokens_per_s: _Optional[float] = ..., bandwidth_bytes_per_s: _Optional[float] = ..., loss: _Optional[float] = ..., addresses: _Optional[_Iterable[str]] = ..., is_keeper: bool = ..., era: _Optional[int] = ..., saved: _Optional[_Iterable[_Union[SavedPlace, _Mapping]]] = ..., copies: _Optional[_Iterable[_Union[SavedCopy, _Mapping]]] = ...) -> None: ...
