from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SignedRunSpec(_message.Message):
    __slots__ = ("payload", "signature", "owner")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    owner: str
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., owner: _Optional[str] = ...) -> None: ...

class RunSpec(_message.Message):
    __slots__ = ("name", "config_json", "weights", "seed", "initial_digests", "tokenizer", "stage_ends", "sequence_length", "target_batch", "microbatch", "optimizer", "precision", "dropout", "averaging", "delay", "data", "held_out", "eval_every", "num_epochs", "min_replicas", "keepers", "checkpoint_every", "lora")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    INITIAL_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    STAGE_ENDS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TARGET_BATCH_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    AVERAGING_FIELD_NUMBER: _ClassVar[int]
    DELAY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    EVAL_EVERY_FIELD_NUMBER: _ClassVar[int]
    NUM_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    KEEPERS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    name: str
    config_json: bytes
    weights: str
    seed: int
    initial_digests: _containers.RepeatedScalarFieldContainer[bytes]
    tokenizer: _containers.RepeatedCompositeFieldContainer[TokenizerFile]
    stage_ends: _containers.RepeatedScalarFieldContainer[int]
    sequence_length: int
    target_batch: int
    microbatch: int
    optimizer: Optimizer
    precision: str
    dropout: float
    averaging: str
    delay: int
    data: RunData
    held_out: RunData
    eval_every: int
    num_epochs: int
    min_replicas: int
    keepers: int
    checkpoint_every: int
    lora: Lora
    def __init__(self, name: _Optional[str] = ..., config_json: _Optional[bytes] = ..., weights: _Optional[str] = ..., seed: _Optional[int] = ..., initial_digests: _Optional[_Iterable[bytes]] = ..., tokenizer: _Optional[_Iterable[_Union[TokenizerFile, _Mapping]]] = ..., stage_ends: _Optional[_Iterable[int]] = ..., sequence_length: _Optional[int] = ..., target_batch: _Optional[int] = ..., microbatch: _Optional[int] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., precision: _Optional[str] = ..., dropout: _Optional[float] = ..., averaging: _Optional[str] = ..., delay: _Optional[int] = ..., data: _Optional[_Union[RunData, _Mapping]] = ..., held_out: _Optional[_Union[RunData, _Mapping]] = ..., eval_every: _Optional[int] = ..., num_epochs: _Optional[int] = ..., min_replicas: _Optional[int] = ..., keepers: _Optional[int] = ..., checkpoint_every: _Optional[int] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "target_modules", "frozen_precision")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    FROZEN_PRECISION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    frozen_precision: str
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ..., frozen_precision: _Optional[str] = ...) -> None: ...

class TokenizerFile(_message.Message):
    __slots__ = ("name", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("lr", "beta1", "beta2", "eps", "weight_decay", "clip_norm", "schedule", "warmup_epochs", "min_lr_ratio")
    LR_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    MIN_LR_RATIO_FIELD_NUMBER: _ClassVar[int]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    schedule: str
    warmup_epochs: int
    min_lr_ratio: float
    def __init__(self, lr: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., clip_norm: _Optional[float] = ..., schedule: _Optional[str] = ..., warmup_epochs: _Optional[int] = ..., min_lr_ratio: _Optional[float] = ...) -> None: ...

class RunData(_message.Message):
    __slots__ = ("kind", "source", "files", "text_field", "documents_per_chunk", "manifest_digest", "num_samples")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_PER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    source: str
    files: _containers.RepeatedScalarFieldContainer[str]
    text_field: str
    documents_per_chunk: int
    manifest_digest: bytes
    num_samples: int
    def __init__(self, kind: _Optional[str] = ..., source: _Optional[str] = ..., files: _Optional[_Iterable[str]] = ..., text_field: _Optional[str] = ..., documents_per_chunk: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., num_samples: _Optional[int] = ...) -> None: ...
