from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RefusalCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    THE_REQUEST_IS_WRONG: _ClassVar[RefusalCode]
    THIS_NODE_HAS_NO_ROOM: _ClassVar[RefusalCode]
    THIS_NODE_IS_LEAVING: _ClassVar[RefusalCode]
    THE_BLOCKS_ARE_NOT_SERVED_HERE: _ClassVar[RefusalCode]
    THE_WEIGHTS_DIFFER: _ClassVar[RefusalCode]
    THE_VERSIONS_DO_NOT_MEET: _ClassVar[RefusalCode]
    THE_SESSION_IS_UNKNOWN: _ClassVar[RefusalCode]
    THE_CACHE_IS_TOO_SMALL: _ClassVar[RefusalCode]
    THE_COMPUTATION_FAILED: _ClassVar[RefusalCode]
    THE_MICROBATCH_IS_UNKNOWN: _ClassVar[RefusalCode]
    THE_MICROBATCH_IS_TOO_LARGE: _ClassVar[RefusalCode]
    THE_EPOCH_IS_ANOTHER: _ClassVar[RefusalCode]
    THIS_SESSION_MADE_ROOM: _ClassVar[RefusalCode]
    THE_RUN_IS_ANOTHER: _ClassVar[RefusalCode]
THE_REQUEST_IS_WRONG: RefusalCode
THIS_NODE_HAS_NO_ROOM: RefusalCode
THIS_NODE_IS_LEAVING: RefusalCode
THE_BLOCKS_ARE_NOT_SERVED_HERE: RefusalCode
THE_WEIGHTS_DIFFER: RefusalCode
THE_VERSIONS_DO_NOT_MEET: RefusalCode
THE_SESSION_IS_UNKNOWN: RefusalCode
THE_CACHE_IS_TOO_SMALL: RefusalCode
THE_COMPUTATION_FAILED: RefusalCode
THE_MICROBATCH_IS_UNKNOWN: RefusalCode
THE_MICROBATCH_IS_TOO_LARGE: RefusalCode
THE_EPOCH_IS_ANOTHER: RefusalCode
THIS_SESSION_MADE_ROOM: RefusalCode
THE_RUN_IS_ANOTHER: RefusalCode

class ProtocolVersion(_message.Message):
    __slots__ = ("major", "minor", "software")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    software: str
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., software: _Optional[str] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("tensors", "open", "step", "status", "open_microbatches", "forward", "backward", "open_stage", "stage_forward", "stage_backward")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    OPEN_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPEN_STAGE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FORWARD_FIELD_NUMBER: _ClassVar[int]
    STAGE_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    open: OpenSession
    step: Step
    status: GetNodeStatus
    open_microbatches: OpenMicrobatches
    forward: Forward
    backward: Backward
    open_stage: OpenStage
    stage_forward: StageForward
    stage_backward: StageBackward
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ..., open: _Optional[_Union[OpenSession, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., status: _Optional[_Union[GetNodeStatus, _Mapping]] = ..., open_microbatches: _Optional[_Union[OpenMicrobatches, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., open_stage: _Optional[_Union[OpenStage, _Mapping]] = ..., stage_forward: _Optional[_Union[StageForward, _Mapping]] = ..., stage_backward: _Optional[_Union[StageBackward, _Mapping]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("tensors", "refusal", "opened", "step", "status", "microbatches_opened", "forward", "backward", "stage_opened", "stage_forward", "stage_backward")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_OPENED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    STAGE_OPENED_FIELD_NUMBER: _ClassVar[int]
    STAGE_FORWARD_FIELD_NUMBER: _ClassVar[int]
    STAGE_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    refusal: Refusal
    opened: SessionOpened
    step: StepDone
    status: NodeStatus
    microbatches_opened: MicrobatchesOpened
    forward: ForwardDone
    backward: BackwardDone
    stage_opened: StageOpened
    stage_forward: StageForwardDone
    stage_backward: StageBackwardDone
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., opened: _Optional[_Union[SessionOpened, _Mapping]] = ..., step: _Optional[_Union[StepDone, _Mapping]] = ..., status: _Optional[_Union[NodeStatus, _Mapping]] = ..., microbatches_opened: _Optional[_Union[MicrobatchesOpened, _Mapping]] = ..., forward: _Optional[_Union[ForwardDone, _Mapping]] = ..., backward: _Optional[_Union[BackwardDone, _Mapping]] = ..., stage_opened: _Optional[_Union[StageOpened, _Mapping]] = ..., stage_forward: _Optional[_Union[StageForwardDone, _Mapping]] = ..., stage_backward: _Optional[_Union[StageBackwardDone, _Mapping]] = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("version", "session_id", "model_digest", "start", "end", "block_digests", "batch", "max_length")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    BLOCK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    session_id: bytes
    model_digest: bytes
    start: int
    end: int
    block_digests: _containers.RepeatedScalarFieldContainer[bytes]
    batch: int
    max_length: int
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., session_id: _Optional[bytes] = ..., model_digest: _Optional[bytes] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., block_digests: _Optional[_Iterable[bytes]] = ..., batch: _Optional[int] = ..., max_length: _Optional[int] = ...) -> None: ...

class SessionOpened(_message.Message):
    __slots__ = ("version", "numeric_class", "max_tokens_per_step", "idle_timeout_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    numeric_class: str
    max_tokens_per_step: int
    idle_timeout_s: int
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., numeric_class: _Optional[str] = ..., max_tokens_per_step: _Optional[int] = ..., idle_timeout_s: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("session_id", "session_version", "position", "rewind_to", "reorder", "no_reply_tensor")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_VERSION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REWIND_TO_FIELD_NUMBER: _ClassVar[int]
    REORDER_FIELD_NUMBER: _ClassVar[int]
    NO_REPLY_TENSOR_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    session_version: int
    position: int
    rewind_to: int
    reorder: _containers.RepeatedScalarFieldContainer[int]
    no_reply_tensor: bool
    def __init__(self, session_id: _Optional[bytes] = ..., session_version: _Optional[int] = ..., position: _Optional[int] = ..., rewind_to: _Optional[int] = ..., reorder: _Optional[_Iterable[int]] = ..., no_reply_tensor: bool = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("session_version", "position", "compute_us", "queue_us")
    SESSION_VERSION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    session_version: int
    position: int
    compute_us: int
    queue_us: int
    def __init__(self, session_version: _Optional[int] = ..., position: _Optional[int] = ..., compute_us: _Optional[int] = ..., queue_us: _Optional[int] = ...) -> None: ...

class OpenMicrobatches(_message.Message):
    __slots__ = ("version", "model_digest", "start", "end", "block_digests")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    BLOCK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    model_digest: bytes
    start: int
    end: int
    block_digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., model_digest: _Optional[bytes] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., block_digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class MicrobatchesOpened(_message.Message):
    __slots__ = ("version", "numeric_class", "max_tokens", "idle_timeout_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    numeric_class: str
    max_tokens: int
    idle_timeout_s: int
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., numeric_class: _Optional[str] = ..., max_tokens: _Optional[int] = ..., idle_timeout_s: _Optional[int] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("microbatch_id", "wants_gradients", "has_mask", "has_positions", "dropout_seed")
    MICROBATCH_ID_FIELD_NUMBER: _ClassVar[int]
    WANTS_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    HAS_MASK_FIELD_NUMBER: _ClassVar[int]
    HAS_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    microbatch_id: bytes
    wants_gradients: bool
    has_mask: bool
    has_positions: bool
    dropout_seed: int
    def __init__(self, microbatch_id: _Optional[bytes] = ..., wants_gradients: bool = ..., has_mask: bool = ..., has_positions: bool = ..., dropout_seed: _Optional[int] = ...) -> None: ...

class ForwardDone(_message.Message):
    __slots__ = ("microbatch_id", "is_stashed", "compute_us", "queue_us")
    MICROBATCH_ID_FIELD_NUMBER: _ClassVar[int]
    IS_STASHED_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    microbatch_id: bytes
    is_stashed: bool
    compute_us: int
    queue_us: int
    def __init__(self, microbatch_id: _Optional[bytes] = ..., is_stashed: bool = ..., compute_us: _Optional[int] = ..., queue_us: _Optional[int] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("microbatch_id", "again")
    MICROBATCH_ID_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    microbatch_id: bytes
    again: Forward
    def __init__(self, microbatch_id: _Optional[bytes] = ..., again: _Optional[_Union[Forward, _Mapping]] = ...) -> None: ...

class BackwardDone(_message.Message):
    __slots__ = ("microbatch_id", "was_stashed", "compute_us", "queue_us")
    MICROBATCH_ID_FIELD_NUMBER: _ClassVar[int]
    WAS_STASHED_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    microbatch_id: bytes
    was_stashed: bool
    compute_us: int
    queue_us: int
    def __init__(self, microbatch_id: _Optional[bytes] = ..., was_stashed: bool = ..., compute_us: _Optional[int] = ..., queue_us: _Optional[int] = ...) -> None: ...

class OpenStage(_message.Message):
    __slots__ = ("version", "run_id", "stage")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    run_id: bytes
    stage: int
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., run_id: _Optional[bytes] = ..., stage: _Optional[int] = ...) -> None: ...

class StageOpened(_message.Message):
    __slots__ = ("version", "max_tokens")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    max_tokens: int
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class StageForward(_message.Message):
    __slots__ = ("epoch", "lineage", "unit", "first_sample", "wants_gradients")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    FIRST_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    WANTS_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lineage: bytes
    unit: int
    first_sample: int
    wants_gradients: bool
    def __init__(self, epoch: _Optional[int] = ..., lineage: _Optional[bytes] = ..., unit: _Optional[int] = ..., first_sample: _Optional[int] = ..., wants_gradients: bool = ...) -> None: ...

class StageForwardDone(_message.Message):
    __slots__ = ("unit",)
    UNIT_FIELD_NUMBER: _ClassVar[int]
    unit: int
    def __init__(self, unit: _Optional[int] = ...) -> None: ...

class StageBackward(_message.Message):
    __slots__ = ("epoch", "lineage", "term_number", "term_peer", "ledger_id", "unit", "again")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    TERM_NUMBER_FIELD_NUMBER: _ClassVar[int]
    TERM_PEER_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lineage: bytes
    term_number: int
    term_peer: str
    ledger_id: int
    unit: int
    again: StageForward
    def __init__(self, epoch: _Optional[int] = ..., lineage: _Optional[bytes] = ..., term_number: _Optional[int] = ..., term_peer: _Optional[str] = ..., ledger_id: _Optional[int] = ..., unit: _Optional[int] = ..., again: _Optional[_Union[StageForward, _Mapping]] = ...) -> None: ...

class StageBackwardDone(_message.Message):
    __slots__ = ("unit", "was_in_ledger", "is_finite")
    UNIT_FIELD_NUMBER: _ClassVar[int]
    WAS_IN_LEDGER_FIELD_NUMBER: _ClassVar[int]
    IS_FINITE_FIELD_NUMBER: _ClassVar[int]
    unit: int
    was_in_ledger: bool
    is_finite: bool
    def __init__(self, unit: _Optional[int] = ..., was_in_ledger: bool = ..., is_finite: bool = ...) -> None: ...

class GetNodeStatus(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("version", "model_name", "model_digest", "start", "end", "num_sessions", "cache_bytes_used", "cache_bytes_budget", "num_steps", "num_forwards", "num_backwards", "stash_bytes_used", "stash_bytes_budget", "num_batches", "num_found_tokens", "num_evicted_sessions")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_BUDGET_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_BACKWARDS_FIELD_NUMBER: _ClassVar[int]
    STASH_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    STASH_BYTES_BUDGET_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_FOUND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    model_name: str
    model_digest: bytes
    start: int
    end: int
    num_sessions: int
    cache_bytes_used: int
    cache_bytes_budget: int
    num_steps: int
    num_forwards: int
    num_backwards: int
    stash_bytes_used: int
    stash_bytes_budget: int
    num_batches: int
    num_found_tokens: int
    num_evicted_sessions: int
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., model_name: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., num_sessions: _Optional[int] = ..., cache_bytes_used: _Optional[int] = ..., cache_bytes_budget: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_forwards: _Optional[int] = ..., num_backwards: _Optional[int] = ..., stash_bytes_used: _Optional[int] = ..., stash_bytes_budget: _Optional[int] = ..., num_batches: _Optional[int] = ..., num_found_tokens: _Optional[int] = ..., num_evicted_sessions: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: RefusalCode
    message: str
    def __init__(self, code: _Optional[_Union[RefusalCode, str]] = ..., message: _Optional[str] = ...) -> None: ...
