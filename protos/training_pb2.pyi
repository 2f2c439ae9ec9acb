from protos import node_pb2 as _node_pb2
from protos import run_pb2 as _run_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MemberMessage(_message.Message):
    __slots__ = ("introduction", "lead", "hello", "redirect", "where", "lease", "done", "failed", "confirm", "void", "prepare", "abort", "report", "round_failed", "commit", "committed", "excluded", "get_place", "state", "refusal", "get_artifact", "artifact", "get_saved", "saved", "get_pieces", "get_snapshot", "ordered", "put_orders", "standing", "put_artifact")
    INTRODUCTION_FIELD_NUMBER: _ClassVar[int]
    LEAD_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FAILED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    GET_PLACE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    GET_ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    GET_SAVED_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    GET_PIECES_FIELD_NUMBER: _ClassVar[int]
    GET_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ORDERED_FIELD_NUMBER: _ClassVar[int]
    PUT_ORDERS_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    PUT_ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    introduction: Introduction
    lead: Lead
    hello: Hello
    redirect: Redirect
    where: Where
    lease: Lease
    done: Done
    failed: Failed
    confirm: Confirm
    void: Void
    prepare: Prepare
    abort: Abort
    report: Report
    round_failed: RoundFailed
    commit: Commit
    committed: Committed
    excluded: Excluded
    get_place: GetPlace
    state: StateHeader
    refusal: _node_pb2.Refusal
    get_artifact: GetArtifact
    artifact: Artifact
    get_saved: GetSaved
    saved: SavedState
    get_pieces: GetPieces
    get_snapshot: GetSnapshot
    ordered: Ordered
    put_orders: PutOrders
    standing: Standing
    put_artifact: PutArtifact
    def __init__(self, introduction: _Optional[_Union[Introduction, _Mapping]] = ..., lead: _Optional[_Union[Lead, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., redirect: _Optional[_Union[Redirect, _Mapping]] = ..., where: _Optional[_Union[Where, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., confirm: _Optional[_Union[Confirm, _Mapping]] = ..., void: _Optional[_Union[Void, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., round_failed: _Optional[_Union[RoundFailed, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., excluded: _Optional[_Union[Excluded, _Mapping]] = ..., get_place: _Optional[_Union[GetPlace, _Mapping]] = ..., state: _Optional[_Union[StateHeader, _Mapping]] = ..., refusal: _Optional[_Union[_node_pb2.Refusal, _Mapping]] = ..., get_artifact: _Optional[_Union[GetArtifact, _Mapping]] = ..., artifact: _Optional[_Union[Artifact, _Mapping]] = ..., get_saved: _Optional[_Union[GetSaved, _Mapping]] = ..., saved: _Optional[_Union[SavedState, _Mapping]] = ..., get_pieces: _Optional[_Union[GetPieces, _Mapping]] = ..., get_snapshot: _Optional[_Union[GetSnapshot, _Mapping]] = ..., ordered: _Optional[_Union[Ordered, _Mapping]] = ..., put_orders: _Optional[_Union[PutOrders, _Mapping]] = ..., standing: _Optional[_Union[Standing, _Mapping]] = ..., put_artifact: _Optional[_Union[PutArtifact, _Mapping]] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("version", "run_id", "stage", "is_request", "to_stage")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    IS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    version: _node_pb2.ProtocolVersion
    run_id: bytes
    stage: int
    is_request: bool
    to_stage: int
    def __init__(self, version: _Optional[_Union[_node_pb2.ProtocolVersion, _Mapping]] = ..., run_id: _Optional[bytes] = ..., stage: _Optional[int] = ..., is_request: bool = ..., to_stage: _Optional[int] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("epoch", "lineage", "era")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    ERA_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lineage: bytes
    era: int
    def __init__(self, epoch: _Optional[int] = ..., lineage: _Optional[bytes] = ..., era: _Optional[int] = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("number", "peer")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    number: int
    peer: str
    def __init__(self, number: _Optional[int] = ..., peer: _Optional[str] = ...) -> None: ...

class UnitResult(_message.Message):
    __slots__ = ("unit", "num_loss_tokens", "loss_sum")
    UNIT_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    unit: int
    num_loss_tokens: int
    loss_sum: float
    def __init__(self, unit: _Optional[int] = ..., num_loss_tokens: _Optional[int] = ..., loss_sum: _Optional[float] = ...) -> None: ...

class Owner(_message.Message):
    __slots__ = ("peer", "ledger_id")
    PEER_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    peer: str
    ledger_id: int
    def __init__(self, peer: _Optional[str] = ..., ledger_id: _Optional[int] = ...) -> None: ...

class GroupMember(_message.Message):
    __slots__ = ("peer", "has_gradient", "share")
    PEER_FIELD_NUMBER: _ClassVar[int]
    HAS_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    has_gradient: bool
    share: int
    def __init__(self, peer: _Optional[str] = ..., has_gradient: bool = ..., share: _Optional[int] = ...) -> None: ...

class Rate(_message.Message):
    __slots__ = ("peer", "bytes_per_s")
    PEER_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    peer: str
    bytes_per_s: int
    def __init__(self, peer: _Optional[str] = ..., bytes_per_s: _Optional[int] = ...) -> None: ...

class Lead(_message.Message):
    __slots__ = ("place", "term")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("place", "term", "stage", "ledger_id", "units", "capacity", "results", "is_reachable", "early_ledger_id", "measured", "is_ready")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    IS_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    EARLY_LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    stage: int
    ledger_id: int
    units: _containers.RepeatedScalarFieldContainer[int]
    capacity: int
    results: _containers.RepeatedCompositeFieldContainer[UnitResult]
    is_reachable: bool
    early_ledger_id: int
    measured: _containers.RepeatedCompositeFieldContainer[Rate]
    is_ready: bool
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., stage: _Optional[int] = ..., ledger_id: _Optional[int] = ..., units: _Optional[_Iterable[int]] = ..., capacity: _Optional[int] = ..., results: _Optional[_Iterable[_Union[UnitResult, _Mapping]]] = ..., is_reachable: bool = ..., early_ledger_id: _Optional[int] = ..., measured: _Optional[_Iterable[_Union[Rate, _Mapping]]] = ..., is_ready: bool = ...) -> None: ...

class Redirect(_message.Message):
    __slots__ = ("place", "term")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ...) -> None: ...

class Where(_message.Message):
    __slots__ = ("place",)
    PLACE_FIELD_NUMBER: _ClassVar[int]
    place: Place
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("place", "term", "unit", "serial", "owners")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    unit: int
    serial: int
    owners: _containers.RepeatedCompositeFieldContainer[Owner]
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., unit: _Optional[int] = ..., serial: _Optional[int] = ..., owners: _Optional[_Iterable[_Union[Owner, _Mapping]]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("place", "term", "serial", "ledgers", "ends_ledger", "result")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    ENDS_LEDGER_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    serial: int
    ledgers: _containers.RepeatedScalarFieldContainer[int]
    ends_ledger: int
    result: UnitResult
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., serial: _Optional[int] = ..., ledgers: _Optional[_Iterable[int]] = ..., ends_ledger: _Optional[int] = ..., result: _Optional[_Union[UnitResult, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("place", "term", "unit", "serial", "culprit", "reason")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    CULPRIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    unit: int
    serial: int
    culprit: str
    reason: str
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., unit: _Optional[int] = ..., serial: _Optional[int] = ..., culprit: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Confirm(_message.Message):
    __slots__ = ("place", "term", "unit", "ledger_id", "is_first")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    IS_FIRST_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    unit: int
    ledger_id: int
    is_first: bool
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., unit: _Optional[int] = ..., ledger_id: _Optional[int] = ..., is_first: bool = ...) -> None: ...

class Void(_message.Message):
    __slots__ = ("place", "term", "ledger_id")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    ledger_id: int
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., ledger_id: _Optional[int] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("place", "term", "attempt", "group", "ledger_id", "units")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    attempt: int
    group: _containers.RepeatedCompositeFieldContainer[GroupMember]
    ledger_id: int
    units: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., attempt: _Optional[int] = ..., group: _Optional[_Iterable[_Union[GroupMember, _Mapping]]] = ..., ledger_id: _Optional[int] = ..., units: _Optional[_Iterable[int]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("place", "term", "attempt")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    attempt: int
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., attempt: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("place", "term", "attempt", "digest", "square_norm")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SQUARE_NORM_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    attempt: int
    digest: bytes
    square_norm: float
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., attempt: _Optional[int] = ..., digest: _Optional[bytes] = ..., square_norm: _Optional[float] = ...) -> None: ...

class RoundFailed(_message.Message):
    __slots__ = ("place", "term", "attempt", "culprits", "is_mismatch")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CULPRITS_FIELD_NUMBER: _ClassVar[int]
    IS_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    attempt: int
    culprits: _containers.RepeatedScalarFieldContainer[str]
    is_mismatch: bool
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., attempt: _Optional[int] = ..., culprits: _Optional[_Iterable[str]] = ..., is_mismatch: bool = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("epoch", "parent", "term", "attempt", "num_loss_tokens", "norm", "is_skipped", "digests", "members", "loss_sum", "eval_loss_sum", "num_eval_tokens", "era", "orders", "signature")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    IS_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    EVAL_LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    NUM_EVAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ERA_FIELD_NUMBER: _ClassVar[int]
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    parent: bytes
    term: Term
    attempt: int
    num_loss_tokens: int
    norm: float
    is_skipped: bool
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    members: _containers.RepeatedCompositeFieldContainer[Replica]
    loss_sum: float
    eval_loss_sum: float
    num_eval_tokens: int
    era: int
    orders: bytes
    signature: bytes
    def __init__(self, epoch: _Optional[int] = ..., parent: _Optional[bytes] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., attempt: _Optional[int] = ..., num_loss_tokens: _Optional[int] = ..., norm: _Optional[float] = ..., is_skipped: bool = ..., digests: _Optional[_Iterable[bytes]] = ..., members: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., loss_sum: _Optional[float] = ..., eval_loss_sum: _Optional[float] = ..., num_eval_tokens: _Optional[int] = ..., era: _Optional[int] = ..., orders: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("peer", "stage")
    PEER_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    stage: int
    def __init__(self, peer: _Optional[str] = ..., stage: _Optional[int] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("place",)
    PLACE_FIELD_NUMBER: _ClassVar[int]
    place: Place
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ...) -> None: ...

class Excluded(_message.Message):
    __slots__ = ("place", "term", "reason")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    place: Place
    term: Term
    reason: str
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., term: _Optional[_Union[Term, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class GetPlace(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSnapshot(_message.Message):
    __slots__ = ("at_least",)
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    at_least: Place
    def __init__(self, at_least: _Optional[_Union[Place, _Mapping]] = ...) -> None: ...

class StateHeader(_message.Message):
    __slots__ = ("place", "commit", "num_parameters", "num_steps", "digest")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    place: Place
    commit: Commit
    num_parameters: int
    num_steps: int
    digest: bytes
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., num_parameters: _Optional[int] = ..., num_steps: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class GetArtifact(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class PutArtifact(_message.Message):
    __slots__ = ("digest", "num_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    num_bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Artifact(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class GetSaved(_message.Message):
    __slots__ = ("place",)
    PLACE_FIELD_NUMBER: _ClassVar[int]
    place: Place
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ...) -> None: ...

class SavedState(_message.Message):
    __slots__ = ("head_bytes",)
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    head_bytes: int
    def __init__(self, head_bytes: _Optional[int] = ...) -> None: ...

class GetPieces(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class SignedRunOrders(_message.Message):
    __slots__ = ("payload", "signature")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class RunOrders(_message.Message):
    __slots__ = ("run_id", "serial", "is_paused", "amendments", "eval_epochs", "rollback")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    IS_PAUSED_FIELD_NUMBER: _ClassVar[int]
    AMENDMENTS_FIELD_NUMBER: _ClassVar[int]
    EVAL_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    serial: int
    is_paused: bool
    amendments: _containers.RepeatedCompositeFieldContainer[Amendment]
    eval_epochs: _containers.RepeatedScalarFieldContainer[int]
    rollback: Place
    def __init__(self, run_id: _Optional[bytes] = ..., serial: _Optional[int] = ..., is_paused: bool = ..., amendments: _Optional[_Iterable[_Union[Amendment, _Mapping]]] = ..., eval_epochs: _Optional[_Iterable[int]] = ..., rollback: _Optional[_Union[Place, _Mapping]] = ...) -> None: ...

class Amendment(_message.Message):
    __slots__ = ("epoch", "lr", "target_batch", "num_epochs", "data")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    TARGET_BATCH_FIELD_NUMBER: _ClassVar[int]
    NUM_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lr: float
    target_batch: int
    num_epochs: int
    data: _run_pb2.RunData
    def __init__(self, epoch: _Optional[int] = ..., lr: _Optional[float] = ..., target_batch: _Optional[int] = ..., num_epochs: _Optional[int] = ..., data: _Optional[_Union[_run_pb2.RunData, _Mapping]] = ...) -> None: ...

class Ordered(_message.Message):
    __slots__ = ("orders",)
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    orders: bytes
    def __init__(self, orders: _Optional[bytes] = ...) -> None: ...

class PutOrders(_message.Message):
    __slots__ = ("orders",)
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    orders: bytes
    def __init__(self, orders: _Optional[bytes] = ...) -> None: ...

class Standing(_message.Message):
    __slots__ = ("place", "commit", "orders", "eval_epoch", "eval_loss", "idle_s")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    EVAL_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVAL_LOSS_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    place: Place
    commit: Commit
    orders: bytes
    eval_epoch: int
    eval_loss: float
    idle_s: float
    def __init__(self, place: _Optional[_Union[Place, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., orders: _Optional[bytes] = ..., eval_epoch: _Optional[int] = ..., eval_loss: _Optional[float] = ..., idle_s: _Optional[float] = ...) -> None: ...
