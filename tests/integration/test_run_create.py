"""swarm run create | publish | show, as users on two machines see them: each has a cache folder of its own, and the DHT between."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from swarm.checkpoint import digest_tensors
from swarm.cli import cli
from swarm.errors import UserError
from swarm.identity import Identity
from swarm.run_creation import create_run
from swarm.run_id import parse_run_id
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.span import Span
from swarm.training.initial import RandomCheckpoint
from swarm.training.manifest import Manifest
from tests.support.fork_server import ForkServer
from tests.support.models import TINY, save_tiny, tiny_tokenizer
from tests.support.probes import Finished, run_program
from tests.support.processes import LocalSwarm, local_swarm

RUN = """
name = "tiny stories"
stages = 2
sequence_length = 16
target_batch = 8
microbatch = 2
eval_every = 3
model.config = "config.json"
model.seed = 5
tokenizer.path = "tokenizer"
data = {kind = "jsonl", path = "corpus", files = ["train-*.jsonl"], documents_per_chunk = 4}
held_out = {kind = "text", path = "corpus/held.txt"}
end.samples = 100
"""
NOBODYS = "ab" * 32


@pytest.fixture(scope="module")
def swarm(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    with local_swarm(tmp_path_factory.mktemp("runs"), fork_server=fork_server) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the owner has: a run.toml and all that it names."""
    folder = tmp_path_factory.mktemp("owner")
    (folder / "run.toml").write_text(RUN)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **TINY["llama"]}))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "corpus").mkdir()
    for number in range(2):
        lines = [json.dumps({"text": f"Story {number}.{line}: a swarm of machines."}) for line in range(10)]
        (folder / "corpus" / f"train-{number}.jsonl").write_text("\n".join(lines))
    (folder / "corpus" / "held.txt").write_text("A story that nobody trains on. " * 10)
    return folder


@pytest.fixture(scope="module")
def created(fork_server: ForkServer, swarm: LocalSwarm, folder: Path) -> Finished:
    peers = ["--initial-peers", swarm.bootstrap.address]
    identity = str(folder / "owner.identity")
    return run_program(
        "swarm", "run", "create", str(folder / "run.toml"), *peers, "--identity", identity,
        "--cache-dir", str(folder / "cache"), fork_server=fork_server,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_id(created: Finished) -> str:
    assert created.code == 0, created
    return created.out.strip()


def swarm_run(*arguments: object) -> Finished:
    """swarm run ARGUMENTS in this process, which spares it the imports."""
    started = time.monotonic()
    done = CliRunner().invoke(cli, ["run", *map(str, arguments)], prog_name="swarm")
    return Finished(done.exit_code, done.stdout, done.stderr, time.monotonic() - started)


@pytest.fixture(scope="module")
def store(folder: Path, run_id: str) -> RunStore:
    return RunStore.open(parse_run_id(run_id), folder / "cache")


def test_create_prints_the_run_id_alone_and_tells_the_next_commands(
    swarm: LocalSwarm, created: Finished, run_id: str
) -> None:
    assert len(parse_run_id(run_id)) == 32 and len(created.out.splitlines()) == 1
    lines = created.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Hold a stage", "Train", "Its rules"]
    assert all(run_id in line and line.endswith(swarm.bootstrap.address) for line in lines)


def test_the_run_is_kept_with_all_that_its_rules_name(folder: Path, store: RunStore) -> None:
    spec = store.spec
    assert store.owner == Identity.load_or_create(folder / "owner.identity").peer_id
    assert (spec.name, spec.stages, spec.num_epochs, spec.seed) == ("tiny stories", (Span(0, 2), Span(2, 4)), 13, 5)
    assert spec.missing_parts() == [] and store.missing() == []
    manifest = Manifest.from_bytes(store.manifest(), spec.data.manifest_digest)
    assert manifest.num_samples == spec.data.num_samples > 0
    assert spec.data.files == ("train-0.jsonl", "train-1.jsonl") == tuple(name for name, _ in manifest.files)
    assert spec.held_out is not None
    held_out = Manifest.from_bytes(store.manifest(spec.held_out), spec.held_out.manifest_digest)
    assert spec.held_out.files == ("held.txt",) and held_out.num_samples == spec.held_out.num_samples > 0
    text = "A swarm of small machines"
    assert store.tokenizer()(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_the_digests_are_those_of_the_weights_in_fp32(store: RunStore) -> None:
    source = RandomCheckpoint(store.spec.config, store.spec.seed, "x")
    parts = [source.load_blocks(Span(0, 2)), source.load_blocks(Span(2, 4)), source.load_ends()]
    assert store.spec.initial_digests == tuple(digest_tensors(part) for part in parts)


def test_somebody_elsewhere_gets_the_same_rules_from_the_swarm_and_keeps_them(
    fork_server: ForkServer, swarm: LocalSwarm, folder: Path, run_id: str, store: RunStore
) -> None:
    elsewhere = folder / "elsewhere"
    peers = ["--initial-peers", swarm.bootstrap.address]
    show = ("run", "show", run_id, *peers, "--cache-dir", str(elsewhere), "--json")
    done = run_program("swarm", *show, fork_server=fork_server)
    assert done.code == 0 and done.err == "", done
    shown = json.loads(done.out)
    assert shown["run_id"] == run_id and shown["owner"] == store.owner
    assert shown["config"]["num_hidden_layers"] == 4 and shown["stages"] == ["0:2", "2:4"]
    assert shown["data"]["manifest_digest"] == store.spec.data.manifest_digest.hex()
    kept = RunStore.open(parse_run_id(run_id), elsewhere)
    assert kept.raw == store.raw and len(kept.missing()) == len(kept.artifacts()) > 2


def test_the_rules_are_shown_to_people_without_a_swarm_if_they_are_kept(folder: Path, run_id: str) -> None:
    done = swarm_run("show", run_id, "--cache-dir", folder / "cache")
    assert done.code == 0 and done.err == "", done
    for sentence in (
        run_id,
        "llama, 4 blocks, random weights of seed 5",
        "2 (0:2 2:4) and the ends",
        "8 sequences of 16 tokens, at most 2 a microbatch",
        "with 1 of each stage and of the ends",
        "after 13 epochs (104 sequences, 1664 tokens)",
        "AdamW, lr 0.001 (cosine, 0 epochs of warm-up, down to 0.1 of it)",
        "jsonl, 2 files of ",
        "every 3 epochs",
    ):
        assert sentence in done.out, done.out


def test_a_run_that_nobody_knows_is_a_clear_error_in_bounded_time(swarm: LocalSwarm, tmp_path: Path) -> None:
    done = swarm_run("show", NOBODYS, "--initial-peers", swarm.bootstrap.address, "--cache-dir", tmp_path)
    done.assert_refused("swarm", f"nobody in this swarm knows run {NOBODYS}", "`swarm run publish`", within_s=10)
    done = swarm_run("show", NOBODYS, "--cache-dir", tmp_path)
    done.assert_refused("swarm", "is not kept on this machine: give --initial-peers", within_s=2)
    done = swarm_run("publish", NOBODYS, "--initial-peers", swarm.bootstrap.address, "--cache-dir", tmp_path)
    done.assert_refused("swarm", f"run {NOBODYS} is not kept in", within_s=2)


def test_a_run_is_not_lost_when_the_swarm_cannot_be_reached_and_published_later(
    swarm: LocalSwarm, folder: Path, run_id: str
) -> None:
    nowhere = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
    cache = ["--cache-dir", folder / "cache"]
    done = swarm_run("publish", run_id, "--initial-peers", nowhere, "--timeout", 1, *cache)
    done.assert_refused("swarm", f"run {run_id} is kept here but was not published: none of the", within_s=10)
    done = swarm_run("publish", run_id, "--initial-peers", swarm.bootstrap.address, *cache)
    assert done.code == 0 and run_id in done.err, done


def test_what_is_wrong_with_the_files_is_named(folder: Path, tmp_path: Path) -> None:
    def create(old: str, new: str) -> RunStore:
        assert old in RUN
        (folder / "other.toml").write_text(RUN.replace(old, new))
        return create_run(folder / "other.toml", cache_dir=tmp_path)

    old, new = (
        'model.config = "config.json"',
        "model.config = {model_type = '%s', num_hidden_layers = 4, vocab_size = %d}",
    )
    with pytest.raises(UserError, match="has 288 tokens, more than the config's vocab_size of 100"):
        create(old, new % ("llama", 100))
    with pytest.raises(UserError, match="transformers cannot make a model"):
        create(old, new % ("no_such_family", 288))
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        create('path = "tokenizer"', 'path = "corpus"')
    assert not list(tmp_path.glob("runs/*")), "nothing is kept of a run that was not made"


def test_a_checkpoint_gives_config_tokenizer_and_weights(folder: Path, tmp_path: Path) -> None:
    save_tiny("gpt2", folder / "gpt2")
    text = RUN.replace('model.config = "config.json"', 'model.weights = "gpt2"').replace(
        'tokenizer.path = "tokenizer"', ""
    )
    (folder / "checkpoint.toml").write_text(text)
    store = create_run(folder / "checkpoint.toml", cache_dir=tmp_path)
    assert store.spec.weights == str(folder / "gpt2") and store.spec.config["model_type"] == "gpt2"
    again = create_run(folder / "checkpoint.toml", cache_dir=tmp_path)
    assert again.run_id == store.run_id, "the same rules of the same owner are the same run"
    assert isinstance(store.spec, RunSpec) and len(set(store.spec.initial_digests)) == 3
