"""run.toml: a run as its owner describes it, read and checked. Every key and its default: docs/run-file.md.

    read_run_file(path) -> RunFile          the rules, and where their files are; reads no weights, data or tokenizer
    swarm.run_creation.create_run           fills in the digests, signs and keeps the run

Defaults are those of RunSpec: a key that is left out is not passed on.
"""

from __future__ import annotations

import difflib
import enum
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from swarm.checkpoint import open_checkpoint
from swarm.errors import UserError
from swarm.run_spec import (
    DataKind,
    DataSpec,
    FrozenPrecision,
    LoraSettings,
    OptimizerSettings,
    Precision,
    RunSpec,
    Schedule,
    num_blocks_of,
)
from swarm.span import Span
from swarm.wire_format import WireFormat

Kind = TypeVar("Kind", bound=enum.StrEnum)

_DATA_KEYS = ("kind", "path", "files", "text_field", "documents_per_chunk")
KEYS: dict[str, tuple[str, ...]] = {
    "": (
        "name",
        "stages",
        "sequence_length",
        "target_batch",
        "microbatch",
        "precision",
        "dropout",
        "averaging",
        "delay",
        "eval_every",
        "min_replicas",
        "keepers",
        "checkpoint_every",
        "trainable",
    ),
    "model": ("config", "weights", "seed"),
    "tokenizer": ("path",),
    "optimizer": (
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "clip_norm",
        "schedule",
        "warmup_epochs",
        "min_lr_ratio",
    ),
    "lora": ("rank", "alpha", "target_modules", "frozen_precision"),
    "data": _DATA_KEYS,
    "held_out": _DATA_KEYS,
    "end": ("epochs", "samples"),
}
"""The keys of each section; "" is what stands before the first."""
RANDOM_WEIGHTS = "random"
FILES_OF_KIND = {DataKind.TEXT: ["*.txt"], DataKind.JSONL: ["*.jsonl"], DataKind.PARQUET: ["*.parquet"]}
_NO_DEFAULT = object()


class Trainable(enum.StrEnum):
    """What a run changes."""

    ALL = "all"
    LORA = "lora"


@dataclass(frozen=True, slots=True)
class RunFile:
    """A run as its owner describes it. spec lacks only what is read from files: see RunSpec.missing_parts."""

    path: Path
    spec: RunSpec
    tokenizer_folder: Path
    data_folder: Path | None
    """Where the files of spec.data are; None for data of kind own."""
    held_out_folder: Path | None


def read_run_file(path: Path) -> RunFile:
    """Read and check a run.toml. Raises UserError, naming the key and what it must be."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {path}: {reason}") from error
    with _errors_name(path):
        _refuse_unknown_keys(values)
        return _read(_Section("", values), path)


def _read(top: _Section, path: Path) -> RunFile:
    base = path.absolute().parent
    model, data_section, end = top.section("model"), top.section("data"), top.section("end")
    weights, config, model_folder = _read_model(model, base)
    data, data_folder = _read_data(data_section, base)
    held_out, held_out_folder = None, None
    if "held_out" in top.values:
        held_out, held_out_folder = _read_data(top.section("held_out"), base)
        _refuse_overlap(data, data_folder, held_out, held_out_folder)
    target_batch = top.get("target_batch", int)
    spec = RunSpec(
        name=top.get("name", str, path.stem),
        config=config,
        weights=weights,
        stages=_read_stages(top, num_blocks_of(config)),
        sequence_length=top.get("sequence_length", int),
        target_batch=target_batch,
        optimizer=_read_optimizer(top.section("optimizer")),
        data=data,
        held_out=held_out,
        num_epochs=_read_end(end, target_batch),
        lora=_read_lora(top),
        **model.given("seed"),
        **top.given("microbatch", "dropout", "delay", "eval_every", "min_replicas", "keepers", "checkpoint_every"),
        **top.given_kinds(precision=Precision, averaging=WireFormat),
    )
    _check_length(spec)
    return RunFile(
        path, spec, _find_tokenizer(top.section("tokenizer"), base, model_folder), data_folder, held_out_folder
    )


def _read_model(section: _Section, base: Path) -> tuple[str, dict[str, Any], Path | None]:
    """(weights, config, the folder that they came from)."""
    weights = section.get("weights", str, RANDOM_WEIGHTS)
    config = section.values.get("config")
    if weights != RANDOM_WEIGHTS:
        if config is not None:
            raise ValueError(f"model.config is that of the checkpoint {weights!r}: leave it out, or the weights")
        if (base / weights).exists():
            weights = str((base / weights).resolve())
        with open_checkpoint(weights) as checkpoint:
            folder = checkpoint.folder
        return weights, _read_json(folder / "config.json"), folder
    if isinstance(config, Mapping):
        return weights, dict(config), None
    if not isinstance(config, str):
        raise ValueError(
            "model.config must be the path of a config.json or a table of its values (or give a checkpoint as model.weights)"
        )
    path = base / Path(config).expanduser()
    path = path / "config.json" if path.is_dir() else path
    return weights, _read_json(path), path.parent


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the object of a config.json")
    return config


def _find_tokenizer(section: _Section, base: Path, model_folder: Path | None) -> Path:
    named = section.get("path", str, "")
    if not named:
        if model_folder is None:
            raise ValueError("tokenizer.path is missing: give a folder with tokenizer.json, or a model's hub id")
        return model_folder
    path = base / Path(named).expanduser()
    if path.is_file():
        return path.parent
    if path.is_dir():
        return path
    with open_checkpoint(named) as checkpoint:
        return checkpoint.folder


def _read_stages(top: _Section, num_blocks: int | None) -> tuple[Span, ...]:
    stages = top.values.get("stages")
    if isinstance(stages, list) and stages and all(isinstance(stage, str) for stage in stages):
        return tuple(Span.parse(stage) for stage in stages)
    if isinstance(stages, int) and not isinstance(stages, bool):
        return split_evenly(num_blocks or 1, stages)
    raise ValueError('stages must be a number of equal stages, or spans that cover all blocks such as ["0:3", "3:6"]')


def split_evenly(num_blocks: int, num_stages: int) -> tuple[Span, ...]:
    """Stages of the same size, the first ones a block larger if it does not divide. ValueError for an impossible number."""
    if not 0 < num_stages <= num_blocks:
        raise ValueError(f"stages must be 1 to {num_blocks}, the number of blocks, got {num_stages}")
    size, rest = divmod(num_blocks, num_stages)
    ends = [stage * size + min(stage, rest) for stage in range(num_stages + 1)]
    return tuple(itertools.starmap(Span, itertools.pairwise(ends)))


def _read_optimizer(section: _Section) -> OptimizerSettings:
    given = section.given(*(key for key in KEYS["optimizer"] if key not in ("clip_norm", "schedule")))
    if "clip_norm" in section.values:
        clip_norm = section.values["clip_norm"]
        given["clip_norm"] = None if clip_norm is False else clip_norm
    return OptimizerSettings(**given, **section.given_kinds(schedule=Schedule))


def _read_lora(top: _Section) -> LoraSettings | None:
    trainable = top.kind("trainable", Trainable) if "trainable" in top.values else Trainable.ALL
    if trainable is Trainable.ALL:
        if "lora" in top.values:
            raise ValueError('the section lora is for runs of adapters: add trainable = "lora", or leave it out')
        return None
    section = top.section("lora")
    given = section.given("rank", "alpha") | section.given_kinds(frozen_precision=FrozenPrecision)
    if "target_modules" in section.values:
        names = section.values["target_modules"]
        if not isinstance(names, list) or not names:
            raise ValueError(
                'lora.target_modules must be a list of names such as ["q_proj", "v_proj"]; leave it out for all linears'
            )
        given["target_modules"] = tuple(names)
    return LoraSettings(**given)


def _read_data(section: _Section, base: Path) -> tuple[DataSpec, Path | None]:
    kind = section.kind("kind", DataKind)
    options = section.given("text_field", "documents_per_chunk")
    if kind is DataKind.OWN:
        if {"path", "files"} & section.values.keys():
            raise ValueError(f"{section.name}.path and files: data of kind own is named by each trainer, not here")
        return DataSpec(kind=kind, **options), None
    path = base / Path(section.get("path", str)).expanduser()
    if path.is_file() and "files" not in section.values:
        folder, files = path.parent, [path.name]
    elif path.is_dir():
        patterns = section.values.get("files", FILES_OF_KIND[kind])
        folder, files = path, _glob(section.name, path, patterns)
    else:
        raise ValueError(f"{section.name}.path: {path} is neither a file nor a folder with files")
    source = "/".join(folder.resolve().parts[-2:]).lstrip("/")
    return DataSpec(kind=kind, source=source, files=tuple(files), **options), folder


def data_like(spec: RunSpec, path: Path) -> tuple[DataSpec, Path]:
    """Other training data of the same kind and options, without its manifest, and the folder of its files.

    ValueError if there is none, or if some of it is held-out data, as far as names of files and their folder tell.
    """
    data = spec.data
    if data.kind is DataKind.OWN:
        raise ValueError("in this run every trainer brings its own text: there is no data to amend")
    values = {
        "kind": str(data.kind),
        "path": str(path.resolve()),
        "text_field": data.text_field,
        "documents_per_chunk": data.documents_per_chunk,
    }
    found, folder = _read_data(_Section("data", values), Path())
    assert folder is not None
    if spec.held_out is not None and spec.held_out.source:
        held_out = tuple(f"/{spec.held_out.source}/{file}" for file in spec.held_out.files)
        for one in sorted((folder / file).resolve() for file in found.files):
            if one.as_posix().endswith(held_out):
                raise ValueError(
                    f"{one} has name and folder of the run's held-out data: what is trained on cannot be held out "
                    "(if it is another file, rename it)"
                )
    return found, folder


def _glob(name: str, folder: Path, patterns: object) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f'{name}.files must be a list of patterns such as ["*.jsonl"]')
    try:
        found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        files = sorted(path.relative_to(folder).as_posix() for path in found)
    except (ValueError, NotImplementedError):
        raise ValueError(f"{name}.files must be patterns of paths below {folder}, without ..") from None
    if not files:
        raise ValueError(f"{name}.files: nothing in {folder} is like {' or '.join(patterns)}")
    return files


def _refuse_overlap(data: DataSpec, data_folder: Path | None, held_out: DataSpec, held_out_folder: Path | None) -> None:
    def paths(spec: DataSpec, folder: Path | None) -> set[Path]:
        return {(folder / file).resolve() for file in spec.files} if folder else set()

    both = paths(data, data_folder) & paths(held_out, held_out_folder)
    if both:
        raise ValueError(f"{min(both)} is in data and in held_out: what is trained on cannot be held out")


def _read_end(section: _Section, target_batch: int) -> int:
    if len(section.values) != 1:
        raise ValueError("end needs one of two keys: epochs (optimizer steps), or samples (sequences to train on)")
    if "epochs" in section.values:
        return int(section.get("epochs", int))
    samples: int = section.get("samples", int)
    if samples <= 0 or target_batch <= 0:
        raise ValueError("end.samples and target_batch must be positive")
    return -(-samples // target_batch)


def _check_length(spec: RunSpec) -> None:
    text_config = spec.config.get("text_config", spec.config)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = text_config.get(key)
        if isinstance(limit, int) and spec.sequence_length > limit:
            raise ValueError(f"sequence_length is {spec.sequence_length}, but the model's {key} is {limit}: shorten it")


@dataclass(frozen=True, slots=True)
class _Section:
    """The keys of one section, with errors that name them in full."""

    name: str
    values: Mapping[str, Any]

    def section(self, name: str) -> _Section:
        return _Section(name, self.values.get(name, {}))

    def get(self, key: str, kind: type[Any], default: Any = _NO_DEFAULT) -> Any:
        value = self.values.get(key, default)
        if value is _NO_DEFAULT:
            raise ValueError(f"{self._full(key)} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            words = {int: "a whole number", str: "a text"}
            raise ValueError(f"{self._full(key)} must be {words[kind]}, got {value!r}")
        return value

    def given(self, *keys: str) -> dict[str, Any]:
        """Those of the keys that are there; RunSpec checks their values."""
        return {key: self.values[key] for key in keys if key in self.values}

    def given_kinds(self, **kinds: type[enum.StrEnum]) -> dict[str, Any]:
        return {key: self.kind(key, kind) for key, kind in kinds.items() if key in self.values}

    def kind(self, key: str, kinds: type[Kind]) -> Kind:
        text = self.get(key, str)
        if text not in list(kinds):
            raise ValueError(f"{self._full(key)} must be one of {', '.join(kinds)}, got {text!r}")
        return kinds(text)

    def _full(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _refuse_unknown_keys(values: Mapping[str, Any]) -> None:
    for name, section in values.items():
        if name not in KEYS:
            if name not in KEYS[""]:
                raise ValueError(f"unknown key {name}; {_nearest(name, '')}")
        elif not isinstance(section, dict):
            raise ValueError(f"{name} must be a section: write [{name}] and its keys below")
        else:
            for key in section:
                if key not in KEYS[name]:
                    raise ValueError(f"unknown key {name}.{key}; {_nearest(key, name)}")


def _nearest(key: str, section: str) -> str:
    """Looked for first in its own section, then in all; the whole list if nothing is like it."""
    own = {f"{section}.{known}" if section else known: known for known in KEYS[section]}
    everywhere = {f"{name}.{known}" if name else known: known for name, keys in KEYS.items() for known in keys}
    if not section:
        own |= {name: name for name in KEYS if name}
    for candidates, cutoff in ((own, 0.6), (everywhere, 0.6), (own, 0.0)):
        found = difflib.get_close_matches(key, list(dict.fromkeys(candidates.values())), n=1, cutoff=cutoff)
        if found:
            return f"the nearest known one is {next(full for full, known in candidates.items() if known == found[0])}"
    raise AssertionError("no key is known")


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
