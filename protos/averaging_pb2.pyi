from protos import node_pb2 as _node_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExchangeRefusalCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    THE_JOINING_IS_MALFORMED: _ClassVar[ExchangeRefusalCode]
    THIS_ROUND_IS_OVER: _ClassVar[ExchangeRefusalCode]
    THIS_ROUND_DID_NOT_BEGIN: _ClassVar[ExchangeRefusalCode]
    THE_PLANS_DIFFER: _ClassVar[ExchangeRefusalCode]
    THE_EXCHANGE_VERSIONS_DIFFER: _ClassVar[ExchangeRefusalCode]
THE_JOINING_IS_MALFORMED: ExchangeRefusalCode
THIS_ROUND_IS_OVER: ExchangeRefusalCode
THIS_ROUND_DID_NOT_BEGIN: ExchangeRefusalCode
THE_PLANS_DIFFER: ExchangeRefusalCode
THE_EXCHANGE_VERSIONS_DIFFER: ExchangeRefusalCode

class ExchangeRequest(_message.Message):
    __slots__ = ("tensors", "join", "contribution")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    join: JoinExchange
    contribution: ExchangeChunk
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ..., join: _Optional[_Union[JoinExchange, _Mapping]] = ..., contribution: _Optional[_Union[ExchangeChunk, _Mapping]] = ...) -> None: ...

class ExchangeReply(_message.Message):
    __slots__ = ("tensors", "refusal", "joined", "reduced")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    refusal: ExchangeRefusal
    joined: ExchangeJoined
    reduced: ExchangeChunk
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ..., refusal: _Optional[_Union[ExchangeRefusal, _Mapping]] = ..., joined: _Optional[_Union[ExchangeJoined, _Mapping]] = ..., reduced: _Optional[_Union[ExchangeChunk, _Mapping]] = ...) -> None: ...

class JoinExchange(_message.Message):
    __slots__ = ("version", "round_id", "plan_digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: _node_pb2.ProtocolVersion
    round_id: bytes
    plan_digest: bytes
    def __init__(self, version: _Optional[_Union[_node_pb2.ProtocolVersion, _Mapping]] = ..., round_id: _Optional[bytes] = ..., plan_digest: _Optional[bytes] = ...) -> None: ...

class ExchangeJoined(_message.Message):
    __slots__ = ("round_id",)
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    round_id: bytes
    def __init__(self, round_id: _Optional[bytes] = ...) -> None: ...

class ExchangeChunk(_message.Message):
    __slots__ = ("round_id", "index")
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    round_id: bytes
    index: int
    def __init__(self, round_id: _Optional[bytes] = ..., index: _Optional[int] = ...) -> None: ...

class ExchangeRefusal(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ExchangeRefusalCode
    message: str
    def __init__(self, code: _Optional[_Union[ExchangeRefusalCode, str]] = ..., message: _Optional[str] = ...) -> None: ...
