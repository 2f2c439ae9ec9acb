"""RunSpec: the rules of one training run, fixed for ever and signed by the run's owner.

Self-certifying: the run id is the hash of the rules and the owner's key, so whoever has the id can check what a stranger hands him.
Pure: files are read by swarm.run_file, the DHT is swarm.p2p.directory's.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from google.protobuf.message import DecodeError

from protos import run_pb2
from swarm.epoch.messages import EARLY
from swarm.identity import Identity, public_key_of, verify_signature
from swarm.model_spec import DIGEST_BYTES, MAX_BLOCKS
from swarm.run_id import RUN_ID_BYTES, make_run_id, parse_run_id
from swarm.span import Span
from swarm.value_checks import (
    check_digests,
    check_number,
    check_one_of,
    check_text,
    check_whole,
    is_path_below,
    require,
)
from swarm.wire_format import WireFormat

__all__ = [
    "MAX_CONFIG_BYTES",
    "MAX_SPEC_BYTES",
    "MAX_STAGES",
    "RUN_ID_BYTES",
    "DataKind",
    "DataSpec",
    "FrozenPrecision",
    "LoraSettings",
    "OptimizerSettings",
    "Precision",
    "RunSpec",
    "Schedule",
    "certified_run_id",
    "data_from_wire",
    "data_to_wire",
    "open_spec",
    "parse_run_id",
    "sign_spec",
]

MAX_SPEC_BYTES = 24 * 1024
MAX_CONFIG_BYTES = 16 * 1024
MAX_STAGES = 256
MAX_TOKENIZER_FILES = 16
MAX_SEQUENCE_LENGTH = 2**20
MAX_TARGET_BATCH = 2**24
MAX_EPOCHS = 2**31 - 1
MAX_SAMPLES = 2**48
MAX_FILES = 1000
MAX_LORA_RANK = 1024
MAX_TARGET_MODULES = 64
SHA256_BYTES = 32
_SIGNATURE_TAG = b"shardswarm RunSpec 1\0"
_NUM_BLOCKS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)


class Precision(enum.StrEnum):
    """What blocks and ends compute in. Weights, gradients in the ledger and moments are fp32 in any case."""

    FP32 = "fp32"
    BF16 = "bf16"
    """bf16 autocast over fp32 master weights."""


class FrozenPrecision(enum.StrEnum):
    """In how many bits linears of frozen blocks keep their weights: numeric classes whose codes follow from the weights to the bit."""

    INT8 = "int8"
    INT4 = "int4"


class Schedule(enum.StrEnum):
    """How the learning rate goes after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter, 2019) with global-norm clipping and a learning rate by epoch."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of parameters with two or more dimensions; all others (norms, biases) decay by nothing."""
    clip_norm: float | None = 1.0
    """Largest global L2 norm of the mean gradient, over all stages and the ends together. None: no clipping."""
    schedule: Schedule = Schedule.COSINE
    warmup_epochs: int = 0
    min_lr_ratio: float = 0.1
    """The learning rate at the end of the run, as a part of lr; not for CONSTANT."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            check_number(name, getattr(self, name), "must be positive", lambda value: value > 0)
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), "must be in [0, 1)", lambda value: 0 <= value < 1)
        check_number("weight_decay", self.weight_decay, "must not be negative; 0 for none", lambda value: value >= 0)
        if self.clip_norm is not None:
            check_number(
                "clip_norm", self.clip_norm, "must be positive, or false for no clipping", lambda value: value > 0
            )
        check_one_of("schedule", self.schedule, Schedule)
        check_whole("warmup_epochs", self.warmup_epochs, 0, MAX_EPOCHS)
        check_number("min_lr_ratio", self.min_lr_ratio, "must be between 0 and 1", lambda value: 0 <= value <= 1)

    def lr_at(self, epoch: int, num_epochs: int) -> float:
        """The learning rate of the step that ends epoch (0, 1, ...) of a run of num_epochs.

        Rises linearly over the warm-up (its first step is lr / warmup_epochs), then falls to min_lr_ratio * lr.
        """
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1) / self.warmup_epochs
        rest = max(num_epochs - self.warmup_epochs, 1)
        done = min((epoch - self.warmup_epochs) / rest, 1.0)
        if self.schedule is Schedule.CONSTANT:
            return self.lr
        share = 1 - done if self.schedule is Schedule.LINEAR else 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * share)

    def clip_factor(self, norm: float) -> float:
        """What the mean gradient of global norm `norm` is multiplied by, as torch.nn.utils.clip_grad_norm_ does."""
        return 1.0 if self.clip_norm is None else min(1.0, self.clip_norm / (norm + 1e-6))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Adapters (Hu et al., 2021): a linear W of the blocks computes W x + alpha / rank * B A x, and only A and B are trained."""

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ()
    """Which linears: dotted names, or their ends, as PEFT has them; sorted. Empty until they are filled in: all of the blocks'."""
    frozen_precision: FrozenPrecision | None = None
    """Of the blocks' linears, which then compute in bf16 (QLoRA; Dettmers et al., 2023). None: weights as RunSpec.precision says."""

    def __post_init__(self) -> None:
        check_whole("lora.rank", self.rank, 1, MAX_LORA_RANK)
        check_number("lora.alpha", self.alpha, "must be positive", lambda value: value > 0)
        names = self.target_modules
        require(
            len(names) <= MAX_TARGET_MODULES,
            f"lora.target_modules are {len(names)}, at most {MAX_TARGET_MODULES} are allowed: name the ends that they share",
        )
        for name in names:
            require(
                isinstance(name, str) and len(name) <= 100 and _MODULE_NAME.fullmatch(name) is not None,
                f"lora.target_modules must be names of modules such as q_proj or self_attn.q_proj, got {name!r}",
            )
        require(len(set(names)) == len(names), "lora.target_modules must differ: name each once")
        if self.frozen_precision is not None:
            check_one_of("lora.frozen_precision", self.frozen_precision, FrozenPrecision)
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "target_modules", tuple(sorted(names)))

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.rank


class DataKind(enum.StrEnum):
    """Where samples come from."""

    TEXT = "text"
    """Plain text files, packed; a document is a file."""
    JSONL = "jsonl"
    PARQUET = "parquet"
    OWN = "own"
    """Every trainer fills its leases from text of its own, which never leaves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Training or held-out data. The manifest names every chunk by digest, so that all trainers see the same samples."""

    kind: DataKind
    source: str = ""
    """A folder or file (the last parts of the path, for people) or hub id, where a trainer finds the files unless told otherwise."""
    files: tuple[str, ...] = ()
    """Paths below the source, in order."""
    text_field: str = "text"
    """Of jsonl and parquet rows; "messages" holds chats, and only the assistant's words are learned."""
    documents_per_chunk: int = 256
    manifest_digest: bytes = b""
    """16 bytes; empty for OWN."""
    num_samples: int = 0
    """0 for OWN."""

    def __post_init__(self) -> None:
        check_one_of("kind", self.kind, DataKind)
        check_text("source", self.source)
        check_text("text_field", self.text_field, at_least=1)
        check_whole("documents_per_chunk", self.documents_per_chunk, 1, 2**20)
        check_whole("num_samples", self.num_samples, 0, MAX_SAMPLES)
        require(
            len(self.files) <= MAX_FILES, f"files are {len(self.files)}, at most {MAX_FILES} are allowed: join some"
        )
        for file in self.files:
            require(
                is_path_below(file),
                f"files must be paths below the source, of printable characters, without .., got {file!r}",
            )
        require(len(set(self.files)) == len(self.files), "files must differ: name each once")
        check_digests("manifest_digest", [self.manifest_digest] if self.manifest_digest else [], DIGEST_BYTES)
        if self.kind is DataKind.OWN:
            require(
                not (self.files or self.manifest_digest or self.num_samples),
                "data of kind own stays with each trainer: leave out files, manifest_digest and num_samples",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """The rules of a run."""

    name: str
    config: Mapping[str, Any]
    """config.json of the model, whole."""
    weights: str = "random"
    """"random" (from `seed`), or a checkpoint as users name them: hub id, alias, folder."""
    seed: int = 0
    initial_digests: tuple[bytes, ...] = ()
    """Digest of the initial weights of each stage and, last, of the ends; 16 bytes each."""
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    """File name -> SHA-256 (32 bytes)."""
    stages: tuple[Span, ...]
    sequence_length: int
    target_batch: int
    """Sequences per epoch, swarm-wide."""
    microbatch: int = 1
    """Most sequences that one microbatch has."""
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: Precision = Precision.BF16
    dropout: float = 0.0
    averaging: WireFormat = WireFormat.FP32
    delay: int = 0
    """Epochs between the weights that a gradient is computed with and those that it is applied to: 0 or 1."""
    data: DataSpec
    held_out: DataSpec | None = None
    eval_every: int = 0
    """Epochs between evaluations on held_out; 0: never."""
    min_replicas: int = 1
    """The first epoch waits until every stage, and the ends, have so many."""
    keepers: int = 2
    """Nodes that hold the ends, too, so that they outlive the trainers."""
    checkpoint_every: int = 100
    """Epochs between the states that every member keeps on its disk."""
    num_epochs: int
    lora: LoraSettings | None = None
    """None: all weights are trained. Else adapters on the blocks, and blocks and ends stay as they were."""

    def __post_init__(self) -> None:
        check_text("name", self.name, at_least=1)
        require(self.name == self.name.strip(), f"name must not begin or end with a blank, got {self.name!r}")
        object.__setattr__(self, "config", _plain_config(self.config))
        check_text("weights", self.weights, at_least=1)
        check_whole("seed", self.seed, 0, 2**63 - 1)
        self._check_stages()
        self._check_tokenizer()
        check_whole("sequence_length", self.sequence_length, 2, MAX_SEQUENCE_LENGTH)
        check_whole("target_batch", self.target_batch, 1, MAX_TARGET_BATCH)
        check_whole("microbatch", self.microbatch, 1, MAX_TARGET_BATCH)
        require(
            self.microbatch <= self.target_batch,
            f"microbatch is {self.microbatch}, more than the target_batch of {self.target_batch}: make it smaller",
        )
        num_units = -(-self.target_batch // self.microbatch) - (-self.num_eval_samples // self.microbatch)
        require(
            num_units <= EARLY,
            f"an epoch would have {num_units} microbatches, with those of held_out, at most {EARLY} are possible: "
            "make microbatch larger, or target_batch or held_out smaller",
        )
        check_one_of("precision", self.precision, Precision)
        check_number("dropout", self.dropout, "must be in [0, 1); 0 for none", lambda value: 0 <= value < 1)
        check_one_of("averaging", self.averaging, WireFormat)
        check_whole("delay", self.delay, 0, 1)
        check_whole("min_replicas", self.min_replicas, 1, 1000)
        check_whole("keepers", self.keepers, 0, 1000)
        check_whole("checkpoint_every", self.checkpoint_every, 1, MAX_EPOCHS)
        check_whole("num_epochs", self.num_epochs, 1, MAX_EPOCHS)
        check_whole("eval_every", self.eval_every, 0, MAX_EPOCHS)
        require(
            self.optimizer.warmup_epochs <= self.num_epochs,
            f"warmup_epochs is {self.optimizer.warmup_epochs}, more than the run's {self.num_epochs} epochs: make it smaller",
        )
        if self.held_out is not None:
            require(self.held_out.kind is not DataKind.OWN, "held_out must be the same for all: its kind cannot be own")
        require(
            self.held_out is not None or not self.eval_every,
            "eval_every is set but there is nothing to evaluate on: give held_out, or leave it out",
        )

    def _check_stages(self) -> None:
        require(0 < len(self.stages) <= MAX_STAGES, f"stages must be 1 to {MAX_STAGES}, got {len(self.stages)}")
        ends = [0, *(stage.end for stage in self.stages)]
        for stage, start in zip(self.stages, ends, strict=False):
            require(
                stage.start == start,
                f"stages must cover all blocks in order, each once: {stage} comes where one from {start} is due",
            )
        num_blocks = num_blocks_of(self.config)
        require(
            num_blocks is not None,
            f"config does not say how many blocks there are: add {_NUM_BLOCKS_KEYS[0]} to it",
        )
        require(
            num_blocks == ends[-1],
            f"stages end at block {ends[-1]}, but the config has {num_blocks}: cover all of them",
        )
        require(ends[-1] <= MAX_BLOCKS, f"stages hold {ends[-1]} blocks, at most {MAX_BLOCKS} are allowed")
        check_digests("initial_digests", self.initial_digests, DIGEST_BYTES)
        require(
            len(self.initial_digests) in (0, self.num_stages),
            f"initial_digests are {len(self.initial_digests)}: need one for each of {len(self.stages)} stages and the ends",
        )

    def _check_tokenizer(self) -> None:
        require(
            len(self.tokenizer) <= MAX_TOKENIZER_FILES,
            f"tokenizer has {len(self.tokenizer)} files, at most {MAX_TOKENIZER_FILES} are allowed: leave out what it does not need",
        )
        for name in self.tokenizer:
            # Peers write these files to disk under these names.
            require(
                isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None,
                f"tokenizer files must have plain names such as tokenizer.json, got {name!r}",
            )
        check_digests("tokenizer", list(self.tokenizer.values()), SHA256_BYTES)
        object.__setattr__(self, "tokenizer", dict(sorted(self.tokenizer.items())))

    @property
    def num_blocks(self) -> int:
        return self.stages[-1].end

    @property
    def ends_stage(self) -> int:
        """The number under which the ends count as a stage."""
        return len(self.stages)

    @property
    def num_stages(self) -> int:
        """With the ends."""
        return len(self.stages) + 1

    @property
    def num_eval_samples(self) -> int:
        """Samples of an evaluation: all of the held-out data."""
        return self.held_out.num_samples if self.held_out is not None else 0

    def missing_parts(self) -> list[str]:
        """What must still be filled in before the rules can be signed: others could not check what they load."""
        parts = {
            "initial_digests": self.initial_digests,
            "tokenizer": self.tokenizer,
        }
        if self.lora is not None:
            parts["lora.target_modules"] = self.lora.target_modules
        for name, data in {"data": self.data, "held_out": self.held_out}.items():
            if data is not None and data.kind is not DataKind.OWN:
                parts |= {f"{name}.{part}": getattr(data, part) for part in ("files", "manifest_digest", "num_samples")}
        return [name for name, part in parts.items() if not part]

    def to_bytes(self) -> bytes:
        """The rules in their one canonical form."""
        return _to_message(self).SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, raw: bytes) -> RunSpec:
        """The rules in raw. ValueError, naming the reason, for anything that to_bytes does not make."""
        try:
            spec = _from_message(run_pb2.RunSpec.FromString(raw))
        except DecodeError:
            raise ValueError("the run spec is not valid protobuf") from None
        except RecursionError:
            raise ValueError("config is nested too deeply") from None
        if spec.to_bytes() != raw:
            # Rules that are not understood must not be overlooked.
            raise ValueError("the run spec has rules that this software does not know: install a newer version")
        return spec

    def run_id(self, owner: str) -> bytes:
        """The id of the run if the peer of this id signs these rules."""
        return make_run_id(self.to_bytes(), public_key_of(owner))


def sign_spec(spec: RunSpec, identity: Identity) -> bytes:
    """The signed rules as bytes. ValueError if something is not filled in yet, or they are larger than MAX_SPEC_BYTES."""
    missing = spec.missing_parts()
    require(not missing, f"{', '.join(missing)} must be filled in before a run spec is signed")
    payload = spec.to_bytes()
    raw = _envelope(payload, identity.sign(_SIGNATURE_TAG + payload), identity.peer_id)
    require(
        len(raw) <= MAX_SPEC_BYTES,
        f"the run spec has {len(raw)} bytes, at most {MAX_SPEC_BYTES} are allowed: use fewer files or stages, or a shorter config",
    )
    return raw


def certified_run_id(raw: bytes) -> bytes:
    """The id of the run whose signed rules raw is. The signature is verified; the rules themselves are not read.

    ValueError, naming the reason, for anything else. Nobody but the owner can make other bytes with the same id.
    """
    signed = _opened(raw)
    return make_run_id(signed.payload, public_key_of(signed.owner))


def open_spec(raw: bytes, run_id: bytes) -> tuple[RunSpec, str]:
    """The rules of the run and its owner's peer id. ValueError, naming the reason, if raw is anything else."""
    signed = _opened(raw)
    found = make_run_id(signed.payload, public_key_of(signed.owner))
    require(found == run_id, f"the run spec is that of run {found.hex()[:16]}..., not of {run_id.hex()[:16]}...")
    spec = RunSpec.from_bytes(signed.payload)
    missing = spec.missing_parts()
    require(not missing, f"the run spec lacks {', '.join(missing)}")
    return spec, signed.owner


def _opened(raw: bytes) -> run_pb2.SignedRunSpec:
    require(len(raw) <= MAX_SPEC_BYTES, f"a run spec of {len(raw)} bytes, at most {MAX_SPEC_BYTES} are allowed")
    try:
        signed = run_pb2.SignedRunSpec.FromString(raw)
    except DecodeError:
        raise ValueError("the run spec is not valid protobuf") from None
    # What is neither hashed nor signed could be anything.
    require(_envelope(signed.payload, signed.signature, signed.owner) == raw, "the run spec is not in canonical form")
    require(
        verify_signature(signed.owner, _SIGNATURE_TAG + signed.payload, signed.signature),
        "the run spec is not signed by its owner",
    )
    return signed


def _envelope(payload: bytes, signature: bytes, owner: str) -> bytes:
    signed = run_pb2.SignedRunSpec(payload=payload, signature=signature, owner=owner)
    return signed.SerializeToString(deterministic=True)


# Rules as protobuf ------------------------------------------------------------------------------------------------------


def _to_message(spec: RunSpec) -> run_pb2.RunSpec:
    optimizer = spec.optimizer
    return run_pb2.RunSpec(
        name=spec.name,
        config_json=_json(spec.config),
        weights=spec.weights,
        seed=spec.seed,
        initial_digests=spec.initial_digests,
        tokenizer=[run_pb2.TokenizerFile(name=name, sha256=digest) for name, digest in spec.tokenizer.items()],
        stage_ends=[stage.end for stage in spec.stages],
        sequence_length=spec.sequence_length,
        target_batch=spec.target_batch,
        microbatch=spec.microbatch,
        optimizer=run_pb2.Optimizer(
            lr=optimizer.lr,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_norm=optimizer.clip_norm,
            schedule=optimizer.schedule,
            warmup_epochs=optimizer.warmup_epochs,
            min_lr_ratio=optimizer.min_lr_ratio,
        ),
        precision=spec.precision,
        dropout=spec.dropout,
        averaging=spec.averaging,
        delay=spec.delay,
        data=data_to_wire(spec.data),
        held_out=data_to_wire(spec.held_out) if spec.held_out else None,
        eval_every=spec.eval_every,
        num_epochs=spec.num_epochs,
        min_replicas=spec.min_replicas,
        keepers=spec.keepers,
        checkpoint_every=spec.checkpoint_every,
        lora=_to_lora_message(spec.lora) if spec.lora else None,
    )


def _to_lora_message(lora: LoraSettings) -> run_pb2.Lora:
    return run_pb2.Lora(
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=lora.target_modules,
        frozen_precision=lora.frozen_precision,
    )


def data_to_wire(data: DataSpec) -> run_pb2.RunData:
    """As protobuf."""
    return run_pb2.RunData(
        kind=data.kind,
        source=data.source,
        files=data.files,
        text_field=data.text_field,
        documents_per_chunk=data.documents_per_chunk,
        manifest_digest=data.manifest_digest,
        num_samples=data.num_samples,
    )


def _from_message(message: run_pb2.RunSpec) -> RunSpec:
    optimizer, ends = message.optimizer, message.stage_ends
    return RunSpec(
        name=message.name,
        config=json.loads(message.config_json.decode("ascii")),
        weights=message.weights,
        seed=message.seed,
        initial_digests=tuple(message.initial_digests),
        tokenizer={file.name: file.sha256 for file in message.tokenizer},
        stages=tuple(Span(start, end) for start, end in zip([0, *ends], ends, strict=False)),
        sequence_length=message.sequence_length,
        target_batch=message.target_batch,
        microbatch=message.microbatch,
        optimizer=OptimizerSettings(
            lr=optimizer.lr,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_norm=optimizer.clip_norm if optimizer.HasField("clip_norm") else None,
            schedule=Schedule(optimizer.schedule),
            warmup_epochs=optimizer.warmup_epochs,
            min_lr_ratio=optimizer.min_lr_ratio,
        ),
        precision=Precision(message.precision),
        dropout=message.dropout,
        averaging=WireFormat(message.averaging),
        delay=message.delay,
        data=data_from_wire(message.data),
        held_out=data_from_wire(message.held_out) if message.HasField("held_out") else None,
        eval_every=message.eval_every,
        num_epochs=message.num_epochs,
        min_replicas=message.min_replicas,
        keepers=message.keepers,
        checkpoint_every=message.checkpoint_every,
        lora=_from_lora_message(message.lora) if message.HasField("lora") else None,
    )


def _from_lora_message(message: run_pb2.Lora) -> LoraSettings:
    return LoraSettings(
        rank=message.rank,
        alpha=message.alpha,
        target_modules=tuple(message.target_modules),
        frozen_precision=FrozenPrecision(message.frozen_precision) if message.frozen_precision else None,
    )


def data_from_wire(message: run_pb2.RunData) -> DataSpec:
    """ValueError if it makes no sense."""
    return DataSpec(
        kind=DataKind(message.kind),
        source=message.source,
        files=tuple(message.files),
        text_field=message.text_field,
        documents_per_chunk=message.documents_per_chunk,
        manifest_digest=message.manifest_digest,
        num_samples=message.num_samples,
    )


def _json(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _plain_config(config: object) -> dict[str, Any]:
    """The config as JSON has it: a copy of our own, with text keys."""
    require(isinstance(config, Mapping), "config must be the object of a config.json")
    try:
        plain: dict[str, Any] = json.loads(_json(cast(Mapping[str, Any], config)))
        num_bytes = len(_json(plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config cannot be written as JSON ({error}): check its values") from None
    require(
        num_bytes <= MAX_CONFIG_BYTES,
        f"config has {num_bytes} bytes as JSON, at most {MAX_CONFIG_BYTES} are allowed: leave out what training does not need, such as labels",
    )
    return plain


def num_blocks_of(config: Mapping[str, Any]) -> int | None:
    """The number of blocks that a config.json says; None if it does not."""
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, Mapping) else config
    for name in _NUM_BLOCKS_KEYS:
        if isinstance(inner.get(name), int):
            return int(inner[name])
    return None
