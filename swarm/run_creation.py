"""From a run.toml to a signed run on this disk: reads the tokenizer, the data and the initial weights, and names them by digest."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from swarm.cache import cache_root
from swarm.errors import UserError
from swarm.identity import Identity
from swarm.run_file import RunFile, read_run_file
from swarm.run_spec import DataKind, DataSpec, RunSpec, certified_run_id, sign_spec
from swarm.run_store import RunStore, artifact_digest
from swarm.tokenizer_files import find_tokenizer_files, load_tokenizer, read_tokenizer_files

OWNER_FILE = "owner.identity"


def create_run(
    path: Path, *, identity_path: Path | None = None, cache_dir: Path | None = None, num_workers: int = 0
) -> RunStore:
    """Make the run that a run.toml describes, sign it, and keep it with its tokenizer and manifests.

    identity_path: the key that signs; None: owner.identity in the cache. Made if missing.
    num_workers: processes that tokenise the data, beside this one.
    Raises UserError, naming the file's key or the place in the data at fault.
    """
    described = read_run_file(path)
    spec, artifacts = fill_in(described, num_workers)
    identity = Identity.load_or_create(identity_path or cache_root(cache_dir) / OWNER_FILE)
    try:
        raw = sign_spec(spec, identity)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    store = RunStore.save(raw, certified_run_id(raw), cache_dir)
    for digest, content in artifacts.items():
        store.put(digest, content)
    return store


def fill_in(described: RunFile, num_workers: int = 0) -> tuple[RunSpec, dict[bytes, bytes]]:
    """The whole rules, and the files that they name by digest. Raises UserError."""
    from swarm.training.initial import initial_digests, open_initial_weights

    spec = described.spec
    # A config that transformers cannot use is known before hours of data are read.
    weights = open_initial_weights(spec)
    spec = _with_targets(spec)
    files = read_tokenizer_files(find_tokenizer_files(described.tokenizer_folder))
    tokenizer_digests = {name: artifact_digest(content) for name, content in files.items()}
    artifacts = {tokenizer_digests[name]: content for name, content in files.items()}
    # Loaded from a copy of just these files, because that is what everybody else will have.
    with tempfile.TemporaryDirectory(prefix="shardswarm-") as copy:
        for name, content in files.items():
            (Path(copy) / name).write_bytes(content)
        tokenizer = load_tokenizer(Path(copy))
        _check_vocabulary(tokenizer, spec, described)
        data = _with_manifest(spec.data, described.data_folder, tokenizer, spec, num_workers, artifacts)
        held_out = spec.held_out and _with_manifest(
            spec.held_out, described.held_out_folder, tokenizer, spec, num_workers, artifacts
        )
    digests = initial_digests(weights, spec.stages)
    whole = dataclasses.replace(
        spec, initial_digests=digests, tokenizer=tokenizer_digests, data=data, held_out=held_out
    )
    return whole, artifacts


def _with_targets(spec: RunSpec) -> RunSpec:
    """The rules with the linears that have adapters, checked."""
    if spec.lora is None:
        return spec
    from swarm.training.adapters import AdapterLayout, find_linears

    if not spec.lora.target_modules:
        return dataclasses.replace(spec, lora=dataclasses.replace(spec.lora, target_modules=find_linears(spec)))
    AdapterLayout(spec)
    return spec


def _with_manifest(
    data: DataSpec,
    folder: Path | None,
    tokenizer: Any,
    spec: RunSpec,
    num_workers: int,
    artifacts: dict[bytes, bytes],
) -> DataSpec:
    """The data with its manifest, which is added to the artifacts."""
    if data.kind is DataKind.OWN or folder is None:
        return data
    from swarm.training.manifest import build_manifest

    manifest = build_manifest(data, folder, tokenizer, spec.sequence_length, num_workers)
    artifacts[manifest.digest] = manifest.to_bytes()
    return dataclasses.replace(data, manifest_digest=manifest.digest, num_samples=manifest.num_samples)


def _check_vocabulary(tokenizer: Any, spec: RunSpec, described: RunFile) -> None:
    text_config = spec.config.get("text_config", spec.config)
    vocab_size = text_config.get("vocab_size")
    if isinstance(vocab_size, int) and len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {described.tokenizer_folder} has {len(tokenizer)} tokens, more than the config's vocab_size of "
            f"{vocab_size}: take the model's own tokenizer, or a larger vocab_size"
        )
