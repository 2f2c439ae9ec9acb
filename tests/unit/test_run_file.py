"""run.toml as its owner writes it: every key, every default, every mistake by name; and the folder in which a run is kept."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from swarm.errors import UserError
from swarm.identity import Identity
from swarm.run_file import KEYS, data_like, read_run_file, split_evenly
from swarm.run_spec import (
    DataKind,
    DataSpec,
    FrozenPrecision,
    LoraSettings,
    OptimizerSettings,
    Precision,
    RunSpec,
    Schedule,
    certified_run_id,
    sign_spec,
)
from swarm.run_store import RunStore
from swarm.span import Span
from swarm.tensors import WireFormat
from tests.support.processes import ROOT
from tests.support.runs import CONFIG, make_data, make_spec

MINIMAL = """
stages = 2
sequence_length = 64
target_batch = 32
model.config = "config.json"
tokenizer.path = "tokenizer"
data.kind = "jsonl"
data.path = "corpus"
end.epochs = 10
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all that MINIMAL names."""
    folder = tmp_path / "home"
    for name in ("tokenizer", "corpus/deep"):
        (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 256}))
    for name in ("corpus/b.jsonl", "corpus/a.jsonl", "corpus/deep/c.jsonl", "corpus/notes.txt", "held.jsonl"):
        (folder / name).write_text('{"text": "hello"}\n')
    return folder


def read(folder: Path, text: str) -> Any:
    (folder / "run.toml").write_text(text)
    return read_run_file(folder / "run.toml")


def without(*starts: str) -> str:
    return "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(starts))


def test_the_shortest_file_leaves_everything_else_at_its_default(folder: Path) -> None:
    described = read(folder, MINIMAL)
    assert described.spec == RunSpec(
        name="run",
        config={**CONFIG, "max_position_embeddings": 256},
        stages=(Span(0, 2), Span(2, 4)),
        sequence_length=64,
        target_batch=32,
        data=DataSpec(kind=DataKind.JSONL, source="home/corpus", files=("a.jsonl", "b.jsonl")),
        num_epochs=10,
    )
    assert described.tokenizer_folder == folder / "tokenizer" and described.data_folder == folder / "corpus"
    assert described.spec.missing_parts() == [
        "initial_digests", "tokenizer", "data.manifest_digest", "data.num_samples",
    ]  # fmt: skip


def test_every_key_ends_up_in_the_rules(folder: Path) -> None:
    spec = read(
        folder,
        """
        name = "all keys"
        stages = ["0:1", "1:4"]
        sequence_length = 128
        target_batch = 100
        microbatch = 3
        precision = "fp32"
        dropout = 0.1
        averaging = "int8"
        delay = 1
        eval_every = 5
        min_replicas = 2
        keepers = 3
        checkpoint_every = 20
        trainable = "lora"

        [lora]
        rank = 4
        alpha = 32
        target_modules = ["v_proj", "self_attn.q_proj"]
        frozen_precision = "int4"

        [model]
        seed = 7
        weights = "random"
        [model.config]
        model_type = "llama"
        num_hidden_layers = 4
        anything = [1, 2.5, "x"]

        [tokenizer]
        path = "tokenizer"

        [optimizer]
        lr = 1
        beta1 = 0.8
        beta2 = 0.99
        eps = 1e-6
        weight_decay = 0
        clip_norm = false
        schedule = "linear"
        warmup_epochs = 2
        min_lr_ratio = 0.5

        [data]
        kind = "jsonl"
        path = "corpus"
        files = ["**/*.jsonl"]
        text_field = "messages"
        documents_per_chunk = 16

        [held_out]
        kind = "text"
        path = "corpus/notes.txt"

        [end]
        samples = 901
        """,
    ).spec
    assert spec == RunSpec(
        name="all keys",
        config={"model_type": "llama", "num_hidden_layers": 4, "anything": [1, 2.5, "x"]},
        seed=7,
        stages=(Span(0, 1), Span(1, 4)),
        sequence_length=128,
        target_batch=100,
        microbatch=3,
        optimizer=OptimizerSettings(
            lr=1,
            beta1=0.8,
            beta2=0.99,
            eps=1e-6,
            weight_decay=0,
            clip_norm=None,
            schedule=Schedule.LINEAR,
            warmup_epochs=2,
            min_lr_ratio=0.5,
        ),
        precision=Precision.FP32,
        dropout=0.1,
        averaging=WireFormat.INT8,
        delay=1,
        data=DataSpec(
            kind=DataKind.JSONL,
            source="home/corpus",
            files=("a.jsonl", "b.jsonl", "deep/c.jsonl"),
            text_field="messages",
            documents_per_chunk=16,
        ),
        held_out=DataSpec(kind=DataKind.TEXT, source="home/corpus", files=("notes.txt",)),
        eval_every=5,
        min_replicas=2,
        keepers=3,
        checkpoint_every=20,
        num_epochs=10,
        lora=LoraSettings(
            rank=4,
            alpha=32.0,
            target_modules=("self_attn.q_proj", "v_proj"),
            frozen_precision=FrozenPrecision.INT4,
        ),
    )


def document() -> str:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/run-file.md").read_text(), re.S)
    return str(block)


def test_the_document_names_every_key_and_its_true_default(folder: Path) -> None:
    uncommented = re.sub(r"^# (?=\[?[a-z_]+\]? *(=|$|#))", "", document(), flags=re.M)
    uncommented = uncommented.replace(
        "[held_out] ", "[held_out]\n" + "".join(f"{key} = 0\n" for key in KEYS["data"]) + "#"
    )
    named = tomllib.loads(uncommented)
    sections = {name: set(values) for name, values in named.items() if isinstance(values, dict)}
    assert {"": {key for key, value in named.items() if not isinstance(value, dict)}, **sections} == {
        name: set(keys) for name, keys in KEYS.items()
    }
    required = "\n".join(without("data.", "model.", "tokenizer.", "end.").splitlines())
    with_defaults = required + "\n" + document()
    for section, lines in {
        "model": 'config = "config.json"',
        "tokenizer": 'path = "tokenizer"',
        "data": 'kind = "jsonl"\npath = "corpus"',
        "end": "epochs = 10",
    }.items():
        with_defaults = re.sub(rf"^\[{section}\]", f"[{section}]\n{lines}\n", with_defaults, flags=re.M)
    assert read(folder, with_defaults).spec == read(folder, MINIMAL).spec


def test_adapters_have_defaults_and_all_linears_are_filled_in_later(folder: Path) -> None:
    spec = read(folder, MINIMAL + 'trainable = "lora"').spec
    assert spec.lora == LoraSettings(rank=8, alpha=16.0) and "lora.target_modules" in spec.missing_parts()
    assert read(folder, MINIMAL + 'trainable = "all"').spec == read(folder, MINIMAL).spec


def test_data_of_every_trainers_own_needs_no_path(folder: Path) -> None:
    described = read(folder, without("data.") + '\ndata.kind = "own"')
    assert described.spec.data == DataSpec(kind=DataKind.OWN) and described.data_folder is None


def test_held_out_data_is_not_amended_into_the_training_data(folder: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (folder / "apart").mkdir(exist_ok=True)
        (folder / "apart" / name).write_text('{"text": "x"}')
    held_out = make_data(source=f"{folder.name}/apart", files=("b.jsonl", "gone.jsonl"))
    spec = make_spec(held_out=held_out)
    (folder / "link.jsonl").symlink_to(folder / "apart" / "b.jsonl")
    for path in (folder / "apart", folder / "apart" / "b.jsonl", folder / "link.jsonl"):
        with pytest.raises(ValueError, match=r"apart/b.jsonl has name and folder of the run's held-out data"):
            data_like(spec, path)
    data, found = data_like(spec, folder / "apart" / "a.jsonl")
    assert data.files == ("a.jsonl",) and found.samefile(folder / "apart")


def test_a_config_folder_is_the_tokenizers_place_unless_told_otherwise(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "config.json").rename(folder / "model" / "config.json")
    described = read(folder, without("model.", "tokenizer.") + '\nmodel.config = "model"')
    assert described.tokenizer_folder == folder / "model"


def test_a_checkpoint_brings_its_config_and_tokenizer(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "config.json").rename(folder / "model" / "config.json")
    described = read(folder, without("model.", "tokenizer.") + '\nmodel.weights = "model"')
    assert described.spec.weights == str(folder / "model") and described.spec.num_blocks == 4
    assert described.tokenizer_folder == folder / "model"


MISTAKES: dict[str, tuple[str, str]] = {
    "unknown": (MINIMAL + "traget_batch = 3", "unknown key traget_batch; the nearest known one is target_batch"),
    "unknown in a section": (MINIMAL + "optimizer.weight_deacy = 3", "unknown key optimizer.weight_deacy; the nearest known one is optimizer.weight_decay"),
    "in another section": (MINIMAL + "warmup_epochs = 3", "unknown key warmup_epochs; the nearest known one is optimizer.warmup_epochs"),
    "unknown section": (MINIMAL + "[heldout]", "unknown key heldout; the nearest known one is held_out"),
    "like nothing": (MINIMAL + "data.zzz = 1", "unknown key data.zzz; the nearest known one is data."),
    "no section": (MINIMAL + "optimizer = 3", "optimizer must be a section: write [optimizer] and its keys below"),
    "no TOML": ("stages = ", "cannot read"),
    "missing length": (without("sequence_length"), "sequence_length is missing"),
    "missing batch": (without("target_batch"), "target_batch is missing"),
    "missing stages": (without("stages"), "stages must be a number of equal stages, or spans"),
    "missing config": (without("model"), "model.config must be the path of a config.json or a table"),
    "missing tokenizer": (without("tokenizer", "model") + "\nmodel.config = {num_hidden_layers = 4}", "tokenizer.path is missing: give a folder"),
    "missing kind": (without("data.kind"), "data.kind is missing"),
    "missing path": (without("data.path"), "data.path is missing"),
    "missing end": (without("end"), "end needs one of two keys: epochs"),
    "two ends": (MINIMAL + "end.samples = 3", "end needs one of two keys"),
    "no samples": (without("end") + "\nend.samples = 0", "end.samples and target_batch must be positive"),
    "length as text": (without("sequence_length") + '\nsequence_length = "64"', "sequence_length must be a whole number, got '64'"),
    "kind": (without("data.kind") + '\ndata.kind = "csv"', "data.kind must be one of text, jsonl, parquet, own, got 'csv'"),
    "schedule": (MINIMAL + 'optimizer.schedule = "step"', "optimizer.schedule must be one of constant, linear, cosine, got 'step'"),
    "precision": (MINIMAL + "precision = 16", "precision must be a text, got 16"),
    "nonsense for RunSpec": (MINIMAL + "delay = 2", "delay must be a whole number from 0 to 1, got 2"),
    "clipping": (MINIMAL + "optimizer.clip_norm = true", "clip_norm must be positive, or false"),
    "too many stages": (without("stages") + "\nstages = 5", "stages must be 1 to 4, the number of blocks, got 5"),
    "span": (without("stages") + '\nstages = ["0-4"]', "expected blocks as start:end"),
    "hole": (without("stages") + '\nstages = ["0:1", "2:4"]', "2:4 comes where one from 1 is due"),
    "no config": (without("model") + '\nmodel.config = "nowhere.json"', "nowhere.json: No such file"),
    "config is text": (without("model") + '\nmodel.config = "held.txt"', "held.txt: No such file"),
    "config twice": (MINIMAL + 'model.weights = "tokenizer"', "leave it out, or the weights"),
    "no checkpoint": (without("model") + '\nmodel.weights = "./nowhere"', "does not exist: give a checkpoint folder"),
    "no tokenizer": (without("tokenizer") + '\ntokenizer.path = "./nowhere"', "does not exist"),
    "no data": (without("data.path") + '\ndata.path = "nowhere"', "nowhere is neither a file nor a folder"),
    "no files": (MINIMAL + 'data.files = ["*.json"]', "is like *.json"),
    "files outside": (MINIMAL + 'data.files = ["../*.jsonl"]', "files must be paths below the source"),
    "files absolute": (MINIMAL + 'data.files = ["/etc/*"]', "data.files must be patterns of paths below"),
    "files of numbers": (MINIMAL + "data.files = [1]", "data.files must be a list of patterns"),
    "own data named": (without("data.kind") + '\ndata.kind = "own"', "is named by each trainer, not here"),
    "trainable": (MINIMAL + 'trainable = "qlora"', "trainable must be one of all, lora, got 'qlora'"),
    "adapters of a full run": (MINIMAL + "lora.rank = 4", 'the section lora is for runs of adapters: add trainable = "lora"'),
    "rank": (MINIMAL + 'trainable = "lora"\nlora.rank = 0', "lora.rank must be a whole number from 1 to 1024, got 0"),
    "frozen precision": (MINIMAL + 'trainable = "lora"\nlora.frozen_precision = "bf16"', "lora.frozen_precision must be one of int8, int4, got 'bf16'"),
    "frozen precision as a number": (MINIMAL + 'trainable = "lora"\nlora.frozen_precision = 8', "lora.frozen_precision must be a text, got 8"),
    "frozen blocks of a full run": (MINIMAL + 'lora.frozen_precision = "int8"', 'the section lora is for runs of adapters: add trainable = "lora"'),
    "targets": (MINIMAL + 'trainable = "lora"\nlora.target_modules = "q_proj"', "lora.target_modules must be a list of names"),
    "no targets": (MINIMAL + 'trainable = "lora"\nlora.target_modules = []', "leave it out for all linears"),
    "held out of data": (MINIMAL + '[held_out]\nkind = "jsonl"\npath = "corpus/a.jsonl"', "a.jsonl is in data and in held_out"),
    "sequences too long": (without("sequence_length") + "\nsequence_length = 512", "sequence_length is 512, but the model's max_position_embeddings is 256"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_the_file(folder: Path, name: str) -> None:
    text, sentence = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        read(folder, text)
    assert sentence in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*run.toml: No such file"):
        read_run_file(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*run.toml"):
        read_run_file(tmp_path / "run.toml")


def test_blocks_are_split_evenly_the_first_stages_a_block_larger() -> None:
    assert split_evenly(7, 3) == (Span(0, 3), Span(3, 5), Span(5, 7))
    assert split_evenly(4, 1) == (Span(0, 4),) and len(split_evenly(30, 30)) == 30
    for impossible in (0, -1, 8):
        with pytest.raises(ValueError, match="stages must be 1 to 7"):
            split_evenly(7, impossible)


# The folder of a run ---------------------------------------------------------------------------------------------------

MANIFEST, VOCABULARY = b'{"chunks": []}', b"vocabulary"


def digest_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@pytest.fixture
def signed() -> tuple[bytes, bytes]:
    """(signed rules, run id). Two tokenizer files have the same content."""
    tokenizer = {"tokenizer.json": digest_of(VOCABULARY), "vocab.json": digest_of(VOCABULARY)}
    data = make_data(manifest_digest=digest_of(MANIFEST)[:16])
    raw = sign_spec(make_spec(tokenizer=tokenizer, data=data, held_out=data), Identity.generate())
    return raw, certified_run_id(raw)


def test_a_run_is_kept_and_found_again_with_its_files(tmp_path: Path, signed: tuple[bytes, bytes]) -> None:
    raw, run_id = signed
    assert RunStore.find(run_id, tmp_path) is None
    store = RunStore.save(raw, run_id, tmp_path)
    wanted = [digest_of(VOCABULARY), digest_of(MANIFEST)[:16]]
    assert store.missing() == wanted == list(store.artifacts())
    for content, digest in zip((VOCABULARY, MANIFEST), wanted, strict=True):
        assert store.put(digest, content) == store.artifact(digest)
    again = RunStore.open(run_id, tmp_path)
    assert (again.raw, again.spec, again.owner) == (raw, store.spec, store.owner)
    assert again.missing() == [] and again.manifest() == again.manifest(again.spec.held_out) == MANIFEST
    assert {path.name for path in again.tokenizer_folder().iterdir()} == {"tokenizer.json", "vocab.json"}
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        f"runs/{run_id.hex()}/{name}"
        for name in ("spec.bin", "manifest.json", "held_out_manifest.json", "tokenizer/tokenizer.json", "tokenizer/vocab.json")
    }  # fmt: skip


def test_only_what_the_rules_name_is_kept(tmp_path: Path, signed: tuple[bytes, bytes]) -> None:
    raw, run_id = signed
    with pytest.raises(ValueError, match="not of 00000000"):
        RunStore.save(raw, bytes(32), tmp_path)
    store = RunStore.save(raw, run_id, tmp_path)
    with pytest.raises(ValueError, match=r"these 4 bytes are not the run's manifest.json"):
        store.put(digest_of(MANIFEST)[:16], b"else")
    with pytest.raises(KeyError):
        store.put(digest_of(b"else"), b"else")
    assert len(store.missing()) == 2


def test_what_is_damaged_is_not_read_and_can_be_put_again(tmp_path: Path, signed: tuple[bytes, bytes]) -> None:
    raw, run_id = signed
    store = RunStore.save(raw, run_id, tmp_path)
    digest = digest_of(VOCABULARY)
    store.put(digest, VOCABULARY)
    (store.folder / "tokenizer" / "vocab.json").write_bytes(b"vocabulory")
    assert digest in store.missing()
    (store.folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing or damaged: it must be fetched again"):
        store.tokenizer_folder()
    store.put(digest, VOCABULARY)
    assert digest not in store.missing()
    (store.folder / "spec.bin").write_bytes(raw[:-1])
    assert RunStore.find(run_id, tmp_path) is None
    with pytest.raises(UserError, match="is not kept in"):
        RunStore.open(run_id, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, signed: tuple[bytes, bytes]) -> None:
    raw, run_id = signed
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="set SHARDSWARM_CACHE to a folder you can write"):
        RunStore.save(raw, run_id, tmp_path)
