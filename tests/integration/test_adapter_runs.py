"""Adapter runs from end to end: several at once on the same nodes, and each is as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from swarm.client.export import export_run
from swarm.client.runs import publish_run
from swarm.run_store import RunStore
from tests.support.fork_server import ForkServer
from tests.support.models import save_tiny
from tests.support.one_process_training import samples_of_run, train_in_one_process
from tests.support.processes import Process, local_swarm, wait_until
from tests.support.training_swarm import ALICE, TrainingSwarm, largest_error, make_run, weights_of_run

PROMPT = "Alice was"


def adapter_run(folder: Path, base: Path, **rules: Any) -> RunStore:
    fixed = {"trainable": "lora", "model.weights": str(base), "checkpoint_every": 3, "keepers": 1, "microbatch": 2}
    return make_run(folder, **{**fixed, **rules})


def greedy(model: Any, tokenizer: Any) -> list[int]:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return list(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())


def check_alone(training: TrainingSwarm, nodes: list[Process], trainer: Process) -> None:
    """The run's weights and losses are those of PEFT's in one process on this run's data."""
    spec = training.store.spec
    expected = train_in_one_process(spec, samples_of_run(training.store, training.folder / "data"))
    losses = [step["loss"] for _, step in sorted(training.steps_of(trainer).items())]
    assert len(losses) == spec.num_epochs
    assert all(abs(loss / right - 1) < 1e-5 for loss, right in zip(losses, expected.losses, strict=True))
    error = largest_error(weights_of_run(training, nodes, trainer), expected.weights)
    print(f"largest relative error {error:.1e}, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert error < 1e-5


def test_two_owners_runs_on_the_same_blocks_do_not_see_each_other(tmp_path: Path, fork_server: ForkServer) -> None:
    """Another rank, other linears, other data, another length. Each node process has the blocks once."""
    base = save_tiny("llama", tmp_path / "base")
    one = adapter_run(tmp_path / "one", base, **{"lora.rank": 4, "optimizer.lr": 1e-2, "end.epochs": 9})
    small = {"lora.rank": 2, "lora.alpha": 32, "lora.target_modules": ["q_proj", "v_proj"], "precision": "fp32"}
    other = adapter_run(
        tmp_path / "other", base, texts=ALICE[::-1], **small, **{"optimizer.lr": 2e-2, "end.epochs": 6, "model.seed": 8}
    )
    assert one.owner != other.owner and one.spec.initial_digests == other.spec.initial_digests
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as local:
        peers = local.initial_peers
        runs = [TrainingSwarm(local, store, tmp_path / name) for store, name in ((one, "one"), (other, "other"))]
        for run in runs:
            publish_run(run.store, peers, 15)
        both = ("--run", runs[1].run_id)
        nodes = [runs[0].start_node(stage, *both, cache=tmp_path / f"node{stage}") for stage in (0, 1)]
        trainers = [run.start_trainer() for run in runs]
        for node in nodes:
            assert [hosted["run"] for hosted in node.ready()["runs"]] == [run.run_id for run in runs]
            assert "frozen blocks shared" in node.log
        for trainer in trainers:
            trainer.wait(60)
        for run, trainer in zip(runs, trainers, strict=True):
            check_alone(run, nodes, trainer)
        for run in runs:
            served = f"run={run.run_id[:8]} serving the weights of epoch={run.store.spec.num_epochs} "
            wait_until(
                lambda served=served: all(served in node.log for node in nodes), 30, "its last adapters are served"
            )
        texts = []
        for run in runs:
            epoch, cache = run.store.spec.num_epochs, tmp_path / "client"
            assert export_run(run.store.run_id, peers, run.folder / "out", cache_dir=cache).place.epoch == epoch
            with swarm.connect(initial_peers=peers, model=f"run:{run.run_id}@{epoch}", cache_dir=cache) as client:
                texts.append(greedy(client.model(), client.tokenizer()))
    for run, text in zip(runs, texts, strict=True):
        plain = AutoModelForCausalLM.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "out")
        before = greedy(plain, tokenizer)
        assert greedy(PeftModel.from_pretrained(plain, run.folder / "out"), tokenizer) == text != before
    assert texts[0] != texts[1]


def test_who_joins_an_adapter_run_late_gets_adapters_and_ends_without_values(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    """The only trainer and the disk it had are gone in mid-run; a new one, and a second node of a stage, go on."""
    store = make_run(tmp_path / "run", trainable="lora", **{"lora.rank": 2, "end.epochs": 12, "keepers": 2})
    with local_swarm(tmp_path / "swarm", fork_server=fork_server) as local:
        publish_run(store, local.initial_peers, 15)
        training = TrainingSwarm(local, store, tmp_path / "run")
        nodes = [training.start_node(stage, cache=tmp_path / f"node{stage}") for stage in (0, 1)]
        wait_until(lambda: all("keeping the ends" in node.log for node in nodes), 60, "the ends are kept")
        first = training.start_trainer(fault={"on": "stepped", "at": 5, "action": "SIGKILL"})
        wait_until(lambda: not first.is_running(), 60, "the trainer is killed")
        assert training.faults_of(first)
        joiner = training.start_node(0, cache=tmp_path / "joiner")
        joiner.ready()
        second = training.start_trainer(cache=tmp_path / "trainer")
        second.wait(60)
        last = store.spec.num_epochs - 1
        wait_until(lambda: all(last in training.steps_of(node) for node in (*nodes, joiner)), 30, "the run ends")
        steps = [training.steps_of(member)[last] for member in (*nodes, joiner, second)]
        assert steps[0]["digest"] == steps[2]["digest"] and steps[2]["downloads"] == steps[3]["downloads"] == 1
        expected = train_in_one_process(store.spec, samples_of_run(store, training.folder / "data"))
        assert largest_error(weights_of_run(training, [joiner, nodes[1]], second), expected.weights) < 1e-5
