"""The rules of a run as text for people, and as JSON for scripts."""

from __future__ import annotations

from typing import Any

from swarm.run_spec import DataKind, DataSpec, RunSpec, Schedule
from swarm.run_store import RunStore


def run_as_json(store: RunStore) -> dict[str, Any]:
    """The same as the text, for scripts."""
    spec, optimizer = store.spec, store.spec.optimizer
    return {
        "run_id": store.run_id.hex(),
        "owner": store.owner,
        "name": spec.name,
        "weights": spec.weights,
        "seed": spec.seed,
        "num_blocks": spec.num_blocks,
        "stages": [str(stage) for stage in spec.stages],
        "initial_digests": [digest.hex() for digest in spec.initial_digests],
        "tokenizer": {name: digest.hex() for name, digest in spec.tokenizer.items()},
        "sequence_length": spec.sequence_length,
        "target_batch": spec.target_batch,
        "microbatch": spec.microbatch,
        "optimizer": {name: getattr(optimizer, name) for name in optimizer.__dataclass_fields__},
        "precision": spec.precision,
        "dropout": spec.dropout,
        "averaging": spec.averaging,
        "delay": spec.delay,
        "data": _data_as_json(spec.data),
        "held_out": _data_as_json(spec.held_out) if spec.held_out else None,
        "eval_every": spec.eval_every,
        "min_replicas": spec.min_replicas,
        "keepers": spec.keepers,
        "checkpoint_every": spec.checkpoint_every,
        "lora": spec.lora and {name: getattr(spec.lora, name) for name in spec.lora.__dataclass_fields__},
        "num_epochs": spec.num_epochs,
        "config": dict(spec.config),
    }


def _data_as_json(data: DataSpec) -> dict[str, Any]:
    values = {name: getattr(data, name) for name in data.__dataclass_fields__}
    return {**values, "manifest_digest": data.manifest_digest.hex()}


def run_as_text(store: RunStore) -> str:
    """The rules, one a line."""
    spec = store.spec
    samples = spec.num_epochs * spec.target_batch
    rows = {
        "run": store.run_id.hex(),
        "name": spec.name,
        "owner": store.owner,
        "model": f"{_family(spec)}, {spec.num_blocks} blocks, {_weights(spec)}",
        "stages": f"{len(spec.stages)} ({' '.join(map(str, spec.stages))}) and the ends",
        "epoch": f"{spec.target_batch} sequences of {spec.sequence_length} tokens, at most {spec.microbatch} a microbatch",
        "begin": f"with {spec.min_replicas} of each stage and of the ends",
        "kept": f"by every member each {spec.checkpoint_every} epochs; the ends by {spec.keepers} nodes, too",
        "end": f"after {spec.num_epochs} epochs ({samples} sequences, {samples * spec.sequence_length} tokens)",
        "trains": _trained(spec),
        "optimizer": _optimizer(spec),
        "precision": f"{spec.precision}, dropout {spec.dropout:g}",
        "averaging": f"in {spec.averaging}, {'one epoch' if spec.delay else 'no epoch'} of delay",
        "data": _data(spec.data),
        "held out": f"{_data(spec.held_out)}, every {spec.eval_every} epochs" if spec.held_out else "nothing",
        "tokenizer": ", ".join(spec.tokenizer),
    }
    return "\n".join(f"{name:11}{value}" for name, value in rows.items())


def _family(spec: RunSpec) -> str:
    """The config is checked for size only: what is in it may be meant for a terminal."""
    family = spec.config.get("model_type")
    return family if isinstance(family, str) and family.isprintable() else "unknown kind"


def _weights(spec: RunSpec) -> str:
    return f"random weights of seed {spec.seed}" if spec.weights == "random" else f"from {spec.weights}"


def _trained(spec: RunSpec) -> str:
    lora = spec.lora
    if lora is None:
        return "all weights"
    blocks = f", over blocks in {lora.frozen_precision}" if lora.frozen_precision else ""
    return f"adapters (LoRA) of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}{blocks}"


def _optimizer(spec: RunSpec) -> str:
    optimizer = spec.optimizer
    clip = f"clipped at norm {optimizer.clip_norm:g}" if optimizer.clip_norm is not None else "not clipped"
    fall = "" if optimizer.schedule is Schedule.CONSTANT else f", down to {optimizer.min_lr_ratio:g} of it"
    return (
        f"AdamW, lr {optimizer.lr:g} ({optimizer.schedule}, {optimizer.warmup_epochs} epochs of warm-up{fall}), "
        f"betas {optimizer.beta1:g} {optimizer.beta2:g}, eps {optimizer.eps:g}, "
        f"weight decay {optimizer.weight_decay:g}, {clip}"
    )


def _data(data: DataSpec) -> str:
    if data.kind is DataKind.OWN:
        return "own: every trainer brings its own"
    files = data.files[0] if len(data.files) == 1 else f"{len(data.files)} files"
    return f"{data.kind}, {files} of {data.source}, {data.num_samples} samples"
